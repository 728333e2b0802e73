"""The command line: translates its arguments to the runner, prints what it found. Exit code 0 fine, 1 findings, 2 bad input."""

from __future__ import annotations

import os
import random
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from verify import environment
from verify.errors import VerifyError
from verify.reports.pages import WIDTH

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Decide whether an attention kernel is right.",
)
console = Console(highlight=False)
if console.width < WIDTH:  # a narrow terminal or a pipe: long lines wrap there, cells must not be cut
    console = Console(highlight=False, width=WIDTH)

Target = Annotated[str, typer.Argument(help="a kernel's name, path/to/file.py or path/to/file.py::name")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is a GPU")]


def main() -> None:
    """The console script."""
    try:
        app()
    except VerifyError as error:
        print(f"verify: {error}", file=sys.stderr)
        sys.exit(2)


@app.command()
def fuzz(
    target: Target,
    seconds: Annotated[float, typer.Option(help="time for all properties together, shrinking not counted")] = 60.0,
    cases: Annotated[int | None, typer.Option(min=1, help="instead: cases for each property")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of the drawn cases; default: a new one, printed first")] = None,
    property: Annotated[list[str] | None, typer.Option(help="only this property; may be repeated")] = None,
    call_seconds: Annotated[float, typer.Option(min=1, help="a call that takes longer hangs")] = 60.0,
    out: Annotated[Path | None, typer.Option(help="folder for the records; default: .verify/runs/<time>")] = None,
    device: Device = None,
) -> None:
    """Try to break a kernel: every property on adversarial random cases. Findings come shrunk, with a command to replay."""
    from verify import registry
    from verify.fuzzing import run_fuzz

    if seconds <= 0:
        raise VerifyError(f"seconds={seconds:g}: a positive number")
    device = environment.prepare(device)
    kernels = registry.find(target)
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    folder = out or Path(".verify") / "runs" / time.strftime("%Y%m%d-%H%M%S")
    console.print(f"seed {seed}, {', '.join(f'{k} {v}' for k, v in environment.describe(device).items())}")
    budget: dict[str, Any] = {"seconds": None if cases else seconds, "cases": cases, "call_seconds": call_seconds}
    raise typer.Exit(run_fuzz(target, kernels, device, **budget, seed=seed, laws=property or [], folder=folder, console=console))


@app.command()
def resume(folder: Annotated[Path, typer.Argument(help="the records of `verify fuzz` runs")]) -> None:
    """Go on with interrupted runs: what is on record is not judged again. Exit code as of `verify fuzz`."""
    raise typer.Exit(import_module("verify.fuzzing").run_resume(folder, console))


@app.command()
def replay(
    *,
    target: Target,
    case: Annotated[str, typer.Argument(help="a case id, as printed by a finding")],
    property: Annotated[str, typer.Option(help="the property to judge")] = "oracle",
    in_process: Annotated[bool, typer.Option("--in-process", help="call the kernel here, for a debugger")] = False,
    sanitizer: Annotated[str | None, typer.Option(help="a tool of compute-sanitizer to run it under, memcheck say")] = None,
    device: Device = None,
) -> None:
    """Judge one case again and show its tensors where they are small. Exit code 1 where the property does not hold."""
    from verify import registry
    from verify.case import Case
    from verify.replaying import run_replay, run_sanitized

    device, parsed = environment.prepare(device), Case.parse(case)
    if sanitizer:
        raise typer.Exit(run_sanitized(sanitizer, target, parsed, property))
    raise typer.Exit(run_replay(target, registry.find(target), parsed, property, device, console, here=in_process))


@app.command()
def kernels(device: Device = None) -> None:
    """List the kernels, what each supports on this device and why not the rest."""
    from verify import registry
    from verify.properties.options import CHOICES, options

    device = environment.prepare(device)
    registry.load_bundled()
    table = Table(title=f"kernels on {device}")
    for heading in ("kernel", "supports", "does not support"):
        table.add_column(heading, overflow="fold")
    for kernel in registry.REGISTRY.values():
        known = options(kernel, device)
        if why := known.refusal():
            table.add_row(kernel.name, "nothing here", why)
            continue
        reasons: dict[str, list[str]] = {}
        for option in CHOICES:
            for value, reason in known.refused[option].items():
                reasons.setdefault(reason, []).append(f"{option}={value}")
        taken = ", ".join(known.taken["dtype"]) + "; " + ", ".join(str(m) for m in known.taken["mask"])
        table.add_row(kernel.name, taken, "\n".join(f"{', '.join(what)}: {reason}" for reason, what in reasons.items()) or "-")
    for name, reason in registry.UNAVAILABLE.items():
        table.add_row(name, "unavailable", reason)
    console.print(table)


@app.command()
def identify(target: Target, device: Device = None) -> None:
    """Find out from a kernel's errors which arithmetic it has: formats, sums, extra roundings. Prints the line to declare."""
    from verify import registry
    from verify.identify import identify as find_out
    from verify.problem import Problem

    device = environment.prepare(device)
    for kernel in registry.find(target):
        identity = find_out(kernel, device)
        plain = Problem(batch=1, heads_q=8, heads_kv=2, len_q=512, len_k=64, dim_qk=64, dim_v=64, dtype="fp16", grads=True)
        console.print(identity.table(kernel.numerics(plain, device)))
        console.print(f"arithmetic={identity.arithmetic}", markup=False, soft_wrap=True)


@app.command()
def masks(len_q: Annotated[int, typer.Option(min=1)] = 4, len_k: Annotated[int, typer.Option(min=1)] = 6) -> None:
    """Show every mask as a picture: rows are queries, columns keys, # = visible."""
    from verify.masks import KINDS, Mask

    examples = {
        "window": "window(2,0)",
        "prefix_lm": "prefix_lm(2)",
        "padding": "padding(4)",
        "blocks": "blocks(1,2)",
        "dense": "dense(50,1)",
    }
    for name, kind in KINDS.items():
        text = examples.get(name, name)
        console.print(f"[bold]{text}[/bold]  {(kind.rule.__doc__ or '').split(chr(10))[0]}", markup=True)
        console.print(Mask.parse(text).picture(len_q, len_k) + "\n", markup=False)


@app.command()
def report(
    *,
    draws: Annotated[int | None, typer.Option(min=1, help="draws, the same for every row; default by table")] = None,
    problem: Annotated[str | None, typer.Option(help="one problem's table instead of the report")] = None,
    recipe: Annotated[str, typer.Option(help="the inputs of that problem")] = "outliers(0.001,10)",
    section: Annotated[list[str] | None, typer.Option(help="only this table of the report; may be repeated")] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="only this kernel (name or file); may be repeated")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp16, bf16, fp32; may be repeated")] = None,
    stored: Annotated[Path | None, typer.Option("--from", help="a table.json: measure nothing, write its tables again")] = None,
    compare: Annotated[tuple[Path, Path] | None, typer.Option(help="OLD.json NEW.json: what moved between two reports")] = None,
    out: Annotated[Path, typer.Option(help="folder for table.md, .tex, .csv, .json and plots")] = Path("verify-report"),
    device: Device = None,
) -> None:
    """Regenerate the RMSE tables: total = input rounding + kernel arithmetic, beside what the declared arithmetic predicts."""
    if compare is not None or stored is not None:
        return import_module("verify.reports.rmse_pages").from_stored(stored, compare, out, console)
    from verify.reporting import run_report

    chosen: dict[str, Any] = {"targets": kernel or [], "dtypes": dtype or [], "sections": section or [], "draws": draws}
    run_report(environment.prepare(device), problem=problem, recipe=recipe, **chosen, out=out, console=console)


@app.command()
def bench(
    *,
    kernel: Annotated[list[str] | None, typer.Option(help="only this kernel (name or file); may be repeated")] = None,
    dim: Annotated[list[int] | None, typer.Option(min=1, help="head dim; default 64, 128, 256; may be repeated")] = None,
    length: Annotated[list[int] | None, typer.Option(min=1, help="default 512, 1024, ... 16384; may be repeated")] = None,
    mask: Annotated[list[str] | None, typer.Option(help="default full and causal_lower_right; may be repeated")] = None,
    dtype: Annotated[str, typer.Option(help="fp16 or bf16")] = "bf16",
    forward_only: Annotated[bool, typer.Option("--forward-only", help="leave out the backward")] = False,
    out: Annotated[Path, typer.Option(help="folder for speed.md, speed.csv, speed.json, speed.png")] = Path("verify-bench"),
    device: Device = None,
) -> None:
    """Measure TFLOP/s, forward and backward, at FlashAttention-3's shapes, beside the error of the same call. Needs a GPU."""
    from verify.benching import run_bench

    shapes: dict[str, Any] = {"dims": dim, "lengths": length, "masks": mask, "dtype": dtype, "forward_only": forward_only}
    run_bench(environment.prepare(device), targets=kernel or [], out=out, console=console, **shapes)


@app.command()
def power(
    *,
    fault: Annotated[list[str] | None, typer.Option(help="only this mutant; may be repeated")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="hunts for each mutant, each with its own seed")] = 5,
    matrix: Annotated[bool, typer.Option("--matrix", help="every mutant under every property, not its own alone")] = False,
    controls: Annotated[int, typer.Option(min=0, help="cases that each correct variant is judged on")] = 1000,
    out: Annotated[Path, typer.Option(help="folder for power.md and power.json")] = Path("verify-power"),
) -> None:
    """See that the suite finds bugs: known-wrong kernels, cases until each is caught, what other suites' rules say of them, and
    correct variants that must not be accused. On the CPU. Exit code 1 where one escapes or is accused.
    """
    environment.prepare("cpu")
    from verify.properties.power import run_power

    raise typer.Exit(run_power(fault or [], seeds=seeds, matrix=matrix, controls=controls, out=out, console=console))


@app.command()
def record(
    *,
    kernel: Annotated[list[str] | None, typer.Option(help="only this kernel (name or file); may be repeated")] = None,
    update: Annotated[bool, typer.Option("--update", help="write the figures into the record of this machine")] = False,
    device: Device = None,
) -> None:
    """Compare every kernel's RMSE with the record of this machine and its versions. Exit code 1 where one is WORSE."""
    for library in ("OMP", "OPENBLAS", "MKL"):  # sums split among threads end in other digits; read when NumPy loads
        os.environ[f"{library}_NUM_THREADS"] = "1"
    device = environment.prepare(device)
    from verify import recording, registry

    registry.load_bundled()
    kernels = [k for t in kernel or [] for k in registry.find(t)] or list(registry.REGISTRY.values())
    machine, names = recording.machine(device), {k.name for k in kernels}
    recorded = recording.read(recording.FILE).get(machine, {})
    now, reasons = recording.measure_all(kernels, device)
    reasons.update(f"{name} is unavailable: {why}" for name, why in registry.UNAVAILABLE.items() if not kernel)
    changes = recording.compare(recorded, now, names)
    console.print(import_module("verify.reports.terminal").changed(machine, changes))
    if reasons:
        console.print(f"no figures: {'; '.join(f'{why} ({count})' for why, count in reasons.items())}", markup=False)
    if update:
        recording.update(recording.FILE, machine, names, now)
        console.print(f"written: {recording.FILE}; review it with `git diff`", markup=False)
        return
    console.print("nothing was written; the same command with --update records these figures")
    raise typer.Exit(int(any(change.mark == "WORSE" for change in changes)))


if __name__ == "__main__":
    main()
