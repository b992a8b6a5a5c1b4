"""Configs of labels: which images have which traits, and which are train or test images. Imports no torch."""

import dataclasses
import typing as tp

import beartype

from saev import errors, fields


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Cub:
    """The attributes of CUB-200-2011, with its split."""

    root: fields.Path = ""
    """The CUB_200_2011 folder. --cub-root is short for it."""

    def __post_init__(self) -> None:
        fields.settle(self, "labels.")


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Split:
    """Which images are train and test images."""

    split: tp.Literal["drawn", "folders", "dumps", "file"] = "drawn"
    """drawn: at random, equal shares of each class. folders: by the first folder of each path. dumps: those
    of --train-data and of --test-data. file: by a column of a file."""
    split_file: fields.Path = ""
    """CSV or Parquet file for --labels.split file, with a column `path`, such as the split.csv of earlier
    results. Default: the table itself."""
    split_column: str = "split"
    """Column of that file."""
    split_names: tuple[str, str] = ("train", "test")
    """Names of train and test images in that column, or of their folders. Images with other names are left
    out."""
    test_share: float = 0.5
    """Share of test images in a drawn split."""
    split_seed: int = 0
    """Seed of a drawn split."""

    def __post_init__(self) -> None:
        fields.settle(self, "labels.", test_share="(0, 1)", split_seed="[0, 4294967296)")
        if self.split_file and self.split != "file":
            raise errors.UserError(f"--labels.split-file {self.split_file}: needs --labels.split file.")


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class ClassFolders(Split):
    """Each class, the folder that an image lies in, is a trait."""

    groups: fields.Path = ""
    """TOML file that merges classes into named traits, such as waders = ["heron", "*_stork"]."""


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Table(Split):
    """Columns of a table with a row per image. Empty cells, NA and NaN are missing: the image is left out of
    that trait's AP."""

    file: fields.Path = ""
    """CSV or Parquet file."""
    path_column: str = "path"
    """Column of the images' paths, relative to the folder that was dumped."""
    binary: tuple[str, ...] = ()
    """Columns of 0 and 1, true and false, or yes and no. Each is a trait."""
    categorical: tuple[str, ...] = ()
    """Columns of names. Each value is a trait COLUMN::VALUE."""
    numeric: tuple[str, ...] = ()
    """Columns of numbers, each with a threshold: COLUMN=12.5 is the trait of images with 12.5 or more."""
    class_column: str = ""
    """Column of the classes that a drawn split is balanced over. Default: the images' folders."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.thresholds()

    def thresholds(self) -> list[tuple[str, float]]:
        """(column, threshold) of the numeric traits.

        Raises:
            UserError: one is not COLUMN=NUMBER.
        """
        out = []
        for text in self.numeric:
            column, _, number = text.rpartition("=")
            try:
                out.append((column, float(number)))
            except ValueError:
                column = ""
            if not column:
                raise errors.UserError(f"--labels.numeric {text}: must be COLUMN=NUMBER, as in length=12.5.")
        return out


@beartype.beartype
@dataclasses.dataclass(frozen=True)
class Masks(Split):
    """Classes of patch labels (`python -m saev.labels`): an image has a trait if patches of it do."""

    label_name: str = ""
    """Name of the patch labels (--name of python -m saev.labels)."""
    parts: tuple[str, ...] = ()
    """Classes to use as traits. Default: all but `background` that some images have, but not all."""
    min_patches: int = 1
    """Number of patches of a class from which on an image has the trait."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fields.settle(self, "labels.", min_patches="[1, 1e6]")


Labels = Cub | ClassFolders | Table | Masks
