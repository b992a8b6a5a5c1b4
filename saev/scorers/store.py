"""Fits, saves and loads scorers. A hash of the inputs names the file, so that nothing is fitted twice."""

import dataclasses
import functools
import logging
import pathlib
import re

import beartype
import torch

from saev import errors, fields, helpers, nn
from saev.data import activations
from saev.data import config as data_config
from saev.formats import checkpoint, tensors
from saev.scorers import base, config, kmeans, pca, random, sae

logger = logging.getLogger("saev")

REFIT = "Delete the file; the next run fits it again."

REVISION = 5
"""Increment it when a fit gives other numbers: then older fits and evaluations are computed again."""


@beartype.beartype
def fit(
    cfg: config.Scorer,
    data: data_config.Shards | activations.Activations,
    k: int,
    *,
    seed: int = 0,
    dpath: pathlib.Path | None = None,
    device: torch.device = base.CPU,
) -> base.Scorer:
    """Fits a scorer with k prototypes on `device`; returned on the CPU. PCA and small SAEs may have fewer.

    With `dpath`, the scorer is saved there. It is loaded if data, config, k and seed are the same.

    Raises:
        UserError: bad shards or checkpoint, or too few activations.
    """
    return fit_each(cfg, data, [k], seed=seed, dpath=dpath, device=device)[0]


@beartype.beartype
def fit_each(
    cfg: config.Scorer,
    data: data_config.Shards | activations.Activations,
    ks: list[int],
    *,
    seed: int = 0,
    dpath: pathlib.Path | None = None,
    device: torch.device = base.CPU,
) -> list[base.Scorer]:
    """As `fit`, for each of `ks`. k-means fits all in the same passes; the others fit only the largest."""
    acts = activations.Activations.open(data)
    if isinstance(cfg, config.Sae):
        scorer = _load_sae(cfg, acts)
        return [scorer.prefix(k) for k in ks]
    if dpath is None:
        return [
            _configured(cfg, scorer, k)
            for scorer, k in zip(_fit(cfg, acts, ks, seed, device), ks, strict=True)
        ]
    helpers.sweep(dpath)
    key = _key(cfg, acts, seed)
    found = functools.partial(_found, cfg, dpath, key)

    def missing() -> list[int]:
        return [k for k in sorted(set(ks)) if found(k) is None]

    if missing():
        lock_fpath = dpath / f".{_name(cfg)}-{key}.lock"
        with helpers.locked(lock_fpath, f"it fits {_name(cfg)} in {dpath}"):
            if missing_ks := missing():
                _fit_and_save(cfg, acts, missing_ks, seed, dpath, key, device)
    fitted = [_fitted(fpath, acts.d_vit) for fpath in map(found, ks) if fpath]
    return [_configured(cfg, scorer, k) for scorer, k in zip(fitted, ks, strict=True)]


def _fit(
    cfg: config.Random | config.Pca | config.KMeans,
    acts: activations.Activations,
    ks: list[int],
    seed: int,
    device: torch.device,
    state_fpaths: list[pathlib.Path] | None = None,
) -> list[base.Prototypes]:
    """Fits one scorer for each K. They may have more prototypes than that."""
    if isinstance(cfg, config.KMeans):
        return kmeans.fit(cfg, acts, ks, seed, state_fpaths, device)
    one = pca.fit(acts, device) if isinstance(cfg, config.Pca) else random.fit(acts, max(ks), seed)
    return [one] * len(ks)


def _fit_and_save(
    cfg: config.Random | config.Pca | config.KMeans,
    acts: activations.Activations,
    ks: list[int],
    seed: int,
    dpath: pathlib.Path,
    key: str,
    device: torch.device,
) -> None:
    states = [dpath / f"{_name(cfg)}-{k}-{key}.state" for k in ks]
    fitted = _fit(cfg, acts, ks, seed, device, states)
    for scorer in {id(scorer): scorer for scorer in fitted}.values():
        fpath = dpath / f"{_name(cfg)}-{scorer.n_prototypes}-{key}.bin"
        save(scorer, fpath)
        logger.info("fitted %s", fpath)
    # also the states of a fit that was killed here
    for state in dpath.glob(f"{_name(cfg)}-*-{key}.state"):
        if state.with_suffix(".bin").exists():
            state.unlink(missing_ok=True)


def _found(cfg: config.Scorer, dpath: pathlib.Path, key: str, k: int) -> pathlib.Path | None:
    """Finds the file to use for K. Random activations: any with at least K. PCA: the only one."""
    names = {fpath: fpath.name.split("-") for fpath in dpath.glob(f"{_name(cfg)}-*-{key}.bin")}
    sizes = {int(parts[1]): f for f, parts in names.items() if re.fullmatch("[0-9]{1,9}", parts[1])}
    if isinstance(cfg, config.KMeans):
        return sizes.get(k)
    return next((sizes[n] for n in sorted(sizes) if n >= k or isinstance(cfg, config.Pca)), None)


def _fitted(fpath: pathlib.Path, d_vit: int) -> base.Prototypes:
    """Loads a fitted scorer.

    Raises:
        UserError: as `load`; or its size does not match its name and the activations.
    """
    scorer, k = load(fpath), int(fpath.name.split("-")[1])
    shape = tuple(scorer.direction_KD.shape) if isinstance(scorer, base.Prototypes) else "an SAE"
    if not isinstance(scorer, base.Prototypes) or shape != (k, d_vit):
        raise errors.UserError(f"{fpath}: holds {shape} instead of {(k, d_vit)} (prototypes, d_vit). {REFIT}")
    return scorer


def _configured(
    cfg: config.Random | config.Pca | config.KMeans, scorer: base.Prototypes, k: int
) -> base.Prototypes:
    """The first k prototypes, with the config's similarity and signs."""
    if isinstance(cfg, config.Pca):
        return (pca.both_signs(scorer) if cfg.both_signs else scorer).prefix(k)
    return dataclasses.replace(scorer, similarity=cfg.similarity).prefix(k)


def _name(cfg: config.Scorer) -> str:
    return type(cfg).__name__.lower()


def _key(cfg: config.Scorer, acts: activations.Activations, seed: int) -> str:
    """Hash of what affects the fit. Settings that only affect scoring are not included."""
    scoring = ("similarity", "both_signs")
    parts = {
        "cfg": {k: v for k, v in fields.identity(cfg).items() if k not in scoring},
        "revision": REVISION,
        "activations": acts.fingerprint,
        "seed": None if isinstance(cfg, config.Pca) else seed,
    }
    return helpers.hash_of(parts)[:12]


def _load_sae(cfg: config.Sae, acts: activations.Activations) -> sae.SaeLatents:
    if not cfg.ckpt:
        raise errors.UserError("--scorer.ckpt is missing: pass the sae.pt that train.py printed.")
    model = nn.load(cfg.ckpt)
    model.check_fits(acts.space, cfg.ckpt, acts.given)
    return sae.SaeLatents(model, model.d_sae)


@beartype.beartype
def save(scorer: base.Scorer, fpath: pathlib.Path | str) -> None:
    """Writes a scorer atomically. For an SAE it writes the checkpoint, so all latents are saved."""
    if isinstance(scorer, sae.SaeLatents):
        return nn.save(scorer.sae, fpath)
    assert isinstance(scorer, base.Prototypes), "no other scorer has a file format"
    payload = tensors.dump(scorer.saved())
    header = {"cls": "Prototypes", "similarity": scorer.similarity}
    checkpoint.write(fields.path(fpath), "scorer", header, payload)
    return None


@beartype.beartype
def load(fpath: pathlib.Path | str) -> base.Scorer:
    """Loads a scorer that protoeval.py or `save` wrote, or all latents of an SAE checkpoint.

    Raises:
        UserError: as `checkpoint.read`; or the tensors are not prototypes.
    """
    fpath = fields.path(fpath)
    if checkpoint.kind(fpath) == "sae":
        model = nn.load(fpath)
        return sae.SaeLatents(model, model.d_sae)
    header, payload = checkpoint.read(fpath, "scorer")
    found = tensors.load(payload, str(fpath), REFIT)
    try:
        if "vectors_KD" in found:  # saved exactly, without subtracting the mean
            build, first = base.Prototypes.of, found["vectors_KD"]
        else:
            build, first = base.Prototypes, found["direction_KD"]
        scorer = build(first, found["mean_D"], header["similarity"])
        if 0 in scorer.direction_KD.shape:
            raise ValueError(f"its prototypes have shape {tuple(scorer.direction_KD.shape)}")
        if {scorer.direction_KD.dtype, scorer.mean_D.dtype} != {torch.float32}:
            raise ValueError(f"its prototypes are {scorer.direction_KD.dtype}")
    except Exception as err:  # names, types or shapes that do not match
        raise errors.UserError(
            f"{fpath}: its tensors are not prototypes ({errors.first_line(err)}). {REFIT}"
        ) from err
    tensors.check_finite(found, str(fpath), REFIT)
    return scorer
