"""A small but whole experiment: drawn birds, a ViT with random weights, an SAE, a gallery, a table.

Every command runs in this process, as the launcher would run it. Results of a command are compared by digests of what it
computed, not of its files (these hold times).
"""

import collections.abc
import contextlib
import csv
import dataclasses
import hashlib
import pathlib
import shutil
import time
import typing as tp

import numpy as np
import torch

from saev import helpers, launch, nn, scorers, sweeps
from saev.data import config as data_config
from saev.data import indexed, ordered, shuffled
from saev.demo import minicub
from saev.protoeval import config as protoeval_config
from saev.protoeval import merge
from saev.training import config as training_config
from saev.visuals import config as visuals_config

LAYERS = (4, 5)
N_IMGS = 48
STAGES = {
    "dump": ("python -m saev.data", data_config.Dump, "saev.data.dump:main"),
    "train": ("train.py", training_config.Train, "saev.training.loop:main"),
    "look": ("visuals.py", visuals_config.Visuals, "saev.visuals.collect:main"),
    "evaluate": ("protoeval.py", protoeval_config.ProtoEval, "saev.protoeval.run:main"),
}
TAKES_ONE = ("dump", "look")
"""Stages that take one config; the others take a list."""


class Interrupted(BaseException):
    """Stands for a kill in the middle of a pass: nothing of ours catches it."""


def run(stage: str, args: collections.abc.Sequence[object]) -> tp.Any:
    """Runs one command and returns what its stage returns."""
    program, cls, target = STAGES[stage]
    cfgs = sweeps.parse(cls, program, [str(arg) for arg in args])
    return launch.Stage(target, cfgs[0] if stage in TAKES_ONE else cfgs).run()


@contextlib.contextmanager
def interrupted(desc: str, n: int) -> collections.abc.Generator[None]:
    """Inside, the first pass whose progress is called `desc...` ends at its item n, and so does the block."""
    before = helpers.progress

    def progress(iterable, what, *args, **kwargs):
        for i, item in enumerate(before(iterable, what, *args, **kwargs)):
            if what.startswith(desc) and i == n:
                raise Interrupted
            yield item

    helpers.progress = progress
    try:
        yield
    except Interrupted:
        return
    finally:
        helpers.progress = before
    raise AssertionError(f"{desc} was not interrupted")


def digest(obj: object) -> str:
    """Of nested lists and dicts of plain values, arrays and tensors."""
    out = hashlib.sha256()

    def add(item: object) -> None:
        if isinstance(item, torch.Tensor):
            item = item.detach().contiguous().float().numpy()
        if isinstance(item, np.ndarray):
            out.update(f"{item.dtype}{item.shape}".encode())
            out.update(np.ascontiguousarray(item).tobytes())
        elif isinstance(item, dict):
            for key in sorted(item):
                add(str(key))
                add(item[key])
        elif isinstance(item, list | tuple):
            out.update(f"[{len(item)}".encode())
            for element in item:
                add(element)
        else:
            out.update(f"{type(item).__name__}:{item!r};".encode())

    add(obj)
    return out.hexdigest()


@dataclasses.dataclass(frozen=True)
class Chain:
    """The experiment in the folder `root`."""

    root: pathlib.Path
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """What each command took, by its stage."""

    @property
    def cub(self) -> pathlib.Path:
        return self.root / "CUB_200_2011"

    @property
    def shards(self) -> pathlib.Path:
        return next(p for p in self.root.glob("shards/*") if p.is_dir())

    @property
    def ckpt(self) -> pathlib.Path:
        return next(p for p in self.root.glob("checkpoints/*") if p.is_dir()) / "sae.pt"

    # ---- the four commands; `to` names an output folder ----

    def dump(self, to: str = "shards") -> str:
        vit = ["--vit-family", "timm", "--vit-ckpt", "test_vit", "--vit-weights", "random"]
        flags = ["--vit-layers", *LAYERS, "--n-workers", 1, "--device", "cpu"]
        flags += ["--dump-to", self.root / to, "--max-patches-per-shard", 2 * 101 * 16]
        return run("dump", [*vit, *flags, "data:cub200", "--data.root", self.cub])

    def train(self, to: str = "checkpoints", shards: pathlib.Path | None = None) -> str:
        return run("train", self.train_args(to, shards))[0]

    def train_args(self, to: str, shards: pathlib.Path | None = None) -> list[object]:
        args = ["--data.shard-root", shards or self.shards, "--data.layer", LAYERS[1]]
        args += ["--n-patches", 8192, "--batch-size", 512, "--n-threads", 1, "--log-every", 4]
        args += ["--wandb-project", "", "--ckpt-to", self.root / to, "--device", "cpu"]
        return [*args, "--save-every", 1e-9, "sae:top-k", "--sae.exp-factor", 2, "--sae.top-k", 4]

    def look(self, to: str = "gallery") -> str:
        args = ["--ckpt", self.ckpt, "--dump-to", self.root / to, "--top-k", 4]
        args += ["--n-images", 2, "--n-group", 1, "--data.shard-root", self.shards, "--data.layer", LAYERS[1]]
        return run("look", [*args, "--device", "cpu", "images:cub200", "--images.root", self.cub])

    def evaluate(
        self, to: str = "results", scorers_to: str = "scorers", *more: object, gallery: str = ""
    ) -> str:
        sweep = self.root / "scorers.toml"
        if not sweep.exists():
            kinds = ['type = "random"', 'type = "k-means"\nn_iters = 3\nn_samples = 2000']
            kinds += ['type = "pca"', f'type = "sae"\nckpt = "{self.ckpt}"']
            sweep.write_text("".join(f"[[scorer]]\n{kind}\n" for kind in kinds))
        args = ["--sweep", sweep, "--cub-root", self.cub, "--device", "cpu", "--force"]
        args += ["--train-data.shard-root", self.shards, "--train-data.layer", LAYERS[1]]
        args += ["--n-prototypes", 8, 32, "--n-train", -1, "--n-boot", 20]
        args += ["--dump-to", self.root / to, "--scorers-to", self.root / scorers_to]
        args += ["--gallery", self.root / gallery] if gallery else []
        return run("evaluate", [*args, *more])

    def build(self) -> "Chain":
        """Runs all four commands."""
        minicub.draw(self.cub, n_imgs=N_IMGS)
        for stage in STAGES:
            start_s = time.monotonic()
            getattr(self, stage)()
            self.seconds[stage] = time.monotonic() - start_s
        return self

    # ---- digests of what readers see ----

    def activations(self, shards: pathlib.Path | None = None) -> str:
        """Every activation, by each of the three loaders, with what is said of it."""
        data = data_config.Shards(str(shards or self.shards), "all", "all")
        parts: list[object] = []
        in_order = ordered.Ordered(data)
        parts += [[block.image_i_N, block.act_NXD] for block in in_order]
        reader = in_order.acts
        parts += [reader.space.describe(), [list(r) for r in reader.records], reader.photos.described()]
        mixed = shuffled.Shuffled(data, batch_size=512, seed=0, pool_bytes=2**24, n_threads=1)
        n_batches = len(reader) // 512
        parts += [b.act_BD.numpy() for _, b in zip(range(n_batches), mixed, strict=False)]
        chosen = indexed.Indexed(str(shards or self.shards), layer=LAYERS[0])
        parts += [[chosen[i]["act"], chosen[i]["image_i"]] for i in range(0, len(chosen), 97)]
        return digest(parts)

    def run_weights(self, ckpt: pathlib.Path | str) -> str:
        """An SAE as `nn.load` gives it."""
        sae = nn.load(ckpt)
        return digest([repr(sae.cfg), sae.activations, dict(sae.state_dict())])

    def fitted(self, fpath: pathlib.Path) -> str:
        """A scorer as `scorers.load` gives it."""
        scorer = tp.cast(tp.Any, scorers.load(fpath))
        return digest([scorer.n_prototypes, scorer.similarity, scorer.digest()])

    def table(self, results: pathlib.Path | str) -> str:
        """The figures of a results folder."""
        with (pathlib.Path(results) / "summary.csv").open(newline="") as fd:
            return digest(list(csv.reader(fd)))

    def report(self, to: str = "results") -> str:
        """What `protoeval.py --report` writes about the results below a folder."""

        out = merge.write(self.root / to)
        texts = [(out / name).read_text() for name in ("table.csv", "differences.csv")]
        shutil.rmtree(out)
        return digest(texts)

    def runs(self) -> str:
        """What `python -m saev.training.report` reads of the run."""
        from saev.training import runs

        return digest(runs.read((str(self.ckpt.parent),)).rows())

    def links(self, results: pathlib.Path | str) -> str:
        """The links into a gallery that `protoeval.py --gallery` writes."""
        return digest((pathlib.Path(results) / "traits.md").read_text())
