"""How well the shuffled loader mixes, from its plan alone: no activations are needed, so any scale can be looked at.

    uv run python -m benchmarks.mixing [--quick]

For a dump of a given shape and a pool of a given size it follows the loader's plan and counts the different images
(and classes, for a dump sorted by class) in batches of 4,096 after the pool has been turned over three times.
The ratio is to what uniform sampling of the whole dump gives.
"""

import argparse
import time
import typing as tp

import numpy as np

from benchmarks import common
from saev.data import mixing

BATCH = 4096


class Dump(tp.NamedTuple):
    """The shape of a dump, one layer of which is read."""

    name: str
    n_imgs: int
    n_tokens: int
    d_vit: int
    imgs_per_shard: int
    imgs_per_class: int


DUMPS = (
    Dump("CUB, ViT-S", 11_788, 256, 384, 9338, 59),
    Dump("ImageNet, ViT-L", 1_281_167, 256, 1024, 9338, 1281),
    Dump("iNat21, ViT-L, 2.4M patches a shard", 2_686_843, 256, 1024, 2334, 268),
    Dump("iNat21, ViT-L, 20M patches a shard", 2_686_843, 256, 1024, 19455, 268),
)
POOLS_GB = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the default pool only")
    pools = (2.0,) if parser.parse_args().quick else POOLS_GB
    common.report([simulate(dump, gb) for dump in DUMPS for gb in pools])


def layout(dump: Dump, pool_gb: float) -> mixing.Layout:
    """As `shuffled.Shuffled` makes it."""
    starts = range(0, dump.n_imgs, dump.imgs_per_shard)
    return mixing.Layout.of(
        [range(a, min(a + dump.imgs_per_shard, dump.n_imgs)) for a in starts],
        n_layers=1,
        n_tokens=dump.n_tokens,
        token_bytes=4 * dump.d_vit,
        batch_size=BATCH,
        n_fit=mixing.n_fit(int(pool_gb * 1e9), BATCH, dump.d_vit, 4 * dump.d_vit),
    )


def simulate(dump: Dump, pool_gb: float) -> common.Case:
    plan = mixing.Plan(of := layout(dump, pool_gb), 0)
    n_warm = min(3 * of.n_pool, of.n_acts // 2) // BATCH
    images, classes = [], []
    start_s = time.perf_counter()
    for step in range(n_warm + 100):
        index_B = np.concatenate([part_n2[:, 0] for part_n2 in plan.draw(plan.without_slots)])
        if step >= n_warm:
            images.append(len(np.unique(index_B // dump.n_tokens)))
            classes.append(len(np.unique(index_B // dump.n_tokens // dump.imgs_per_class)))
    took_s = time.perf_counter() - start_s
    of_classes = uniform(-(-dump.n_imgs // dump.imgs_per_class))
    return {
        "name": f"{dump.name}, pool {pool_gb:g} GB",
        "ratio": round(float(np.mean(images)) / uniform(dump.n_imgs), 4),
        "reference": "different images of uniform sampling",
        "images": round(float(np.mean(images)), 1),
        "classes_ratio": round(float(np.mean(classes)) / of_classes, 4),
        "n_shards": len(of.shards),
        "read_kb": round(of.n_block * 4 * dump.d_vit / 1024),
        "plan_ms_per_batch": round(1e3 * took_s / (n_warm + 100), 2),
        "checked": "counted in 100 batches",
    }


def uniform(n: int) -> float:
    """Expected number of different ones among BATCH draws from n."""
    return n * (1 - (1 - 1 / n) ** BATCH)


if __name__ == "__main__":
    main()
