"""All results below a folder as one report: tables over ViTs, layers and scorers."""

import dataclasses
import json
import logging
import pathlib

import beartype

from saev import errors, helpers
from saev.formats import results
from saev.protoeval import report

logger = logging.getLogger("saev")


@dataclasses.dataclass(frozen=True)
class Result:
    """One results directory."""

    dpath: pathlib.Path
    about: results.About
    lines: list[dict]
    """Of summary.csv."""
    kinds: list[dict]
    """Of kinds.csv."""


@beartype.beartype
def write(root: pathlib.Path) -> pathlib.Path:
    """Writes `root`/report: table.md, table.csv, table.tex, chart.png. Of the same cell evaluated twice the newest wins.

    The same cell: ViT, layer, tokens, labels, certainty, scorer, numbers of prototypes and train images, seed. Results on other
    labels get tables of their own. Directories that cannot be read are named and left out; none is changed.

    Raises:
        UserError: no results there.
    """
    found = read_all(root)
    if not found:
        raise errors.UserError(
            f"--report {root}: holds no results. Pass the folder that protoeval.py wrote to (--dump-to)."
        )
    n_cells = sum(len(result.lines) for result in found)
    sections = _sections(found)
    n_kept = sum(len(lines) for tables in sections.values() for _, lines, _ in tables)
    out = root / "report"
    text, csv_lines, tex = [], [], []
    for (labels, certainty), tables in sections.items():
        text.append(f"Labels {labels[:8]}, certainty from {certainty}:\n")
        cells, kinds = _joined(tables)
        text += [
            results.markdown(cells),
            "By kind of trait (number of traits):\n",
            results.markdown(kinds),
        ]
        tex.append(results.latex(cells))
        for about, lines, _ in tables:
            place = {
                "vit": about.vit,
                "layer": about.layer,
                "tokens": about.tokens,
                "labels": labels,
            }
            csv_lines += [place | {"min_certainty": certainty} | line for line in lines]
        report.save(
            report.chart([(about, lines) for about, lines, _ in tables]),
            _chart(out, labels, certainty, sections),
        )
    if n_cells > n_kept:
        text.append(f"{n_cells - n_kept} older cells gave way to newer ones.\n")
    header = ("vit", "layer", "tokens", "labels", "min_certainty", *results.SUMMARY)
    results.write_csv(out / "table.csv", header, csv_lines)
    helpers.write_text(out / "table.tex", "\n".join(tex))
    helpers.write_text(out / "table.md", "\n".join(text))
    return out


@beartype.beartype
def read_all(root: pathlib.Path) -> list[Result]:
    """Complete results directories below `root`, oldest first."""
    out = []
    for fpath in sorted(root.glob("*/about.json")):
        dpath = fpath.parent
        if not (dpath / "table.md").exists():
            logger.warning("%s: is not complete; left out", dpath)
            continue
        try:
            about = results.About(**json.loads(fpath.read_text()))
            lines = results.read_csv(dpath / "summary.csv", results.SUMMARY)
            kinds = results.read_csv(dpath / "kinds.csv", results.KIND_COLUMNS)
        except Exception as err:  # whatever an edited or foreign file holds
            logger.warning("%s: cannot be read (%s); left out", dpath, errors.first_line(err))
            continue
        out.append(Result(dpath, about, lines, kinds))
    return sorted(out, key=lambda result: result.about.created)


Table = tuple[results.About, list[dict], list[dict]]
"""Of one ViT and layer: what it is of, its lines of summary.csv and of kinds.csv."""


def _sections(found: list[Result]) -> dict[tuple[str, int], list[Table]]:
    """Tables by labels and certainty; within them by ViT, layer and tokens."""
    abouts: dict[tuple, results.About] = {}
    cells: dict[tuple, dict[tuple, dict]] = {}
    kinds: dict[tuple, dict[tuple, dict]] = {}
    for result in found:  # oldest first: what comes later replaces
        about = result.about
        place = (about.labels, about.min_certainty, about.vit, about.layer, about.tokens)
        abouts[place] = about
        for line in result.lines:
            key = (line["scorer"], line["n_prototypes"], line["n_train"], about.seed)
            cells.setdefault(place, {})[key] = line
        for line in result.kinds:
            key = (line["scorer"], line["kind"])
            kinds.setdefault(place, {})[key] = line
    sections: dict[tuple[str, int], list[Table]] = {}
    for place in sorted(abouts):
        order = {name: i for i, name in enumerate(results.REFERENCES)}
        keys = sorted(cells[place], key=lambda key: (order.get(key[0], len(order)), *key))
        lines = [cells[place][key] for key in keys]
        table = (abouts[place], lines, list(kinds.get(place, {}).values()))
        sections.setdefault(place[:2], []).append(table)
    return sections


def _joined(tables: list[Table]) -> tuple[list[list[str]], list[list[str]]]:
    """One table of all cells, and one of the kinds of traits, with ViT and layer before each row."""
    flat = [(about, line) for about, lines, _ in tables for line in lines]
    header, *rows = results.table([line for _, line in flat])
    cells = [["ViT", "Layer", *header]]
    cells += [
        [about.vit, str(about.layer), *row] for (about, _), row in zip(flat, rows, strict=True)
    ]
    out: list[list[str]] = []
    for about, _, kinds in tables:
        header, *rows = results.kinds_table(kinds)
        out = out or [["ViT", "Layer", *header]]
        out += [[about.vit, str(about.layer), *row] for row in rows]
    return cells, out


def _chart(out: pathlib.Path, labels: str, certainty: int, sections: dict) -> pathlib.Path:
    return out / ("chart.png" if len(sections) == 1 else f"chart-{labels[:8]}-{certainty}.png")
