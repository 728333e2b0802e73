"""A table and its footnotes as a page of markdown or LaTeX (booktabs)."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import LATEX_ESCAPE_RULES, tabulate

WIDTH = 170
"""Columns of a terminal that the widest table needs."""
LEFT = ("kernel", "inputs", "tensor", "problem")
"""Columns of words."""


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], style: str) -> str:
    align = ["left" if name in LEFT else "right" for name in headings]
    return tabulate(
        rows, headings, tablefmt=style, colalign=align if rows else None, disable_numparse=True
    )


def markdown(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> str:
    """A heading, the table, a list of notes. What a cell holds stays in it, whatever a kernel or
    file is called.
    """
    listed = "".join(f"- {note}\n" for note in notes)
    cells = [[_cell(text) for text in row] for row in rows]
    return f"## {title}\n\n{_table(headings, cells, 'pipe')}\n" + (f"\n{listed}" if listed else "")


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split("\n"))


def latex(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table environment with a caption."""
    caption = "".join(LATEX_ESCAPE_RULES.get(character, character) for character in title)
    body = _table(headings, rows, "latex_booktabs")
    return f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n{body}\n\\end{{table}}\n"
