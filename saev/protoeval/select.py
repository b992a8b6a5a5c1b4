"""Stage 4 itself: score every image once, choose prototypes on train images, measure them on test images.

N images, K prototypes, C of them, T traits, D d_vit, R draws of train images, M resamples of test images.
"""

import collections.abc
import dataclasses
import datetime
import hashlib
import json
import logging
import pathlib
import shutil
import typing as tp

import beartype
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, jaxtyped

from saev import devices, errors, helpers, scorers
from saev.data import config as data_config
from saev.data import cub, reader
from saev.formats import results
from saev.protoeval import ap, check, config, probe, report, scoring
from saev.scorers import config as scorers_config

logger = logging.getLogger("saev")

REVISION = 4
"""Raised whenever the same activations, labels and config may give other numbers."""
AP_DIGITS = 12
"""Decimal places in which APs are compared: equal ones of different rankings differ in their last bits."""


class Bank(tp.NamedTuple):
    """A fitted scorer and the numbers of prototypes it is evaluated at (prefixes of it)."""

    name: str
    scorer: scorers.Scorer
    ks: tuple[int, ...]


class Split(tp.NamedTuple):
    """One split's images, in the order of CUB's images.txt."""

    scores: scoring.Scores
    column_N: Int64[np.ndarray, " N"]
    """Their places among the scores."""
    labels_NT: Bool[np.ndarray, "N T"]

    def of(self, prototypes: slice | np.ndarray) -> Float32[np.ndarray, "C N"]:
        """Scores of some prototypes, in memory."""
        return self.scores.scores_KN[prototypes][:, self.column_N]

    @property
    def mean_ND(self) -> Float32[np.ndarray, "N D"]:
        return self.scores.mean_ND[self.column_N]


class Draw(tp.NamedTuple):
    """Train images to choose on: draw `r` of `n`."""

    n: int
    r: int
    rows: Int64[np.ndarray, " n"]


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
    if not cfg.train_data.shard_root:
        raise errors.UserError(
            "--train-data.shard-root is missing: pass the directory that `python -m saev.data` printed."
        )
    check_one_space(cfgs)
    labels = cub.load(cfg.cub_root, min_certainty=cfg.min_certainty)
    if not cfg.force:
        check.refuse_implausible(labels, cfg.cub_root)
    joins = [
        _join(cfg.train_data, labels, True, cfg.force),
        _join(cfg.test, labels, False, cfg.force),
    ]
    if cfg.gallery:
        report.read_gallery(pathlib.Path(cfg.gallery))
    linked = _in_gallery(cfgs)
    out = pathlib.Path(cfg.dump_to) / _run_id(cfgs, labels)
    if not (out / "table.md").exists():
        with helpers.locked(out.with_name(f".{out.name}.lock"), f"it evaluates {out}"):
            if not (out / "table.md").exists():
                _evaluate_into(out, cfgs, labels, joins)
    else:
        logger.info("%s: evaluated already", out)
    if linked:
        report.link(out, linked, pathlib.Path(cfg.gallery))
    return str(out)


@beartype.beartype
def look(cfgs: list[config.ProtoEval], say: collections.abc.Callable[[str], None] = print) -> None:
    """What --check prints: of each label folder, and of its join with the activations that are given.

    Raises:
        UserError: bad or (without --force) implausible labels, or shards that lack an image.
    """
    for cfg in {(c.cub_root, c.train_data, c.test, c.min_certainty): c for c in cfgs}.values():
        _look(cfg, say)


def _look(cfg: config.ProtoEval, say: collections.abc.Callable[[str], None]) -> None:
    if not cfg.cub_root:
        raise errors.UserError("--cub-root is missing: pass the CUB_200_2011 folder.")
    labels = cub.load(cfg.cub_root, min_certainty=cfg.min_certainty)
    say(f"{cfg.cub_root}, certainty from {cfg.min_certainty}: {check.describe(labels)}")
    for split, data in (("train", cfg.train_data), ("test", cfg.test)):
        if data.shard_root:
            n = len(_join(data, labels, split == "train", cfg.force))
            say(f"{data.shard_root}: holds all {n:,} {split} images.")
    for problem in check.problems(labels):
        say(f"Implausible: {problem}.")
    if not cfg.force:
        check.refuse_implausible(labels, cfg.cub_root)


def _evaluate_into(
    out: pathlib.Path,
    cfgs: list[config.ProtoEval],
    labels: cub.Cub,
    joins: list[dict[int, int]],
) -> None:
    cfg = cfgs[0]
    banks = [
        bank for c, name in zip(cfgs, labels_of(cfgs), strict=True) for bank in _banks(c, name)
    ]
    partial = out.with_name(f".{out.name}.partial")
    train, test = _score(cfg, banks, labels, joins, partial)
    rows = evaluate(train, test, banks, cfg)
    about = dataclasses.replace(_about(cfgs, labels), problems=_forced(cfg, labels))
    report.write(out, rows, labels.attribute_names_T, cfgs, about)
    shutil.rmtree(partial, ignore_errors=True)


def _forced(cfg: config.ProtoEval, labels: cub.Cub) -> list[str]:
    """What --force went on in spite of."""
    known = set(labels.paths_N)
    out = check.problems(labels)
    for data in dict.fromkeys((cfg.train_data, cfg.test)):
        acts = reader.Reader(data)
        n = sum(cub.key(acts.records[int(i)].path) not in known for i in acts.image_is_N)
        if n:
            out.append(f"{n:,} images of {data.shard_root} have no labels and were left out")
    return out


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


def _about(cfgs: list[config.ProtoEval], labels: cub.Cub) -> results.About:
    cfg = cfgs[0]
    acts, space = reader.Reader(cfg.train_data), _space(reader.Reader(cfg.train_data))
    data = (cfg.train_data, cfg.test)
    names = [pathlib.Path(root).name[:8] for d in data for root in (d.shard_root, *d.more_roots)]
    return results.About(
        vit=str(space["ViT"]),
        layer=tp.cast(int, space["layer"]),
        tokens=f"{acts.n_tokens} tokens an image ({cfg.train_data.patches})",
        shards=list(dict.fromkeys(names)),
        labels=_labels_hash(labels),
        min_certainty=cfg.min_certainty,
        seed=cfg.seed,
        n_seeds=cfg.n_seeds,
        n_boot=cfg.n_boot,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        scorers=dict(zip(labels_of(cfgs), map(_in_full, cfgs), strict=True)),
        activations=[_identity(d) for d in data],
    )


def _labels_hash(labels: cub.Cub) -> str:
    parts = [labels.paths_N, labels.is_train_N.tolist(), labels.attribute_names_T]
    digest = hashlib.sha256(labels.labels_NT.tobytes())
    digest.update(helpers.canonical_json(parts).encode())
    return digest.hexdigest()


def _in_gallery(cfgs: list[config.ProtoEval]) -> str:
    """Name of the SAE that --gallery shows; empty without the flag.

    Raises:
        UserError: no gallery there, or of none of the SAEs.
    """
    if not cfgs[0].gallery:
        return ""
    fpath = pathlib.Path(cfgs[0].gallery) / "gallery.json"
    try:
        shown = json.loads(fpath.read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise errors.UserError(
            f"--gallery {cfgs[0].gallery}: no gallery.json that names its SAE. Pass a folder that visuals.py wrote."
        ) from err
    for cfg, name in zip(cfgs, labels_of(cfgs), strict=True):
        ckpt = pathlib.Path(getattr(cfg.scorer, "ckpt", ""))
        if isinstance(cfg.scorer, scorers_config.Sae) and not ckpt.is_file():
            raise errors.UserError(
                f"--scorer.ckpt {ckpt}: no such checkpoint. Pass the sae.pt that train.py printed."
            )
        if ckpt.is_file() and helpers.hash_file(ckpt) == shown:
            return name
    raise errors.UserError(
        f"--gallery {cfgs[0].gallery}: shows another SAE than --scorer.ckpt. Run visuals.py on that checkpoint."
    )


def _run_id(cfgs: list[config.ProtoEval], labels: cub.Cub) -> str:
    """Hash of all that decides the table: activations, labels, scorers, grid and seed; not of where they lie."""
    parts: list[object] = [REVISION, scorers.revision(), _labels_hash(labels)]
    for cfg in cfgs:
        parts += [_identity(data) for data in (cfg.train_data, cfg.test, cfg.fit)]
        parts += [cfg.n_prototypes, cfg.n_train, cfg.seed, cfg.n_seeds, cfg.n_boot]
        parts += [_in_full(cfg), _name_of_run(cfg)]
    return helpers.hash_of(parts)[:12]


def _in_full(cfg: config.ProtoEval) -> dict[str, tp.Any]:
    """All that decides a scorer but the seed; not where its files lie."""
    fields: dict[str, tp.Any] = {"cls": type(cfg.scorer).__name__}
    fields |= dataclasses.asdict(cfg.scorer)
    if "ckpt" in fields:
        ckpt = pathlib.Path(fields["ckpt"])
        return fields | {"ckpt": helpers.hash_file(ckpt) if ckpt.is_file() else fields["ckpt"]}
    return fields | {"fit": _identity(cfg.fit)}


def _name_of_run(cfg: config.ProtoEval) -> str:
    """An SAE's run id, which the table names it by; else empty."""
    return pathlib.Path(getattr(cfg.scorer, "ckpt", "")).parent.name


def _identity(data: data_config.Shards) -> str:
    return reader.Reader(data).hash


# ---- scorers ----


def _banks(cfg: config.ProtoEval, name: str) -> list[Bank]:
    """K-means is fitted once per K; the others once, and their prefixes serve the smaller K."""
    fit_ks = (
        sorted(set(cfg.n_prototypes))
        if type(cfg.scorer).__name__ == "KMeans"
        else [max(cfg.n_prototypes)]
    )
    fitted = scorers.fit_each(
        cfg.scorer,
        cfg.fit,
        fit_ks,
        seed=cfg.seed,
        dpath=pathlib.Path(cfg.scorers_to),
        device=devices.pick(cfg.device),
    )
    out = []
    for k_max, scorer in zip(fit_ks, fitted, strict=True):
        wanted = (k_max,) if len(fit_ks) > 1 else cfg.n_prototypes
        ks = tuple(sorted({min(k, scorer.n_prototypes) for k in wanted}))
        if scorer.n_prototypes < k_max:
            logger.info(
                "%s: has %d prototypes, which stand for all larger K",
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
def _join(data: data_config.Shards, labels: cub.Cub, train: bool, force: bool) -> dict[int, int]:
    """Image number in the shards -> row in the labels, for all images of the split; skipped images are not there.

    Raises:
        UserError: an image of the split is not in the shards, a path is there twice, or (without `force`) the shards hold an image
            that the labels do not know.
    """
    acts = reader.Reader(data)
    row_of = {path: row for row, path in enumerate(labels.paths_N)}
    paths = {int(i): acts.records[i].path for i in acts.image_is_N}
    rows = {i: row_of[cub.key(path)] for i, path in paths.items() if cub.key(path) in row_of}
    join = {i: row for i, row in rows.items() if labels.is_train_N[row] == train}
    split, other = ("train", "test") if train else ("test", "train")
    if wrong := [paths[i] for i in join if paths[i].startswith(f"{other}/")]:
        raise errors.UserError(
            f"{data.shard_root}: {len(wrong)} images lie in {other}/ but are {split} images by train_test_split.txt (first: {wrong[0]}). Sort the photos again."
        )
    if unknown := sorted(paths[i] for i in paths.keys() - rows.keys()):
        what = f"{data.shard_root}: {len(unknown)} of {len(paths)} images have no row in images.txt (first: {', '.join(unknown[:3])})"
        if not force:
            raise errors.UserError(
                f"{what}. Dump CUB's images alone (data:cub200); --force leaves the others out; fit on other images by --fit-data."
            )
        logger.warning("%s; they are left out", what)
    if len(set(join.values())) < len(join):
        raise errors.UserError(
            f"{data.shard_root}: holds a {split} image of CUB twice. Dump one folder of CUB images."
        )
    missing = set(np.flatnonzero(labels.is_train_N == train).tolist()) - set(join.values())
    if missing:
        first = ", ".join(labels.paths_N[row] for row in sorted(missing)[:3])
        raise errors.UserError(
            f"{data.shard_root}: {len(missing)} of CUB's {split} images are not in these shards, joined by path (first: {first}). "
            "Dump the images with data:cub200, or data:image-folder on CUB's images/ folder; if they lie in shards of their own, pass these as --test-data.shard-root."
        )
    return join


# ---- scores ----


def _score(
    cfg: config.ProtoEval,
    banks: list[Bank],
    labels: cub.Cub,
    joins: list[dict[int, int]],
    dpath: pathlib.Path,
) -> tuple[Split, Split]:
    """Train and test scores; one pass when both lie in the same shards."""
    device = devices.pick(cfg.device)
    run = [bank.scorer.to(device) for bank in banks]
    train_join, test_join = joins
    if cfg.test == cfg.train_data:
        joint = _scores(run, cfg.train_data, train_join | test_join, dpath / "all", device, cfg)
        both = [joint, joint]
    else:
        both = [
            _scores(run, data, join, dpath / name, device, cfg)
            for name, data, join in (
                ("train", cfg.train_data, train_join),
                ("test", cfg.test, test_join),
            )
        ]
    train, test = (_split(scores, join, labels) for scores, join in zip(both, joins, strict=True))
    return train, test


def _scores(
    run: list[scorers.Scorer],
    data: data_config.Shards,
    join: dict[int, int],
    dpath: pathlib.Path,
    device: torch.device,
    cfg: config.ProtoEval,
) -> scoring.Scores:
    """In the order of images.txt, so that no result depends on the order of the shards."""
    image_is = sorted(join, key=join.__getitem__)
    return scoring.score(run, data, image_is, dpath, device, cfg.memory_gb)


def _split(scores: scoring.Scores, join: dict[int, int], labels: cub.Cub) -> Split:
    columns = [n for n, i in enumerate(scores.image_i_N.tolist()) if i in join]
    rows = [join[i] for i in scores.image_i_N[columns].tolist()]
    return Split(scores, np.array(columns, np.int64), labels.labels_NT[rows])


# ---- choice ----


@beartype.beartype
def evaluate(
    train: Split, test: Split, banks: list[Bank], cfg: config.ProtoEval
) -> list[results.Row]:
    """The whole grid (scorer x K x n_train), the constant scorer's row and the linear probe's first."""
    draws = _draws(len(train.labels_NT), cfg)
    measure = Measure(test, cfg)
    rows = [_constant_row(train, measure)]
    rows += [_probe_row(same_n, train, measure) for same_n in draws]
    start = 0
    for bank in helpers.progress(banks, "choose", len(banks), "scorers"):
        rows += _bank_rows(bank, start, draws, train, measure, cfg.memory_gb)
        start += bank.scorer.n_prototypes
    return rows


def _draws(n_images: int, cfg: config.ProtoEval) -> list[list[Draw]]:
    """For each number of train images (more than there are: all) its draws; of all images there is one."""
    out = []
    for n in dict.fromkeys(n_images if n == -1 else min(n, n_images) for n in cfg.n_train):
        n_draws = 1 if n == n_images else cfg.n_seeds
        out.append([Draw(n, r, train_subset(n_images, n, cfg.seed, r)) for r in range(n_draws)])
    return out


@jaxtyped(typechecker=beartype.beartype)
def train_subset(n_images: int, n: int, seed: int, r: int = 0) -> Int64[np.ndarray, " n"]:
    """Draw r of n train images (-1 or too many: all), the same for every scorer; smaller subsets lie in larger ones."""
    key = (seed, 0xC0B, r) if r else (seed, 0xC0B)
    order_N = np.random.default_rng(key).permutation(n_images)
    return np.sort(order_N if n == -1 else order_N[:n])


class Measure:
    """Test APs, and mAPs on resamples of the test images."""

    def __init__(self, test: Split, cfg: config.ProtoEval):
        self.test = test
        n_images = len(test.labels_NT)
        times_MN = ap.resamples(n_images, cfg.n_boot, cfg.seed)
        self.times_MN = np.concatenate([np.ones((1, n_images), np.uint8), times_MN])

    @jaxtyped(typechecker=beartype.beartype)
    def __call__(
        self, scores_TN: Float[np.ndarray, "T N"]
    ) -> tuple[Float64[np.ndarray, " T"], Float64[np.ndarray, " M"]]:
        """AP of row t for trait t, and mAPs over the traits that each resample has a positive of."""
        ap_TM = ap.resampled(scores_TN, self.test.labels_NT, self.times_MN)
        boot_TM = ap_TM[:, 1:]
        n_M = np.maximum((~np.isnan(boot_TM)).sum(axis=0), 1)
        return ap_TM[:, 0], np.nansum(boot_TM, axis=0) / n_M


class Choice(tp.NamedTuple):
    """Of one cell and draw: each trait's prototype, among the scorer's, and its AP on the train images."""

    best_T: Int64[np.ndarray, " T"]
    train_ap_T: Float64[np.ndarray, " T"]


def _bank_rows(
    bank: Bank,
    start: int,
    draws: list[list[Draw]],
    train: Split,
    measure: Measure,
    memory_gb: float,
) -> list[results.Row]:
    """A scorer's rows. Prototypes are taken some at a time, and each serves every K that it is among."""
    n_bytes = 4 * sum(split.labels_NT.shape[0] for split in (train, measure.test))
    size = max(1, int(memory_gb * 1e9 / (4 * n_bytes)))
    flat = [draw for same_n in draws for draw in same_n]
    T = train.labels_NT.shape[1]
    now = [Choice(np.zeros(T, np.int64), np.full(T, np.nan)) for _ in flat]
    chosen: dict[tuple[int, int, int], Choice] = {}
    for first, last in _pieces(bank.ks, size):
        scores_CN = train.of(slice(start + first, start + last))
        for i, draw in enumerate(flat):
            ap_CT = ap.of_rows(scores_CN[:, draw.rows], train.labels_NT[draw.rows])
            now[i] = better(now[i], ap_CT, first)
            if last in bank.ks:
                chosen[last, draw.n, draw.r] = now[i]
    rows = []
    for k in bank.ks:
        for same_n in draws:
            choices = [chosen[k, draw.n, draw.r] for draw in same_n]
            measured = [measure(measure.test.of(start + choice.best_T)) for choice in choices]
            rows.append(_row(bank.name, k, len(same_n[0].rows), choices, measured))
    return rows


def _pieces(ks: tuple[int, ...], size: int) -> list[tuple[int, int]]:
    """Ranges of at most `size` prototypes, one after the other, of which one ends at each K."""
    ends = sorted({*ks, *range(size, max(ks), size)})
    return list(zip([0, *ends[:-1]], ends, strict=True))


@jaxtyped(typechecker=beartype.beartype)
def better(choice: Choice, ap_CT: Float64[np.ndarray, "C T"], first: int) -> Choice:
    """The prototype of largest AP per trait, `first` and later ones considered too.

    Among equals the lowest number. Where there is no AP at all (a trait without a positive among the train images) it is
    prototype 0: no better than one drawn at random, and that is what its test AP then says.
    """
    ap_CT = ap_CT.round(AP_DIGITS)
    best_T = np.nan_to_num(ap_CT, nan=-1.0).argmax(axis=0)
    best_ap_T = ap_CT[best_T, np.arange(len(best_T))]
    is_new_T = best_ap_T > np.nan_to_num(choice.train_ap_T, nan=-1.0)
    return Choice(
        np.where(is_new_T, first + best_T, choice.best_T),
        np.where(is_new_T, best_ap_T, choice.train_ap_T),
    )


def _row(
    name: str,
    k: int,
    n: int,
    choices: list[Choice],
    measured: list[tuple[np.ndarray, np.ndarray]],
) -> results.Row:
    test_ap, boot = zip(*measured, strict=True)
    return results.Row(
        name,
        k,
        n,
        np.stack([choice.best_T for choice in choices]),
        np.stack([choice.train_ap_T for choice in choices]),
        np.stack(test_ap),
        np.stack(boot),
    )


def _constant_row(train: Split, measure: Measure) -> results.Row:
    """A scorer that says the same of every image: its AP is the trait's prevalence. Nothing real may fall to this row."""
    zeros_NT = np.zeros(train.labels_NT.shape, np.float32)
    train_ap_T = ap.paired(zeros_NT.T, train.labels_NT)
    choice = Choice(np.zeros(len(train_ap_T), np.int64), train_ap_T)
    measured = measure(np.zeros(measure.test.labels_NT.T.shape, np.float32))
    return _row("constant", 1, len(zeros_NT), [choice], [measured])


def _probe_row(same_n: list[Draw], train: Split, measure: Measure) -> results.Row:
    """A linear probe, trained on the images that the others choose on: what labels buy that may form their own direction."""
    choices, measured = [], []
    for draw in same_n:
        train_ND, labels_NT = train.mean_ND[draw.rows], train.labels_NT[draw.rows]
        own_NT, test_NT = probe.scores(train_ND, labels_NT, train_ND, measure.test.mean_ND)
        train_ap_T = ap.paired(own_NT.T, labels_NT)
        choices.append(Choice(np.zeros(len(train_ap_T), np.int64), train_ap_T))
        measured.append(measure(test_NT.T))
    return _row("Linear probe", 1, len(same_n[0].rows), choices, measured)
