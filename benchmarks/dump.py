"""What a dump costs above the ViT's bare forward pass, and which of decoding, ViT and disk bounds it.

    uv run python -m benchmarks.dump [--quick] [--images DIR] [--device cuda] [--vit-family F --vit-ckpt C --autocast bfloat16]

Reference: the same model on the same batches, preloaded, its activations dropped. The dump decodes the images from
files, runs the model, checks, encodes, checksums and writes the activations, and syncs them to the disk. Without
flags: DINOv2 ViT-S/14 (the demo's packaged weights, all 12 blocks) on made-up JPEGs of CUB's size.
"""

import argparse
import concurrent.futures
import dataclasses
import pathlib
import tempfile

import numpy as np
import PIL.Image
import torch

from benchmarks import common
from saev.data import config, dump, images, vits
from saev.demo import weights
from saev.formats import shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images: under 40 s on 2 cores")
    parser.add_argument("--images", help="folder of images (default: made-up JPEGs)")
    parser.add_argument("--n-imgs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--workers", type=int, nargs="+", default=[4])
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vit-family", default="dinov2")
    parser.add_argument("--vit-ckpt", default="dinov2_vits14")
    parser.add_argument("--vit-weights", help="'random', 'hub' or a file (default: the demo's)")
    parser.add_argument("--autocast", default="off")
    args = parser.parse_args()
    n_imgs = args.n_imgs or (24 if args.quick else 128)
    batch_size = args.batch_size or (8 if args.quick else 32)
    n_repeats = args.repeats or (3 if args.quick else 5)
    with tempfile.TemporaryDirectory() as tmp:
        root = pathlib.Path(args.images or pathlib.Path(tmp) / "images")
        if not args.images:
            draw(root, n_imgs)
        if args.vit_weights is None:
            args.vit_weights = str(pathlib.Path(tmp) / "vit.safetensors")
            weights.unpack(pathlib.Path(args.vit_weights))
        vit_cfg = config.Vit(
            vit_family=args.vit_family,
            vit_ckpt=args.vit_ckpt,
            vit_weights=args.vit_weights,
            autocast=args.autocast,
        )
        cfg = config.Dump(
            vit=vit_cfg,
            data=config.ImageFolder(str(root)),
            vit_layers=(-1,),
            vit_batch_size=batch_size,
            device=args.device,
        )
        common.report(measure(cfg, pathlib.Path(tmp), n_imgs, n_repeats, args.workers))


def draw(root: pathlib.Path, n_imgs: int) -> None:
    """JPEGs of 500 x 375 pixels with detail at every scale, as photos have."""
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n_imgs):
        img = np.full((375, 500, 3), 128.0)
        for n in (4, 12, 36, 108, 324):
            noise = rng.normal(0, 90 / n**0.4, (n, n, 3)).clip(-128, 127) + 128
            layer = PIL.Image.fromarray(noise.astype(np.uint8)).resize((500, 375), 3)
            img += np.asarray(layer, np.float64) - 128
        PIL.Image.fromarray(img.clip(0, 255).astype(np.uint8)).save(root / f"{i}.jpg", quality=90)


def measure(
    cfg: config.Dump, tmp: pathlib.Path, n_imgs: int, n_repeats: int, workers: list[int]
) -> list[common.Case]:
    records = images.list_images(cfg.data)[:n_imgs]
    device = torch.device(cfg.device)
    vit = vits.load(cfg.vit).to(device)
    layers = vits.resolve_layers(cfg.vit_layers, vit.n_blocks)
    root = pathlib.Path(cfg.data.root)

    def decode(record: shards.Record) -> torch.Tensor:
        return vit.transform(images.open_rgb(root / record.path))

    imgs_NCHW = torch.stack([decode(record) for record in records])
    batches = [batch.to(device) for batch in imgs_NCHW.split(cfg.vit_batch_size)]

    @torch.inference_mode()
    def forward() -> None:
        for batch in batches:
            vit(batch, layers)
        if device.type == "cuda":
            torch.cuda.synchronize()

    def decode_all() -> None:
        with concurrent.futures.ThreadPoolExecutor(workers[-1]) as pool:
            list(pool.map(decode, records))

    made: list[shards.ShardDir] = []

    def run(n_workers: int, dtype: str) -> float:
        with tempfile.TemporaryDirectory(dir=tmp) as dump_to:
            metadata = shards.Metadata(
                vit_family=cfg.vit.vit_family,
                vit_ckpt=vit.ckpt_id,
                layers=layers,
                n_patches_per_img=vit.n_patches,
                cls_token=vit.cls_token,
                d_vit=vit.d_vit,
                n_imgs=len(records),
                max_patches_per_shard=cfg.max_patches_per_shard,
                data={},
                **shards.stored_as(dtype),
            )
            transform = vit.transform.to_dict()
            out = shards.ShardDir.create(pathlib.Path(dump_to), metadata, records, transform)
            run_cfg = dataclasses.replace(cfg, n_workers=n_workers, dtype=dtype)
            dumper = dump._Dumper(run_cfg, vit, out, records, device)
            took_s = common.seconds(lambda: dumper.write(list(range(metadata.n_shards))))
            made[:] = [out]
            check(out, batches, vit, layers)
        return took_s

    forward()  # warm up
    calls = {"forward": lambda: common.seconds(forward), "decode": lambda: common.seconds(decode_all)}
    cases = [(n, "float32") for n in workers] + [(workers[-1], "bfloat16")]
    calls |= {f"dump, {d}, {n} workers": lambda n=n, d=d: run(n, d) for n, d in cases}
    times = common.interleaved(calls, n_repeats)
    gb = n_imgs * made[0].metadata.img_bytes * (2 if cases[-1][1] == "bfloat16" else 1) / 1e9
    return [
        {
            "name": f"{name}, {cfg.vit.vit_ckpt}, {cfg.device}",
            "ratio": round(common.median_ratio(times[name], times["forward"]), 4),
            "reference": "bare forward pass",
            "imgs_per_s": round(n_imgs / float(np.median(times[name])), 2),
            "forward_imgs_per_s": round(n_imgs / float(np.median(times["forward"])), 2),
            "float32_gb": round(gb, 3),
            "checked": "the first batch equals the forward pass, bit for bit" if name != "decode" else "",
        }
        for name in calls
        if name != "forward"
    ]


@torch.inference_mode()
def check(out: shards.ShardDir, batches: list[torch.Tensor], vit: vits.Vit, layers: tuple[int, ...]) -> None:
    """Compares the first shard's first batch, value by value."""
    metadata = shards.ShardDir.open(out.dpath).metadata
    want = vit(batches[0], layers).cpu().numpy()
    stored = np.fromfile(out.acts_fpath(0), shards.STORED[metadata.dtype], want.size)
    assert (stored.reshape(want.shape) == shards.encode(want, metadata.dtype)).all()


if __name__ == "__main__":
    main()
