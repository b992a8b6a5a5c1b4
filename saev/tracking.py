"""Logs a run's metrics to a local metrics.jsonl, which is the record, and optionally copies them to wandb.

wandb runs in a separate process (`saev.mirror`), so its failures cannot reach the training loop.
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

from saev import errors, helpers
from saev.formats import jsonfile, metricslog

logger = logging.getLogger("saev")

Metrics = collections.abc.Mapping[str, float | int]

FINISH_S = 20.0
"""Seconds to wait at the end of training for wandb to upload the rest. (Slurm kills 30 s after SIGTERM.)"""


class Tracker:
    """Takes the metrics of one run. This one discards them (in all processes but the first)."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def flush(self) -> None:
        """Ensures that everything logged so far is on disk."""

    def finish(self) -> None: ...


class JsonLines(Tracker):
    """Writes one JSON object per line to metrics.jsonl. Each is flushed, so a killed run keeps its log.

    A resumed run keeps only the earlier lines with steps before `from_step`, because later steps are run
    again. With a project, a separate process copies the file and config.json to wandb, which is offline
    without a login.
    """

    def __init__(self, fpath: pathlib.Path, from_step: int = 0, wandb_project: str = ""):
        fpath.parent.mkdir(parents=True, exist_ok=True)
        kept = "".join(_lines_before(fpath, from_step)) if from_step else ""
        helpers.write_text(fpath, kept)
        self.fpath = fpath
        self.fd = fpath.open("a", encoding="utf-8")
        self.is_copied = bool(wandb_project)
        if self.is_copied:
            _copier.start(fpath.parent, wandb_project, from_step)

    def log(self, step: int, metrics: Metrics) -> None:
        """
        Raises:
            UserError: the file is no longer there.
        """
        self._check()
        with errors.naming(self.fpath):
            self.fd.write(metricslog.line({"step": step, **metrics}) + "\n")
            self.fd.flush()

    def flush(self) -> None:
        """Raises as `log`."""
        self._check()
        with errors.naming(self.fpath):
            os.fsync(self.fd.fileno())

    def _check(self) -> None:
        """Checks that the file is still there: writes to a removed file succeed, but are lost."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(os.fstat(self.fd.fileno()), self.fpath.stat()):
                return
        raise errors.UserError(
            f"{self.fpath}: was removed, moved or replaced during training, which ends here. "
            "Run the same command again: it starts from the newest saved state that is there."
        )

    def finish(self) -> None:
        try:
            with errors.naming(self.fpath):
                self.fd.close()
        finally:
            if self.is_copied:
                _copier.finish(self.fpath.parent)


def _lines_before(fpath: pathlib.Path, step: int) -> collections.abc.Iterator[str]:
    """Yields the complete lines of earlier steps. Logs damaged lines and leaves them out."""
    text = fpath.read_bytes() if fpath.exists() else b""
    for i, line in enumerate(text.split(b"\n")[:-1], 1):
        metrics = metricslog.parse(line)
        if metrics is None:
            logger.warning("%s:%d: is damaged (checksum) and left out", fpath, i)
        elif (metrics.get("step") or 0) < step:
            yield line.decode() + "\n"


class _Copier:
    """Controls the process `saev.mirror`, which serves all runs, from the first start to the last finish.

    Its methods never raise. Only the last `finish` waits, at most FINISH_S.
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
                "wandb: did not finish within %.0f s; to upload the rest: wandb sync %s/wandb/*run-*",
                FINISH_S,
                dpath,
            )
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # and its child processes
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
            logger.warning("wandb: its process does not answer; training continues without it")
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
            start_new_session=True,  # Ctrl-C must not reach it
        )
    except OSError as err:
        logger.warning("wandb: cannot start its process (%s); training continues", err.strerror)
        return None
    os.set_blocking(tp.cast(tp.IO[bytes], process.stdin).fileno(), False)
    return process


def start(dpath: pathlib.Path, *, wandb_project: str, from_step: int = 0) -> Tracker:
    """Returns the tracker of the run in `dpath`. Without a project name, only metrics.jsonl is written.

    Args:
        from_step: the step from which a run resumes.
    """
    is_off = os.environ.get("WANDB_MODE") == "disabled"
    return JsonLines(dpath / "metrics.jsonl", from_step, "" if is_off else wandb_project)
