"""Stage 4 itself: score every image once, choose prototypes on train images, measure them on test images.

N images, K prototypes, T traits, B images of a block, P patches, D d_vit.
"""

import dataclasses
import hashlib
import logging
import pathlib
import typing as tp

import beartype
import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64, jaxtyped

from saev import devices, errors, helpers, scorers
from saev.data import config as data_config
from saev.data import cub, ordered, reader
from saev.formats import results
from saev.protoeval import ap, config, report

logger = logging.getLogger("saev")

REVISION = 1
"""Raised whenever the same activations, labels and config may give other numbers."""


class Bank(tp.NamedTuple):
    """A fitted scorer and the numbers of prototypes it is evaluated at (prefixes of it)."""

    name: str
    scorer: scorers.Scorer
    ks: tuple[int, ...]


class Split(tp.NamedTuple):
    """Image scores of one split, in the order of CUB's images.txt, and their labels."""

    scores_NK: Float32[np.ndarray, "N K"]
    labels_NT: Bool[np.ndarray, "N T"]


@beartype.beartype
def main(cfgs: list[config.ProtoEval]) -> str:
    """Evaluates the scorers of one group in one pass over each shard directory; returns the results directory.

    The directory is named by what decides the results, so finished ones are found again, never overwritten.

    Raises:
        UserError: bad labels, shards that lack a train or test image (names the first), or bad scorers.
    """
    cfg = cfgs[0]
    if not cfg.cub_root:
        raise errors.UserError("--cub-root is missing: pass the CUB_200_2011 folder.")
    check_one_space(cfgs)
    labels = cub.load(cfg.cub_root, min_certainty=cfg.min_certainty)
    joins = [_join(cfg.train_data, labels, True), _join(cfg.test, labels, False)]
    out = pathlib.Path(cfg.dump_to) / _run_id(cfgs, labels)
    if (out / "table.md").exists():
        logger.info("%s: evaluated already", out)
        return str(out)
    banks = [
        bank for c, name in zip(cfgs, labels_of(cfgs), strict=True) for bank in _banks(c, name)
    ]
    train, test = _score(cfg, banks, labels, joins)
    rows = evaluate(train, test, banks, labels.attribute_names_T, cfg.n_train, cfg.seed)
    report.write(out, rows, labels.attribute_names_T, cfgs, _describe(cfg))
    return str(out)


@beartype.beartype
def check_one_space(cfgs: list[config.ProtoEval]) -> None:
    """Prototypes of one ViT layer say nothing of another's patches, even where both are equally wide.

    Raises:
        UserError: train, test or fit activations of different ViTs, layers or (train and test) tokens; layer "all".
    """
    readers = {
        data: reader.Reader(data) for cfg in cfgs for data in (cfg.train_data, cfg.test, cfg.fit)
    }
    train = cfgs[0].train_data
    for flag, data in [("test", cfgs[0].test), *(("fit", cfg.fit) for cfg in cfgs)]:
        want, got = _space(readers[train]), _space(readers[data])
        want |= {"patches": train.patches} if flag == "test" else {}
        got |= {"patches": data.patches} if flag == "test" else {}
        if differ := [key for key in want if want[key] != got[key]]:
            what = ", ".join(f"{key} {got[key]} instead of {want[key]}" for key in differ)
            raise errors.UserError(
                f"--{flag}-data.shard-root {data.shard_root}: not in the space of the train activations: {what}. "
                f"Pass the same ViT and --{flag}-data.layer as --train-data has."
            )


def _space(acts: reader.Reader) -> dict[str, object]:
    layer = acts.only_layer("protoeval compares")
    return {"ViT": f"{acts.metadata.vit_family} {acts.metadata.vit_ckpt}", "layer": layer}


def _describe(cfg: config.ProtoEval) -> str:
    """What the table is of, in a sentence."""
    acts, space = reader.Reader(cfg.train_data), _space(reader.Reader(cfg.train_data))
    names = [pathlib.Path(data.shard_root).name[:8] for data in (cfg.train_data, cfg.test)]
    return (
        f"{space['ViT']}, layer {space['layer']}, {acts.n_tokens} tokens an image ({cfg.train_data.patches}), "
        f"shards {' and '.join(dict.fromkeys(names))}; certainty from {cfg.min_certainty}; seed {cfg.seed}."
    )


def _run_id(cfgs: list[config.ProtoEval], labels: cub.Cub) -> str:
    """Hash of all that decides the table: activations, labels, scorers, grid and seed; not of where they lie."""
    parts: list[object] = [
        REVISION,
        labels.paths_N,
        labels.is_train_N.tolist(),
        labels.attribute_names_T,
    ]
    digest = hashlib.sha256(labels.labels_NT.tobytes())
    for cfg in cfgs:
        parts += [_identity(data) for data in (cfg.train_data, cfg.test, cfg.fit)]
        parts += [type(cfg.scorer).__name__, cfg.n_prototypes, cfg.n_train, cfg.seed]
        fields = dataclasses.asdict(cfg.scorer)
        if (ckpt := pathlib.Path(fields.get("ckpt", ""))).is_file():
            fields |= {"ckpt": [ckpt.parent.name, hashlib.sha256(ckpt.read_bytes()).hexdigest()]}
        parts.append(fields)
    digest.update(helpers.canonical_json(parts).encode())
    return digest.hexdigest()[:12]


def _identity(data: data_config.Shards) -> str:
    return reader.Reader(data).hash


# ---- scorers ----


def _banks(cfg: config.ProtoEval, name: str) -> list[Bank]:
    """K-means is fitted once per K; the others once, and their prefixes serve the smaller K."""
    fit_ks = cfg.n_prototypes if type(cfg.scorer).__name__ == "KMeans" else (max(cfg.n_prototypes),)
    out = []
    for k_max in fit_ks:
        scorer = scorers.fit(
            cfg.scorer, cfg.fit, k_max, seed=cfg.seed, dpath=pathlib.Path(cfg.scorers_to)
        )
        wanted = (k_max,) if len(fit_ks) > 1 else cfg.n_prototypes
        ks = tuple(sorted({min(k, scorer.n_prototypes) for k in wanted}))
        if scorer.n_prototypes < k_max:
            logger.info(
                "%s: has %d prototypes; larger K are left out",
                type(cfg.scorer).__name__,
                scorer.n_prototypes,
            )
        out.append(Bank(name, scorer, ks))
    return out


@beartype.beartype
def labels_of(cfgs: list[config.ProtoEval]) -> list[str]:
    """The scorers' names in the table: the class, an SAE's run id, and whatever else tells two of them apart.

    Raises:
        UserError: the same scorer, fitted on the same activations, is there twice.
    """
    short = [_label(cfg, cfgs) for cfg in cfgs]
    full = [
        f"{name} ({getattr(cfg.scorer, 'ckpt', '')} fit on {cfg.fit.shard_root} layer {cfg.fit.layer} {cfg.fit.patches})"
        for name, cfg in zip(short, cfgs, strict=True)
    ]
    names = [s if short.count(s) == 1 else f for s, f in zip(short, full, strict=True)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise errors.UserError(f"the scorer {twice} is given twice. Name it once in the sweep.")
    return names


def _label(cfg: config.ProtoEval, cfgs: list[config.ProtoEval]) -> str:
    alike = [c for c in cfgs if type(c.scorer) is type(cfg.scorer)]
    parts = [type(cfg.scorer).__name__]
    for field in dataclasses.fields(cfg.scorer):
        value = getattr(cfg.scorer, field.name)
        if field.name == "ckpt":
            parts.append(pathlib.Path(value).parent.name or value)
        elif any(getattr(c.scorer, field.name) != value for c in alike):
            parts.append(f"{field.name}={value}")
    if any(c.fit != cfg.fit for c in alike):
        parts.append(f"fit on {pathlib.Path(cfg.fit.shard_root).name[:8]} layer {cfg.fit.layer}")
    return " ".join(parts)


# ---- images joined by path ----


@beartype.beartype
def _join(data: data_config.Shards, labels: cub.Cub, train: bool) -> dict[int, int]:
    """Image number in the shards -> row in the labels, for all images of the split; skipped images are not there.

    Raises:
        UserError: an image of the split is not in the shards, or a path is there twice.
    """
    acts = reader.Reader(data)
    row_of = {path: row for row, path in enumerate(labels.paths_N)}
    paths = {int(i): acts.records[i].path.removeprefix("images/") for i in acts.image_is_N}
    rows = {i: row_of[path] for i, path in paths.items() if path in row_of}
    join = {i: row for i, row in rows.items() if labels.is_train_N[row] == train}
    split = "train" if train else "test"
    if len(set(join.values())) < len(join):
        raise errors.UserError(
            f"{data.shard_root}: holds a {split} image of CUB twice. Dump one folder of CUB images."
        )
    missing = set(np.flatnonzero(labels.is_train_N == train).tolist()) - set(join.values())
    if missing:
        first = ", ".join(labels.paths_N[row] for row in sorted(missing)[:3])
        raise errors.UserError(
            f"{data.shard_root}: {len(missing)} of CUB's {split} images are not in these shards, joined by path (first: {first}). "
            "Dump the images with data:cub200, or data:image-folder on CUB's images/ folder."
        )
    return join


# ---- scores ----


def _score(
    cfg: config.ProtoEval, banks: list[Bank], labels: cub.Cub, joins: list[dict[int, int]]
) -> tuple[Split, Split]:
    """Train and test scores; one pass when both lie in the same shards."""
    device = devices.pick(cfg.device)
    run = [bank.scorer.to(device) for bank in banks]
    train_NK = score_images(run, cfg.train_data, device)
    test_NK = train_NK if cfg.test == cfg.train_data else score_images(run, cfg.test, device)
    splits = [
        _split(scores_NK, join, labels)
        for scores_NK, join in zip((train_NK, test_NK), joins, strict=True)
    ]
    return splits[0], splits[1]


def _split(scores_NK: np.ndarray, join: dict[int, int], labels: cub.Cub) -> Split:
    """Rows in the order of images.txt, so that no result depends on the order of the shards."""
    image_is = sorted(join, key=join.__getitem__)
    return Split(scores_NK[image_is], labels.labels_NT[[join[i] for i in image_is]])


@torch.inference_mode()
@jaxtyped(typechecker=beartype.beartype)
def score_images(
    run: list[scorers.Scorer], data: data_config.Shards, device: torch.device
) -> Float32[np.ndarray, "N K"]:
    """Scores of every image for all prototypes of all scorers, side by side: the max over the image's patches."""
    stream = ordered.Ordered(data, n_imgs=16)
    n_prototypes = sum(s.n_prototypes for s in run)
    scores_NK = np.full(
        (stream.reader.n_all, n_prototypes), np.nan, np.float32
    )  # no score: no silent use
    for image_i_B, acts_BPD in helpers.progress(stream, "score", len(stream), "blocks"):
        B, P, _ = acts_BPD.shape
        x_XD = torch.from_numpy(acts_BPD).to(device).flatten(0, 1)
        max_BK = torch.cat([s(x_XD).unflatten(0, (B, P)).amax(dim=1) for s in run], dim=1)
        scores_NK[image_i_B] = max_BK.cpu().numpy()
    return scores_NK


# ---- choice ----


@beartype.beartype
def evaluate(
    train: Split,
    test: Split,
    banks: list[Bank],
    names: list[str],
    n_train: tuple[int, ...],
    seed: int,
) -> list[results.Row]:
    """The whole grid (scorer x K x n_train), the constant scorer's row first."""
    rows = [_constant_row(train, test)]
    start = 0
    for bank in banks:
        columns = slice(start, start + bank.scorer.n_prototypes)
        start = columns.stop
        cells = [_cells(bank, n, train, test, columns, seed) for n in n_train]
        rows += [row for same_k in zip(*cells, strict=True) for row in same_k]
    return rows


def _cells(
    bank: Bank, n: int, train: Split, test: Split, columns: slice, seed: int
) -> list[results.Row]:
    """A scorer's rows for one number of train images: the AP matrix serves every K."""
    subset = train_subset(len(train.labels_NT), n, seed)
    ap_KT = ap.average_precision(train.scores_NK[subset, columns], train.labels_NT[subset])
    return [_row(bank.name, k, len(subset), ap_KT, test, columns.start) for k in bank.ks]


@jaxtyped(typechecker=beartype.beartype)
def train_subset(n_images: int, n: int, seed: int) -> Int64[np.ndarray, " n"]:
    """n of the train images (-1 or too many: all), the same for every scorer; smaller subsets lie in larger ones."""
    order_N = np.random.default_rng((seed, 0xC0B)).permutation(n_images)
    return np.sort(order_N if n == -1 else order_N[:n])


@jaxtyped(typechecker=beartype.beartype)
def choose(ap_KT: Float64[np.ndarray, "K T"]) -> Int64[np.ndarray, " T"]:
    """The prototype of largest AP per trait; among equals (and where there is no AP at all) the lowest number."""
    return np.nan_to_num(ap_KT, nan=-1.0).argmax(axis=0)


def _row(name: str, k: int, n: int, ap_KT: np.ndarray, test: Split, first: int) -> results.Row:
    best_T = choose(ap_KT[:k])
    test_ap_T = ap.paired_average_precision(test.scores_NK[:, first + best_T], test.labels_NT)
    train_ap_T = ap_KT[best_T, np.arange(len(best_T))]
    return results.Row(name, k, n, best_T, train_ap_T, test_ap_T)


def _constant_row(train: Split, test: Split) -> results.Row:
    """A scorer that says the same of every image: its AP is the trait's prevalence. Nothing real may fall to this row."""
    n_traits = test.labels_NT.shape[1]
    train_ap_T, test_ap_T = (
        ap.paired_average_precision(np.zeros(s.labels_NT.shape, np.float32), s.labels_NT)
        for s in (train, test)
    )
    return results.Row(
        "constant", 1, len(train.labels_NT), np.zeros(n_traits, np.int64), train_ap_T, test_ap_T
    )
