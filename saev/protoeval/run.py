"""Stage 4, step by step. Each step is a module of that name; docs/experiment.md explains them."""

import logging
import pathlib
import shutil

from saev.formats import results
from saev.protoeval import (
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
    traits,
)
from saev.protoeval.experiment import Experiment

logger = logging.getLogger("saev")


def main(cfgs: list[config.ProtoEval]) -> str:
    """Evaluates the scorers of one group and returns the results directory.

    The directory's name is a hash of all that determines the results, so finished ones are reused, not
    overwritten.

    Raises:
        UserError: bad labels, shards that lack a train or test image (the first is named), or bad scorers.
    """
    cfg = cfgs[0]
    acts = opening.open_all(cfgs)
    found = labels.load(cfg, {"train": acts.train, "test": acts.test})
    sides = join.join(cfg, acts, found)
    fits = join.fit_data(cfgs, acts, sides, found)
    experiment = Experiment(cfgs, found, sides, fits, patch_join.load(cfg, sides))
    shown = gallery.own(experiment)
    if shown:
        traits.check(experiment)
    out = pathlib.Path(cfg.dump_to) / experiment.id
    with report.once(out, bool(cfg.patch_labels)) as is_new:
        if is_new:
            _evaluate(experiment, out)
    if shown:
        gallery.link(out, shown, pathlib.Path(cfg.gallery))
        traits.write(out, shown, experiment)
    return str(out)


def _evaluate(experiment: Experiment, out: pathlib.Path) -> None:
    cfg = experiment.cfgs[0]
    experiment.log_memory()
    partial = out.with_name(f".{out.name}.partial")  # a killed pass resumes from here
    banks = fit.fit(experiment)
    chosen, measured = score.score(experiment, banks, partial)
    cells = choose.choose(chosen, banks, cfg)
    rows = measure.measure(cells, chosen, measured, cfg)
    names, about, parts = experiment.labels.attribute_names_T, experiment.about(), experiment.patches
    found = (
        examples.favourites(cells, about, names),
        examples.retrieved(cells, measured, experiment.measured_paths, about, names),
    )
    more = dict(zip(results.FOR_GALLERIES, found, strict=True))
    patches = patch_table.evaluate(experiment, banks, parts, partial / "patches") if parts else None
    if experiment.labels.is_drawn:
        report.write_split(out, experiment.labels)
    report.write(out, rows, names, experiment.cfgs, about, more, patches)
    shutil.rmtree(partial, ignore_errors=True)
