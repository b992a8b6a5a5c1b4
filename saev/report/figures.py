"""Figures for print: style, sizes, captions, and files in three formats."""

import collections.abc
import contextlib
import pathlib
import textwrap
import warnings

import matplotlib
import matplotlib.figure

from saev import errors, helpers

COLUMN, PAGE = 3.3, 6.9
"""Widths in inches: of a column, and of a page with two columns."""
FONT, SMALL = 7.0, 6.0
"""Sizes of text in points: of labels, and of captions and tick labels."""
DPI = 300
"""Pixels per inch of PNG files."""
METADATA: dict[str, dict[str, None]] = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}, ".png": {}}
"""Format by extension, with the metadata to leave out: equal figures are equal files."""
COLORS = tuple(matplotlib.color_sequences["petroff10"])
"""Told apart by colour-blind readers and in greyscale (Petroff 2021)."""
MARKERS = "osD^vP*X"
STYLE: dict[str, object] = {
    "axes.grid": True,
    "axes.labelsize": FONT,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": FONT,
    "figure.dpi": DPI,
    "font.size": FONT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "svg.hashsalt": "saev",
    "text.parse_math": False,  # names may hold dollar signs
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
}


@contextlib.contextmanager
def styled() -> collections.abc.Generator[None]:
    """The style of figures, for a block or, as a decorator, for a function. Characters that the font lacks
    (Chinese ones, for example) are boxes, except in SVG files; matplotlib does not warn of each."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def check(path: str, flag: str) -> None:
    """Raises a UserError unless the file's extension is .pdf, .svg or .png."""
    if pathlib.Path(path).suffix.lower() not in METADATA:
        raise errors.UserError(f"{flag} {path}: a figure's file must end in .pdf, .svg or .png.")


def save(figure: matplotlib.figure.Figure, fpath: pathlib.Path) -> None:
    """Writes a figure atomically, in the format that the extension names."""
    suffix = fpath.suffix.lower()
    with helpers.atomic(fpath) as tmp_fpath, tmp_fpath.open("wb") as fd, styled():
        figure.savefig(fd, format=suffix[1:], dpi=figure.dpi, metadata=METADATA[suffix])


def wrapped(text: str, width: float, size: float = SMALL, hyphens: bool = False) -> str:
    """Breaks lines, after hyphens too if `hyphens`, so that text of this size in points fits into `width`
    inches, about."""
    return textwrap.fill(text, max(8, int(72 * width / (0.57 * size))), break_on_hyphens=hyphens)


def caption(figure: matplotlib.figure.Figure, text: str) -> None:
    """Writes a caption below the charts of a figure with constrained layout."""
    width, _ = figure.get_size_inches()
    figure.supxlabel(wrapped(text, width), x=0.01, ha="left", fontsize=SMALL, linespacing=1.3)
