"""Tables of protoeval as text: markdown and LaTeX, from lines of its CSV files."""

import typing as tp

import beartype
import numpy as np

from saev.formats import results


@beartype.beartype
def table(lines: list[dict[str, tp.Any]]) -> list[list[str]]:
    """Header and cells of the table as papers print it, from lines of summary.csv.

    The interval and the spread over draws are left out where no line has one.
    """
    has_interval, has_spread = (
        any(not np.isnan(line[key]) for line in lines) for key in ("low", "spread")
    )
    out = [
        ["Scorer", "Prototypes", "Train", "mAP"]
        + ["95% interval"] * has_interval
        + ["Draws"] * has_spread
        + ["5%", "95%"]
    ]
    for line in lines:
        cells = [str(line["scorer"]), f"{line['n_prototypes']:,}", f"{line['n_train']:,}"]
        cells.append(f"{line['map']:.3f}")
        if has_interval:
            is_there = not np.isnan(line["low"])
            cells.append(f"{line['low']:.3f} to {line['high']:.3f}" if is_there else "")
        if has_spread:
            cells.append("" if np.isnan(line["spread"]) else f"± {line['spread']:.3f}")
        out.append([*cells, f"{line['q05']:.3f}", f"{line['q95']:.3f}"])
    return out


@beartype.beartype
def kinds_table(lines: list[dict[str, tp.Any]]) -> list[list[str]]:
    """mAP by kind of trait, one row for each scorer (with most train images, then prototypes), from lines of kinds.csv."""
    kinds = [k for k in results.KINDS if any(line["kind"] == k for line in lines)]
    most: dict[str, tuple[int, int]] = {}
    for line in lines:
        size = (line["n_train"], line["n_prototypes"])
        most[line["scorer"]] = max(size, most.get(line["scorer"], size))
    lines = [x for x in lines if (x["n_train"], x["n_prototypes"]) == most[x["scorer"]]]
    counts = {k: max((x["n_traits"] for x in lines if x["kind"] == k), default=0) for k in kinds}
    rows: dict[tuple[object, ...], dict[str, float]] = {}
    for line in lines:
        key = (line["scorer"], line["n_prototypes"], line["n_train"])
        rows.setdefault(key, {})[line["kind"]] = line["map"]
    header = ["Scorer", "Prototypes", "Train", *(f"{k} ({counts[k]})" for k in kinds)]
    return [header] + [
        [str(s), f"{k:,}", f"{n:,}", *(_shown(found.get(kind)) for kind in kinds)]
        for (s, k, n), found in rows.items()
    ]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


@beartype.beartype
def differences_table(lines: list[dict[str, tp.Any]]) -> list[list[str]]:
    """From lines of `differences`."""
    header = [
        "Scorer",
        "Prototypes",
        "Train",
        "Less",
        "Prototypes",
        "Difference",
        "95% interval",
        "",
    ]
    return [header] + [
        [
            str(line["scorer"]),
            f"{line['n_prototypes']:,}",
            f"{line['n_train']:,}",
            str(line["baseline"]),
            f"{line['baseline_prototypes']:,}",
            f"{line['difference']:+.3f}",
            f"{line['low']:+.3f} to {line['high']:+.3f}",
            "excludes 0" if line["excludes_zero"] else "",
        ]
        for line in lines
    ]


@beartype.beartype
def seeds_table(lines: list[dict[str, tp.Any]]) -> list[list[str]]:
    """From lines of `over_seeds`."""

    def said(value: float, spread: float, sign: str) -> str:
        return "" if np.isnan(value) else f"{value:{sign}.3f} ± {spread:.3f}".removesuffix(" ± nan")

    header = ["Scorer", "Prototypes", "Train", "Seeds", "mAP", "Less", "Difference"]
    return [header] + [
        [
            str(line["scorer"]),
            f"{line['n_prototypes']:,}",
            f"{line['n_train']:,}",
            str(line["n_seeds"]),
            said(line["map"], line["spread"], ""),
            str(line["baseline"]),
            said(line["difference"], line["difference_spread"], "+"),
        ]
        for line in lines
    ]


@beartype.beartype
def markdown(cells: list[list[str]]) -> str:
    header, *rows = cells
    lines = [header, ["---"] * len(header), *rows]
    return (
        "".join(f"| {' | '.join(line)} |\n" for line in lines)
        .replace("| --- ", "|---")
        .replace("|--- |", "|---|")
    )


LATEX = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


LATEX |= {c: f"\\{c}" for c in "&%$#_{}"}


@beartype.beartype
def latex(cells: list[list[str]]) -> str:
    """A booktabs table; text columns left, numbers right."""
    header, *rows = ([_escaped(cell) for cell in line] for line in cells)
    is_number = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(header))]
    columns = "".join("r" if number else "l" for number in is_number)
    body = "".join(" & ".join(row) + r" \\" + "\n" for row in rows)
    return (
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{' & '.join(header)} \\\\\n\\midrule\n"
        f"{body}\\bottomrule\n\\end{{tabular}}\n"
    )


def _escaped(text: str) -> str:
    return "".join(LATEX.get(c, c) for c in text)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True
