"""A table and its footnotes as a markdown page."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

WIDTH = 340
"""Columns that no table of this project needs."""


def page(title: str, table: Table, footnotes: str) -> str:
    """A heading, the table (made with box=rich.box.MARKDOWN), a list of the footnotes' lines."""
    buffer = io.StringIO()
    Console(file=buffer, width=WIDTH, color_system=None).print(table)
    rows = "\n".join(line.rstrip() for line in buffer.getvalue().strip().splitlines())
    notes = "\n".join(f"- {line}" for line in footnotes.splitlines())
    return f"## {title}\n\n{rows}\n\n{notes}\n"
