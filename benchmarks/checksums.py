"""What checksums of checkpoints and scores cost, and what they see: flipped bits of every kind of file that a later command reads.

uv run python -m benchmarks.checksums [--quick]
"""

import argparse
import collections
import collections.abc
import io
import pathlib
import random
import tempfile

import numpy as np
import torch

from benchmarks import common
from saev import errors, nn, scorers
from saev.formats import checkpoint, jsonfile, manifest, results, tensors
from saev.nn import config
from saev.protoeval import merge, report, score
from saev.scorers import base, kmeans
from saev.training import state

Read = collections.abc.Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few bits: under 40 s")
    is_quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as tmp:
        root = pathlib.Path(tmp)
        counts = {
            name: flipped(fpath, read, 300 if is_quick else 4000)
            for name, (fpath, read) in {**checkpoints(root), **tables(root)}.items()
        }
        print("| file | flipped bits | refused | same values | other values | tracebacks |")
        print("|---|---|---|---|---|---|")
        for name, count in counts.items():
            cells = [count[key] for key in ("refused", "same", "other", "traceback")]
            print(f"| {name} | {count.total():,} | {' | '.join(map(str, cells))} |")
        total = sum(counts.values(), collections.Counter())
        cases = [loading(root, 3 if is_quick else 15), scoring_blocks(3 if is_quick else 15)]
    common.report([case | {"flips": dict(total)} for case in cases])


def flipped(fpath: pathlib.Path, read: Read, n: int) -> collections.Counter[str]:
    """What becomes of n single flipped bits (all, where there are fewer)."""
    content, want, count = fpath.read_bytes(), repr(read()), collections.Counter()
    places = range(8 * len(content))
    for i in random.Random(0).sample(places, min(n, len(places))):
        bad = bytearray(content)
        bad[i // 8] ^= 1 << i % 8
        fpath.write_bytes(bad)
        try:
            count["same" if repr(read()) == want else "other"] += 1
        except errors.UserError as err:
            count["refused" if "\n" not in str(err) else "traceback"] += 1
        except Exception:
            count["traceback"] += 1
    fpath.write_bytes(content)
    return count


def checkpoints(root: pathlib.Path) -> dict[str, tuple[pathlib.Path, Read]]:
    sae_fpath, scorer_fpath, kmeans_fpath = (root / n for n in ("sae.pt", "x.bin", "x.state"))
    nn.save(nn.SparseAutoencoder(config.TopK(d_vit=6, exp_factor=3, top_k=2)), sae_fpath)
    scorers.save(base.Prototypes(torch.randn(3, 6), torch.zeros(6), "dot"), scorer_fpath)
    kmeans._write_state(kmeans.State(torch.zeros(6), torch.randn(3, 6), 2.5, 3), kmeans_fpath)
    state.save(root, 5, {"w": torch.randn(30), "t": 3}, keep_last=1)

    def sae() -> object:
        found = nn.load(sae_fpath)
        return found.cfg, {name: t.tolist() for name, t in found.state_dict().items()}

    return {
        "SAE": (sae_fpath, sae),
        "scorer": (scorer_fpath, lambda: scorers.load(scorer_fpath).digest()),
        "training state": (root / "state-000000005.pt", lambda: state.load(root, 5)),
        "k-means state": (kmeans_fpath, lambda: checkpoint.read(kmeans_fpath, "state")),
    }


def tables(root: pathlib.Path) -> dict[str, tuple[pathlib.Path, Read]]:
    """JSON of a run, and what --report reads of a results directory."""
    run_fpath, dpath = root / "config.json", root / "results" / "x"
    run_fpath.write_text(jsonfile.seal({"lr": 1e-3, "sae": {"d_vit": 8}, "name": "é"}))
    about = results.About(
        "vit", 1, "tokens", ["s"], "f" * 64, 3, 0, 1, 2, "2026", {"Random": {"cls": "Random"}}
    )
    ap_RT = np.array([[0.3, 0.4]])
    rows = [
        results.Row(name, 8, 9, np.zeros((1, 2), np.int64), ap_RT, ap_RT, ap_RT)
        for name in ("constant", "Random")
    ]
    report.write(dpath, rows, ["a::b", "c::d"], [], about)
    names = (*results.FILES, manifest.NAME)
    return {"config.json": (run_fpath, lambda: run_json(run_fpath))} | {
        name: (dpath / name, lambda: merge._read(dpath)) for name in names
    }


def run_json(fpath: pathlib.Path) -> object:
    return jsonfile.read_sealed(fpath, dict, "Leave it out.", old=True)


def loading(root: pathlib.Path, n_repeats: int) -> common.Case:
    """Reading an SAE of 768 x 12,288: checksum, CRC and the search for NaN, next to torch.load alone."""
    fpath = root / "large.pt"
    nn.save(nn.SparseAutoencoder(config.TopK(d_vit=768, exp_factor=16)), fpath)

    def plain() -> None:
        with fpath.open("rb") as fd:
            fd.readline()
            torch.load(io.BytesIO(fd.read()), weights_only=True)

    def checked() -> None:
        _, payload = checkpoint.read(fpath, "sae")
        tensors.check_finite(tensors.load(payload, "", ""), "", "")

    return case("tensors of a checkpoint", "torch.load", checked, plain, n_repeats)


def scoring_blocks(n_repeats: int) -> common.Case:
    """A block of protoeval's pass with the checksum of its scores."""
    scorer = base.Prototypes(torch.randn(2048, 384), torch.zeros(384), "cosine")
    acts_BPD = torch.randn(64, 196, 384)

    def plain() -> np.ndarray:
        return scorer.of_images(acts_BPD).T.contiguous().numpy()

    def checked() -> None:
        score._checksums(plain(), acts_BPD[:, 0].numpy(), [slice(None)])

    return case("scores of a block", "the same without checksums", checked, plain, n_repeats)


def case(name: str, reference: str, checked: Read, plain: Read, n_repeats: int) -> common.Case:
    calls = {"checked": checked, "plain": plain}
    timed = common.interleaved({n: lambda c=c: common.seconds(c) for n, c in calls.items()}, n_repeats)
    ratio = common.median_ratio(timed["checked"], timed["plain"])
    return {"name": name, "ratio": round(ratio, 3), "reference": reference}


if __name__ == "__main__":
    main()
