"""What a guarded call costs: ``python -m verify.studies.call_overhead``.

On cases as fuzzing draws them: the bare call (the kernel's function, gradients by autograd, no
copy, no check), the guarded call, the float64 oracle, each the fastest of a few; (guarded + oracle)
/ (bare + oracle).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median, quantiles
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from verify import environment, registry
from verify.oracles import float64
from verify.properties.catalogue import PROPERTIES
from verify.registry import Kernel
from verify.sandbox.call import call, keywords
from verify.spec.case import Case
from verify.spec.finding import Finding
from verify.studies.bounds import drawn

CALLS = 5


def main(
    kernel: Annotated[
        list[str] | None, typer.Option(help="only this kernel; may be repeated")
    ] = None,
    cases: Annotated[int, typer.Option(min=10)] = 60,
    device: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Print the table."""
    device = environment.prepare(device)
    torch.set_num_threads(1)
    registry.load_bundled()
    columns = (
        "kernel",
        "cases",
        "bare us",
        "guarded us",
        "oracle us",
        "ratio, median",
        "90 % below",
        "gradients, median",
    )
    table = Table(*columns, box=box.MARKDOWN)
    for subject in (
        [k for name in kernel for k in registry.find(name)]
        if kernel
        else registry.REGISTRY.values()
    ):
        forward = list(_times(subject, "oracle", cases, device))
        backward = list(_times(subject, "gradients", cases, device))
        if forward:
            figures = [f"{1e6 * median(column):.0f}" for column in zip(*forward, strict=True)]
            ratios = [_ratio(*times) for times in forward]
            both = f"{median(_ratio(*times) for times in backward):.2f}" if backward else "-"
            row = [f"{median(ratios):.2f}", f"{quantiles(ratios, n=10)[-1]:.2f}", both]
            table.add_row(subject.name, str(len(forward)), *figures, *row)
    Console(width=130).print(table)


def _ratio(bare: float, guarded: float, oracle: float) -> float:
    return (guarded + oracle) / (bare + oracle)


def _times(
    kernel: Kernel, law: str, cases: int, device: str
) -> Iterator[tuple[float, float, float]]:
    """(bare, guarded, oracle) in seconds of each drawn case that the kernel computes."""
    if PROPERTIES[law].refusal(kernel, device):
        return
    judged = 0
    for chunk in range(cases):
        for case in drawn(kernel, PROPERTIES[law], device, seed=chunk):
            if kernel.unsupported(case.problem, device) or kernel.known_issue(case, device, law):
                continue
            try:
                yield _timed(kernel, case, device)
            except Finding:
                continue
            judged += 1
            if judged >= cases:
                return


def _timed(kernel: Kernel, case: Case, device: str) -> tuple[float, float, float]:
    x, p = case.inputs(device), case.problem

    def bare() -> None:
        leaves = x.map(lambda t: t.detach().requires_grad_(p.grads and t.is_floating_point()))
        returned = kernel.fn(leaves.q, leaves.k, leaves.v, **keywords(kernel, p, leaves))
        out = returned[0] if isinstance(returned, tuple) else returned
        if p.grads and out.requires_grad:
            wanted = [t for t in (leaves.q, leaves.k, leaves.v, leaves.bias) if t is not None]
            torch.autograd.grad([out], wanted, [x.do], materialize_grads=True)

    call(kernel, p, x)  # compiles; raises where it cannot
    return (
        _best(bare, device),
        _best(lambda: call(kernel, p, x), device),
        _best(lambda: float64.exact(p, x), device),
    )


def _best(what: Callable[[], object], device: str) -> float:
    spent = []
    for _ in range(CALLS):
        start = time.perf_counter()
        what()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return min(spent)


if __name__ == "__main__":
    typer.run(main)
