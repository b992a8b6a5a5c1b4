"""Tables as text: Markdown and LaTeX. A table is a frame of strings; its column names are the header."""

import collections.abc

import polars as pl

LATEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    c: f"\\{c}" for c in "&%$#_{}"
}


def texts(form: str, *columns: collections.abc.Iterable, missing: str = "") -> list[str]:
    """Formats each row's values with `form`, or as `missing` if the first value is NaN or null."""
    return [
        missing if row[0] is None or row[0] != row[0] else form.format(*row)
        for row in zip(*columns, strict=True)
    ]


def where(cells: pl.DataFrame) -> str:
    """The ViTs and layers of a frame with columns vit and layer, in words."""
    lines = cells.group_by("vit", maintain_order=True).agg(pl.col("layer").unique().sort())
    return "; ".join(
        f"{vit}, layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
        for vit, layers in lines.iter_rows()
    )


def short(texts: list[str | None]) -> list[str | None]:
    """Numbers with as few significant digits, from 3 on, as keep different ones different. Other texts, whole
    numbers and columns that hold other texts stay as they are."""
    try:
        numbers = [text if text is None else float(text) for text in texts]
    except ValueError:
        return texts
    for digits in range(3, 18):
        shown = [x if x is None else f"{x:.{digits}g}" for x in numbers]
        if len({*shown}) == len({*numbers}):
            break
    return [text if text is None or text.isdecimal() else new for text, new in zip(texts, shown, strict=True)]


def markdown(table: pl.DataFrame, *, padded: bool = False) -> str:
    """A Markdown table. padded: align the columns, for a terminal."""
    if not padded:
        lines = ["| " + " | ".join(row) + " |\n" for row in (table.columns, *table.iter_rows())]
        return "".join([lines[0], "|---" * table.width + "|\n", *lines[1:]])
    widths = [max(map(len, (column.name, *column))) for column in table]
    rows = [table.columns, ["-" * width for width in widths], *table.iter_rows()]
    return "".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |\n" for row in rows
    )


def latex(table: pl.DataFrame) -> str:
    """A booktabs table. Numbers are aligned right, text left."""
    columns = "".join("r" if all(map(_is_number, column)) else "l" for column in table)
    header, *rows = (
        " & ".join("".join(LATEX.get(c, c) for c in cell) for cell in row) + r" \\" + "\n"
        for row in (table.columns, *table.iter_rows())
    )
    body = "".join(rows)
    lines = f"\\toprule\n{header}\\midrule\n{body}\\bottomrule\n"
    return f"\\begin{{tabular}}{{{columns}}}\n{lines}\\end{{tabular}}\n"


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True
