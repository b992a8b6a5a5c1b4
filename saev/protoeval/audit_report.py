"""The files of the audit. docs/results.md lists them."""

import pathlib

import polars as pl

from saev import helpers
from saev.formats import patchresults, results
from saev.protoeval import patch_report
from saev.report import frame, tables

YIELD = (
    f"Yield(B): share of the first B prototypes with an AP of at least {patchresults.TAU} on the test "
    "images, for the class of patches that they find best on the train images."
)
DEFINITIONS = (
    f"{YIELD} Area: mean of Yield(1) to that of the "
    "largest B. Permuted labels: mean over permutations of the image labels, and in brackets the 2.5% and "
    "97.5% quantiles over them. Other brackets: 95% bootstrap intervals over the test images."
)
"""What the columns of a table of several results mean."""
N_SHOWN = 5
"""Prototypes of each scorer that audit.md names."""


def write(dpath: pathlib.Path, table: patchresults.AuditTable, about: results.About) -> None:
    """Writes AUDIT_FILES into a results directory."""
    rows, found = yields(table), prototypes(table)
    against = patch_report.differences(table.rows, about, table.measures, any_k=True)
    frame.write_parquet(dpath / "audit.parquet", found)
    frame.write_csv(dpath / "audit-yields.csv", rows)
    frame.write_csv(dpath / "audit-differences.csv", against)
    text = f"Audit of prototypes that image labels propose:\n\n{tables.markdown(yields_table(rows))}\n"
    text += _note(table, about)
    if len(against):
        shown = patch_report.differences_table(against, {name: title(name) for name in table.measures})
        text += f"\n\n{patch_report.AGAINST}{tables.markdown(shown)}"
    shown = found.filter(pl.col("rank") <= N_SHOWN, pl.col("scorer") != results.CONSTANT)
    text += f"\nThe first {N_SHOWN} prototypes of each scorer:\n\n{tables.markdown(prototypes_table(shown))}"
    helpers.write_text(dpath / "audit.md", text)


def title(measure: str) -> str:
    """Yield(10) for "10"."""
    return "Area" if measure == patchresults.AREA else f"Yield({measure})"


def prototypes(table: patchresults.AuditTable) -> pl.DataFrame:
    """The frame of audit.parquet."""
    traits, names = ([helpers.printable(name) for name in some] for some in (table.traits, table.names))
    lines = [
        (
            *(row.scorer, row.n_prototypes, b + 1, int(prototype), float(penalty)),
            *(traits[trait] if trait >= 0 else "", float(weight)),
            *(names[row.class_B[b]], float(row.train_ap_B[b]), float(row.ap_BM[b, 0])),
            *(float(row.purity_B[b]), float(row.highest_ap_B[b]), bool(row.ap_BM[b, 0] >= patchresults.TAU)),
        )
        for row in table.rows
        for b, (prototype, penalty, trait, weight) in enumerate(zip(*row.ranking, strict=True))
    ]
    return pl.DataFrame(lines, patchresults.AUDIT, orient="row")


def yields(table: patchresults.AuditTable) -> pl.DataFrame:
    """The frame of audit-yields.csv."""
    lines = []
    for row in table.rows:
        for measure in table.measures:
            value, low, high = results.measured(row.means_M(measure))
            null_P = row.null_P(measure)
            p = (1 + int((null_P >= value).sum())) / (1 + len(null_P))
            any_class = float(patchresults.yields(row.highest_ap_B[:, None], measure)[0])
            null = (float(null_P.mean()), *results.quantiles(null_P, 0.025, 0.975))
            lines.append((row.scorer, row.n_prototypes, measure, value, low, high, *null, p, any_class))
    return pl.DataFrame(lines, patchresults.AUDIT_YIELDS, orient="row")


def yields_table(lines: pl.DataFrame, place: dict[str, str] | None = None) -> pl.DataFrame:
    """A row for each scorer, and one for its ranking by permuted labels.

    Args:
        place: column -> header of further first columns.
    """
    place = place or {}
    own = "{:.3f} ({:.3f} to {:.3f})" if lines["low"].is_not_nan().any() else "{:.3f}"
    rows = []
    key = [*place, "scorer", "n_prototypes"]
    for (*where, scorer, k), mine in lines.group_by(key, maintain_order=True):
        titles = [title(measure) for measure in mine["measure"]]
        shown = [tables.texts(own, *(mine[name] for name in ("value", "low", "high")))]
        if scorer != results.CONSTANT:
            nulls = (mine[name] for name in ("null", "null_low", "null_high"))
            shown.append(tables.texts("{:.3f} ({:.3f} to {:.3f})", *nulls))
        for name, values in zip((scorer, f"{scorer}{patchresults.PERMUTED}"), shown, strict=False):
            first = dict(zip(place.values(), map(str, where), strict=True))
            size = {"Scorer": name, "Prototypes": f"{k:,}"}
            rows.append(first | size | dict(zip(titles, values, strict=True)))
    return pl.DataFrame(rows)


def prototypes_table(lines: pl.DataFrame) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "Scorer": lines["scorer"].to_list(),
            "Rank": tables.texts("{}", lines["rank"]),
            "Prototype": tables.texts("{}", lines["prototype"]),
            "Trait": lines["trait"].to_list(),
            "Weight": tables.texts("{:+.2f}", lines["weight"]),
            "Part": lines["class"].to_list(),
            "Train AP": tables.texts("{:.3f}", lines["train_ap"]),
            "Test AP": tables.texts("{:.3f}", lines["test_ap"]),
        }
    )


def _note(table: patchresults.AuditTable, about: results.About) -> str:
    n_all = len(table.names)
    note = f"Prototypes are ranked by an L1-logistic model of {len(table.traits)} image labels, fitted on "
    note += f"{about.chosen_on}. Yield(B): share of the first B prototypes with an AP of at least "
    note += f"{patchresults.TAU} on {about.measured_on}, for the class of patches that they find best on "
    note += (
        f"{about.chosen_on}, among {len(table.audited)} of {n_all} classes ({_left_out(table)}). Area: mean "
    )
    note += f"of Yield(1) to Yield({table.budgets[-1]}). Permuted labels: mean over "
    note += f"{len(table.rows[0].null_ap_PB)} permutations of the image labels, and in brackets the 2.5% and "
    note += "97.5% quantiles over them."
    if about.n_boot:
        note += (
            f" Other brackets: 95% intervals from {about.n_boot:,} bootstrap resamples of the test images."
        )
    return f"{note}\n"


def _left_out(table: patchresults.AuditTable) -> str:
    names = [helpers.printable(name) for c, name in enumerate(table.names) if c not in table.audited]
    return f"without {', '.join(names)}" if names else "all"
