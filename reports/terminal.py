"""What a run looks like in a terminal: kernel x property, what is unsupported and why, findings.
From records alone.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from verify.records.journal import JUDGED, Record


def show_run(records: Iterable[Record], *, write: Callable[[str], None], width: int = 150) -> None:
    """Write the closing tables of a run, line by line."""
    records = list(records)
    if not records:
        return
    for line in lines(matrix(records), width=width):
        write(line)
    for line in (sight(records), *ratios(records), *known_defects(records), *unfinished(records)):
        write(line)
    if any(r.verdict == "unsupported" for r in records):
        for line in lines(unsupported(records), width=width):
            write(line)


def lines(table: Table, *, width: int = 150) -> list[str]:
    """A table as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(table)
    return [line.rstrip() for line in buffer.getvalue().splitlines()]


def matrix(records: list[Record]) -> Table:
    """A row for each property, a column for each kernel: judged cases, findings, and what the
    numbers hide.
    """
    kernels = sorted({r.kernel for r in records})
    table = Table(
        title="judged cases; = bitwise equal; ! known defect;"
        " ? zeros, mean(V) and a scale 5 % off would all pass"
    )
    table.add_column("property")
    for kernel in kernels:
        table.add_column(kernel, justify="right")
    of: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        of.setdefault((record.kernel, record.property), []).append(record)
    for law in sorted({r.property for r in records}):
        table.add_row(law, *(_cell(of.get((kernel, law), [])) for kernel in kernels))
    return table


def _cell(records: list[Record]) -> str:
    counts = Counter(r.verdict for r in records)
    judged = sum(counts[v] for v in JUDGED)
    same = sum(r.bitwise is True for r in records)
    marks = [f"={same}"] if any(r.bitwise is not None for r in records) else []
    marks += [
        f"{mark}{counts[name]}"
        for mark, name in (("?", "uninformative"), ("!", "known"))
        if counts[name]
    ]
    found = f"[bold]{counts['finding']} FOUND[/bold] in " if counts["finding"] else ""
    return (
        found + " ".join([str(judged), *marks])
        if judged
        else "unsupported"
        if counts["unsupported"]
        else "-"
    )


def known_defects(records: list[Record]) -> list[str]:
    """For each known defect: in how many of the cases that could show it it showed."""
    possible = Counter((r.kernel, r.known) for r in records if r.known)
    shown = Counter((r.kernel, r.known) for r in records if r.verdict == "known")
    expired = ": NOT SEEN, is it mended?"
    return [
        f"known defect of {kernel}: {what}; shown by {shown[kernel, what]} of {n} "
        f"cases{'' if shown[kernel, what] else expired}"
        for (kernel, what), n in sorted(possible.items())
    ]


def unfinished(records: list[Record]) -> list[str]:
    """The cases at which a process ended."""
    return [
        f"NOT FINISHED: {r.kernel}, {r.property}: {r.case}: the process ended here, or was "
        "interrupted"
        for r in records
        if r.verdict == "unfinished"
    ]


def ratios(records: list[Record]) -> list[str]:
    """For each kernel the median of RMSE / expected, tensor by tensor: 1 where errors are those of
    the declared arithmetic.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for record in records:
        for name, value in record.measured.items():
            if name.endswith("/expected") and record.verdict in ("held", "uninformative"):
                found.setdefault(record.kernel, {}).setdefault(
                    name.removesuffix("/expected"), []
                ).append(value)
    return [
        f"{kernel}: RMSE / expected, median: "
        + ", ".join(f"{tensor} {median(values):.3f}" for tensor, values in tensors.items())
        for kernel, tensors in sorted(found.items())
    ]


def sight(records: list[Record]) -> str:
    """How many of the oracle's cases could have seen each of three wrong kernels."""
    judged = [
        r for r in records if r.property == "oracle" and r.verdict in ("held", "uninformative")
    ]
    blind = Counter(name for r in judged for name in r.blind_to)
    names = ("zeros", "mean(V)", "scale*1.05")
    return f"of {len(judged)} cases against the oracle, those that would catch: " + ", ".join(
        f"{n} {len(judged) - blind[n]}" for n in names
    )


def unsupported(records: list[Record]) -> Table:
    """Why problems were not judged, by kernel and reason."""
    table = Table(title="unsupported")
    for heading in ("kernel", "cases", "reason"):
        table.add_column(
            heading, justify="right" if heading == "cases" else "left", overflow="fold"
        )
    reasons = Counter((r.kernel, r.reason) for r in records if r.verdict == "unsupported")
    for (kernel, reason), count in sorted(reasons.items()):
        table.add_row(kernel, str(count), reason)
    return table


def changed(machine: str, changes: Iterable[Any]) -> Table:
    """What `verify record` found: each figure beside the recorded one."""
    table = Table(title=f"RMSE on {machine}", title_justify="left")
    for heading in ("kernel", "case", "tensor", "recorded", "now", "ratio", ""):
        table.add_column(
            heading,
            justify="right" if heading in ("recorded", "now", "ratio") else "left",
            no_wrap=True,
        )
    for c in changes:
        figures = ["-" if rmse is None else f"{rmse:.3e}" for rmse in (c.recorded, c.now)]
        table.add_row(
            *c.entry.rsplit(" ", 1),
            c.tensor,
            *figures,
            "-" if c.ratio is None else f"{c.ratio:.3f}",
            c.mark,
        )
    return table
