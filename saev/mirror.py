"""Copies the metrics.jsonl of running trainings to wandb. `saev.tracking` starts it as a process (python -m
saev.mirror).

wandb may raise, hang, patch sys.exit or die from a signal meant for the job. In a separate process none of
that reaches the training. Commands arrive as JSON lines on stdin. When stdin ends (the trainer was killed),
all runs are finished.
"""

import collections.abc
import contextlib
import functools
import logging
import os
import pathlib
import select
import signal
import sys
import typing as tp
import uuid

import msgspec

from saev import errors, helpers
from saev.formats import jsonfile, metricslog

logger = logging.getLogger("saev")

WANDB_URLS = ("https://api.wandb.ai", "https://api.forge.coreweave.com")
"""The two addresses of wandb's own server."""
POLL_S = 1.0
"""Seconds between checks for new lines."""
MAX_ORPHAN_S = 60
"""Most seconds that the process may outlive its trainer."""


class Start(msgspec.Struct):
    """Command: start copying the metrics of the run in this folder."""

    dpath: str
    project: str
    from_step: int
    """Lines of earlier steps are already in wandb."""


class Finish(msgspec.Struct):
    """Command: the run in this folder is over."""

    finished: str


class Copy:
    """Copies one run's metrics to wandb. The first error is logged in one line and ends the copy."""

    def __init__(self, cmd: Start):
        self.dpath = pathlib.Path(cmd.dpath)
        self.from_step = cmd.from_step
        self.tail = b""
        self.run: tp.Any = None
        with self._guarded():
            self.file = (self.dpath / "metrics.jsonl").open("rb")
            self.run = _begin(self.dpath, cmd.project, cmd.from_step)

    @contextlib.contextmanager
    def _guarded(self) -> collections.abc.Generator[None]:
        try:
            yield
        except BaseException as err:  # wandb raises SystemExit and KeyboardInterrupt too
            self.run = None
            logger.warning(
                "wandb: %s. Run %s continues without wandb; %s has all its metrics. "
                "(To avoid this, set WANDB_MODE=offline, or pass --wandb-project '' to disable wandb.)",
                errors.first_line(err).rstrip("."),
                self.dpath.name,
                self.dpath / "metrics.jsonl",
            )

    def push(self) -> None:
        """Sends the lines written since the last call."""
        if self.run is None:
            return
        with self._guarded():
            *lines, self.tail = (self.tail + self.file.read()).split(b"\n")
            for line in lines:
                metrics = metricslog.parse(line) or {}
                step = int(metrics.pop("step", None) or 0)
                if metrics and step >= self.from_step:
                    self.run.log(metrics, step=step)

    def finish(self) -> None:
        self.push()
        if self.run is not None:
            with self._guarded():
                self.run.finish()


def _begin(dpath: pathlib.Path, project: str, from_step: int) -> tp.Any:
    """Starts the wandb run. A resumed run keeps its id (wandb-id.txt), so that wandb shows one run."""
    import wandb

    id_fpath = dpath / "wandb-id.txt"
    if not (from_step and id_fpath.exists()):
        helpers.write_text(id_fpath, uuid.uuid4().hex[:8])
    config = jsonfile.read_sealed(dpath / "config.json", dict[str, tp.Any], "Train again.", old=True)
    mode = wandb_mode()
    run = wandb.init(
        project=project,
        name=dpath.name,
        id=id_fpath.read_text(),
        resume="allow" if from_step else None,
        config=config,
        dir=str(dpath),
        mode=mode,
        reinit="create_new",  # one wandb run for each SAE of the process
        settings=wandb.Settings(silent=True, console="off"),
    )
    if mode == "offline":
        _log_offline(dpath.parent)
    return run


@functools.cache
def _log_offline(ckpt_dpath: pathlib.Path) -> None:
    """Logs once per folder how to upload offline runs."""
    logger.info("wandb is offline; to upload: wandb sync %s/*/wandb/offline-run-*", ckpt_dpath)


def wandb_mode() -> tp.Literal["online", "offline", "disabled"]:
    """Returns WANDB_MODE if set, else online with an API key (environment, settings, netrc), else offline.

    Unlike `wandb.login`, it asks neither the user nor a server.
    """
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("online", "offline", "disabled"):
        return tp.cast(tp.Literal["online", "offline", "disabled"], mode)
    import requests.utils
    import wandb

    settings = wandb.setup().settings
    if settings.mode in ("offline", "disabled"):  # `wandb offline` was run in this folder
        return settings.mode
    if settings.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    url = settings.base_url.rstrip("/")
    logins = map(requests.utils.get_netrc_auth, WANDB_URLS if url in WANDB_URLS else [url])
    return "online" if any(logins) else "offline"


# ---- the process ----


def _commands() -> collections.abc.Iterator[Start | Finish | None]:
    """Yields the commands from stdin until it ends, and None whenever POLL_S passes without input."""
    stdin, rest = sys.stdin.fileno(), b""
    while True:
        if not select.select([stdin], [], [], POLL_S)[0]:
            yield None
            continue
        data = os.read(stdin, 1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield jsonfile.parse_line(line, Start if b'"dpath"' in line else Finish)


def _silence() -> None:
    """Keeps our log lines on stderr and discards what wandb and its children print."""
    stream = os.fdopen(os.dup(2), "w", buffering=1)
    logging.basicConfig(
        level=logging.WARNING, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S", stream=stream
    )
    logger.setLevel(logging.INFO)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def main() -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)  # the trainer handles these and tells us
    _silence()
    copies: dict[str, Copy] = {}
    for cmd in _commands():
        if isinstance(cmd, Start):
            copies[cmd.dpath] = Copy(cmd)
        elif isinstance(cmd, Finish):
            copies.pop(cmd.finished).finish()
            if not copies:
                break
        for copy in copies.values():
            copy.push()
    signal.alarm(MAX_ORPHAN_S)
    for copy in copies.values():
        copy.finish()
    with contextlib.suppress(BaseException):
        tp.cast(tp.Any, sys.modules.get("wandb")).teardown()
    os._exit(0)  # wandb's exit hooks may hang


if __name__ == "__main__":
    main()
