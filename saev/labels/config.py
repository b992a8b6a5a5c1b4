"""Config of `python -m saev.labels`. Imports no torch."""

import dataclasses
import re
import typing as tp

import beartype
import tyro

from saev import errors, fields, launch
from saev.data import config as data_config


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Index:
    """One image file per photo, whose pixel values are ids of classes (ADE20K, FishVista, Cityscapes)."""

    root: fields.Path = ""
    """Folder of the masks. A photo a/b.jpg has the mask a/b.png."""
    suffix: str = ".png"
    """What takes the place of the photo's suffix in the mask's name, such as '_seg.png' or '/mask.png'."""
    names: fields.Path = ""
    """File with the classes' names: JSON ({"1": "wall"} or {"wall": 1}), or lines of an id and a name.
    Default: the ids found are the names."""
    ignore: tuple[int, ...] = ()
    """Ids of pixels that have no class, such as 255, or ADE20K's 0."""

    def __post_init__(self) -> None:
        fields.settle(self, "masks.", ignore="[0, 65535]")


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Coco:
    """Polygons of a COCO-style JSON file. Where several cover a pixel, the smallest one counts."""

    file: fields.Path = ""
    """The JSON file, with images, annotations and categories."""

    def __post_init__(self) -> None:
        fields.settle(self, "masks.")


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Labels:
    """Gives each patch of a dump the class that most of its pixels have in a segmentation mask."""

    shard_root: fields.Path = ""
    """Shard directory, as printed by `python -m saev.data`."""
    images: data_config.ImageFolder | data_config.Cub200 = dataclasses.field(
        default_factory=data_config.ImageFolder
    )
    """The images that were dumped. Only their sizes are read."""
    masks: Index | Coco = dataclasses.field(default_factory=Index)
    """The masks. `masks:NAME --help` shows the flags of each."""
    rule: tp.Literal["majority", "foreground"] = "majority"
    """majority: the class of most of the patch's pixels. foreground: of most pixels that are not background,
    if there are any. Equal counts: the lower id."""
    background: int = 0
    """Id of the background, for --rule foreground."""
    missing: tp.Literal["refuse", "ignore"] = "refuse"
    """Images without a mask. refuse: stop. ignore: their patches get no label."""
    name: str = ""
    """Name of these labels, for a dump with several: labels-NAME.bin."""
    n_workers: int = 4
    """Threads that decode masks."""
    dry_run: bool = False
    """Print the config without labelling."""
    slurm: tp.Annotated[launch.SlurmConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=launch.of_user
    )
    """Where to run."""

    def __post_init__(self) -> None:
        fields.settle(self, background="[0, 65534]", n_workers="[1, 1024]")
        if not re.fullmatch(r"\w*", self.name, re.ASCII):
            raise errors.UserError(f"--name {self.name!r}: use letters, digits and underscores.")
