"""`verify bench`: how fast every kernel is at the FlashAttention-3 paper's shapes, and how far from
the truth while it is.

16 384 tokens in all, hidden size 2048, head dims 64, 128, 256, lengths 512 to 16 384, causal or not
(Shah et al. 2024, arXiv 2407.08608, section 4.1). Operations: 4 B H N^2 D forward, halved where
causal; 2.5 times that backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from verify import environment, registry
from verify.bounds.metrics import measure
from verify.errors import VerifyError
from verify.measurement.rmse import writable
from verify.oracles import float64
from verify.registry import Kernel
from verify.reports import speed_table, stored
from verify.sandbox.call import GRADIENTS, keywords
from verify.spec.case import Case, Inputs
from verify.spec.finding import Finding
from verify.spec.problem import Problem

DIMS, LENGTHS, TOKENS, HIDDEN = (64, 128, 256), (512, 1024, 2048, 4096, 8192, 16384), 16384, 2048
MASKS = ("full", "causal_lower_right")
ALSO = ("fa3_wheel",)
"""Other people's kernels, where they are installed."""
REPEATS = 15
AHEAD = 20_000_000
"""Cycles that the GPU waits before the first measured call: the launches queue up, and the host's
time is not measured.
"""


def run_bench(
    device: str,
    *,
    targets: list[str],
    dims: list[int] | None,
    lengths: list[int] | None,
    masks: list[str] | None,
    dtype: str,
    forward_only: bool,
    out: Path,
    console: Console,
) -> None:
    """Measure, print the table, write speed.json (after every figure), speed.md, speed.csv and
    speed.png below `out`.

    Raises VerifyError without a GPU, for an unknown kernel or a folder that cannot be written,
    before anything is measured.
    """
    if device != "cuda":
        raise VerifyError(f"device={device}: speed is measured with CUDA events, on a GPU")
    registry.load_bundled(*ALSO)
    kernels = [k for t in targets for k in registry.find(t)] or list(registry.REGISTRY.values())
    path = writable(out / "speed.json")
    problems = [
        _problem(dim, length, mask, dtype)
        for dim in dims or DIMS
        for length in lengths or LENGTHS
        for mask in masks or MASKS
    ]
    report: dict[str, Any] = {
        "schema": 1,
        "environment": environment.describe(device),
        "repeats": REPEATS,
        "rows": [],
    }
    report["unavailable"] = [
        {"kernel": k, "reason": why} for k, why in registry.UNAVAILABLE.items() if not targets
    ]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(problems) * len(kernels))
        for problem in problems:
            for row in _measured(problem, kernels, device, forward_only=forward_only):
                progress.update(task, advance=1, description=f"{row['kernel']} {problem}")
                report["rows"].append(row)
                stored.save(report, path)
    speed_table.write(report, out)
    console.print(speed_table.table(report))
    console.print("\n".join(speed_table.footnotes(report)), markup=False)
    console.print(
        f"written: {out}/speed.json, .md, .csv{speed_table.plot(report, out)}", markup=False
    )


def _problem(dim: int, length: int, mask: str, dtype: str) -> Problem:
    heads = max(1, HIDDEN // dim)
    return Problem.parse(
        f"b{max(1, TOKENS // length)}.h{heads}.q{length}.k{length}.d{dim}.{dtype}.{mask}.grads"
    )


def operations(problem: Problem) -> float:
    """Floating-point operations of the forward."""
    whole = 4.0 * problem.batch * problem.heads_q * problem.len_q * problem.len_k * problem.dim_qk
    return whole if problem.mask.names == {"full"} else whole / 2


def _measured(
    problem: Problem, kernels: list[Kernel], device: str, *, forward_only: bool
) -> Iterator[dict[str, Any]]:
    """A row for each kernel: figures of both directions, or a reason."""
    drawn = (
        Case(problem).inputs(device).map(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2))
    )  # [B, N, H, D] in memory
    one = problem.but(batch=1, grads=not forward_only)
    exact = float64.exact(one, drawn.map(lambda t: t[:1]))
    for kernel in kernels:
        row: dict[str, Any] = {"kernel": kernel.name, "problem": str(problem.but(grads=False))}
        directions = ["forward"] if forward_only else ["forward", "backward"]
        try:
            for direction in directions:
                if reason := kernel.unsupported(problem.but(grads=direction == "backward"), device):
                    row[direction] = {"reason": reason}
                    continue
                run, results = _prepared(kernel, problem, drawn, direction)
                milliseconds = _time(run)
                errors = [measure(t[:1], getattr(exact, name)) for name, t in results().items()]
                rmse = (
                    sum(e.rmse**2 * e.count for e in errors) / sum(e.count for e in errors)
                ) ** 0.5
                work = operations(problem) * (2.5 if direction == "backward" else 1.0)
                row[direction] = {
                    "ms": milliseconds,
                    "tflops": work / milliseconds / 1e9,
                    "rmse": rmse,
                }
                if kernel.stages and direction == "forward":
                    parts = kernel.stages(
                        drawn.q, drawn.k, drawn.v, **keywords(kernel, problem, drawn)
                    )
                    row["stages"] = {name: _time(part) for name, part in parts.items()}
        except (Finding, RuntimeError) as error:  # out of memory is a RuntimeError
            row[direction] = {"reason": str(error).strip().splitlines()[0]}
        torch.cuda.empty_cache()
        yield row


def _prepared(
    kernel: Kernel, problem: Problem, drawn: Inputs, direction: str
) -> tuple[Callable[[], Any], Callable[[], dict[str, Tensor]]]:
    """(what is timed, its results by name)"""
    inputs = drawn.map(lambda t: t.detach().requires_grad_(direction == "backward"))
    arguments = keywords(kernel, problem, inputs)

    def forward() -> Tensor:
        returned = kernel.fn(inputs.q, inputs.k, inputs.v, **arguments)
        return returned[0] if isinstance(returned, tuple) else returned

    if direction == "forward":
        return forward, lambda: {"out": forward()}
    out, leaves = (
        forward(),
        [t for t in (getattr(inputs, name) for name in GRADIENTS) if t is not None],
    )

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, drawn.do, retain_graph=True)

    return backward, lambda: dict(zip(("dq", "dk", "dv"), backward(), strict=True))


def _time(run: Callable[[], Any]) -> float:
    """Milliseconds on the GPU: the median of REPEATS calls."""
    for _ in range(3):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    torch.cuda.synchronize()
    torch.cuda._sleep(AHEAD)
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in events)
