"""The labels of a set of images, whatever they come from. N images, T traits."""

import dataclasses
import typing as tp

import beartype
import numpy as np
from jaxtyping import Bool, Int64, jaxtyped

from saev import errors

MAX_CELLS = 4 * 10**9
"""Most images x traits: bytes of the labels."""


class Words(tp.NamedTuple):
    """How messages speak of a source."""

    name: str
    listed: str
    """Where its images are listed."""
    split: str
    """What says which are train images."""
    surplus: str
    """What to do if the shards hold other images too: the start of a sentence."""
    remedy: str
    """What to do if the shards lack an image: a sentence."""


WORDS = Words("the labels", "the labels", "the split", "Label them", "Dump them too.")


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Traits:
    """The labels of all images of a source."""

    paths_N: list[str]
    """Keys that join labels to activations: paths relative to the folder that was dumped."""
    is_train_N: Bool[np.ndarray, " N"]
    attribute_names_T: list[str]
    """Names of traits. The part before :: is a trait's group."""
    labels_NT: Bool[np.ndarray, "N T"]
    """Whether the trait is present. False where it is unknown."""
    class_N: Int64[np.ndarray, " N"]
    """Numbers of classes."""
    known_NT: Bool[np.ndarray, "N T"] | None = None
    """Whether the label is known. None: all are."""
    left_out: frozenset[str] = frozenset()
    """Paths of images that are neither train nor test images."""
    words: Words = WORDS
    source: str = ""
    """The source and the split, for tables. Empty for CUB."""
    is_drawn: bool = False
    """Whether the split was drawn at random."""

    def key(self, path: str) -> str:
        """Turns a dumped path into the key that joins labels to it."""
        return path.removeprefix("./")

    @property
    def n_unknown(self) -> int:
        """Number of labels (of an image and a trait) that are missing."""
        return 0 if self.known_NT is None else int((~self.known_NT).sum())

    def known_of(self, rows: tp.Any) -> np.ndarray | None:
        """`known_NT` of some images."""
        return None if self.known_NT is None else self.known_NT[rows]


def refuse_size(n_images: int, n_traits: int, where: str, remedy: str) -> None:
    """Raises a UserError if the labels would not fit into memory."""
    if n_images * n_traits > MAX_CELLS:
        raise errors.UserError(
            f"{where}: {n_images:,} images x {n_traits:,} traits need {n_images * n_traits / 1e9:.0f} GB of "
            f"labels; at most {MAX_CELLS / 1e9:.0f} are read. {remedy}"
        )
