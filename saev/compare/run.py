"""Compares dictionaries step by step: open, join, encode, correlate, match, report. See docs/compare.md."""

import itertools
import logging
import pathlib
import shutil

import numpy as np

from saev import devices, fields, helpers, machine, scorers
from saev.compare import config, correlate, gallery, match, memory, report, sides, store
from saev.data import activations

logger = logging.getLogger("saev")

REVISION = 2
"""Raise it when the same dictionaries, activations and config may give other numbers."""


def main(cfg: config.Compare) -> str:
    """Compares two dictionaries, or all pairs of --runs, and returns the results directory.

    The directory's name is a hash of everything that determines the results, so finished ones are reused.

    Raises:
        UserError: a bad checkpoint, shard directory or gallery, or fewer than two images in common.
    """
    found = sides.open_all(cfg)
    shown = gallery.opened(cfg, found)
    joined = sides.join(found, cfg)
    out = pathlib.Path(cfg.dump_to) / _id(cfg, found, joined)
    out.parent.mkdir(parents=True, exist_ok=True)
    helpers.sweep(out.parent)
    with helpers.locked(out.with_name(f".{out.name}.partial.lock"), f"it compares {out}"):
        if out.exists():
            logger.info("%s: already compared", out)
        else:
            _compare(cfg, found, joined, out)
    if shown:
        gallery.write(shown, found, out)
    return str(out)


def _id(cfg: config.Compare, found: list[sides.Side], joined: sides.Joined) -> str:
    parts: list[object] = [REVISION, scorers.REVISION, fields.identity(cfg), joined.per_patch]
    for side, acts in zip(found, joined.acts, strict=True):
        parts += [side.name, side.scorer.digest(), acts.fingerprint]
    return helpers.hash_of(parts)[:12]


def _compare(cfg: config.Compare, found: list[sides.Side], joined: sides.Joined, out: pathlib.Path) -> None:
    if devices.pick(cfg.device).type == "cpu":  # the formula holds on a CPU
        sizes = [_sizes(side, acts, joined.per_patch) for side, acts in zip(found, joined.acts, strict=True)]
        machine.log_need(memory.peak(cfg, sizes))
    partial = out.with_name(f".{out.name}.partial")  # a killed pass resumes from here
    stores = _encode(cfg, found, joined, partial)
    stats = [correlate.moments(codes) for codes in stores]
    pairs = [
        _pair(cfg, (a, b), found, joined, stores, stats)
        for a, b in helpers.progress(
            itertools.combinations(range(len(found)), 2),
            "compare",
            len(found) * (len(found) - 1) // 2,
            "pairs",
        )
    ]
    report.write(out, cfg, found, joined, stats, pairs)
    shutil.rmtree(partial, ignore_errors=True)


def _sizes(side: sides.Side, acts: activations.Activations, per_patch: bool) -> memory.Side:
    """An SAE whose config does not decide it is taken to have one latent in a hundred on a patch."""
    n, n_imgs = side.scorer.n_prototypes, acts.n_imgs
    n_codes = n
    if side.sae:
        n_codes = min(n, (1 if per_patch else 8) * (side.sae.cfg.n_firing or max(1, n // 100)))
    n_rows = n_imgs * acts.n_tokens if per_patch else n_imgs
    return memory.Side(n, acts.d_vit, n_imgs, acts.n_tokens, n_rows, n_codes, bool(side.sae))


def _encode(
    cfg: config.Compare, found: list[sides.Side], joined: sides.Joined, partial: pathlib.Path
) -> list[store.Store]:
    """Each side's codes. Dictionaries on one stream are encoded in one pass."""
    values = store.per_image_max if cfg.pool == "max" else store.per_image_mean
    values = store.per_patch if joined.per_patch else values
    out: dict[int, store.Store] = {}
    for i, acts in enumerate(dict.fromkeys(joined.acts)):
        mine = [n for n, other in enumerate(joined.acts) if other is acts]
        run = [found[n].scorer for n in mine]
        codes = store.encode(run, acts, values, partial / str(i), devices.pick(cfg.device))
        out |= dict(zip(mine, codes, strict=True))
    return [out[n] for n in range(len(found))]


def _pair(
    cfg: config.Compare,
    which: tuple[int, int],
    found: list[sides.Side],
    joined: sides.Joined,
    stores: list[store.Store],
    stats: list[correlate.Moments],
) -> report.Pair:
    """Matches of two sides, the same with permuted images, and matches by cosine in one space."""
    one, two = (stores[n] for n in which)
    both = (stats[which[0]], stats[which[1]])
    order_one, order_two = (joined.order[n] for n in which)
    shuffled = order_two[permuted(len(order_two), cfg.seed)]
    matched, null = (
        match.match(
            correlate.tiles(one, two, (order_one, order), both, cfg.memory_gb),
            one.n_latents,
            two.n_latents,
            candidates=0 if cfg.runs else cfg.candidates,
        )
        for order in (order_two, shuffled)
    )
    cosines = None
    if found[which[0]].is_in_space_of(found[which[1]]):
        directions = sides.directions(found[which[0]], found[which[1]])
        cosines = match.cosines(*directions, both[0].is_live_S, both[1].is_live_S, cfg.seed)
    return report.Pair(*which, matched, null, cosines)


def permuted(n: int, seed: int) -> np.ndarray:
    """A random permutation of n images that leaves none in its place (one cycle)."""
    order_N = np.random.default_rng([seed, 1]).permutation(n)
    out_N = np.empty(n, np.int64)
    out_N[order_N] = np.roll(order_N, 1)
    return out_N
