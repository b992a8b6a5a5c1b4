"""What does a gallery of every live latent cost, in encodings of the same shards?

    uv run python -m benchmarks.visuals [--quick] [--n-imgs N] [--cpu]

The reference reads the shards and finds the codes of every patch (sparse where the SAE is sparse), and keeps nothing. The
command does the same, then everything else: statistics, images, heat, pictures, files. Its cost has a part for each latent
(about 1 ms), so the ratio falls with the number of images; --quick has few. Activations are Gaussian, and all latents fire on
nearly all images. Photos are JPEGs of 500 x 375 pixels. Also printed: bytes of the files per latent and per image, and the peak
of this process's memory. --cpu counts processor time instead of the clock's, for a machine that is busy.
"""

import argparse
import collections.abc
import dataclasses
import pathlib
import re
import tempfile

import numpy as np
import PIL.Image
import torch

from benchmarks import common
from saev import nn
from saev.data import activations, ordered
from saev.data import config as data_config
from saev.formats import shards
from saev.nn import config as nn_config
from saev.visuals import coders, collect, config, memory

N_PATCHES, D_VIT, SIDE = 256, 384, (500, 375)


@dataclasses.dataclass(frozen=True)
class Case:
    """One gallery."""

    name: str
    n_imgs: int
    d_sae: int
    n_repeats: int
    n_images: int = 20
    top_k: int = 32
    d_vit: int = D_VIT


QUICK = [Case("2,048 latents, quick", 160, 2048, 1)]
FULL = [
    Case("16,384 latents", 1000, 16384, 3),
    Case("32,768 latents x 128 images", 400, 32768, 1, n_images=128),
]


def write(root: pathlib.Path, case: Case) -> config.Visuals:
    """Made-up activations, photos and an SAE."""
    rng = np.random.default_rng(0)
    metadata = shards.Metadata(
        "timm", "made-up", (3,), N_PATCHES, False, case.d_vit, case.n_imgs, 200 * N_PATCHES,
        {"__class__": "ImageFolder"},
    )  # fmt: skip
    records = [shards.Record(f"class{i % 20}/{i}.jpg", f"class{i % 20}") for i in range(case.n_imgs)]
    out = shards.ShardDir.create(root / "shards", metadata, records, {})
    for shard_i in range(metadata.n_shards):
        with out.writing(shard_i) as writer:
            shape = (len(metadata.imgs_in(shard_i)), 1, N_PATCHES, case.d_vit)
            writer.write(rng.standard_normal(shape, np.float32))
    for record in records:
        fpath = root / "photos" / record.path
        fpath.parent.mkdir(parents=True, exist_ok=True)
        small = PIL.Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8))
        small.resize(SIDE, PIL.Image.Resampling.BICUBIC).save(fpath, quality=90)
    sae_cfg = nn_config.TopK(d_vit=case.d_vit, d_sae=case.d_sae, top_k=case.top_k)
    nn.save(nn.SparseAutoencoder(sae_cfg), root / "run" / "sae.pt")
    return config.Visuals(
        images=data_config.ImageFolder(str(root / "photos")),
        ckpt=str(root / "run" / "sae.pt"),
        data=data_config.Shards(str(out.dpath), 3),
        dump_to=str(root / "gallery"),
        n_images=case.n_images,
        device="cpu",
    )


def encode(cfg: config.Visuals) -> None:
    """Reads the shards and finds all codes."""
    acts = activations.Activations(cfg.data)
    coder = coders.load(cfg, acts, torch.device("cpu"))
    sizes = memory.Sizes(acts.n_imgs, acts.n_tokens, acts.d_vit, coder.n)
    for block in ordered.Ordered(acts, sizes.block):
        coder(torch.from_numpy(block.act_NXD).flatten(0, 1))


def run(case: Case, seconds: collections.abc.Callable) -> common.Case:
    with tempfile.TemporaryDirectory() as folder:
        cfg = write(pathlib.Path(folder), case)
        tiny = dataclasses.replace(case, n_imgs=4, d_sae=64, d_vit=16, top_k=4)
        collect.main(write(pathlib.Path(folder) / "tiny", tiny))  # compiles
        calls = {
            "gallery": lambda: seconds(lambda: collect.main(cfg)),
            "encode": lambda: seconds(lambda: encode(cfg)),
        }
        found = common.interleaved(calls, case.n_repeats)
        data = pathlib.Path(cfg.dump_to) / "data"
        sizes = {
            name: sum(f.stat().st_size for f in (data / name).iterdir()) for name in ("latents", "images")
        }
        n_shown = len((data.parent / "latents.csv").read_text().splitlines()) - 1
    status = pathlib.Path("/proc/self/status").read_text()
    (peak,) = re.findall("VmHWM:[^0-9]*([0-9]+) kB", status)
    return {
        "name": case.name,
        "ratio": round(common.median_ratio(found["gallery"], found["encode"]), 3),
        "reference": "encoding the same shards",
        "time": "processor" if seconds is common.cpu_seconds else "clock",
        "gallery_s": [round(s, 1) for s in found["gallery"]],
        "encode_s": [round(s, 1) for s in found["encode"]],
        "n_imgs": case.n_imgs,
        "n_shown": n_shown,
        "bytes_per_latent": round(sizes["latents"] / n_shown),
        "bytes_per_image": round(sizes["images"] / case.n_imgs),
        "peak_gb": round(1024 * int(peak) / 1e9, 2),
        "estimated_gb": round(
            memory.peak(cfg, memory.Sizes(case.n_imgs, N_PATCHES, case.d_vit, case.d_sae)) / 1e9, 2
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--n-imgs", type=int, help="other number of images")
    parser.add_argument("--cpu", action="store_true", help="processor time")
    args = parser.parse_args()
    cases = QUICK if args.quick else FULL
    if args.n_imgs:
        cases = [dataclasses.replace(case, n_imgs=args.n_imgs) for case in cases]
    seconds = common.cpu_seconds if args.cpu else common.seconds
    common.report([run(case, seconds) for case in cases])


if __name__ == "__main__":
    main()
