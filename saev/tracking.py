"""Metrics of a run: a local metrics.jsonl always, wandb beside it when asked for.

The training loop holds a `Tracker` and does not know which.
"""

import collections.abc
import json
import os
import pathlib
import typing as tp

import beartype

Metrics = collections.abc.Mapping[str, float | int]


@tp.runtime_checkable
class Tracker(tp.Protocol):
    """Takes the metrics of one run."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def finish(self) -> None: ...


class JsonLines:
    """One JSON object a line in metrics.jsonl; each line is flushed, so a killed run keeps what it logged."""

    def __init__(self, fpath: pathlib.Path):
        fpath.parent.mkdir(parents=True, exist_ok=True)
        self.fd = fpath.open("w", encoding="utf-8")

    def log(self, step: int, metrics: Metrics) -> None:
        self.fd.write(json.dumps({"step": step, **metrics}) + "\n")
        self.fd.flush()

    def finish(self) -> None:
        self.fd.close()


class Wandb:
    """One wandb run. Offline when nobody is logged in (sync later with `wandb sync`); never prompts."""

    def __init__(self, dpath: pathlib.Path, project: str, name: str, config: dict[str, object]):
        import wandb

        self.run = wandb.init(
            project=project,
            name=name,
            config=config,
            dir=str(dpath),
            mode=wandb_mode(),
            reinit="create_new",  # several SAEs of one process are several runs
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self.run.log(dict(metrics), step=step)

    def finish(self) -> None:
        self.run.finish()


class Both:
    """Hands everything to several trackers."""

    def __init__(self, *trackers: Tracker):
        self.trackers = trackers

    def log(self, step: int, metrics: Metrics) -> None:
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def finish(self) -> None:
        for tracker in self.trackers:
            tracker.finish()


@beartype.beartype
def wandb_mode() -> tp.Literal["online", "offline", "disabled"]:
    """WANDB_MODE if set; else online when an API key is at hand (environment or netrc), offline when not."""
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("online", "offline", "disabled"):
        return tp.cast(tp.Literal["online", "offline", "disabled"], mode)
    import wandb

    return "online" if wandb.api.api_key else "offline"


@beartype.beartype
def start(
    dpath: pathlib.Path, *, name: str, config: dict[str, object], wandb_project: str
) -> Tracker:
    """The tracker of the run whose files are in `dpath`; without a project name only metrics.jsonl is written."""
    local = JsonLines(dpath / "metrics.jsonl")
    if not wandb_project:
        return local
    return Both(local, Wandb(dpath, wandb_project, name, config))
