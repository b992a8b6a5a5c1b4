"""Fit, save and load scorers. A fitted scorer is a file named by what decides it, and is never fitted twice."""

import dataclasses
import io
import logging
import pathlib

import beartype
import torch

from saev import errors, helpers, nn
from saev.data import config as data_config
from saev.data import reader
from saev.formats import checkpoint
from saev.scorers import base, config, kmeans, pca, random, sae

logger = logging.getLogger("saev")

REVISION = 4
"""Raised whenever a fitter may give other numbers: what was fitted before is then fitted again."""
NESTED = {config.Random: random.fit, config.Pca: pca.fit}
"""Scorers whose first k prototypes are those of a fit of k: one fit serves every smaller number."""


@beartype.beartype
def fit(
    cfg: config.Scorer,
    data: data_config.Shards,
    k: int,
    *,
    seed: int = 0,
    dpath: pathlib.Path | None = None,
    device: torch.device = base.CPU,
) -> base.Scorer:
    """A scorer with k prototypes (fewer where there are no more: PCA, small SAEs), on the CPU; `device` does the work.

    With `dpath` the fitted scorer is kept there, and found again by the hash of data, config, k and seed.

    Raises:
        UserError: bad shards or checkpoint, or too few activations.
    """
    return fit_each(cfg, data, [k], seed=seed, dpath=dpath, device=device)[0]


@beartype.beartype
def fit_each(
    cfg: config.Scorer,
    data: data_config.Shards,
    ks: list[int],
    *,
    seed: int = 0,
    dpath: pathlib.Path | None = None,
    device: torch.device = base.CPU,
) -> list[base.Scorer]:
    """`fit` for each of `ks`, together: k-means in the same passes, the others once for the largest."""
    if isinstance(cfg, config.Sae):
        scorer = _load_sae(cfg, data)
        return [scorer.prefix(k) for k in ks]
    if isinstance(cfg, config.KMeans):
        return _fit_kmeans(cfg, data, ks, seed, dpath, device)
    scorer = _fit_nested(cfg, data, max(ks), seed, dpath, device)
    return [scorer.prefix(k) for k in ks]


def _fit_nested(
    cfg: config.Random | config.Pca,
    data: data_config.Shards,
    k: int,
    seed: int,
    dpath: pathlib.Path | None,
    device: torch.device,
) -> base.Prototypes:
    """Its file may hold more prototypes than asked for."""
    key = _key(cfg, data, seed)
    for fpath in (
        sorted((dpath or pathlib.Path()).glob(f"{_name(cfg)}-*-{key}.bin")) if dpath else []
    ):
        if int(fpath.name.split("-")[1]) >= k:
            return load(fpath).prefix(k)
    scorer = NESTED[type(cfg)](cfg, data, k, seed, device)
    if dpath is not None:
        _keep(scorer, _fpath(dpath, cfg, k, key))
    return scorer


def _fit_kmeans(
    cfg: config.KMeans,
    data: data_config.Shards,
    ks: list[int],
    seed: int,
    dpath: pathlib.Path | None,
    device: torch.device,
) -> list[base.Scorer]:
    if dpath is None:
        return kmeans.fit(cfg, data, ks, seed, device=device)
    key = _key(cfg, data, seed)
    missing = [k for k in sorted(set(ks)) if not _fpath(dpath, cfg, k, key).exists()]
    if missing:
        state_fpath = dpath / f"kmeans-{'-'.join(map(str, missing))}-{key}.state"
        fitted = kmeans.fit(cfg, data, missing, seed, state_fpath, device)
        for k, scorer in zip(missing, fitted, strict=True):
            _keep(scorer, _fpath(dpath, cfg, k, key))
        state_fpath.unlink(missing_ok=True)
    return [load(_fpath(dpath, cfg, k, key)) for k in ks]


def _fpath(dpath: pathlib.Path, cfg: config.Scorer, k: int, key: str) -> pathlib.Path:
    return dpath / f"{_name(cfg)}-{k}-{key}.bin"


def _keep(scorer: base.Scorer, fpath: pathlib.Path) -> None:
    save(scorer, fpath)
    logger.info("fitted %s", fpath)


def _name(cfg: config.Scorer) -> str:
    return type(cfg).__name__.lower()


def _key(cfg: config.Scorer, data: data_config.Shards, seed: int) -> str:
    fields = {
        "cls": _name(cfg),
        "cfg": dataclasses.asdict(cfg),
        "revision": REVISION,
        "activations": reader.Reader(data).hash,
        "seed": seed,
    }
    return helpers.hash_of(fields)[:12]


def _load_sae(cfg: config.Sae, data: data_config.Shards) -> sae.SaeLatents:
    if not cfg.ckpt:
        raise errors.UserError("--scorer.ckpt is missing: pass the sae.pt that train.py printed.")
    model = nn.load(cfg.ckpt)
    model.check_fits(reader.Reader(data).describe(), cfg.ckpt, data.shard_root)
    return sae.SaeLatents(model, model.d_sae)


@beartype.beartype
def save(scorer: base.Scorer, fpath: pathlib.Path | str) -> None:
    """Writes a scorer atomically. An SAE's file is its checkpoint, so all its latents are saved."""
    if isinstance(scorer, sae.SaeLatents):
        return nn.save(scorer.sae, fpath)
    payload = io.BytesIO()
    torch.save(
        {"vectors_KD": scorer.vectors_KD.cpu().clone(), "mean_D": scorer.mean_D.cpu()}, payload
    )
    header = {"cls": "Prototypes", "similarity": scorer.similarity}
    checkpoint.write(pathlib.Path(fpath), "scorer", header, payload.getvalue())
    return None


@beartype.beartype
def load(fpath: pathlib.Path | str) -> base.Scorer:
    """Loads a scorer that protoeval.py or `save` wrote, or an SAE checkpoint (all its latents).

    Raises:
        UserError: see `checkpoint.read`; also tensors that do not fit the header.
    """
    fpath = pathlib.Path(fpath)
    if checkpoint.kind(fpath) == "sae":
        model = nn.load(fpath)
        return sae.SaeLatents(model, model.d_sae)
    header, payload = checkpoint.read(fpath, "scorer")
    try:
        tensors = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        return base.Prototypes(tensors["vectors_KD"], tensors["mean_D"], header["similarity"])
    except Exception as err:  # torch raises many types for a cut or foreign file
        first_line = (str(err).splitlines() or [repr(err)])[0]
        raise errors.UserError(
            f"{fpath}: its tensors cannot be read ({first_line}). Delete the file; the next run fits it again."
        ) from err
