"""An experiment: the scorers of a group, the labels and the images. Names and describes its results."""

import dataclasses
import datetime
import functools
import pathlib
import typing as tp

import beartype
import numpy as np

from saev import devices, errors, fields, helpers, machine, scorers
from saev.data import activations
from saev.data.traits import base
from saev.formats import patchresults, results
from saev.protoeval import check, config, join, labels, memory, patch_join
from saev.scorers import config as scorers_config

REVISION = 6
"""Raise it when the same activations, labels and config may give other numbers."""

PATCH_REVISION = 2
"""The same for the patch table."""

AUDIT_REVISION = 3
"""The same for the audit."""

SEVERAL_REVISION = 2
"""The same for models of several prototypes, and keys."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Experiment:
    cfgs: list[config.ProtoEval]
    """One per scorer. They differ only in the scorer and its fit data."""
    labels: base.Traits
    sides: join.Sides
    fits: list[join.Fit]
    """The activations that each scorer is fitted on."""
    patches: patch_join.Labels | None = None
    """Patch labels, if there are any."""

    @functools.cached_property
    def names(self) -> list[str]:
        return names(self.cfgs)

    @functools.cached_property
    def id(self) -> str:
        """A hash of what determines the table: activations, labels, protocol, scorers, grid and seed."""
        parts: list[object] = [REVISION, scorers.REVISION, self._measured_on]
        for cfg, fit in zip(self.cfgs, self.fits, strict=True):
            parts += [fields.identity(cfg), *_content(cfg, fit).values(), _run_name(cfg)]
            parts += self._activations
        if self.patches:
            parts += [PATCH_REVISION, self.patches.fingerprint]
        if self.cfgs[0].audit:
            parts += [AUDIT_REVISION]
        if self.cfgs[0].models:
            parts.append(SEVERAL_REVISION)
        return helpers.hash_of(parts)[:12]

    @property
    def _activations(self) -> list[str]:
        """Fingerprints of the train and test activations."""
        return [acts.fingerprint for acts in self._train_and_test]

    @property
    def _train_and_test(self) -> list[activations.Activations]:
        acts = {side.split: side.acts for side in self.sides}
        return [acts["train"], acts["test"]]

    @property
    def _measured_on(self) -> str:
        """A hash of what is measured on which images. Results are comparable only if it is equal."""
        cfg, left_out = self.cfgs[0], [side.left_out for side in self.sides]
        usual = (cfg.no_positives, cfg.swap_splits) == ("leave-out", False)
        hashed = labels.fingerprint(self.labels)
        if usual and not any(left_out):
            return hashed
        return helpers.hash_of([hashed, cfg.no_positives, cfg.swap_splits, left_out])

    @property
    def measured_paths(self) -> list[str]:
        """The paths of the images that are measured on, in the order of images.txt."""
        return [self.labels.paths_N[row] for row in sorted(self.sides.measured.row_of.values())]

    def about(self) -> results.About:
        cfg, (chosen, measured) = self.cfgs[0], self.sides
        seen_T = self.labels.labels_NT[list(measured.row_of.values())].any(axis=0)
        train, test = self._train_and_test
        modes = " and ".join(dict.fromkeys((train.photos.resize, test.photos.resize)))
        shown = "" if modes == "default" else f", --resize {modes}"
        roots = [r for d in (cfg.train_data, cfg.test) for r in (d.shard_root, *d.more_roots)]
        shards = dict.fromkeys(helpers.printable(pathlib.Path(root).name[:8]) for root in roots)
        return results.About(
            vit=helpers.printable(f"{train.metadata.vit_family} {train.metadata.vit_ckpt}"),
            layer=train.layers[0],
            tokens=f"{train.n_tokens} tokens an image ({cfg.train_data.patches}{shown})",
            shards=list(shards),
            labels=self._measured_on,
            min_certainty=0 if self.labels.source else cfg.min_certainty,
            seed=cfg.seed,
            n_seeds=cfg.n_seeds,
            n_boot=cfg.n_boot,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            scorers={
                name: self._settings(cfg, fit)
                for cfg, fit, name in zip(self.cfgs, self.fits, self.names, strict=True)
            },
            activations=self._activations,
            problems=self._forced() if cfg.force else [],
            chosen_on=chosen.size,
            measured_on=measured.size,
            n_classes=len(np.unique(self.labels.class_N)),
            left_out={side.split: side.left_out for side in self.sides if side.left_out},
            annotations=cfg.annotations,
            source=helpers.printable(self.labels.source),
            n_unknown=self.labels.n_unknown,
            n_labels=self.labels.labels_NT.size,
            patch_labels=self.patches.of_images if self.patches else "",
            audit=list(cfg.audit),
            models={
                f"{name}, {words}": (name, model)
                for cfg, name in zip(self.cfgs, self.names, strict=True)
                for model, words in cfg.models.items()
            },
            n_zero=int((~seen_T).sum()) if cfg.no_positives == "zero" else 0,
            nulls={name + patchresults.PERMUTED: name for name in self.names},
        )

    def _settings(self, cfg: config.ProtoEval, fit: join.Fit) -> dict[str, tp.Any]:
        """All that determines a scorer, except the seed and paths."""
        found = {"cls": type(cfg.scorer).__name__, **fields.recorded(cfg.scorer)}
        found |= _content(cfg, fit)
        if isinstance(cfg.scorer, scorers_config.Sae | scorers_config.Units):
            return found
        return found | {"fitted_on": fit.description}

    def _forced(self) -> list[str]:
        """The problems that --force accepted."""
        known = {*self.labels.paths_N, *self.labels.left_out}
        out = check.problems(self.labels)
        for acts in dict.fromkeys(self._train_and_test):
            n = sum(self.labels.key(acts.records[int(i)].path) not in known for i in acts.image_is_N)
            if n:
                out.append(f"{n:,} images of {acts.root} have no labels and were left out")
        return out

    def log_memory(self) -> None:
        """Logs how much memory the evaluation needs, on a CPU."""
        if devices.pick(self.cfgs[0].device).type != "cpu":
            return
        chosen, measured = self.sides
        ckpts = [pathlib.Path(scorers_config.checkpoint(cfg.scorer)) for cfg in self.cfgs]
        sizes = memory.Sizes(
            n_train=len(chosen.row_of),
            n_test=len(measured.row_of),
            n_traits=self.labels.labels_NT.shape[1],
            n_tokens=chosen.acts.n_tokens,
            d_vit=chosen.acts.d_vit,
            n_fit=max(len(fit.acts) for fit in self.fits),
            ckpt=max(ckpt.stat().st_size if ckpt.is_file() else 0 for ckpt in ckpts),
            n_classes=len(self.patches.names) if self.patches else 0,
        )
        machine.log_need(memory.peak(self.cfgs, sizes))


def _content(cfg: config.ProtoEval, fit: join.Fit) -> dict[str, str]:
    """Hashes of the SAE's checkpoint and of the activations that the scorer is fitted on, as far as it has
    them."""
    ckpt = scorers_config.checkpoint(cfg.scorer)
    content = helpers.hash_file(pathlib.Path(ckpt)) if pathlib.Path(ckpt).is_file() else ckpt
    match cfg.scorer:
        case scorers_config.Units():
            return {}
        case scorers_config.Sae():
            return {"ckpt": content}
        case scorers_config.Untrained():
            return {"like": content, "fit": fit.acts.fingerprint}
        case _:
            return {"fit": fit.acts.fingerprint}


def _run_name(cfg: config.ProtoEval) -> str:
    """An SAE's run id, its name in the table; else ""."""
    return pathlib.Path(scorers_config.checkpoint(cfg.scorer)).parent.name


# ---- names ----


def names(cfgs: list[config.ProtoEval]) -> list[str]:
    """The scorers' names in the table: class, SAE's run id, and the settings in which scorers differ.

    Raises:
        UserError: two configs have the same scorer and fit data.
    """
    short = [_name(cfg, cfgs) for cfg in cfgs]
    full = [
        f"{name} ({scorers_config.checkpoint(cfg.scorer)} fit on {cfg.fit.shard_root} layer {cfg.fit.layer} "
        f"{cfg.fit.patches}, {_fit_images(cfg)})"
        for name, cfg in zip(short, cfgs, strict=True)
    ]
    found = [s if short.count(s) == 1 else f for s, f in zip(short, full, strict=True)]
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise errors.UserError(f"the scorer {twice} is given twice. Name it once in the sweep.")
    return [helpers.printable(name) for name in found]


def _name(cfg: config.ProtoEval, cfgs: list[config.ProtoEval]) -> str:
    alike = [c for c in cfgs if type(c.scorer) is type(cfg.scorer)]
    parts = [type(cfg.scorer).__name__]
    for field in dataclasses.fields(cfg.scorer):
        value = getattr(cfg.scorer, field.name)
        if field.name in ("ckpt", "like"):
            parts.append(pathlib.Path(value).parent.name or value)
        elif any(getattr(c.scorer, field.name) != value for c in alike):
            parts.append(f"{field.name}={value}")
    if any((c.fit, _fit_images(c)) != (cfg.fit, _fit_images(cfg)) for c in alike):
        place = f"{pathlib.Path(cfg.fit.shard_root).name[:8]} layer {cfg.fit.layer}"
        parts.append(f"fit on {_fit_images(cfg)} of {place}")
    return " ".join(parts)


def _fit_images(cfg: config.ProtoEval) -> str:
    """The images of the fit data that a scorer is fitted on."""
    return "all images" if cfg.fit_data.shard_root else f"{cfg.sides[0][0]} images"
