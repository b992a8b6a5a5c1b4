"""The campaign itself: see the package. Run as `uv run python -m faults.campaign [--all | --n-flips N ...]`."""

import argparse
import collections.abc
import itertools
import json
import logging
import pathlib
import shutil
import subprocess
import sys
import tempfile
import typing as tp
import unittest.mock

import numpy as np

from saev import errors, helpers

from . import damage, kills
from .chain import Chain, interrupted
from .outcomes import Tally

T = tp.TypeVar("T")
Probe = collections.abc.Callable[[], str]


class Target(tp.NamedTuple):
    """Files of one sort, and the command that reads them."""

    name: str
    fpaths: list[pathlib.Path]
    probe: Probe
    """Runs the command; returns the digest of its result."""
    is_input: bool = False
    """Written by the user, so that another valid content is as good."""


# ---- what is read by whom ----


def targets(chain: Chain) -> list[Target]:
    """Every file that a later command reads back, with that command."""
    shards, run = chain.shards, chain.ckpt.parent
    results = next(p for p in chain.root.glob("results/*") if p.is_dir())
    small = [shards / name for name in _names(shards) if not name.endswith(".bin")]
    acts = sorted(shards.glob("acts*.bin"))[:1]
    out = [
        Target("activations", acts, chain.activations),
        Target("shard metadata", small, chain.activations),
        Target("verify: activations", acts, lambda: _verified(chain)),
        Target("verify: metadata", small, lambda: _verified(chain)),
        Target("SAE checkpoint", [chain.ckpt], lambda: chain.run_weights(chain.ckpt)),
    ]
    for fpath in sorted(chain.root.glob("scorers/*.bin")):
        out.append(Target("fitted scorer", [fpath], lambda f=fpath: chain.fitted(f)))
    read_back = ["about.json", "summary.csv", "kinds.csv", "resamples.npz"]
    out += [
        Target("results", [results / name for name in read_back], chain.report),
        Target("finished run", _finished_run(run), chain.runs),
        Target("gallery", [chain.root / "gallery/gallery.json"], lambda: _linked(chain)),
    ]
    return out


def _names(dpath: pathlib.Path) -> list[str]:
    return sorted(p.name for p in dpath.iterdir() if p.is_file() and not p.name.endswith(".lock"))


def _finished_run(run: pathlib.Path) -> list[pathlib.Path]:
    return [run / name for name in ("config.json", "metrics.json")]


def _verified(chain: Chain) -> str:
    """What `verify` says is right must read as it was written."""
    from saev.data import verify

    if problems := list(verify.problems(chain.shards, 1)):
        raise errors.UserError(problems[0])
    return chain.activations()


def _linked(chain: Chain) -> str:
    """The traits go into a copy, so that the gallery stays as visuals.py made it."""
    copy = chain.root / "linked"
    subprocess.run(["cp", "-a", chain.root / "gallery", copy], check=True)  # a FIFO too
    try:
        return chain.links(chain.evaluate(gallery="linked"))
    finally:
        shutil.rmtree(copy)


def interrupted_targets(chain: Chain) -> list[Target]:
    """States and caches that an interrupted command leaves, and the command that goes on from them."""
    with interrupted("train", 12):
        chain.train("half")
    states = sorted(chain.root.glob("half/*/state-*.pt"))
    with interrupted("score", 3):
        chain.evaluate("half-results")
    caches = sorted(p for p in chain.root.glob("half-results/.*.partial/**/*") if p.is_file())
    with interrupted("k-means, pass 2", 0):
        chain.evaluate("unused", "half-scorers")
    fits = sorted(chain.root.glob("half-scorers/*.state"))
    with interrupted("statistics", 0):  # all codes are written
        chain.look("half-gallery/g")
    codes = sorted(p for p in chain.root.glob("half-gallery/.g.pass/**/*") if p.is_file())
    assert states and caches and fits and codes, (states, caches, fits, codes)
    return [
        Target("training state", states, _on_a_copy(chain, "half", _train_on)),
        Target("scores of a pass", caches, _on_a_copy(chain, "half-results", _evaluate_on)),
        Target("k-means state", fits, _on_a_copy(chain, "half-scorers", _fit_on)),
        Target("codes of a gallery", codes, _on_a_copy(chain, "half-gallery", _look_on)),
    ]


def _on_a_copy(chain: Chain, name: str, go_on: collections.abc.Callable[[Chain, str], str]) -> Probe:
    """The command finishes in a copy of the interrupted folder, under the same name."""

    def probe() -> str:
        here, aside = chain.root / name, chain.root / f"{name}.aside"
        subprocess.run(["cp", "-a", here, aside], check=True)  # a FIFO too
        try:
            return go_on(chain, name)
        finally:
            shutil.rmtree(here)
            aside.rename(here)

    return probe


def _train_on(chain: Chain, name: str) -> str:
    return chain.run_weights(chain.train(name))


def _evaluate_on(chain: Chain, name: str) -> str:
    return chain.table(chain.evaluate(name))


def _fit_on(chain: Chain, name: str) -> str:
    results = chain.evaluate("fit-results", name)
    try:
        return chain.table(results)
    finally:
        shutil.rmtree(chain.root / "fit-results")


def _look_on(chain: Chain, name: str) -> str:
    return kills.files(pathlib.Path(chain.look(f"{name}/g")))


def inputs(chain: Chain) -> list[Target]:
    """Files that a user writes: nothing can tell whether they are right, so they only must not crash anything."""
    from saev.data import cub

    def labels() -> str:
        found = cub.load(chain.cub)
        return f"{found.labels_NT.sum()} {len(found.paths_N)}"

    names = ["images.txt", "train_test_split.txt", "image_class_labels.txt"]
    names += ["attributes/attributes.txt", "attributes/image_attribute_labels.txt"]
    fpaths = [chain.cub / name for name in names]
    fpaths = [f if f.exists() else chain.root / f.name for f in fpaths]
    photo = sorted(chain.cub.glob("images/*/*"))[:1]
    return [
        Target("CUB's text files", fpaths, labels, is_input=True),
        Target("a photo", photo, lambda: _dumped(chain), is_input=True),
    ]


def _dumped(chain: Chain) -> str:
    try:
        return chain.activations(pathlib.Path(chain.dump("other-shards")))
    finally:
        shutil.rmtree(chain.root / "other-shards", ignore_errors=True)


# ---- campaigns ----


def flips(tally: Tally, target: Target, n_each: int, seed: int) -> None:
    """One flipped bit at a time, in n_each places of each file."""
    expected = None if target.is_input else target.probe()
    for fpath in target.fpaths:
        with damage.kept(fpath) as data:
            for bit in damage.bits(len(data), n_each, seed):
                damage.overwrite(fpath, damage.flipped(data, bit))
                story = f"{fpath.name} bit {bit}"
                tally.attempt("bit flips", target.name, target.probe, expected, story)


def crafted(tally: Tally, target: Target, n_each: int, seed: int) -> None:
    """Other contents: of another kind, and (of JSON) with one value replaced; n_each of both together, for each file."""
    expected = None if target.is_input else target.probe()
    for fpath in target.fpaths:
        with damage.kept(fpath) as data:
            for what, content in _drawn(_contents(data), n_each, seed):
                damage.overwrite(fpath, content)
                story = f"{fpath.name}: {what}"
                tally.attempt("crafted files", target.name, target.probe, expected, story)
        with damage.kept(fpath):
            for what in itertools.islice(damage.no_files(fpath), max(1, n_each // 6)):
                story = f"{fpath.name}: {what}"
                # without metrics.json a run is reported from its log, and the report says so
                wanted = None if fpath.name == "metrics.json" else expected
                tally.attempt("crafted files", target.name, target.probe, wanted, story)


def _contents(data: bytes) -> list[tuple[str, bytes]]:
    out = [*damage.WHOLE.items(), ("cut in half", data[: len(data) // 2]), ("doubled", 2 * data)]
    line, newline, rest = data.partition(b"\n")
    for text, after in ((data, b""), (line, newline + rest)):  # a JSON file; a header or JSON Lines
        try:
            found = damage.mutations(json.loads(text))
        except (ValueError, RecursionError):
            continue
        return out + [(what, damage.to_bytes(obj) + after) for what, obj in found]
    return out


def _drawn(items: list[T], n: int, seed: int) -> list[T]:
    """n of the items, or all, in their order."""
    if n >= len(items):
        return items
    chosen = np.random.default_rng(seed).choice(len(items), n, replace=False)
    return [items[i] for i in sorted(chosen.tolist())]


class Size(tp.NamedTuple):
    """How much is tried. Where each attempt runs a whole command, a twentieth of the flips and contents."""

    n_flips: int = 20
    """Flipped bits of each file."""
    n_crafted: int = 20
    """Other contents of each file."""
    n_each: int = 1
    """Times that each command is killed and run to its end."""


QUICK, ALL = Size(), Size(2000, 10_000, 25)


def run(root: pathlib.Path, size: Size = QUICK, seed: int = 0) -> Tally:
    """Builds the chain in `root` and runs all campaigns, without log lines. Charts, which nothing reads back, are not drawn."""
    from saev.data import passes
    from saev.protoeval import score
    from saev.report import figures

    logger = logging.getLogger("saev")
    before = logger.level, passes.SAVE_S, score.MAX_BLOCK
    logger.setLevel(logging.CRITICAL)
    passes.SAVE_S, score.MAX_BLOCK = 0.0, 8  # so that a small pass can be interrupted
    undrawn = unittest.mock.patch.object(
        figures, "save", lambda _, fpath: helpers.write_text(fpath, "a chart")
    )
    try:
        with undrawn:
            return _run(root, size, seed)
    finally:
        logger.setLevel(before[0])
        passes.SAVE_S, score.MAX_BLOCK = before[1:]


def _run(root: pathlib.Path, size: Size, seed: int) -> Tally:
    tally = Tally()
    chain = Chain(root).build()
    for target in targets(chain):
        flips(tally, target, size.n_flips, seed)
        crafted(tally, target, size.n_crafted, seed)
    for target in interrupted_targets(chain) + inputs(chain):
        flips(tally, target, size.n_flips // 20, seed)
        crafted(tally, target, size.n_crafted // 20, seed)
    kills.campaign(tally, chain, size.n_each, 1 if size == QUICK else 2, seed)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="everything: hours")
    for name, value in QUICK._asdict().items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=value, help=f"default: {value}")
    parser.add_argument("--seed", type=int, default=0, help="which bits, values and moments")
    args = parser.parse_args()
    size = ALL if args.all else Size(args.n_flips, args.n_crafted, args.n_each)
    with tempfile.TemporaryDirectory() as folder:
        tally = run(pathlib.Path(folder), size, args.seed)
    print(tally.table())
    print("\n".join(tally.stories))
    sys.exit(1 if tally.total("wrong", "traceback", "hang") else 0)


if __name__ == "__main__":
    main()
