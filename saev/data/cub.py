"""Labels of CUB-200-2011 (Wah et al. 2011), from the files in CUB_200_2011/:

    images.txt                                        image id, path
    train_test_split.txt                              image id, 1 for train
    image_class_labels.txt                            image id, class id
    attributes/attributes.txt                         attribute id, name (or in CUB_200_2011, or beside it)
    attributes/image_attribute_labels.txt             image id, attribute id, present, certainty, [more,] time
    attributes/class_attribute_labels_continuous.txt  per class: how often, in percent (optional)

Copies arranged for image-folder loaders are read too. They keep these files in a folder `metadata/` (with or
without an attributes/ inside), and the photos in train/CLASS/ and test/CLASS/ instead of images/CLASS/.

Labels are joined by image id and path, never by the position of a line.

Shape letters: N images, T traits, C classes, M lines.
"""

import collections.abc
import dataclasses
import io
import os
import pathlib
import re
import typing as tp
import warnings

import beartype
import numpy as np
from jaxtyping import Float64, jaxtyped

from saev import errors, fields
from saev.data import config
from saev.data.traits import base
from saev.formats import textfile

N_FIELDS = 7
"""Most fields on a line of annotations."""
MAX_BYTES = 2**30
"""Largest file that is read. The largest one of the archive has 9e7 bytes."""
REMEDY = "Pass the CUB_200_2011 folder of the full archive (with attributes)."
NATURAL, INTEGER = re.compile("[0-9]{1,7}"), re.compile("[+-]?[0-9]{1,18}")
FIELDS = "'IMAGE_ID ATTRIBUTE_ID PRESENT CERTAINTY ... TIME' of 4 to 7 fields"


WORDS = base.Words(
    "CUB",
    "images.txt",
    "train_test_split.txt",
    "Dump only CUB's images (data:cub200)",
    "Dump the images with data:cub200, or with data:image-folder on CUB's images/ folder. If the test images "
    "are in other shards, pass these as --test-data.shard-root.",
)


@jaxtyped(typechecker=beartype.beartype)
@dataclasses.dataclass(frozen=True)
class Cub(base.Traits):
    """The labels of all images, in the order of images.txt.

    `paths_N` are relative to images/. `attribute_names_T`, such as has_wing_color::blue, are in the order of
    attribute ids. `class_N` are class ids, from 1, as in classes.txt.
    """

    words: base.Words = WORDS
    shares_CT: Float64[np.ndarray, "C T"] | None = None
    """The archive's own figures for how often annotators saw each trait on each class's images, used to check
    the labels. Row 0 is class 1; classes without images have rows too."""
    n_lines: int = 0
    """Annotations in image_attribute_labels.txt."""
    n_repeated: int = 0
    """Image-attribute pairs with more than one annotation."""
    n_uncertain: int = 0
    """Annotations of "present" that were not certain enough."""
    n_disputed: int = 0
    """Image-attribute pairs that one annotator marked present and another absent."""

    def key(self, path: str) -> str:
        return key(path)


@beartype.beartype
def load(root: str | pathlib.Path, *, min_certainty: int = 3, annotations: config.Annotations = "any") -> Cub:
    """Loads the labels. A trait is present if an annotation says so with at least `min_certainty`.

    Args:
        root: the CUB_200_2011 folder.
        min_certainty: 1 not visible, 2 guessing, 3 probably, 4 definitely.
        annotations: which of several for an image and trait count: "any" positive one, or only the "last".

    Raises:
        UserError: a file is missing, a line cannot be parsed (file and line are named), an id is unknown, or
            an image-attribute pair has no line.
    """
    root = fields.path(root)
    if not root.is_dir():
        raise errors.UserError(
            f"--cub-root {root}: no such directory. Pass the CUB_200_2011 folder (with images.txt)."
        )
    root = metadata_root(root)
    paths = image_paths(root)
    ids = list(paths)
    names_fpath = _attributes_fpath(root)
    names = _names(names_fpath)
    if sorted(names) != list(range(1, len(names) + 1)):
        raise errors.UserError(f"{names_fpath}: attribute ids are not 1 ... {len(names)}. Unpack CUB again.")
    is_train = split(root, paths)
    classes = _numbers(_first(root / "image_class_labels.txt"), paths, range(1, 10_000))
    labels_fpath = _first(*(dpath / "image_attribute_labels.txt" for dpath in (root / "attributes", root)))
    return Cub(
        paths_N=[paths[i] for i in ids],
        is_train_N=np.array([is_train[i] == 1 for i in ids]),
        attribute_names_T=[names[t] for t in sorted(names)],
        class_N=np.array([classes[i] for i in ids], np.int64),
        shares_CT=_read_shares(root, max(classes.values()), len(names)),
        **_read_labels(labels_fpath, ids, len(names), min_certainty, annotations),
    )


def metadata_root(root: pathlib.Path) -> pathlib.Path:
    """Returns the folder with images.txt: `root`, or its metadata/."""
    inner = root / "metadata"
    return inner if (inner / "images.txt").is_file() and not (root / "images.txt").is_file() else root


def image_paths(root: pathlib.Path) -> dict[int, str]:
    """Maps image ids to paths relative to images/ (or train/, test/), as images.txt lists them.

    Raises:
        UserError: images.txt is missing, has a bad line (named), or repeats an id or path.
    """
    fpath = root / "images.txt"
    paths = _names(_first(fpath), key)
    for path in paths.values():
        parts = pathlib.PurePosixPath(path).parts
        if parts[0] == "/" or ".." in parts or "\0" in path:
            raise errors.UserError(
                f"{fpath}: the path {path!r} leaves the image folder. Unpack the archive again."
            )
    return paths


def split(root: pathlib.Path, paths: dict[int, str]) -> dict[int, int]:
    """Maps image ids to 1 (train) or 0 (test).

    Raises:
        UserError: train_test_split.txt is missing, has a bad line (named), or lacks an image.
    """
    return _numbers(_first(root / "train_test_split.txt"), paths, range(2))


def key(path: str) -> str:
    """Turns a path, as dumped or as listed in images.txt, into the key that joins the two.

    The key leaves out a leading images/, train/ or test/.
    """
    first, _, rest = path.removeprefix("./").partition("/")
    return rest if first in ("images", "train", "test") else path.removeprefix("./")


def _first(*fpaths: pathlib.Path) -> pathlib.Path:
    """Returns the first path that exists. A broken link counts: reading it gives the right error."""
    for fpath in fpaths:
        if os.path.lexists(fpath):
            return fpath
    raise errors.UserError(f"{fpaths[0]}: missing. {REMEDY}")


def _attributes_fpath(root: pathlib.Path) -> pathlib.Path:
    """Finds attributes.txt: in attributes/, in CUB_200_2011, or beside it as in the original archive."""
    above = [root.parent, root.resolve().parent]  # beside a link, or beside its target
    if root.name == "metadata":
        above += [root.parent / "attributes", *(dpath.parent for dpath in above)]
    return _first(*(dpath / "attributes.txt" for dpath in (root / "attributes", root, *above)))


def _bad_line(fpath: pathlib.Path, line_i: int, line: str, wanted: str) -> errors.UserError:
    return errors.UserError(
        f"{fpath}:{line_i}: {line.strip()[:80]!r} is not {wanted}. Unpack the archive again."
    )


def _names(
    fpath: pathlib.Path, as_name: collections.abc.Callable[[str], str] = lambda name: name
) -> dict[int, str]:
    """Parses lines of "ID NAME". Repeated ids or names are an error."""
    out: dict[int, str] = {}
    seen: set[str] = set()
    for line_i, line in _filled_lines(fpath):
        number, name = [*line.split(None, 1), "", ""][:2]
        name = as_name(name.strip())
        if not NATURAL.fullmatch(number) or not name or int(number) in out or name in seen:
            raise _bad_line(fpath, line_i, line, "'ID NAME' with an id and a name not seen before")
        out[int(number)] = name
        seen.add(name)
    if not out:
        raise errors.UserError(f"{fpath}: is empty. Unpack the archive again.")
    return out


def _numbers(fpath: pathlib.Path, paths: dict[int, str], allowed: range) -> dict[int, int]:
    """Parses lines of "IMAGE_ID NUMBER", exactly one for each image."""
    out: dict[int, int] = {}
    for line_i, line in _filled_lines(fpath):
        key, number = [*line.split(), "", ""][:2]
        is_good = NATURAL.fullmatch(key) and NATURAL.fullmatch(number) and len(line.split()) == 2
        if not is_good or int(key) not in paths or int(key) in out or int(number) not in allowed:
            bounds = f"{allowed.start}-{allowed.stop - 1}"
            wanted = f"'IMAGE_ID NUMBER' with a new id from images.txt and a number in {bounds}"
            raise _bad_line(fpath, line_i, line, wanted)
        out[int(key)] = int(number)
    if missing := [i for i in paths if i not in out]:
        first = ", ".join(map(str, missing[:3]))
        raise errors.UserError(
            f"{fpath}: {len(missing)} images have no line (first: ids {first}). Unpack the archive again."
        )
    return out


def _read_labels(
    fpath: pathlib.Path, ids: list[int], n_traits: int, min_certainty: int, annotations: config.Annotations
) -> dict[str, tp.Any]:
    """Computes the fields of `Cub` that come from the annotations.

    Only the first four fields of a line are used. Lines of the archive have 5 to 7, and some copies leave out
    the time. With annotations "any", one positive that is certain enough suffices, so an annotator who saw
    the trait outvotes one who did not. With "last", only a pair's last line counts.
    """
    fields_M4 = _first_four_fields(fpath)
    row_of = np.full(max(ids) + 2, -1, np.int64)  # the last entry serves all larger ids
    row_of[ids] = np.arange(len(ids))
    image_M, trait_M, present_M, certainty_M = fields_M4.T
    row_M = row_of[np.clip(image_M, -1, max(ids) + 1)]
    ok_M = (row_M >= 0) & (trait_M >= 1) & (trait_M <= n_traits) & np.isin(present_M, (0, 1))
    ok_M &= (certainty_M >= 1) & (certainty_M <= 4)
    if not ok_M.all():
        line_i, line = _filled_lines(fpath)[int(np.flatnonzero(~ok_M)[0])]
        wanted = f"{FIELDS} with a known image, an attribute in 1-{n_traits}, 0 or 1, and 1-4"
        raise _bad_line(fpath, line_i, line, wanted)
    pair_M = row_M * n_traits + trait_M - 1
    n_seen_NT = np.bincount(pair_M, minlength=len(ids) * n_traits).reshape(-1, n_traits)
    if not n_seen_NT.all():
        first = np.argwhere(n_seen_NT == 0)[:3].tolist()
        pairs = ", ".join(f"image {ids[row]} attribute {trait + 1}" for row, trait in first)
        raise errors.UserError(
            f"{fpath}: {int((n_seen_NT == 0).sum())} image-attribute pairs have no line (first: {pairs}). "
            "The file is truncated or from another archive. Unpack it again."
        )
    n_present_NT = np.bincount(pair_M[present_M == 1], minlength=n_seen_NT.size).reshape(-1, n_traits)
    labels_n = np.zeros(n_seen_NT.size, bool)
    positive_M = (present_M == 1) & (certainty_M >= min_certainty)
    if annotations == "any":
        labels_n[pair_M[positive_M]] = True
    else:
        last_n = np.zeros(n_seen_NT.size, np.int64)
        np.maximum.at(last_n, pair_M, np.arange(len(pair_M)))
        labels_n = positive_M[last_n]
    return {
        "labels_NT": labels_n.reshape(n_seen_NT.shape),
        "n_lines": len(row_M),
        "n_repeated": int((n_seen_NT > 1).sum()),
        "n_disputed": int(((n_present_NT > 0) & (n_present_NT < n_seen_NT)).sum()),
        "n_uncertain": int(((present_M == 1) & ~positive_M).sum()),
    }


def _read_shares(root: pathlib.Path, n_classes: int, n_traits: int) -> np.ndarray | None:
    fpaths = [d / "class_attribute_labels_continuous.txt" for d in (root / "attributes", root)]
    fpath = next((fpath for fpath in fpaths if os.path.lexists(fpath)), None)
    if fpath is None:
        return None
    try:
        shares_CT = _table(_text(fpath), np.float64) / 100
    except ValueError as err:
        raise errors.UserError(
            f"{fpath}: is not a table of numbers ({errors.first_line(err)}). Unpack the archive again."
        ) from err
    is_share = shares_CT.min(initial=0) >= 0 and shares_CT.max(initial=0) <= 1
    if len(shares_CT) < n_classes or shares_CT.shape[1] != n_traits or not is_share:
        shape, largest = " x ".join(map(str, shares_CT.shape)), 100 * shares_CT.max(initial=0)
        raise errors.UserError(
            f"{fpath}: holds {shape} numbers up to {largest:g}, not (at least) {n_classes} classes "
            f"x {n_traits} attributes between 0 and 100. Unpack the archive again."
        )
    return shares_CT


def _table(text: str, dtype: type, columns: range | None = None) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an empty file, which fails later
        return np.loadtxt(io.StringIO(text), dtype, usecols=columns, comments=None, ndmin=2)


def _first_four_fields(fpath: pathlib.Path) -> np.ndarray:
    """Parses the first four fields of each non-blank line into an (M, 4) int64 array."""
    text = _text(fpath)
    _check_n_fields(fpath, text)
    try:
        return _table(text, np.int64, range(4)).reshape(-1, 4)
    except ValueError:  # numpy names only a row; find the line
        for line_i, line in _filled_lines(fpath):
            words = line.split()[:4]
            if len(words) < 4 or not all(map(INTEGER.fullmatch, words)):
                raise _bad_line(fpath, line_i, line, FIELDS) from None
        raise


def _check_n_fields(fpath: pathlib.Path, text: str) -> None:
    """Refuses lines with more than 7 fields: two lines ran together, and the second would be lost."""
    bytes_n = np.frombuffer(f"\n{text}\n".encode("utf-8", "surrogateescape"), np.uint8)
    is_blank_n = bytes_n <= ord(" ")
    starts = np.flatnonzero(is_blank_n[:-1] & ~is_blank_n[1:])
    n_before = np.searchsorted(starts, np.flatnonzero(bytes_n == ord("\n")))
    too_long = np.flatnonzero(np.diff(n_before) > N_FIELDS)
    if too_long.size:
        line_i = int(too_long[0])
        raise _bad_line(fpath, line_i + 1, text.split("\n")[line_i], FIELDS)


def _text(fpath: pathlib.Path) -> str:
    """Reads a file. Bytes that are not UTF-8 become surrogates, as in the paths of the dump."""
    return textfile.read(fpath, REMEDY, MAX_BYTES, "surrogateescape")


def _filled_lines(fpath: pathlib.Path) -> list[tuple[int, str]]:
    """Lists (line number from 1, line) of each non-blank line."""
    lines = _text(fpath).split("\n")
    return [(line_i, line) for line_i, line in enumerate(lines, 1) if line.strip()]
