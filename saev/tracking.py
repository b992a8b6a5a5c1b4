"""Metrics of a run: a local metrics.jsonl always, which is the record, and a copy in wandb when asked for.

The training loop holds a `Tracker` and does not know which. What wandb does wrong never reaches it (`saev.mirror`).
"""

import collections.abc
import contextlib
import logging
import os
import pathlib
import signal
import subprocess
import sys
import typing as tp

import beartype

from saev import errors, helpers
from saev.formats import jsonfile, metricslog

logger = logging.getLogger("saev")

Metrics = collections.abc.Mapping[str, float | int]

FINISH_S = 20.0
"""Seconds to wait for wandb to send the rest, at the end of training. (Slurm kills 30 s after SIGTERM.)"""


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
        self.fpath = fpath
        self.fd = fpath.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Metrics) -> None:
        """
        Raises:
            UserError: the file is no longer there.
        """
        self._check()
        with helpers.naming(self.fpath):
            self.fd.write(metricslog.line({"step": step, **metrics}) + "\n")
            self.fd.flush()

    def flush(self) -> None:
        """Raises as `log`."""
        self._check()
        with helpers.naming(self.fpath):
            os.fsync(self.fd.fileno())

    def _check(self) -> None:
        """Writes to a file that was removed succeed, and are lost."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(os.fstat(self.fd.fileno()), self.fpath.stat()):
                return
        raise errors.UserError(
            f"{self.fpath}: was removed, moved or replaced during training, which ends here. Run the same command again: it starts from the newest saved state that is there."
        )

    def finish(self) -> None:
        with helpers.naming(self.fpath):
            self.fd.close()


def _lines_before(fpath: pathlib.Path, step: int) -> collections.abc.Iterator[str]:
    """Whole lines of earlier steps; a killed process may have left a part of one. Damaged ones are named and left out."""
    text = fpath.read_bytes() if fpath.exists() else b""
    for i, line in enumerate(text.split(b"\n")[:-1], 1):
        metrics = metricslog.parse(line)
        if metrics is None:
            logger.warning("%s:%d: is damaged (checksum) and left out", fpath, i)
        elif (metrics.get("step") or 0) < step:
            yield line.decode() + "\n"


class Wandb:
    """Has the run's metrics.jsonl and config.json copied to wandb. Offline when nobody is logged in; never prompts."""

    def __init__(self, dpath: pathlib.Path, project: str, from_step: int = 0):
        self.dpath = dpath
        _copier.start(dpath, project, from_step)

    def log(self, step: int, metrics: Metrics) -> None:
        pass  # the copier reads metrics.jsonl

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        _copier.finish(self.dpath)


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


class _Copier:
    """The process `saev.mirror`, one for all runs of this process: from the first run's start to the last one's finish.

    Nothing here raises, and only the last finish waits, at most FINISH_S.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.open: set[pathlib.Path] = set()
        self.is_lost = False

    def start(self, dpath: pathlib.Path, project: str, from_step: int) -> None:
        if not self.open:
            self.process, self.is_lost = _spawned(), False
        self.open.add(dpath)
        self._send({"dpath": str(dpath), "project": project, "from_step": from_step})

    def finish(self, dpath: pathlib.Path) -> None:
        self._send({"finished": str(dpath)})
        self.open.discard(dpath)
        if self.open or self.process is None:
            return
        process, self.process = self.process, None
        with contextlib.suppress(OSError):
            tp.cast(tp.IO[bytes], process.stdin).close()
        try:
            process.wait(FINISH_S)
        except subprocess.TimeoutExpired:
            logger.warning(
                "wandb: did not finish within %.0f s; to send the rest: wandb sync %s/wandb/*run-*",
                FINISH_S,
                dpath,
            )
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what wandb started
                process.wait()

    def _send(self, command: dict[str, object]) -> None:
        if self.process is None:
            return
        line = jsonfile.dumps(command).encode() + b"\n"
        try:
            is_sent = tp.cast(tp.IO[bytes], self.process.stdin).write(line) == len(line)
        except OSError:  # it died
            is_sent = False
        if not (is_sent or self.is_lost):
            logger.warning("wandb: its process does not answer; training goes on without it")
            self.is_lost = True


_copier = _Copier()


def _spawned() -> subprocess.Popen[bytes] | None:
    root = str(pathlib.Path(__file__).parent.parent)
    paths = [p for p in (os.environ.get("PYTHONPATH"), root) if p]
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "saev.mirror"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is not for it
        )
    except OSError as err:
        logger.warning("wandb: no process for it (%s); training goes on without it", err.strerror)
        return None
    os.set_blocking(tp.cast(tp.IO[bytes], process.stdin).fileno(), False)
    return process


@beartype.beartype
def start(
    dpath: pathlib.Path,
    *,
    wandb_project: str,
    from_step: int = 0,
) -> Tracker:
    """The tracker of the run whose files are in `dpath`; without a project name only metrics.jsonl is written.

    from_step: the step with which a run goes on.
    """
    local = JsonLines(dpath / "metrics.jsonl", from_step)
    if not wandb_project or os.environ.get("WANDB_MODE") == "disabled":
        return local
    return Both(local, Wandb(dpath, wandb_project, from_step))
