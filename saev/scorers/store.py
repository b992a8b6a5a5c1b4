"""Fits, saves and loads scorers. A hash of the inputs names the file, so that nothing is fitted twice."""

import dataclasses
import logging
import pathlib
import re
import typing as tp

import beartype
import torch

from saev import errors, fields, helpers, nn
from saev.data import activations
from saev.data import config as data_config
from saev.formats import checkpoint, tensors
from saev.scorers import base, config, kmeans, pca, random, sae, untrained

logger = logging.getLogger("saev")

REFIT = "Delete the file; the next run fits it again."

REVISION = 5
"""Increment it when a fit gives other numbers: then older fits and evaluations are computed again."""

Fitted = config.Random | config.Pca | config.KMeans | config.Untrained
"""Configs of scorers that are fitted on activations."""

KINDS = {cls: cls.__name__.lower() for cls in tp.get_args(Fitted)}
"""They begin the names of files."""


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
    if isinstance(cfg, config.Units):
        return [pca.both_signs(base.Prototypes.units(acts.d_vit)).prefix(k) for k in ks]
    if dpath is None:
        fitted = _fit(cfg, acts, ks, seed, device)
    else:
        fitted = _stored(cfg, acts, ks, seed, device, dpath)
    return [_configured(cfg, scorer, k) for scorer, k in zip(fitted, ks, strict=True)]


def stored(
    cfg: Fitted, acts: activations.Activations, ks: list[int], seed: int, dpath: pathlib.Path
) -> dict[int, pathlib.Path]:
    """The files that `fit_each` would load: K -> file, without those that are not fitted yet."""
    return _found(cfg, ks, dpath, KINDS[type(cfg)], _key(cfg, acts, seed))


def kind_of(fpath: pathlib.Path) -> str:
    """One of KINDS, by the file's name; "prototypes" if `fit_each` did not name it."""
    name = fpath.name.partition("-")[0]
    return name if name in KINDS.values() else "prototypes"


def _stored(
    cfg: Fitted,
    acts: activations.Activations,
    ks: list[int],
    seed: int,
    device: torch.device,
    dpath: pathlib.Path,
) -> list[base.Scorer]:
    """As `_fit`, but scorers in the folder are loaded, and others saved there."""
    helpers.sweep(dpath)
    name, key = KINDS[type(cfg)], _key(cfg, acts, seed)
    found = _found(cfg, ks, dpath, name, key)
    if not set(ks) <= found.keys():
        with helpers.locked(dpath / f".{name}-{key}.lock", f"it fits {name} in {dpath}"):
            found = _found(cfg, ks, dpath, name, key)
            if missing := sorted(set(ks) - found.keys()):
                states = [dpath / f"{name}-{k}-{key}.state" for k in missing]
                fitted = _fit(cfg, acts, missing, seed, device, states)
                for scorer in {id(scorer): scorer for scorer in fitted}.values():
                    fpath = dpath / f"{name}-{scorer.n_prototypes}-{key}.bin"
                    save(scorer, fpath)
                    logger.info("fitted %s", fpath)
                # also the states of a fit that was killed here
                for state in dpath.glob(f"{name}-*-{key}.state"):
                    if state.with_suffix(".bin").exists():
                        state.unlink(missing_ok=True)
                found = _found(cfg, ks, dpath, name, key)
    return [_fitted(cfg, found[k], acts.d_vit) for k in ks]


def _fit(
    cfg: Fitted,
    acts: activations.Activations,
    ks: list[int],
    seed: int,
    device: torch.device,
    state_fpaths: list[pathlib.Path] | None = None,
) -> list[base.Scorer]:
    """Fits one scorer for each K. They may have more prototypes than that."""
    match cfg:
        case config.KMeans():
            return [*kmeans.fit(cfg, acts, ks, seed, state_fpaths, device)]
        case config.Pca():
            return [pca.fit(acts, device)] * len(ks)
        case config.Untrained():
            return [untrained.fit(cfg, acts, seed)] * len(ks)
        case config.Random():
            return [random.fit(acts, max(ks), seed)] * len(ks)


def _found(cfg: Fitted, ks: list[int], dpath: pathlib.Path, name: str, key: str) -> dict[int, pathlib.Path]:
    """Maps K to its file, if there is one. Random activations: any with at least K. PCA and untrained SAEs:
    the only one."""
    names = {fpath: fpath.name.split("-") for fpath in dpath.glob(f"{name}-*-{key}.bin")}
    sizes = {int(parts[1]): f for f, parts in names.items() if re.fullmatch("[0-9]{1,9}", parts[1])}
    if isinstance(cfg, config.KMeans):
        return {k: sizes[k] for k in ks if k in sizes}
    is_one = isinstance(cfg, config.Pca | config.Untrained)
    usable = {k: [n for n in sorted(sizes) if n >= k or is_one] for k in ks}
    return {k: sizes[ns[0]] for k, ns in usable.items() if ns}


def _fitted(cfg: Fitted, fpath: pathlib.Path, d_vit: int) -> base.Scorer:
    """Loads a fitted scorer.

    Raises:
        UserError: as `load`; or its size does not match its name and the activations.
    """
    scorer, k = load(fpath), int(fpath.name.split("-")[1])
    is_sae = isinstance(scorer, sae.SaeLatents)
    vectors_KD = scorer.sae.W_dec if is_sae else tp.cast(base.Prototypes, scorer).direction_KD
    shape = tuple(vectors_KD.shape)
    if is_sae != isinstance(cfg, config.Untrained) or shape != (k, d_vit):
        what = f"{'an SAE ' * is_sae}{shape}"
        raise errors.UserError(f"{fpath}: holds {what} instead of {(k, d_vit)} (prototypes, d_vit). {REFIT}")
    return scorer


def _configured(cfg: Fitted, scorer: base.Scorer, k: int) -> base.Scorer:
    """The first k prototypes, with the config's similarity and signs."""
    if isinstance(cfg, config.Untrained) or not isinstance(scorer, base.Prototypes):
        return scorer.prefix(k)
    if isinstance(cfg, config.Pca):
        return (pca.both_signs(scorer) if cfg.both_signs else scorer).prefix(k)
    return dataclasses.replace(scorer, similarity=cfg.similarity).prefix(k)


def _key(cfg: config.Scorer, acts: activations.Activations, seed: int) -> str:
    """Hash of what affects the fit. Settings that only affect scoring are not included."""
    scoring = ("similarity", "both_signs")
    parts = {
        "cfg": {k: v for k, v in fields.identity(cfg).items() if k not in scoring},
        "revision": REVISION,
        "activations": acts.fingerprint,
        "seed": None if isinstance(cfg, config.Pca) else seed,
    }
    if isinstance(cfg, config.Untrained):
        parts["like"] = helpers.hash_file(pathlib.Path(cfg.like)) if pathlib.Path(cfg.like).is_file() else ""
    return helpers.hash_of(parts)[:12]


def _load_sae(cfg: config.Sae, acts: activations.Activations) -> sae.SaeLatents:
    if not cfg.ckpt:
        raise errors.UserError("--scorer.ckpt is missing: pass the sae.pt that train.py printed.")
    model = nn.load(cfg.ckpt)
    model.check_fits(acts.space, cfg.ckpt, acts.given)
    return sae.SaeLatents(model, model.d_sae)


def check_fits(scorer: base.Scorer, acts: activations.Activations, fpath: str) -> None:
    """Refuses activations that a scorer was not made for.

    Args:
        fpath: its file, for messages.

    Raises:
        UserError: they have another width; for an SAE, also another ViT or layer.
    """
    if isinstance(scorer, sae.SaeLatents):
        scorer.sae.check_fits(acts.space, fpath, acts.given)
    elif isinstance(scorer, base.Prototypes) and len(scorer.mean_D) != acts.d_vit:
        raise errors.UserError(
            f"{fpath}: has prototypes of {len(scorer.mean_D)} dimensions, but {acts.given} has {acts.d_vit}. "
            "Pass activations of the ViT and layer that it was fitted on."
        )


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
