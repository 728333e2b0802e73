"""A stored RMSE report on the terminal, as markdown, LaTeX, CSV and plots. Needs neither torch nor
a GPU.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from rich.console import Console

from verify.errors import VerifyError
from verify.reports import comparison, pages, rmse_plot, stored
from verify.reports.rmse_table import SCHEMA, cells, footnotes, table, title


def show(report: dict[str, Any], folder: Path, console: Console) -> None:
    """Print the first table; write all of them to table.md, table.tex and table.csv, and plots.

    Raises VerifyError where the folder can't be written.
    """
    sections = [section for section in report["sections"] if section["rows"]]
    for section in sections[:1]:
        console.print(table(section, reduced=report["reduced"]))
    console.print("\n".join(footnotes(report)), markup=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(report, sections, folder)
        plots = rmse_plot.plot(report, folder)
    except OSError as error:
        raise VerifyError(
            f"out={folder}: {error.strerror}; the figures are above and in table.json, if that was "
            "written"
        ) from error
    console.print(
        "written: "
        f"{', '.join(str(folder / f'table.{kind}') for kind in ('md', 'tex', 'csv'))}{plots}",
        markup=False,
    )
    if others := [section["title"] for section in sections[1:]]:
        console.print(f"there, too: {'; '.join(others)}", markup=False)


def from_stored(
    path: Path | None, compare: tuple[Path, Path] | None, folder: Path, console: Console
) -> None:
    """Compare two stored reports; render one. Raises VerifyError for a file that is no report of
    this version.
    """
    if compare is not None:
        old, new = (stored.load(file, SCHEMA) for file in compare)
        console.print(comparison.table(old, new))
        console.print("\n".join(comparison.only_in_one(old, new)), markup=False)
    if path is not None:
        show(stored.load(path, SCHEMA), folder, console)


def _write(report: dict[str, Any], sections: list[dict[str, Any]], folder: Path) -> None:
    """table.csv has a line for each row and draw."""
    titled = [(title(s, reduced=report["reduced"]), *cells(s)) for s in sections]
    notes = "".join(f"- {note}\n" for note in footnotes(report))
    (folder / "table.md").write_text(
        "\n".join(pages.markdown(*t) for t in titled) + f"\n{notes}", encoding="utf-8"
    )
    (folder / "table.tex").write_text("\n".join(pages.latex(*t) for t in titled), encoding="utf-8")
    rows = [(s["name"], row) for s in sections for row in s["rows"]]
    names = sorted({name for _, row in rows for draw in row["draws"] for name in draw})
    keys = ("problem", "recipe", "kernel", "dtype", "tensor")
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["section", *keys, "draw", *names])
        for section, row in rows:
            for number, draw in enumerate(row["draws"]):
                writer.writerow(
                    [section, *(row[k] for k in keys), number, *(draw.get(n, "") for n in names)]
                )
