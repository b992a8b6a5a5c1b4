"""How fast the loaders are, against reading the same files from end to end. N images, X tokens of an image, D d_vit.

    uv run python -m benchmarks.loading [--quick] [--root DIR] [--gb GB] [--in-order] [--breakdown | --bounds]

Cold: the files are taken out of the page cache before each pass; the reference is one thread that reads them in
16 MB pieces. "direct" reads past the page cache, as the shuffled loader does by itself if memory cannot hold the files; "raw direct" is
such a thread. `cpu_s_per_gb` is processor time. Warm: the reference is copying as many bytes in memory. The shuffled loader's time runs from its
first batch to the moment when it has read the whole epoch: in this span each activation that it hands out is
paid for by one that it reads, as in a long run. "kept" is a stream in half precision for a GPU, which converts it itself.
"checksums" cases give each loader's speed as a share of its speed when it does not compare what it reads.

`per_core` (warm) compares bytes per second of processor time with memcpy's, which disturbances by other programs change
less than the ratio. Times the number of free cores it bounds the ratio. The page cache holds files in small pieces if they came as the shuffled
loader's blocks (of the cold cases before), and in large ones if they were written or read in order, which halves the time
of a read: --in-order drops them before the warm cases and reads them in order. --breakdown prints the processor time of the
shuffled loader's parts instead, in milliseconds per batch of 4,096. --bounds prints the time of its moves of memory alone, with one
thread and with two: where two are no faster, cores share the bandwidth.
"""

import argparse
import collections
import collections.abc
import concurrent.futures
import contextlib
import functools
import os
import pathlib
import tempfile
import time
import types
import typing as tp
import unittest.mock

import numba
import numpy as np

from benchmarks import common
from saev.data import aio, config, extents, mixing, moves, ordered, shuffled
from saev.formats import shards

N_PATCHES, D, BATCH = 256, 384, 4096
PER_SHARD = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small files, few repeats: under 40 s")
    parser.add_argument("--root", help="folder for the files (default: the system's temporary one)")
    parser.add_argument("--gb", type=float, help="size of the files")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--in-order", action="store_true", help="warm: files that were read in order")
    parser.add_argument(
        "--breakdown", action="store_true", help="processor time of the shuffled loader's parts"
    )
    parser.add_argument(
        "--bounds", action="store_true", help="the moves of memory alone, with one thread and with two"
    )
    args = parser.parse_args()
    gb = args.gb or (1.2 if args.quick else 4.0)
    n_repeats = args.repeats or 5
    sizes = {"float32": gb} if args.quick else {"float32": gb, "bfloat16": gb / 2, "float16": gb / 2}
    cases = []
    for dtype, size in sizes.items():
        with tempfile.TemporaryDirectory(dir=args.root) as root:
            dpath = write(pathlib.Path(root), size, dtype)
            if args.breakdown:
                breakdown(dpath, dtype, size, n_repeats)
                continue
            if args.bounds:
                bounds(dpath, dtype, size, n_repeats)
                continue
            for cold in (True, False):
                cases += measure(dpath, dtype, cold, size, n_repeats, args.threads, args.in_order)
    if cases:
        common.report(cases)


def write(root: pathlib.Path, gb: float, dtype: str) -> pathlib.Path:
    """A dump of random activations. The first two values of each tell its place in the stream (exact in every dtype)."""
    n_imgs = int(gb * 1e9 / ((N_PATCHES + 1) * D * (4 if dtype == "float32" else 2)))
    metadata = shards.Metadata(
        vit_family="timm",
        vit_ckpt="random",
        layers=(11,),
        n_patches_per_img=N_PATCHES,
        cls_token=True,
        d_vit=D,
        n_imgs=n_imgs,
        max_patches_per_shard=PER_SHARD * (N_PATCHES + 1),
        data={},
        **shards.stored_as(dtype),
    )
    records = [shards.Record(f"{i}.png", "") for i in range(n_imgs)]
    out = shards.ShardDir.create(root, metadata, records, {})
    block_NLTD = np.random.default_rng(0).standard_normal((100, 1, N_PATCHES + 1, D), np.float32)
    for shard_i in range(metadata.n_shards):
        with out.writing(shard_i) as writer:
            image_is = metadata.imgs_in(shard_i)
            for start in range(image_is.start, image_is.stop, 100):
                n = min(100, image_is.stop - start)
                mark(block_NLTD, start)
                writer.write(block_NLTD[:n])
    return out.dpath


def mark(block_NLTD: np.ndarray, start: int) -> None:
    """Writes (image, patch) into the first values, in digits to base 128."""
    image_i_N = np.arange(start, start + len(block_NLTD))
    for digit in range(3):
        block_NLTD[:, 0, :, digit] = (image_i_N // 128**digit % 128)[:, None]
    block_NLTD[:, 0, 1:, 3] = np.arange(N_PATCHES) % 128
    block_NLTD[:, 0, 1:, 4] = np.arange(N_PATCHES) // 128


def marked(act_BD: np.ndarray) -> np.ndarray:
    """image * N_PATCHES + patch of each activation."""
    image_i_B = act_BD[:, :3] @ np.array([1, 128, 128**2], np.float64)
    patch_i_B = act_BD[:, 3:5] @ np.array([1, 128], np.float64)
    return (image_i_B * N_PATCHES + patch_i_B).astype(np.int64)


def measure(
    dpath: pathlib.Path, dtype: str, cold: bool, gb: float, n_repeats: int, n_threads: int, in_order: bool
) -> list[common.Case]:
    cfg = config.Shards(str(dpath))
    fpaths = sorted(dpath.glob("acts*.bin"))
    n_bytes = sum(f.stat().st_size for f in fpaths)
    first_s: list[float] = []
    loop_cpu_s: list[float] = []

    def prepare() -> None:
        if cold:
            common.drop_page_cache(fpaths)

    def raw(flags: int = 0) -> float:
        prepare()
        return n_bytes / common.seconds(lambda: read_all(fpaths, flags))

    def copy() -> float:
        return n_bytes / common.seconds(lambda: copy_all(n_bytes))

    def in_order() -> float:
        prepare()
        stream = ordered.Ordered(cfg)
        return n_bytes / common.seconds(lambda: sum(len(b.image_i_N) for b in stream))

    def shuffle(keep_half: bool, direct: bool = False) -> float:
        prepare()
        pool_bytes = int(pool_gb * 1e9)
        stream = shuffled.Shuffled(
            cfg,
            batch_size=BATCH,
            pool_bytes=pool_bytes,
            n_threads=n_threads,
            keep_half=keep_half,
            direct=direct,
        )
        layout = stream.layout
        n_batches = (layout.n_acts - layout.n_pool) // BATCH
        start_s = time.perf_counter()
        batches = iter(stream)
        next(batches)
        first_s.append(time.perf_counter() - start_s)
        start_cpu_s = time.process_time()
        took_s = common.seconds(lambda: [None for _, _ in zip(range(n_batches), batches, strict=False)])
        loop_cpu_s.append((time.process_time() - start_cpu_s) / (n_batches * BATCH * layout_bytes(stream)))
        batches.close()
        return n_batches * BATCH * layout_bytes(stream) / took_s

    def believing(call: collections.abc.Callable[[], float]) -> float:
        """The same loader, without comparing."""
        with (
            unittest.mock.patch.object(extents.File, "compare", lambda *_: None),
            unittest.mock.patch.object(moves, "read", believing_read),
        ):
            return call()

    pool_gb = round(gb / 3, 2)
    calls = {"reference": raw if cold else copy, "ordered": in_order}
    calls["shuffled"] = lambda: shuffle(False)
    if cold:
        calls["raw direct"] = lambda: raw(aio.FLAG)
        calls["shuffled direct"] = lambda: shuffle(False, direct=True)
    if dtype != "float32":
        calls["shuffled kept"] = lambda: shuffle(True)
    if dtype != "float32" and cold:
        calls["shuffled direct kept"] = lambda: shuffle(True, direct=True)
    for name in ("ordered", "shuffled"):
        calls[f"{name} without"] = functools.partial(believing, calls[name])
    cpu_s: dict[str, list[float]] = {name: [] for name in calls}

    def counted(name: str) -> float:
        start_s = time.process_time()
        loop_cpu_s.clear()
        rate = calls[name]()
        whole_s = time.process_time() - start_s
        cpu_s[name].append(loop_cpu_s[0] * n_bytes if loop_cpu_s else whole_s)
        return rate

    checked = {"ordered": check_ordered(cfg)} | {
        name: check_shuffled(cfg, int(pool_gb * 1e9), "kept" in name, "direct" in name)
        for name in calls
        if name.startswith("shuffled") and "without" not in name
    }
    if cold:
        checked["raw direct"] = "nothing"
    touched()
    if in_order:
        common.drop_page_cache(fpaths)
    if not cold:
        read_all(fpaths)
    rates = common.interleaved({name: functools.partial(counted, name) for name in calls}, n_repeats)
    reference = "raw sequential read, cold" if cold else "memcpy"
    return [
        {
            "name": f"{name}, {dtype}, {'cold' if cold else 'warm'}",
            "ratio": common.median_ratio(rates[name], rates["reference"]),
            "reference": reference,
            "mb_per_s": round(float(np.median(rates[name])) / 1e6),
            "reference_mb_per_s": round(float(np.median(rates["reference"])) / 1e6),
            "pool_gb": pool_gb,
            "spread": [round(a / b, 3) for a, b in zip(rates[name], rates["reference"], strict=True)],
            "of_raw_direct": common.median_ratio(rates[name], rates["raw direct"]) if cold else None,
            "cpu_s_per_gb": round(1e9 * min(cpu_s[name]) / n_bytes, 3),
            "reference_cpu_s_per_gb": round(1e9 * min(cpu_s["reference"]) / n_bytes, 3),
            "per_core": None if cold else round(min(cpu_s["reference"]) / min(cpu_s[name]), 3),
            "checked": checked[name],
        }
        for name in checked
    ] + [
        {
            "name": f"checksums, {name}, {dtype}, {'cold' if cold else 'warm'}",
            "ratio": common.median_ratio(rates[name], rates[f"{name} without"]),
            "reference": "the same loader without comparing",
            "cpu_ratio": common.median_ratio(cpu_s[name], cpu_s[f"{name} without"]),
            "spread": [round(a / b, 3) for a, b in zip(rates[name], rates[f"{name} without"], strict=True)],
            "checked": checked[name],
        }
        for name in ("ordered", "shuffled")
    ]


def _believed(c, start_n, start, n, data, sums):
    return True


believing_read = numba.njit(nogil=True)(
    types.FunctionType(
        moves.read.py_func.__code__, vars(moves) | {"_is_intact": numba.njit(nogil=True)(_believed)}
    )
)
"""`moves.read` without comparing."""


LABELS = (
    "plan and hand out (all)",
    "  draws",
    "  next blocks",
    "read into the pool (all)",
    "  compiled: read, compare, move to slots",
    "copy into the batch (all)",
    "  compiled copy, with the check for NaN",
)


def breakdown(dpath: pathlib.Path, dtype: str, gb: float, n_repeats: int) -> None:
    """Prints the least processor time of each part in `n_repeats` epochs, warm, and of the same bytes' memcpy."""
    touched()
    read_all(sorted(dpath.glob("acts*.bin")))
    took_s: dict[str, float] = collections.defaultdict(float)

    def timed(owner: tp.Any, name: str, label: str) -> tp.Any:
        call = getattr(owner, name)

        def wrapped(*args: tp.Any) -> tp.Any:
            start_s = time.thread_time()
            try:
                return call(*args)
            finally:
                took_s[label] += time.thread_time() - start_s

        return unittest.mock.patch.object(owner, name, wrapped)

    pool, batch = shuffled._Pool, shuffled._Batch
    measured = [(pool, "draw"), (mixing._Epoch, "draw"), (pool, "_read_ahead"), (pool, "_read_share")]
    measured += [(moves, "read"), (batch, "fill"), (moves, "fill")]
    parts = [timed(owner, name, label) for (owner, name), label in zip(measured, LABELS, strict=True)]
    for keep_half in (False, True) if dtype != "float32" else (False,):
        found: list[dict[str, float]] = []
        for _ in range(n_repeats):
            stream = shuffled.Shuffled(
                config.Shards(str(dpath)), batch_size=BATCH, pool_bytes=int(gb / 3 * 1e9), keep_half=keep_half
            )
            n = (stream.layout.n_acts - stream.layout.n_pool) // BATCH
            with contextlib.ExitStack() as stack:
                for part in parts:
                    stack.enter_context(part)
                batches = stream.batches()
                next(batches)
                took_s.clear()
                start_s = time.process_time()
                for _, _ in zip(range(n), batches, strict=False):
                    pass
                took_s["everything"] = time.process_time() - start_s
                batches.close()
            start_s = time.process_time()
            copy_all(n * BATCH * stream.acts.token_bytes)
            took_s["memcpy of the same bytes"] = time.process_time() - start_s
            found.append({name: 1e3 * s / n for name, s in took_s.items()})
        print(f"\n{dtype}{', kept' if keep_half else ''}: ms of processor time per batch")
        for name in [*LABELS, "everything", "memcpy of the same bytes"]:
            print(f"  {name:40}{min(f[name] for f in found):8.3f}")


def bounds(dpath: pathlib.Path, dtype: str, gb: float, n_repeats: int) -> None:
    """Prints the least time of memcpy, of reads of blocks from the page cache, and of copies out of a pool as large as
    the loader's, for the bytes of a batch as stored."""
    fpath = max(dpath.glob("acts*.bin"), key=lambda f: f.stat().st_size)
    n_bytes, stored = (
        BATCH * D * (4 if dtype == "float32" else 2),
        np.uint32 if dtype == "float32" else np.uint16,
    )
    rng, n_batches = np.random.default_rng(0), 50
    read_all([fpath])
    block_is = rng.permutation(fpath.stat().st_size // mixing.READ_BYTES)
    pool_PD = np.ones((int(gb / 3 * 1e9) // (n_bytes // BATCH), D), stored)
    slots_nB = [rng.permutation(len(pool_PD))[:BATCH] for _ in range(n_batches)]
    large, target = np.ones((2, 64 * 2**20), np.uint8)

    def memcpy(share: int, n_shares: int) -> None:
        part, into = (np.array_split(array, n_shares)[share] for array in (large, target))
        for _ in range(n_batches * n_bytes // len(large) + 1):
            np.copyto(into, part)

    def blocks(share: int, n_shares: int) -> None:
        buffer = bytearray(mixing.READ_BYTES)
        with fpath.open("rb", buffering=0) as fd:
            for i in np.resize(block_is, n_batches * n_bytes // len(buffer))[share::n_shares].tolist():
                os.preadv(fd.fileno(), [buffer], i * len(buffer))

    def rows(share: int, n_shares: int) -> None:
        out_nD = np.ones((-(-BATCH // n_shares), D), stored)
        for slot_B in slots_nB:
            slot_n = np.array_split(slot_B, n_shares)[share]
            moves.take(moves.SAME, pool_PD, slot_n, moves.LARGEST[dtype], out_nD[: len(slot_n)])

    rows(0, 1)  # compile
    print(f"\n{dtype}: ms per batch with 1 and 2 threads")
    copied = (n_batches * n_bytes // len(large) + 1) * len(large) / n_bytes  # batches
    parts = {"memcpy": (memcpy, copied), "blocks from the page cache": (blocks, n_batches)}
    parts["rows out of the pool, with the check for NaN"] = (rows, n_batches)
    for name, (part, n) in parts.items():
        least_ms = []
        for n_threads in (1, 2):
            with concurrent.futures.ThreadPoolExecutor(n_threads) as threads:
                call = functools.partial(_in_threads, threads, part, n_threads)
                least_ms.append(1e3 * min(common.seconds(call) for _ in range(n_repeats)) / n)
        print(f"  {name:45}{least_ms[0]:8.3f}{least_ms[1]:8.3f}")


def _in_threads(
    threads: concurrent.futures.ThreadPoolExecutor, part: collections.abc.Callable[[int, int], None], n: int
) -> None:
    for done in [threads.submit(part, share, n) for share in range(n)]:
        done.result()


def layout_bytes(stream: shuffled.Shuffled) -> float:
    """Bytes in the files for each activation handed out: [CLS] is in between."""
    return stream.acts.token_bytes * (N_PATCHES + 1) / N_PATCHES


def read_all(fpaths: list[pathlib.Path], flags: int = 0) -> None:
    buffer = moves.aligned(16 * 2**20, moves.PAGE).data
    for fpath in fpaths:
        fd, at = os.open(fpath, os.O_RDONLY | flags), 0
        while n := os.preadv(fd, [buffer], at):
            at += n
            if n < len(buffer):
                break
        os.close(fd)


@functools.cache
def touched() -> tuple[np.ndarray, np.ndarray]:
    """Two arrays whose memory is there: the first write to new memory takes several times as long as a copy."""
    return np.ones(64 * 2**20, np.uint8), np.ones(64 * 2**20, np.uint8)


def copy_all(n_bytes: int) -> None:
    source, target = touched()
    for _ in range(round(n_bytes / len(source))):
        np.copyto(target, source)


def check_ordered(cfg: config.Shards) -> str:
    n = 0
    for image_i_N, act_NXD in ordered.Ordered(cfg):
        got = marked(act_NXD.reshape(-1, D))
        want = (image_i_N[:, None] * N_PATCHES + np.arange(N_PATCHES)).reshape(-1)
        assert (got == want).all()
        n += len(got)
    return f"{n} activations at their place"


def check_shuffled(cfg: config.Shards, pool_bytes: int, keep_half: bool, direct: bool) -> str:
    """One epoch: each activation once, and where it says."""
    stream = shuffled.Shuffled(
        cfg, batch_size=BATCH, pool_bytes=pool_bytes, keep_half=keep_half, direct=direct
    )
    n_acts = stream.layout.n_acts
    seen = np.zeros(n_acts, np.int64)
    for at, batch in zip(range(0, n_acts, BATCH), stream, strict=False):
        got = marked(batch.act_BD.float().numpy())
        assert (got == batch.image_i_B * N_PATCHES + batch.patch_i_B).all()
        seen[got[: n_acts - at]] += 1
    assert (seen == 1).all()
    return f"{n_acts} activations once each in an epoch, at their place"


if __name__ == "__main__":
    main()
