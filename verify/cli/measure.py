"""The commands that measure and write tables: report, bench, power, record."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from verify import environment
from verify.cli.app import Device, Kernels, command, console, plain


@command
def report(
    *,
    draws: Annotated[
        int | None, typer.Option(min=1, help="draws, the same for every row; default by table")
    ] = None,
    problem: Annotated[
        str | None, typer.Option(help="one problem's table instead of the report")
    ] = None,
    recipe: Annotated[str, typer.Option(help="the inputs of that problem")] = "outliers(0.001,10)",
    section: Annotated[
        list[str] | None, typer.Option(help="only this table of the report; may be repeated")
    ] = None,
    kernel: Kernels = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="fp16, bf16, fp32; may be repeated")
    ] = None,
    stored: Annotated[
        Path | None,
        typer.Option("--from", help="a table.json: measure nothing, write its tables again"),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="OLD.json NEW.json: what moved between two reports"),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="folder for table.md, .tex, .csv, .json and plots")
    ] = Path("verify-report"),
    device: Device = None,
) -> None:
    """Regenerate the RMSE tables: total = input rounding + kernel arithmetic, beside what the
    declared arithmetic predicts.
    """
    if compare is not None or stored is not None:
        return import_module("verify.reports.rmse_pages").from_stored(stored, compare, out, console)
    from verify.measurement.rmse import run_report

    chosen: dict[str, Any] = {
        "targets": kernel or [],
        "dtypes": dtype or [],
        "sections": section or [],
        "draws": draws,
    }
    run_report(
        environment.prepare(device),
        problem=problem,
        recipe=recipe,
        **chosen,
        out=out,
        console=console,
    )


@command
def bench(
    *,
    kernel: Kernels = None,
    dim: Annotated[
        list[int] | None,
        typer.Option(min=1, help="head dim; default 64, 128, 256; may be repeated"),
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(min=1, help="default 512, 1024, ... 16384; may be repeated")
    ] = None,
    mask: Annotated[
        list[str] | None, typer.Option(help="default full and causal_lower_right; may be repeated")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp16 or bf16")] = "bf16",
    forward_only: Annotated[
        bool, typer.Option("--forward-only", help="leave out the backward")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="folder for speed.md, speed.csv, speed.json, speed.png")
    ] = Path("verify-bench"),
    device: Device = None,
) -> None:
    """Measure TFLOP/s, forward and backward, at FlashAttention-3's shapes, beside the error of the
    same call. Needs a GPU.
    """
    from verify.measurement.speed import run_bench

    shapes: dict[str, Any] = {
        "dims": dim,
        "lengths": length,
        "masks": mask,
        "dtype": dtype,
        "forward_only": forward_only,
    }
    run_bench(environment.prepare(device), targets=kernel or [], out=out, console=console, **shapes)


@command
def power(
    *,
    fault: Annotated[
        list[str] | None, typer.Option(help="only this mutant; may be repeated")
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            min=0, help="hunts for each mutant, each with its own seed; 0: the correct ones only"
        ),
    ] = 5,
    seed: Annotated[int, typer.Option(min=0, help="the first of them")] = 0,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="every mutant under every property, not its own alone")
    ] = False,
    controls: Annotated[
        int, typer.Option(min=0, help="cases that each correct variant is judged on")
    ] = 1000,
    out: Annotated[Path, typer.Option(help="folder for power.md and power.json")] = Path(
        "verify-power"
    ),
) -> None:
    """See that the suite finds bugs: known-wrong kernels, cases until each is caught, what other
    suites' rules say of them, and correct variants that must not be accused. On the CPU. Exit code
    1 where one escapes or is accused.
    """
    environment.prepare("cpu")
    from verify.studies.mutation import run_power

    budget: dict[str, Any] = {
        "seeds": range(seed, seed + seeds),
        "matrix": matrix,
        "controls": controls,
    }
    raise typer.Exit(run_power(fault or [], **budget, out=out, console=console))


@command
def record(
    *,
    kernel: Kernels = None,
    update: Annotated[
        bool, typer.Option("--update", help="write the figures into the record of this machine")
    ] = False,
    device: Device = None,
) -> None:
    """Compare every kernel's RMSE with the record of this machine and its versions. Exit code 1
    where one is WORSE.
    """
    for library in ("OMP", "OPENBLAS", "MKL"):
        # sums split among threads end in other digits; read when NumPy loads
        os.environ[f"{library}_NUM_THREADS"] = "1"
    device = environment.prepare(device)
    from verify import registry
    from verify.measurement import baseline

    registry.load_bundled()
    kernels = [k for t in kernel or [] for k in registry.find(t)] or list(
        registry.REGISTRY.values()
    )
    machine, names = baseline.machine(device), {k.name for k in kernels}
    recorded = baseline.read(baseline.FILE).get(machine, {})
    now, reasons = baseline.measure_all(kernels, device)
    reasons.update(
        f"{name} is unavailable: {why}" for name, why in registry.UNAVAILABLE.items() if not kernel
    )
    changes = baseline.compare(recorded, now, names)
    console.print(import_module("verify.reports.terminal").changed(machine, changes))
    if reasons:
        plain(f"no figures: {'; '.join(f'{why} ({count})' for why, count in reasons.items())}")
    if update:
        baseline.update(baseline.FILE, machine, names, now)
        plain(f"written: {baseline.FILE}; review it with `git diff`")
        return
    console.print("nothing was written; the same command with --update records these figures")
    raise typer.Exit(int(any(change.mark == "WORSE" for change in changes)))
