"""Stage 4, step by step. Each step is a module of that name; docs/experiment.md explains them."""

import dataclasses
import logging
import pathlib
import shutil

from saev import errors, helpers
from saev.formats import results
from saev.protoeval import (
    audit,
    choose,
    config,
    examples,
    fit,
    gallery,
    join,
    labels,
    measure,
    opening,
    patch_join,
    patch_table,
    report,
    score,
    several,
    traits,
)
from saev.protoeval.experiment import Experiment

logger = logging.getLogger("saev")


def main(cfgs: list[config.ProtoEval]) -> str:
    """`each`, for configs with the same labels: returns their results directory."""
    (out,) = each(cfgs)
    return out


def each(cfgs: list[config.ProtoEval]) -> list[str]:
    """Evaluates the scorers of one group. Returns a results directory for each source of labels.

    The directory's name is a hash of everything that determines the results, so finished ones are reused, not
    overwritten. Scorers that several sources share score all images in one pass.

    Raises:
        UserError: bad labels, shards that lack a train or test image (the first is named), or bad scorers.
    """
    acts = opening.open_all(cfgs)
    sources = dict.fromkeys(cfg.source for cfg in cfgs)
    if cfgs[0].gallery and len(sources) > 1:
        raise errors.UserError(
            f"--gallery {cfgs[0].gallery}: shows the traits of one source of labels, but {len(sources)} are "
            "given. Evaluate them without --gallery, then run the command with it and one of them."
        )
    experiments = [_experiment([cfg for cfg in cfgs if cfg.source == source], acts) for source in sources]
    shown = [_shown(experiment) for experiment in experiments]
    names = [experiment.id for experiment in experiments]
    # a killed pass resumes from here
    name = names[0] if len(names) == 1 else helpers.hash_of(names)[:12]
    partial = pathlib.Path(cfgs[0].dump_to) / f".{name}.partial"
    out = [
        _evaluated(experiment, experiments, own, partial)
        for experiment, own in zip(experiments, shown, strict=True)
    ]
    shutil.rmtree(partial, ignore_errors=True)
    return out


def _experiment(cfgs: list[config.ProtoEval], acts: opening.Opened) -> Experiment:
    found = labels.load(cfgs[0], {"train": acts.train, "test": acts.test})
    sides = join.join(cfgs[0], acts, found)
    fits = join.fit_data(cfgs, acts, sides, found)
    return Experiment(cfgs, found, sides, fits, patch_join.load(cfgs[0], sides))


def _shown(experiment: Experiment) -> gallery.Own | None:
    """What the gallery shows, if one is given and can be used."""
    shown = gallery.own(experiment)
    if shown:
        traits.check(experiment)
    return shown


def _evaluated(
    experiment: Experiment, among: list[Experiment], shown: gallery.Own | None, partial: pathlib.Path
) -> str:
    cfg = experiment.cfgs[0]
    out = pathlib.Path(cfg.dump_to) / experiment.id
    with report.once(out, cfg) as is_new:
        if is_new:
            _evaluate(experiment, among, out, partial)
    if shown:
        gallery.link(out, shown, pathlib.Path(cfg.gallery))
        traits.write(out, shown, experiment)
    return str(out)


def _evaluate(
    experiment: Experiment, among: list[Experiment], out: pathlib.Path, partial: pathlib.Path
) -> None:
    cfg, parts, names = experiment.cfgs[0], experiment.patches, experiment.labels.attribute_names_T
    experiment.log_memory()
    banks = fit.fit(experiment)
    if cfg.audit and parts:
        audit.check(banks, cfg, parts)
    chosen, measured = score.score(experiment, banks, partial, [other.sides for other in among])
    cells = choose.choose(chosen, banks, cfg)
    rows, about = measure.measure(cells, chosen, measured, cfg), experiment.about()
    shown = (
        examples.favourites(cells, about, names),
        examples.retrieved(cells, measured, experiment.measured_paths, about, names),
    )
    found = report.Found(about, names, rows, dict(zip(results.FOR_GALLERIES, shown, strict=True)))
    if cfg.models:
        rows, frames, texts = several.evaluate(rows, cells, chosen, measured, cfg, about, names)
        found = dataclasses.replace(found, rows=rows, frames=found.frames | frames, texts=texts)
    if parts:
        table = patch_table.evaluate(experiment, banks, parts, partial / "patches")
        found = dataclasses.replace(found, patches=table)
    if cfg.audit and parts:
        audited = audit.evaluate(experiment, banks, chosen, parts, partial / "audit")
        found = dataclasses.replace(found, audit=audited)
    if experiment.labels.is_drawn:
        report.write_split(out, experiment.labels)
    report.write(out, found, experiment.cfgs)
