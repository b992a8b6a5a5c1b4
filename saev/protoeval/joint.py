"""All results below a folder as one report: tables over ViTs, layers and scorers."""

import collections.abc
import dataclasses
import json
import logging
import pathlib

import beartype
import numpy as np

from saev import errors, helpers
from saev.formats import jsonfile, layout, manifest, results
from saev.protoeval import compare, report

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
    boots: list[np.ndarray]
    """Of resamples.npz, (draws, resamples) for each line."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Of one ViT, layer and sort of tokens. Scorers that would share a name are told apart by what they differ in."""

    about: results.About
    abouts: list[results.About]
    """Of all results that it has rows of."""
    lines: list[dict]
    kinds: list[dict]
    differences: list[dict]
    """Of each scorer less each other one."""
    seeds: list[dict]
    """Over seeds, of scorers that were evaluated with several."""
    drawn: list[dict]
    """Lines for the chart: means over seeds."""

    @property
    def against(self) -> list[dict]:
        return compare.against_baseline(self.differences)


LEGEND = (
    """mAP: mean over the traits with a positive test image (their number: table.csv); its interval is over resamples of \
the test images; 5% and 95% are quantiles over traits. """
    + report.PROBE_NOTE
)
OVER_SEEDS = """Over seeds, which draw the random activations, the start of k-means and the train images: mean and standard deviation of \
the mAP, and of its difference to random activations of the same seed."""
PLACE = ("vit", "layer", "tokens", "labels", "min_certainty")
"""What tells tables apart, of `results.About`."""

Section = tuple[str, int]
"""Labels and certainty: what is measured on others is not comparable."""


@beartype.beartype
def write(root: pathlib.Path) -> pathlib.Path:
    """Writes `root`/report: table.md, table.csv, differences.csv, seeds.csv, table.tex, chart.png. Of the same cell evaluated twice the newest wins.

    The same cell: ViT, layer, tokens, activations, labels, certainty, scorer (with all its settings, checkpoint and what it was
    fitted on), numbers of prototypes and train images, seed. Results on other labels get tables of their own. Directories that cannot be
    read are named and left out; none is changed. Differences are taken anew between the rows that are left, of one or several
    results, where these have the same resamples of the test images (--seed, --n-boot) and as many draws.

    Raises:
        UserError: no results there.
    """
    found = read_all(root)
    if not found:
        single = (
            " It is one result itself: pass the folder above it." * (root / "about.json").exists()
        )
        raise errors.UserError(
            f"--report {root}: holds no results. Pass the folder that protoeval.py wrote to (--dump-to).{single}"
        )
    sections, older = _sections(found)
    out = root / "report"
    text, csv_lines, difference_lines, seed_lines, tex, charts = [], [], [], [], [], []
    for (labels, certainty), tables in sections.items():
        text.append(f"Labels {labels[:8]}, certainty from {certainty}:\n")
        warnings = dict.fromkeys(
            report.warning(about) for table in tables for about in table.abouts
        )
        text += [warning for warning in warnings if warning]
        cells = _joined(tables, "lines", layout.table)
        text += [layout.markdown(cells), "By kind of trait (number of traits):\n"]
        text.append(layout.markdown(_joined_kinds(tables)))
        if any(table.against for table in tables):
            differences = _joined(tables, "against", layout.differences_table)
            text += [f"{report.AGAINST}\n", layout.markdown(differences)]
        if any(table.seeds for table in tables):
            seeds = _joined(tables, "seeds", layout.seeds_table)
            text += [f"{OVER_SEEDS}\n", layout.markdown(seeds)]
        text += [f"{LEGEND}\n", *_notes(tables)]
        tex.append(f"% labels {labels[:8]}, certainty from {certainty}\n{layout.latex(cells)}")
        for table in tables:
            place = {key: getattr(table.about, key) for key in PLACE}
            csv_lines += [place | line for line in table.lines]
            difference_lines += [place | line for line in table.differences]
            seed_lines += [place | line for line in table.seeds]
        charts.append(_chart(out, labels, certainty, sections))
        report.save(report.chart([(table.about, table.drawn) for table in tables]), charts[-1])
    if older:
        names = ", ".join(sorted(set(older)))
        text.append(f"{len(older)} older cells gave way to newer ones (of {names}).\n")
    for fpath in out.glob("chart*.png"):  # of an older report
        if fpath not in charts:
            fpath.unlink()
    results.write_csv(out / "table.csv", (*PLACE, *results.SUMMARY), csv_lines)
    results.write_csv(out / "differences.csv", (*PLACE, *results.DIFFERENCES), difference_lines)
    results.write_csv(out / "seeds.csv", (*PLACE, *results.SEEDS), seed_lines)
    helpers.write_text(out / "table.tex", "\n".join(tex))
    helpers.write_text(out / "table.md", "\n".join(text))
    return out


@beartype.beartype
def read_all(root: pathlib.Path) -> list[Result]:
    """Complete results directories below `root`, at any depth but not in hidden folders, oldest first."""
    out = []
    for fpath in sorted(root.glob("**/*/about.json")):
        if any(part.startswith(".") for part in fpath.relative_to(root).parts):
            continue
        try:
            out.append(_read(fpath.parent))
        except (OSError, errors.UserError) as err:
            logger.warning("left out: %s", errors.first_line(err))
    return sorted(out, key=lambda result: result.about.created)


def _read(dpath: pathlib.Path) -> Result:
    files = manifest.read(dpath, results.FILES, report.AGAIN)
    about = jsonfile.parse(
        files["about.json"], results.About, str(dpath / "about.json"), report.AGAIN
    )
    try:
        lines = results.read_csv(files["summary.csv"], results.SUMMARY)
        kinds = results.read_csv(files["kinds.csv"], results.KIND_COLUMNS)
        boots = results.read_resamples(files["resamples.npz"], len(lines))
    except Exception as err:  # another version's columns, or files made to look like ours
        raise errors.UserError(
            f"{dpath}: cannot be read ({errors.first_line(err)}). {report.AGAIN}"
        ) from err
    return Result(dpath, about, lines, kinds, boots)


def _sections(found: list[Result]) -> tuple[dict[Section, list[Table]], list[str]]:
    """Tables by labels and certainty; and for each cell that gave way to a newer one the name of its directory."""
    places: dict[tuple, list[Result]] = {}
    for result in found:
        about = result.about
        place = (about.labels, about.min_certainty, about.vit, about.layer, about.tokens)
        places.setdefault(place, []).append(result)
    sections: dict[Section, list[Table]] = {}
    older: list[str] = []
    for place in sorted(places):
        table, replaced = _table(places[place])
        sections.setdefault(place[:2], []).append(table)
        older += replaced
    return sections, older


def _table(found: list[Result]) -> tuple[Table, list[str]]:
    """All results of one place, oldest first, as one table."""
    scorers = {
        _identity(result.about, line): line["scorer"] for result in found for line in result.lines
    }
    names = _told_apart(scorers)
    older: list[str] = []
    cells: dict[tuple, tuple[dict, Result, np.ndarray]] = {}
    kinds: dict[tuple, dict] = {}
    for result in found:
        for line, boot_RM in zip(result.lines, result.boots, strict=True):
            identity = _identity(result.about, line)
            key = (identity, line["n_prototypes"], line["n_train"])
            if key in cells:
                older.append(cells[key][1].dpath.name)
            cells[key] = (line | {"scorer": names[identity]}, result, boot_RM)
        for line in result.kinds:
            identity = _identity(result.about, line)
            cell = (identity, line["kind"], line["n_prototypes"], line["n_train"])
            kinds[cell] = line | {"scorer": names[identity]}
    lines = sorted((line for line, *_ in cells.values()), key=_order)
    differences = _differences(list(cells.values()))
    abouts = list({id(result): result.about for _, result, _ in cells.values()}.values())
    of_seed = _by_seed(scorers, {key: line for key, (line, *_) in cells.items()})
    maps = {cell: {s: x["map"] for s, x in found.items()} for cell, found in of_seed.items()}
    drawn = sorted(
        (_mean(cell, list(found.values())) for cell, found in of_seed.items()), key=_order
    )
    seeds = sorted(compare.over_seeds(maps), key=_order)
    place = found[-1].about
    table = Table(place, abouts, lines, list(kinds.values()), differences, seeds, drawn)
    return table, older


def _mean(cell: tuple[str, int, int], lines: list[dict]) -> dict:
    values = {key: float(np.mean([line[key] for line in lines])) for key in ("map", "low", "high")}
    return values | dict(zip(("scorer", "n_prototypes", "n_train"), cell, strict=True))


def _by_seed(
    scorers: dict[str, str], lines: dict[tuple[str, int, int], dict]
) -> dict[tuple[str, int, int], dict[int | None, dict]]:
    """(name without the seed, prototypes, train images) -> seed (the constant scorer has none) -> line."""
    seedless = {identity: json.loads(identity) for identity in scorers}
    seeds = {identity: fields.pop("seed", None) for identity, fields in seedless.items()}
    jsons = {identity: helpers.canonical_json(fields) for identity, fields in seedless.items()}
    names = _told_apart({jsons[identity]: name for identity, name in scorers.items()})
    out: dict[tuple[str, int, int], dict[int | None, dict]] = {}
    for (identity, k, n), line in sorted(lines.items()):
        out.setdefault((names[jsons[identity]], k, n), {})[seeds[identity]] = line
    return out


def _differences(cells: list[tuple[dict, Result, np.ndarray]]) -> list[dict]:
    """Among rows with the same resamples of the test images."""
    alike: dict[tuple[int, int], list[results.Measured]] = {}
    for line, result, boot_RM in cells:
        values = (line["scorer"], line["n_prototypes"], line["n_train"], line["map"], boot_RM)
        key = (result.about.seed, result.about.n_boot)
        alike.setdefault(key, []).append(results.Measured(*values))
    return sorted((x for rows in alike.values() for x in compare.differences(rows)), key=_order)


def _order(line: dict) -> tuple:
    """The rows that others are held against first."""
    name = line["scorer"]
    rank = [not name.startswith(reference) for reference in results.REFERENCES]
    return rank, name, line["n_prototypes"], line["n_train"]


def _identity(about: results.About, line: dict) -> str:
    """JSON of all that decides the scorer of a line."""
    name = line["scorer"]
    if name == results.CONSTANT:
        return helpers.canonical_json({"cls": name})
    of = {"seed": about.seed} | dict(
        zip(("activations", "test"), dict.fromkeys(about.activations), strict=False)
    )
    return helpers.canonical_json(about.scorers.get(name, {"cls": name}) | of)


def _told_apart(scorers: dict[str, str]) -> dict[str, str]:
    """Identity -> name, with what differs where several have one name (of hashes the first 8 digits)."""
    out = {}
    for identity, name in scorers.items():
        mine = json.loads(identity)
        others = [json.loads(i) for i, n in scorers.items() if n == name]
        differing = [key for key in mine if any(other.get(key) != mine[key] for other in others)]
        out[identity] = " ".join([name, *(f"{key}={str(mine[key])[:8]}" for key in differing)])
    return out


def _joined(
    tables: list[Table],
    attribute: str,
    as_cells: collections.abc.Callable[[list[dict]], list[list[str]]],
) -> list[list[str]]:
    """The tables' lines as one table, a row each, with ViT and layer before it."""
    flat = [(table.about, line) for table in tables for line in getattr(table, attribute)]
    header, *rows = as_cells([line for _, line in flat])
    placed = [[*_place(about, tables), *row] for (about, _), row in zip(flat, rows, strict=True)]
    return [[*_place_header(tables), *header], *placed]


def _place_header(tables: list[Table]) -> list[str]:
    return ["ViT", "Layer"] + ["Tokens"] * _tokens_vary(tables)


def _place(about: results.About, tables: list[Table]) -> list[str]:
    return [about.vit, str(about.layer)] + [about.tokens] * _tokens_vary(tables)


def _tokens_vary(tables: list[Table]) -> bool:
    return len({table.about.tokens for table in tables}) > 1


def _joined_kinds(tables: list[Table]) -> list[list[str]]:
    """The same for lines that share rows. The traits are the same, so all tables have the same kinds."""
    out: list[list[str]] = []
    for table in tables:
        header, *rows = layout.kinds_table(table.kinds)
        out = out or [[*_place_header(tables), *header]]
        out += [[*_place(table.about, tables), *row] for row in rows]
    return out


def _notes(tables: list[Table]) -> list[str]:
    """What each result is of, and its scorers' settings."""
    out = []
    for about in (about for table in tables for about in table.abouts):
        resamples = f"{about.n_seeds} draw(s), {about.n_boot:,} resamples"
        out.append(f"{report.describe(about)} {resamples}.\n\n{report.settings(about)}")
    return list(dict.fromkeys(out))


def _chart(out: pathlib.Path, labels: str, certainty: int, sections: dict) -> pathlib.Path:
    return out / ("chart.png" if len(sections) == 1 else f"chart-{labels[:8]}-{certainty}.png")
