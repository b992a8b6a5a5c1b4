"""Stage 4 itself: labels joined to activations, scorers fitted, every image scored once, and a results directory of it.

N images, T traits.
"""

import collections.abc
import dataclasses
import datetime
import hashlib
import logging
import pathlib
import shutil
import typing as tp

import beartype
import numpy as np
import torch

from saev import devices, errors, fields, helpers, scorers
from saev.data import config as data_config
from saev.data import cub, reader
from saev.formats import manifest, results
from saev.protoeval import check, choice, config, join, memory, report, scoring
from saev.scorers import config as scorers_config

logger = logging.getLogger("saev")

REVISION = 5
"""Raised whenever the same activations, labels and config may give other numbers."""


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
    labels = _labels(cfg)
    if not cfg.force:
        check.refuse_implausible(labels, cfg.cub_root)
    joins = join.both(cfg, labels)
    runs = [Run(c, join.fit_data(c, joins[0])) for c in cfgs]
    linked = _in_gallery(cfgs)
    out = pathlib.Path(cfg.dump_to) / _run_id(runs, labels, joins)
    helpers.sweep(out.parent)
    helpers.sweep(out)
    if not (out / manifest.NAME).exists():
        with helpers.locked(out.with_name(f".{out.name}.lock"), f"it evaluates {out}"):
            if not (out / manifest.NAME).exists():
                _evaluate_into(out, runs, labels, joins)
    else:
        manifest.read(out, results.FILES, report.AGAIN)
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
    for cfg in {(c.cub_root, c.train_data, c.test, c.protocol): c for c in cfgs}.values():
        _look(cfg, say)


def _labels(cfg: config.ProtoEval) -> cub.Cub:
    return cub.load(cfg.cub_root, min_certainty=cfg.min_certainty, annotations=cfg.annotations)


def _look(cfg: config.ProtoEval, say: collections.abc.Callable[[str], None]) -> None:
    if not cfg.cub_root:
        raise errors.UserError("--cub-root is missing: pass the CUB_200_2011 folder.")
    labels = _labels(cfg)
    say(
        f"{cfg.cub_root}, certainty from {cfg.min_certainty}, annotations: {cfg.annotations}: {check.describe(labels)}"
    )
    chosen, measured = (split for split, _ in cfg.sides)
    say(f"Prototypes are chosen on the {chosen} images and measured on the {measured} images.")
    for split, data in cfg.sides:
        if data.shard_root:
            found = join.of(data, labels, split, cfg.force)
            if found.left_out:
                text = join.said_of(found.left_out, split)
                say(f"{data.shard_root}: holds {found.size}; {text}.")
            else:
                say(f"{data.shard_root}: holds all {found.size}.")
    for problem in check.problems(labels):
        say(f"Implausible: {problem}.")
    if not cfg.force:
        check.refuse_implausible(labels, cfg.cub_root)


def _evaluate_into(
    out: pathlib.Path, runs: list["Run"], labels: cub.Cub, joins: list[join.Join]
) -> None:
    cfgs = [run.cfg for run in runs]
    cfg = cfgs[0]
    if devices.pick(cfg.device).type == "cpu":  # the formula is for a CPU
        n_bytes = memory.peak(cfgs, _sizes(runs, labels, joins))
        logger.info("memory: about %.2f GB (docs/memory.md)", n_bytes / 1e9)
    banks = [
        bank for run, name in zip(runs, labels_of(cfgs), strict=True) for bank in _banks(run, name)
    ]
    partial = out.with_name(f".{out.name}.partial")
    train, test = _score(cfg, banks, labels, joins, partial)
    rows = choice.evaluate(train, test, banks, cfg)
    about = dataclasses.replace(_about(runs, labels, joins), problems=_forced(cfg, labels))
    report.write(out, rows, labels.attribute_names_T, cfgs, about)
    shutil.rmtree(partial, ignore_errors=True)


def _sizes(runs: list["Run"], labels: cub.Cub, joins: list[join.Join]) -> memory.Sizes:
    acts = reader.Reader(joins[0].data)
    ckpts = [pathlib.Path(getattr(run.cfg.scorer, "ckpt", "")) for run in runs]
    return memory.Sizes(
        n_train=len(joins[0].row_of),
        n_test=len(joins[1].row_of),
        n_traits=labels.labels_NT.shape[1],
        n_tokens=acts.n_tokens,
        d_vit=acts.d_vit,
        n_fit=max(len(reader.Reader(run.fit)) for run in runs),
        ckpt=max(ckpt.stat().st_size if ckpt.is_file() else 0 for ckpt in ckpts),
    )


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


def _about(runs: list["Run"], labels: cub.Cub, joins: list[join.Join]) -> results.About:
    cfgs = [run.cfg for run in runs]
    cfg, (chosen, measured) = cfgs[0], joins
    seen_T = labels.labels_NT[list(measured.row_of.values())].any(axis=0)
    acts, space = reader.Reader(cfg.train_data), _space(reader.Reader(cfg.train_data))
    data = (cfg.train_data, cfg.test)
    names = [pathlib.Path(root).name[:8] for d in data for root in (d.shard_root, *d.more_roots)]
    return results.About(
        vit=helpers.printable(str(space["ViT"])),
        layer=tp.cast(int, space["layer"]),
        tokens=f"{acts.n_tokens} tokens an image ({cfg.train_data.patches})",
        shards=[helpers.printable(name) for name in dict.fromkeys(names)],
        labels=_measured_hash(cfg, labels, joins),
        min_certainty=cfg.min_certainty,
        seed=cfg.seed,
        n_seeds=cfg.n_seeds,
        n_boot=cfg.n_boot,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        scorers={
            name: _in_full(run) | _fitted_on(run, joins, labels)
            for run, name in zip(runs, labels_of(cfgs), strict=True)
        },
        activations=[_identity(d) for d in data],
        chosen_on=chosen.size,
        measured_on=measured.size,
        n_classes=len(np.unique(labels.class_N)),
        left_out={side.split: side.left_out for side in joins if side.left_out},
        annotations=cfg.annotations,
        n_zero=int((~seen_T).sum()) if cfg.no_positives == "zero" else 0,
    )


def _fitted_on(run: "Run", joins: list[join.Join], labels: cub.Cub) -> dict[str, str]:
    if isinstance(run.cfg.scorer, scorers_config.Sae):
        return {}
    return {"fitted_on": join.fitted_on(run.cfg, run.fit, joins, labels)}


def _measured_hash(cfg: config.ProtoEval, labels: cub.Cub, joins: list[join.Join]) -> str:
    """Names what is measured on which images: figures under another name are not comparable."""
    usual = (cfg.no_positives, cfg.swap_splits) == ("leave-out", False)
    left_out = [side.left_out for side in joins]
    if usual and not any(left_out):
        return _labels_hash(labels)
    parts = [_labels_hash(labels), cfg.no_positives, cfg.swap_splits, left_out]
    return helpers.hash_of(parts)


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
    shown = report.read_gallery(pathlib.Path(cfgs[0].gallery)).sha256
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


class Run(tp.NamedTuple):
    """One config of a group, and the activations that its scorer is fitted on."""

    cfg: config.ProtoEval
    fit: data_config.Shards


def _run_id(runs: list[Run], labels: cub.Cub, joins: list[join.Join]) -> str:
    """Hash of all that decides the table: activations, labels, protocol, scorers, grid and seed; not of where they lie."""
    measured = _measured_hash(runs[0].cfg, labels, joins)
    parts: list[object] = [REVISION, scorers.REVISION, measured]
    for run in runs:
        parts += [fields.identity(run.cfg), *_content(run).values(), _name_of_run(run.cfg)]
        parts += [_identity(data) for data in (run.cfg.train_data, run.cfg.test)]
    return helpers.hash_of(parts)[:12]


def _in_full(run: Run) -> dict[str, tp.Any]:
    """All that decides a scorer but the seed; not where its files lie."""
    scorer = run.cfg.scorer
    return {"cls": type(scorer).__name__, **dataclasses.asdict(scorer), **_content(run)}


def _content(run: Run) -> dict[str, str]:
    """Hash of the SAE's checkpoint, or of the activations that the scorer is fitted on."""
    ckpt = getattr(run.cfg.scorer, "ckpt", None)
    if ckpt is None:
        return {"fit": _identity(run.fit)}
    return {"ckpt": helpers.hash_file(pathlib.Path(ckpt)) if pathlib.Path(ckpt).is_file() else ckpt}


def _name_of_run(cfg: config.ProtoEval) -> str:
    """An SAE's run id, which the table names it by; else empty."""
    return pathlib.Path(getattr(cfg.scorer, "ckpt", "")).parent.name


def _identity(data: data_config.Shards) -> str:
    return reader.Reader(data).hash


# ---- scorers ----


def _banks(run: Run, name: str) -> list[choice.Bank]:
    """K-means is fitted once per K; the others once, and their prefixes serve the smaller K."""
    cfg = run.cfg
    fit_ks = (
        sorted(set(cfg.n_prototypes))
        if type(cfg.scorer).__name__ == "KMeans"
        else [max(cfg.n_prototypes)]
    )
    fitted = scorers.fit_each(
        cfg.scorer,
        run.fit,
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
        out.append(choice.Bank(name, scorer, ks))
    return out


@beartype.beartype
def labels_of(cfgs: list[config.ProtoEval]) -> list[str]:
    """The scorers' names in the table: the class, an SAE's run id, and whatever else tells two of them apart.

    Raises:
        UserError: the same scorer, fitted on the same activations, is there twice.
    """
    short = [_label(cfg, cfgs) for cfg in cfgs]
    full = [
        f"{name} ({getattr(cfg.scorer, 'ckpt', '')} fit on {cfg.fit.shard_root} layer {cfg.fit.layer} {cfg.fit.patches}, {_which(cfg)})"
        for name, cfg in zip(short, cfgs, strict=True)
    ]
    names = [s if short.count(s) == 1 else f for s, f in zip(short, full, strict=True)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise errors.UserError(f"the scorer {twice} is given twice. Name it once in the sweep.")
    return [helpers.printable(name) for name in names]


def _label(cfg: config.ProtoEval, cfgs: list[config.ProtoEval]) -> str:
    alike = [c for c in cfgs if type(c.scorer) is type(cfg.scorer)]
    parts = [type(cfg.scorer).__name__]
    for field in dataclasses.fields(cfg.scorer):
        value = getattr(cfg.scorer, field.name)
        if field.name == "ckpt":
            parts.append(pathlib.Path(value).parent.name or value)
        elif any(getattr(c.scorer, field.name) != value for c in alike):
            parts.append(f"{field.name}={value}")
    if any((c.fit, _which(c)) != (cfg.fit, _which(cfg)) for c in alike):
        place = f"{pathlib.Path(cfg.fit.shard_root).name[:8]} layer {cfg.fit.layer}"
        parts.append(f"fit on {_which(cfg)} of {place}")
    return " ".join(parts)


def _which(cfg: config.ProtoEval) -> str:
    """Which of the fit data's images a scorer is fitted on."""
    return "all images" if cfg.fit_data.shard_root else f"{cfg.sides[0][0]} images"


# ---- scores ----


def _score(
    cfg: config.ProtoEval,
    banks: list[choice.Bank],
    labels: cub.Cub,
    joins: list[join.Join],
    dpath: pathlib.Path,
) -> tuple[choice.Split, choice.Split]:
    """Scores of the images that are chosen on and of those measured on; one pass when both lie in the same shards."""
    device = devices.pick(cfg.device)
    run = [bank.scorer.to(device) for bank in banks]
    first, second = joins
    if first.data == second.data:
        rows = first.row_of | second.row_of
        joint = _scores(run, first.data, rows, dpath / "all", device, cfg)
        both = [joint, joint]
    else:
        both = [
            _scores(run, side.data, side.row_of, dpath / side.split, device, cfg) for side in joins
        ]
    chosen, measured = (
        _split(scores, side.row_of, labels) for scores, side in zip(both, joins, strict=True)
    )
    return chosen, measured


def _scores(
    run: list[scorers.Scorer],
    data: data_config.Shards,
    row_of: dict[int, int],
    dpath: pathlib.Path,
    device: torch.device,
    cfg: config.ProtoEval,
) -> scoring.Scores:
    """In the order of images.txt, so that no result depends on the order of the shards."""
    image_is = sorted(row_of, key=row_of.__getitem__)
    return scoring.score(run, data, image_is, dpath, device, cfg.memory_gb)


def _split(scores: scoring.Scores, row_of: dict[int, int], labels: cub.Cub) -> choice.Split:
    columns = [n for n, i in enumerate(scores.image_i_N.tolist()) if i in row_of]
    rows = [row_of[i] for i in scores.image_i_N[columns].tolist()]
    return choice.Split(scores, np.array(columns, np.int64), labels.labels_NT[rows])
