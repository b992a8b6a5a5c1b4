"""Stage 3: encodes the activations once, computes everything from the codes, and writes a gallery.

S latents, C chosen ones, F latents that fire.
"""

import collections.abc
import contextlib
import dataclasses
import logging
import pathlib
import shutil

import beartype
import numpy as np
from jaxtyping import Int64, jaxtyped

from saev import devices, errors, helpers, machine
from saev.data import activations, pictures
from saev.visuals import coders, config, memory, spool, statistics, write

logger = logging.getLogger("saev")

MAX_CHECKED = 10_000
"""Number of image paths that are checked before the pass, about."""


def main(cfg: config.Visuals) -> str:
    """Makes the gallery and returns its folder.

    Raises:
        UserError: bad scorer, shards or images, or no latent passes the filters.
    """
    device = devices.pick(cfg.device)
    acts = activations.Activations.open(dataclasses.replace(cfg.data, patches="image"))
    acts.only_layer("a gallery shows")
    acts.only_whole("a gallery shows")
    coder = coders.load(cfg, acts, device)
    for flag, latents in (("--include-latents", cfg.include_latents), ("--figure", cfg.figure)):
        if bad := [i for i in latents if i >= coder.n]:
            raise errors.UserError(f"{flag} {bad[0]}: the scorer has {coder.noun}s 0 to {coder.n - 1}.")
    shown = pictures.Pictures.of(cfg.images, acts, cfg.thumb_side)
    if shown.transform is None:
        logger.info("%s: has no transform.json; heat maps assume a square centre crop", cfg.data.shard_root)
    dpath = pathlib.Path(cfg.dump_to).resolve()
    helpers.sweep(dpath.parent, dpath.name)
    write.check_target(dpath)
    # Before the long pass, check that images exist: all of a small data set, a sample of a large one.
    image_is = acts.image_is_N
    shown.check(image_is[:: max(1, len(image_is) // MAX_CHECKED)].tolist())
    sizes = memory.Sizes(acts.n_imgs, acts.n_tokens, acts.d_vit, coder.n)
    if device.type == "cpu":  # the formula holds on a CPU
        machine.log_need(memory.peak(cfg, sizes))
    with _scratch(dpath) as scratch:
        codes = spool.run(coder, acts, cfg.n_images, sizes.block, scratch)
        classes = write.Classes.of(acts)
        of_images = classes.class_N, len(classes.names)
        stats = statistics.collect(coder, codes, cfg.n_images, cfg.n_group, cfg.seed, *of_images)
        chosen_C = choose(cfg, coder, stats)
        write.write(dpath, _gallery(cfg, coder, acts, codes, stats, chosen_C, classes, shown))
    return cfg.dump_to


def _gallery(
    cfg: config.Visuals,
    coder: coders.Coder,
    acts: activations.Activations,
    codes: spool.Spool,
    stats: statistics.Stats,
    chosen_C: Int64[np.ndarray, " C"],
    classes: write.Classes,
    shown: pictures.Pictures,
) -> write.Gallery:
    """What the gallery's files are made from."""
    layer = acts.only_layer("a gallery shows")
    sha256 = helpers.hash_file(pathlib.Path(cfg.source)) if cfg.source else helpers.hash_of(coder.digest())
    return write.Gallery(
        title=coders.title(cfg, layer),
        scorer={
            "name": coders.describe(coder),
            "kind": coder.kind,
            "n": coder.n,
            "noun": coder.noun,
            "signed": coder.is_signed or bool((stats.low_S < 0).any()),
            "fires": coder.fires,
            "ckpt": cfg.source,
            "sha256": sha256,
        },
        source={
            "vit": acts.metadata.vit_ckpt,
            "layer": layer,
            "data": pathlib.Path(cfg.images.root).name,
            "n_images": acts.n_imgs,
            "n_patches": acts.n_tokens,
            "grid": list(shown.grid),
            "size": list(shown.size),
            "transform": shown.words,
        }
        | ({} if acts.photos.sizes_A2 is None else {"padded": True}),
        filters=filters(cfg, coder),
        coder=coder,
        acts=acts,
        codes=codes,
        stats=stats,
        chosen_C=chosen_C,
        shown=statistics.images_of(stats, chosen_C, cfg.n_images, cfg.n_group, cfg.seed),
        view=_evenly(acts.n_imgs, cfg.image_view),
        classes=classes,
        pictures=shown,
        seed=cfg.seed,
        gallery={
            "ckpt": cfg.source,
            "sha256": sha256,
            "kind": coder.kind,
            "filters": filters(cfg, coder),
            "images": str(shown.root.absolute()),
        },
    )


@contextlib.contextmanager
def _scratch(dpath: pathlib.Path) -> collections.abc.Generator[pathlib.Path]:
    """A folder beside the gallery for the pass. It stays if the gallery fails, for the next command."""
    scratch = dpath.with_name(f".{dpath.name}.pass")
    lock = dpath.with_name(f".{dpath.name}.pass.lock")
    with helpers.locked(lock, f"it makes {dpath}"):
        yield scratch
        shutil.rmtree(scratch, ignore_errors=True)


def _evenly(n: int, k: int) -> list[int]:
    """At most k numbers below n, evenly spaced."""
    return np.unique(np.linspace(0, n - 1, min(n, k)).astype(np.int64)).tolist() if k else []


# ---- which latents ----


@jaxtyped(typechecker=beartype.beartype)
def choose(cfg: config.Visuals, coder: coders.Coder, stats: statistics.Stats) -> Int64[np.ndarray, " C"]:
    """The latents to show, in the order of the gallery's rows.

    Prototypes that no patch fires are shown too: images have scores for them.

    Raises:
        UserError: no latent passes the filters.
    """
    if cfg.include_latents:
        return _sorted(cfg, stats, np.array(sorted(set(cfg.include_latents)), np.int64))
    live_F = np.flatnonzero((stats.fired_S > 0) | coder.is_ranked_by_score)
    with np.errstate(divide="ignore"):
        log_freq_F = np.log10(stats.freq_S[live_F]).clip(min=-1000)
        log_mean_F = np.log10(np.nan_to_num(stats.mean_S[live_F])).clip(min=-1000)
    (f_low, f_high), (v_low, v_high) = cfg.log_freq_range, cfg.log_value_range
    in_freq_F = (f_low <= log_freq_F) & (log_freq_F <= f_high)
    chosen_C = live_F[in_freq_F & (v_low <= log_mean_F) & (log_mean_F <= v_high)]
    if not len(chosen_C):
        found = _found(log_freq_F, log_mean_F, coder)
        raise errors.UserError(f"no {coder.noun} lies in --log-freq-range and --log-value-range. {found}")
    return _sorted(cfg, stats, chosen_C)[: cfg.top_k]


def _sorted(cfg: config.Visuals, stats: statistics.Stats, chosen_C: np.ndarray) -> np.ndarray:
    by = {"freq": stats.freq_S, "mean": stats.mean_S, "max": stats.high_S, "n-images": stats.images_S}
    if cfg.sort_by == "id":
        return chosen_C
    return chosen_C[np.argsort(-np.nan_to_num(by[cfg.sort_by][chosen_C]), kind="stable")]


def _found(log_freq_F: np.ndarray, log_mean_F: np.ndarray, coder: coders.Coder) -> str:
    if not len(log_freq_F):
        return f"No {coder.noun} fires at all: is this the SAE of this ViT layer?"
    (f_low, f_high), (v_low, v_high) = (np.quantile(v_F, [0.05, 0.95]) for v_F in (log_freq_F, log_mean_F))
    return (
        f"Of {len(log_freq_F)} {coder.noun}s that fire, 90% have log10 frequency {f_low:.1f} to {f_high:.1f} "
        f"and log10 value {v_low:.1f} to {v_high:.1f}: widen the ranges."
    )


def filters(cfg: config.Visuals, coder: coders.Coder) -> str:
    """Why these latents are shown, in words."""
    if cfg.include_latents:
        return f"the {coder.noun}s of --include-latents"
    words = [f"all {coder.noun}s" if coder.is_ranked_by_score else f"all {coder.noun}s that fire"]
    for name, what in (("log_freq_range", "frequency"), ("log_value_range", "mean value")):
        low, high = getattr(cfg, name)
        if (low, high) != (-1000, 1000):
            words.append(f"with log10 of the {what} from {low:g} to {high:g}")
    if cfg.top_k is not None:
        words.append(f"the first {cfg.top_k} by {cfg.sort_by}")
    return ", ".join(words)
