"""Metrics of a run: a local metrics.jsonl always, wandb beside it when asked for.

The training loop holds a `Tracker` and does not know which.
"""

import collections.abc
import contextlib
import json
import logging
import netrc
import os
import pathlib
import typing as tp
import urllib.parse
import uuid

import beartype

from saev import errors, helpers
from saev.formats import jsonfile

logger = logging.getLogger("saev")

Metrics = collections.abc.Mapping[str, float | int]

WANDB_HOSTS = {"api.wandb.ai", "api.forge.coreweave.com"}
"""wandb's own server, which has two names."""


@tp.runtime_checkable
class Tracker(tp.Protocol):
    """Takes the metrics of one run."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def flush(self) -> None:
        """What was logged is on the disk."""
        ...

    def finish(self) -> None: ...


class Nothing:
    """Keeps nothing: for processes that help another one."""

    def log(self, step: int, metrics: Metrics) -> None:
        pass

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        pass


class JsonLines:
    """One JSON object a line in metrics.jsonl; each line is flushed, so a killed run keeps what it logged.

    Of an earlier try only the steps before `from_step` are kept: the others come again.
    """

    def __init__(self, fpath: pathlib.Path, from_step: int = 0):
        fpath.parent.mkdir(parents=True, exist_ok=True)
        kept = "".join(_lines_before(fpath, from_step)) if from_step else ""
        helpers.write_text(fpath, kept)
        self.fd = fpath.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Metrics) -> None:
        self.fd.write(jsonfile.dumps({"step": step, **metrics}) + "\n")
        self.fd.flush()

    def flush(self) -> None:
        os.fsync(self.fd.fileno())

    def finish(self) -> None:
        self.fd.close()


def _lines_before(fpath: pathlib.Path, step: int) -> collections.abc.Iterator[str]:
    """Whole lines of earlier steps; a killed process may have left a part of one."""
    text = fpath.read_text("utf-8", "replace") if fpath.exists() else ""
    for line in text.splitlines(keepends=True):
        try:
            is_earlier = line.endswith("\n") and json.loads(line)["step"] < step
        except (ValueError, KeyError, TypeError):
            is_earlier = False
        if is_earlier:
            yield line


class Wandb:
    """One wandb run. Offline when nobody is logged in (sync later with `wandb sync`); never prompts.

    A run that goes on keeps its wandb id (wandb-id.txt), so that wandb shows one run.
    """

    def __init__(
        self,
        dpath: pathlib.Path,
        project: str,
        name: str,
        config: dict[str, object],
        from_step: int = 0,
    ):
        import wandb

        id_fpath = dpath / "wandb-id.txt"
        if not (from_step and id_fpath.exists()):
            helpers.write_text(id_fpath, uuid.uuid4().hex[:8])
        try:
            self.run = wandb.init(
                project=project,
                name=name,
                id=id_fpath.read_text(),
                resume="allow" if from_step else None,
                config=config,
                dir=str(dpath),
                mode=wandb_mode(),
                reinit="create_new",  # several SAEs of one process are several runs
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as err:
            raise errors.UserError(
                f"wandb: {errors.first_line(err)} Set WANDB_MODE=offline, or pass --wandb-project ''."
            ) from err

    def log(self, step: int, metrics: Metrics) -> None:
        self.run.log(dict(metrics), step=step)

    def flush(self) -> None:
        pass  # wandb writes by itself

    def finish(self) -> None:
        self.run.finish()


class Both:
    """Hands everything to several trackers."""

    def __init__(self, *trackers: Tracker):
        self.trackers = trackers

    def log(self, step: int, metrics: Metrics) -> None:
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def flush(self) -> None:
        for tracker in self.trackers:
            tracker.flush()

    def finish(self) -> None:
        for tracker in self.trackers:
            tracker.finish()


@beartype.beartype
def wandb_mode() -> tp.Literal["online", "offline", "disabled"]:
    """WANDB_MODE if set; else online when an API key is at hand (environment, settings file or netrc), offline when not.

    Asks neither the user nor a server (`wandb.login` would).
    """
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("online", "offline", "disabled"):
        return tp.cast(tp.Literal["online", "offline", "disabled"], mode)
    import wandb

    settings = wandb.setup().settings
    if settings.mode in ("offline", "disabled"):  # `wandb offline` was run in this folder
        return settings.mode
    has_key = settings.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    return "online" if has_key or _netrc_hosts() & _names(settings.base_url) else "offline"


def _names(base_url: str) -> set[str]:
    """The names under which `wandb login` may have written a server's key."""
    host = urllib.parse.urlsplit(base_url).netloc
    return WANDB_HOSTS if host in WANDB_HOSTS else {host}


def _netrc_hosts() -> set[str]:
    """Machines that the user's netrc file knows; none if it is missing or unreadable."""
    home = pathlib.Path.home()
    fpaths = [home / ".netrc", home / "_netrc"]
    if "NETRC" in os.environ:
        fpaths = [pathlib.Path(os.environ["NETRC"]).expanduser()]
    hosts: set[str] = set()
    for fpath in fpaths:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            hosts |= netrc.netrc(fpath).hosts.keys()
    return hosts


@beartype.beartype
def start(
    dpath: pathlib.Path,
    *,
    name: str,
    config: dict[str, object],
    wandb_project: str,
    from_step: int = 0,
) -> Tracker:
    """The tracker of the run whose files are in `dpath`; without a project name only metrics.jsonl is written.

    from_step: the step with which a run goes on.
    """
    local = JsonLines(dpath / "metrics.jsonl", from_step)
    if not wandb_project:
        return local
    return Both(local, Wandb(dpath, wandb_project, name, config, from_step))
