"""What happens when a command meets a fault, and the table of it."""

import collections
import collections.abc
import contextlib
import dataclasses
import signal
import traceback
import typing as tp

from saev import errors

Outcome = tp.Literal["right", "refused", "wrong", "traceback", "hang"]
OUTCOMES: tuple[Outcome, ...] = ("right", "refused", "wrong", "traceback", "hang")
LIMIT_S = 20
"""Seconds after which an attempt counts as hanging."""


class Hang(BaseException):
    """An attempt took too long."""


@contextlib.contextmanager
def limited(limit_s: int) -> collections.abc.Generator[None]:
    def end(signum: int, frame: object) -> tp.NoReturn:
        raise Hang

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclasses.dataclass
class Tally:
    """Counts of outcomes by campaign and what was damaged, and the story of each bad one."""

    counts: dict[tuple[str, str], collections.Counter[Outcome]] = dataclasses.field(default_factory=dict)
    stories: list[str] = dataclasses.field(default_factory=list)

    def attempt(
        self,
        campaign: str,
        what: str,
        probe: collections.abc.Callable[[], str],
        expected: str | None,
        story: str,
    ) -> Outcome:
        """Runs a probe. expected: the digest of a right result; None where any result is as good (the input is another, valid one)."""
        outcome, detail = _outcome(probe, expected)
        self.add(campaign, what, outcome, f"{story}: {detail}")
        return outcome

    def add(self, campaign: str, what: str, outcome: Outcome, story: str) -> None:
        self.counts.setdefault((campaign, what), collections.Counter())[outcome] += 1
        if outcome not in ("right", "refused"):
            self.stories.append(f"{campaign}, {what}, {outcome}: {story}")

    def total(self, *outcomes: Outcome) -> int:
        return sum(counter[o] for counter in self.counts.values() for o in outcomes)

    def table(self) -> str:
        """Markdown."""
        lines = [f"| campaign | damaged | attempts | {' | '.join(OUTCOMES)} |"]
        lines.append(f"|---|---|{'---:|' * (1 + len(OUTCOMES))}")
        total: collections.Counter[Outcome] = collections.Counter()
        for (campaign, what), counter in self.counts.items():
            total += counter
            cells = [counter.total(), *(counter[o] for o in OUTCOMES)]
            lines.append(f"| {campaign} | {what} | {' | '.join(map(str, cells))} |")
        cells = [total.total(), *(total[o] for o in OUTCOMES)]
        lines.append(f"| all | | {' | '.join(map(str, cells))} |")
        return "\n".join(lines)


def _outcome(probe: collections.abc.Callable[[], str], expected: str | None) -> tuple[Outcome, str]:
    try:
        with limited(LIMIT_S):
            found = probe()
    except errors.UserError as err:
        if "\n" in str(err):
            return "traceback", f"a message of several lines: {err}"
        return "refused", str(err)
    except OSError as err:  # the launcher makes one line of it, if it names a file
        named = err.filename is not None
        return ("refused" if named else "traceback"), repr(err)
    except Hang:
        return "hang", f"more than {LIMIT_S} s"
    except Exception as err:
        last = traceback.extract_tb(err.__traceback__)[-1]
        return "traceback", f"{type(err).__name__}: {err} ({last.filename}:{last.lineno})"
    if expected is None or found == expected:
        return "right", ""
    return "wrong", "another result, and no error"
