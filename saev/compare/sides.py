"""Opens the dictionaries and their activations, and joins their images by path.

N images of all sides, K prototypes, D d_vit.
"""

import collections.abc
import dataclasses
import logging
import pathlib
import typing as tp

import beartype
import numpy as np
import torch
from jaxtyping import Float32, Int64

from saev import errors, helpers, scorers
from saev.compare import config
from saev.data import activations, cub
from saev.data import config as data_config
from saev.formats import jsonfile
from saev.scorers import sae as sae_scorer

logger = logging.getLogger("saev")

UNITS = "units"
"""Stands for the ViT's own units instead of a file."""
GEOMETRY = ("size", "resize", "squash", "fit")
"""The fields of an image transform that decide what a patch shows."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Side:
    """One dictionary and its activations."""

    name: str
    fpath: pathlib.Path
    """UNITS for the ViT's units."""
    scorer: tp.Any
    """A `scorers.Scorer`."""
    acts: activations.Activations

    @property
    def sae(self) -> tp.Any:
        """The SAE, or None for other scorers."""
        return self.scorer.sae if isinstance(self.scorer, sae_scorer.SaeLatents) else None

    @property
    def is_units(self) -> bool:
        return str(self.fpath) == UNITS

    @property
    def digest(self) -> str:
        """sha256 of its file."""
        return helpers.hash_of(self.scorer.digest()) if self.is_units else helpers.hash_file(self.fpath)

    @property
    def noun(self) -> str:
        return "latent" if self.sae else "unit" if self.is_units else "prototype"

    @property
    def kind(self) -> str:
        """The SAE's architecture, or the similarity with which prototypes score."""
        if self.is_units:
            return "Units"
        return type(self.sae.cfg).__name__ if self.sae else f"Prototypes ({self.scorer.similarity})"

    @property
    def vit(self) -> str:
        return helpers.printable(f"{self.acts.metadata.vit_family} {self.acts.metadata.vit_ckpt}")

    @property
    def layer(self) -> int:
        return self.acts.layers[0]

    @property
    def seed(self) -> str | None:
        """The seed in config.json beside an SAE's checkpoint; "" if there is none. None for other scorers."""
        if not self.sae:
            return None
        try:
            found = jsonfile.read_sealed(self.fpath.with_name("config.json"), dict[str, tp.Any], "", old=True)
        except (OSError, errors.UserError):
            return ""
        return str(found.get("seed", ""))

    @property
    def scale_D(self) -> torch.Tensor | None:
        """The factor of each dimension, of an SAE with --sae.normalize per-dim; else None."""
        return self.sae.scale.float().cpu() if self.sae and self.sae.scale.ndim else None

    def directions(self, scale_D: torch.Tensor | None = None) -> Float32[torch.Tensor, "K D"]:
        """Unit vectors in activation space: decoder rows, or prototypes minus the mean.

        Args:
            scale_D: multiplies the dimensions first.
        """
        found_KD = self.sae.W_dec if self.sae else self.scorer.direction_KD
        found_KD = found_KD.detach().float().cpu()
        if self.scale_D is not None:
            found_KD = found_KD / self.scale_D
        if scale_D is not None:
            found_KD = found_KD * scale_D
        return torch.nn.functional.normalize(found_KD, dim=1)

    def is_in_space_of(self, other: "Side") -> bool:
        """Whether both dictionaries have the same ViT and layer, so that cosines mean something."""
        try:
            self.acts.space.check_same(other.acts.space, whose="", flag="", patches=False)
        except errors.UserError:
            return False
        return True


def directions(one: Side, two: Side) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides' directions, in the same units.

    If an SAE divides each dimension by its deviation, cosines are in these units. In raw units, a dimension
    with large deviations would decide them.
    """
    scale_D = two.scale_D if one.scale_D is None else one.scale_D
    return one.directions(scale_D), two.directions(scale_D)


def open_all(cfg: config.Compare) -> list[Side]:
    """Opens both sides, or all of --runs. Each stream of activations is opened once.

    Raises:
        UserError: a checkpoint or shard directory is bad, or they do not belong together.
    """
    given = [(pathlib.Path(f), cfg.data, "--data") for run in cfg.runs for f in _checkpoints(run)]
    if not cfg.runs:
        given = [(pathlib.Path(cfg.scorer), cfg.data, "--data")]
        given += [(pathlib.Path(cfg.other), cfg.second_data, "--other-data")]
    if len(given) < 2:
        raise errors.UserError(f"--runs {cfg.runs[0]}: holds one dictionary. Pass at least two.")
    is_open: dict[data_config.Shards, activations.Activations] = {}
    out = []
    for name, (fpath, data, flag) in zip(_names([f for f, _, _ in given]), given, strict=True):
        scorer = None if str(fpath) == UNITS else scorers.load(fpath)
        data = _of_its_layer(scorer, data) if cfg.runs else data
        if data not in is_open:
            is_open[data] = activations.Activations(data, flag, is_open.values())
            is_open[data].only_layer("a dictionary is of")
            is_open[data].only_whole("dictionaries are compared on")
        scorer = scorer or scorers.Prototypes.units(is_open[data].d_vit)
        out.append(Side(name, fpath, scorer, is_open[data]))
        scorers.check_fits(scorer, is_open[data], str(fpath))
    return out


def _checkpoints(run: str) -> list[pathlib.Path]:
    """The dictionaries that a path of --runs names."""
    path = pathlib.Path(run)
    if run == UNITS or path.is_file():
        return [path]
    found = [path / "sae.pt"] if (path / "sae.pt").is_file() else sorted(path.glob("*/sae.pt"))
    if not found:
        raise errors.UserError(
            f"--runs {run}: no checkpoint, run directory or folder of finished runs (*/sae.pt). Pass the "
            "--ckpt-to of train.py."
        )
    return found


def _names(fpaths: list[pathlib.Path]) -> list[str]:
    """Short different names: the run's or the file's, with parents where these are equal.

    Raises:
        UserError: a file is named twice.
    """
    parts = [
        f.resolve().parts[:-1] if f.name == "sae.pt" else (*f.resolve().parts[:-1], f.stem) for f in fpaths
    ]
    if len(set(parts)) < len(parts):
        twice = next(f for f, mine in zip(fpaths, parts, strict=True) if parts.count(mine) > 1)
        raise errors.UserError(f"{twice}: is given twice. Compare it with another dictionary.")
    n = next(
        n for n in range(1, max(map(len, parts)) + 1) if len({mine[-n:] for mine in parts}) == len(parts)
    )
    return [helpers.printable("/".join(mine[-n:])) for mine in parts]


def _of_its_layer(scorer: scorers.Scorer | None, data: data_config.Shards) -> data_config.Shards:
    """The layer that an SAE was trained on, if its checkpoint says so."""
    layers = scorer.sae.activations.get("layers") if isinstance(scorer, sae_scorer.SaeLatents) else None
    return dataclasses.replace(data, layer=layers[0]) if layers and len(layers) == 1 else data


# ---- images and patches ----


class Joined(tp.NamedTuple):
    """The images that all sides have."""

    acts: list[activations.Activations]
    """Each side's activations of only these images. Equal streams are one object."""
    order: list[Int64[np.ndarray, " N"]]
    """For each side: places in its stream of the images, in one order for all sides."""
    n_left_out: list[int]
    """For each side: its images that another side lacks."""
    per_patch: bool


def join(sides: list[Side], cfg: config.Compare) -> Joined:
    """Finds the images of all sides by path, and whether their patches can be compared.

    Raises:
        UserError: fewer than two images in common, a path that occurs twice, or --per patch with different
            grids.
    """
    streams = list(dict.fromkeys(side.acts for side in sides))
    numbers = _numbered(streams)
    common = sorted(set(numbers[0]).intersection(*numbers[1:]), key=numbers[0].__getitem__)
    if len(common) < 2:
        raise errors.UserError(
            f"{streams[-1].given}: has {len(common)} images in common with {streams[0].given}, joined by "
            f"path (first: {_first(streams[-1])} and {_first(streams[0])}). Dump the same images with both "
            "ViTs."
        )
    left_out = {acts: len(mine) - len(common) for acts, mine in zip(streams, numbers, strict=True)}
    for acts, n in left_out.items():
        if n:
            logger.warning("%s: %d images are left out, because another side lacks them", acts.given, n)
    if 0 < cfg.n_images < len(common):
        drawn = np.random.default_rng(cfg.seed).choice(len(common), max(2, cfg.n_images), replace=False)
        common = [common[i] for i in np.sort(drawn).tolist()]
    only, order = {}, {}
    for acts, mine in zip(streams, numbers, strict=True):
        image_is = np.array([mine[key] for key in common], np.int64)
        only[acts] = acts if len(image_is) == acts.n_imgs else acts.only(image_is.tolist())
        order[acts] = np.searchsorted(only[acts].image_is_N, image_is)
    acts = [side.acts for side in sides]
    return Joined(
        [only[a] for a in acts],
        [order[a] for a in acts],
        [left_out[a] for a in acts],
        _per_patch([only[acts] for acts in streams], [order[acts] for acts in streams], cfg),
    )


Numbers = dict[str | int, int]
"""What identifies an image -> its number in a stream."""


def _numbered(streams: list[activations.Activations]) -> list[Numbers]:
    if all([p.dpath for p in acts.dirs] == [p.dpath for p in streams[0].dirs] for acts in streams):
        return [{i: i for i in acts.image_is_N.tolist()} for acts in streams]  # needs no paths
    plain = [_by_path(acts, lambda path: path.removeprefix("./")) for acts in streams]
    if set(plain[0]).intersection(*plain[1:]):
        return plain
    return [_by_path(acts, cub.key) for acts in streams]  # some with images/, train/ or test/


def _by_path(acts: activations.Activations, key: collections.abc.Callable[[str], str]) -> Numbers:
    out: Numbers = {key(acts.records[i].path): i for i in acts.image_is_N.tolist()}
    if len(out) < acts.n_imgs:
        raise errors.UserError(
            f"{acts.given}: holds {acts.n_imgs - len(out)} images twice (equal paths). Leave out one of its "
            "shard directories."
        )
    return out


def _first(acts: activations.Activations) -> str:
    return acts.records[int(acts.image_is_N[0])].path


def _per_patch(
    streams: list[activations.Activations], orders: list[Int64[np.ndarray, " N"]], cfg: config.Compare
) -> bool:
    shapes = [(acts.n_tokens, acts.cfg.patches, geometry(acts)) for acts in streams]
    sizes = [_sizes(acts, order_N) for acts, order_N in zip(streams, orders, strict=True)]
    is_same = all(shape == shapes[0] for shape in shapes)
    is_same = is_same and all(np.array_equal(sizes_N2, sizes[0]) for sizes_N2 in sizes)
    is_known = bool(shapes[0][2]) or len({tuple(p.dpath for p in acts.dirs) for acts in streams}) == 1
    if cfg.per == "patch" and not (is_same and is_known):
        one, two = streams[0], streams[-1]
        found = f"{one.n_tokens} and {two.n_tokens} patches"
        if one.photos.resize != two.photos.resize:
            found += f", --resize {one.photos.resize} and {two.photos.resize}"
        raise errors.UserError(
            f"--per patch: {one.given} and {two.given} have different or "
            f"unknown grids of patches ({found}). Pass --per image."
        )
    return cfg.per != "image" and is_same and is_known


def geometry(acts: activations.Activations) -> dict[str, object]:
    """What decides which part of a photo a ViT sees; empty if that was not recorded."""
    found = acts.photos.described()
    return {name: found.get(name) for name in GEOMETRY} if found else {}


def _sizes(acts: activations.Activations, order_N: Int64[np.ndarray, " N"]) -> np.ndarray:
    """(width, height) of each photo, if the grid or padding depends on it."""
    if acts.photos.sizes_A2 is None:
        return np.zeros((len(order_N), 2), np.int64)
    return acts.photos.sizes_A2[acts.image_is_N[order_N]]
