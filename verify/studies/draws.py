"""How often each kind of case is drawn: ``python -m verify.studies.draws [KERNEL ...]``.

No kernel is called but to find out what it takes. Where there is no GPU, what one would be handed
is drawn for kernels as the CPU knows them.
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from verify import environment, registry
from verify.engine.drawing import draw
from verify.generation.kinds import kinds
from verify.properties.property import Property, named
from verify.registry import Kernel
from verify.sandbox.capabilities import learn, options
from verify.spec.case import Case


def main(
    kernel: Annotated[list[str] | None, typer.Argument(help="names, or FILE::NAME")] = None,
    cases: Annotated[int, typer.Option(min=1)] = 2000,
    device: Annotated[str, typer.Option(help="for which cases are drawn")] = "cpu",
    law: Annotated[str, typer.Option("--property")] = "oracle",
) -> None:
    """Print the table, in per cent of the cases."""
    environment.prepare(device if device == "cpu" or torch.cuda.is_available() else "cpu")
    subjects = [k for name in kernel or ["naive"] for k in registry.find(name)]
    columns = [shares(subject, named(law), device, cases) for subject in subjects]
    table = Table("kind of case", *(k.name for k in subjects), box=box.MARKDOWN)
    for kind in columns[0]:
        table.add_row(kind, *(f"{column[kind]:.2f}" for column in columns))
    Console(width=max(100, 20 * len(subjects) + 60)).print(table)


def shares(kernel: Kernel, prop: Property, device: str, cases: int) -> dict[str, float]:
    """Per cent of so many cases that are of each kind, and that differ; milliseconds for one."""
    drawn(kernel, prop, device, 1)  # finds out what the kernel takes
    start = time.perf_counter()
    found = drawn(kernel, prop, device, cases)
    spent = time.perf_counter() - start
    of_each = {
        kind: 100 * sum(holds(case, device) for case in found) / len(found)
        for kind, holds in kinds().items()
    }
    different = 100 * len(set(map(str, found))) / len(found)
    return of_each | {"different cases": different, "ms": 1e3 * spent / len(found)}


def drawn(kernel: Kernel, prop: Property, device: str, cases: int) -> list[Case]:
    """The first cases of the seeds 0, 1, ..., a chunk of each; they follow the covering arrays in
    turn, as the chunks of a run do.
    """
    if device == "cuda" and not torch.cuda.is_available():
        learn(kernel, device, options(kernel, "cpu"))
    found: list[Case] = []
    seed = 0
    while len(found) < cases:
        draw(found.append, kernel, prop, device, seed=seed, number=seed)
        seed += 1
    return found[:cases]


if __name__ == "__main__":
    typer.run(main)
