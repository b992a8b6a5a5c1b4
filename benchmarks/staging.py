"""After how many readings of the activations does --stage-to pay?

    uv run python -m benchmarks.staging [--gb GB] [--root DIR] [--stage-to DIR]

--root: a folder on the disk where shards lie (default: the system's temporary one). --stage-to: the fast one (default: /dev/shm,
which is memory). Run it in a job, with a folder of your scratch and '$TMPDIR', to decide for your cluster. Each reading is a
shuffled epoch. In place it is cold: files larger than memory do not stay in it.
"""

import argparse
import os
import pathlib
import shutil
import tempfile

from benchmarks import common, loading
from saev.data import config, shuffled
from saev.formats import staging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.4, help="size of the files")
    parser.add_argument("--root")
    parser.add_argument("--stage-to", default="/dev/shm")
    args = parser.parse_args()
    args.stage_to = os.path.expandvars(args.stage_to)
    gb = args.gb
    with (
        tempfile.TemporaryDirectory(dir=args.root) as root,
        tempfile.TemporaryDirectory(dir=args.stage_to) as fast,
    ):
        dpath = loading.write(pathlib.Path(root), gb, "float32")
        fpaths = sorted(dpath.glob("acts*.bin"))
        n = 0

        def cold() -> None:
            common.drop_page_cache(fpaths)

        def copied() -> float:
            cold()
            return common.seconds(lambda: [shutil.copyfile(f, f"{fast}/{f.name}") for f in fpaths])

        def staged() -> float:
            nonlocal n
            cold()
            shutil.rmtree(f"{fast}/{n}", ignore_errors=True)
            n += 1
            with staging.to(f"{fast}/{n}"):
                return common.seconds(lambda: staging.local(str(dpath)))

        def in_place() -> float:
            cold()
            return epoch(str(dpath), gb)

        def from_copy() -> float:
            with staging.to(f"{fast}/{n}"):
                return epoch(staging.local(str(dpath)), gb)

        staged()
        calls = {
            "copy": copied,
            "staging": staged,
            "epoch in place": in_place,
            "epoch from the copy": from_copy,
        }
        times = common.interleaved(calls, 3)
    common.report(
        [
            {
                "name": name,
                "ratio": common.median_ratio(times[name], times["copy"]),
                "reference": "a plain copy, cold",
            }
            | {"seconds": [round(s, 2) for s in times[name]], "gb": gb}
            for name in calls
        ]
    )
    saved_s = min(times["epoch in place"]) - min(times["epoch from the copy"])
    if saved_s <= 0:
        print("An epoch from the copy is not faster: --stage-to does not pay here.")
    else:
        print(f"--stage-to pays from {min(times['staging']) / saved_s:.1f} epochs on.")


def epoch(dpath: str, gb: float) -> float:
    """Seconds of a shuffled epoch, with a pool of a third of the activations."""
    stream = shuffled.Shuffled(config.Shards(dpath), batch_size=loading.BATCH, pool_bytes=int(gb / 3 * 1e9))
    batches = iter(stream)
    n_batches = len(stream.acts) // loading.BATCH
    took_s = common.seconds(lambda: [None for _, _ in zip(range(n_batches), batches, strict=False)])
    batches.close()
    return took_s


if __name__ == "__main__":
    main()
