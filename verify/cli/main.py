"""The command line: translates its arguments to the runner, prints what it found. Exit code 0 fine,
1 findings, 2 bad input.
"""

from __future__ import annotations

import random
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from verify import environment
from verify.cli.measure import Device, console
from verify.cli.measure import app as tables
from verify.errors import VerifyError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Decide whether an attention kernel is right.",
)
app.registered_commands += tables.registered_commands
Target = Annotated[
    str, typer.Argument(help="a kernel's name, path/to/file.py or path/to/file.py::name")
]


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
    seconds: Annotated[float, typer.Option(help="time for all properties together")] = 60.0,
    cases: Annotated[
        int | None, typer.Option(min=1, help="instead: cases for each property")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="seed of the drawn cases; default: a new one, printed first")
    ] = None,
    property: Annotated[
        list[str] | None, typer.Option(help="only this property; may be repeated")
    ] = None,
    call_seconds: Annotated[
        float, typer.Option(min=1, help="a call that takes longer hangs")
    ] = 60.0,
    out: Annotated[
        Path | None, typer.Option(help="folder for the records; default: .verify/runs/<time>")
    ] = None,
    device: Device = None,
) -> None:
    """Try to break a kernel: every property on adversarial random cases. Findings come shrunk, with
    a command to replay.
    """
    from verify import registry
    from verify.engine.session import run_fuzz

    if seconds <= 0:
        raise VerifyError(f"seconds={seconds:g}: a positive number")
    device = environment.prepare(device)
    kernels = registry.find(target)
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    folder = out or Path(".verify") / "runs" / time.strftime("%Y%m%d-%H%M%S")
    console.print(
        f"seed {seed}, {', '.join(f'{k} {v}' for k, v in environment.describe(device).items())}"
    )
    budget: dict[str, Any] = {
        "seconds": None if cases else seconds,
        "cases": cases,
        "call_seconds": call_seconds,
    }
    raise typer.Exit(
        run_fuzz(
            target,
            kernels,
            device,
            **budget,
            seed=seed,
            laws=property or [],
            folder=folder,
            console=console,
        )
    )


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="the records of `verify fuzz` runs")],
) -> None:
    """Go on with interrupted runs: what is on record is not judged again. Exit code as of `verify
    fuzz`.
    """
    raise typer.Exit(import_module("verify.engine.session").run_resume(folder, console))


@app.command()
def replay(
    *,
    target: Target,
    case: Annotated[str, typer.Argument(help="a case id, as printed by a finding")],
    property: Annotated[str, typer.Option(help="the property to judge")] = "oracle",
    in_process: Annotated[
        bool, typer.Option("--in-process", help="call the kernel here, for a debugger")
    ] = False,
    sanitizer: Annotated[
        str | None, typer.Option(help="a tool of compute-sanitizer to run it under, memcheck say")
    ] = None,
    device: Device = None,
) -> None:
    """Judge one case again and show its tensors where they are small. Exit code 1 where the
    property does not hold.
    """
    from verify import registry
    from verify.engine.replay import run_replay, run_sanitized
    from verify.spec.case import Case

    device, parsed = environment.prepare(device), Case.parse(case)
    if sanitizer:
        raise typer.Exit(run_sanitized(sanitizer, target, parsed, property))
    raise typer.Exit(
        run_replay(
            target, registry.find(target), parsed, property, device, console, here=in_process
        )
    )


@app.command()
def kernels(device: Device = None) -> None:
    """List the kernels, what each supports on this device and why not the rest."""
    from verify import registry
    from verify.sandbox.capabilities import CHOICES, options

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
        taken = (
            ", ".join(known.taken["dtype"]) + "; " + ", ".join(str(m) for m in known.taken["mask"])
        )
        table.add_row(
            kernel.name,
            taken,
            "\n".join(f"{', '.join(what)}: {reason}" for reason, what in reasons.items()) or "-",
        )
    for name, reason in registry.UNAVAILABLE.items():
        table.add_row(name, "unavailable", reason)
    console.print(table)


@app.command()
def identify(target: Target, device: Device = None) -> None:
    """Find out from a kernel's errors which arithmetic it has: formats, sums, extra roundings.
    Prints the line to declare.
    """
    from verify import registry
    from verify.inspection.identify import identify as find_out
    from verify.spec.problem import Problem

    device = environment.prepare(device)
    for kernel in registry.find(target):
        identity = find_out(kernel, device)
        plain = Problem(
            batch=1,
            heads_q=8,
            heads_kv=2,
            len_q=512,
            len_k=64,
            dim_qk=64,
            dim_v=64,
            dtype="fp16",
            grads=True,
        )
        console.print(identity.table(kernel.numerics(plain, device)))
        console.print(f"arithmetic={identity.arithmetic}", markup=False, soft_wrap=True)


@app.command()
def determinism(
    target: Target,
    calls: Annotated[int, typer.Option(min=2, max=10_000, help="calls on the same inputs")] = 20,
    device: Device = None,
) -> None:
    """Say whether a kernel repeats its bits, and whether batch entries and heads are independent.
    Exit code 1 where it declares to be deterministic and is not.
    """
    from verify import registry
    from verify.inspection import determinism as verdicts
    from verify.sandbox.process import isolated
    from verify.spec.finding import Finding

    device, failed = environment.prepare(device), False
    for name, kernel in registry.named(target, registry.find(target)).items():
        with isolated(name, kernel, device) as worker:
            try:
                worker.options()
                rows = worker.ask("determinism", calls)
            except Finding as finding:
                console.print(f"{name}: {finding.sentence}", markup=False, soft_wrap=True)
                failed = True
                continue
        console.print(verdicts.table(kernel, rows, device))
        failed |= verdicts.broken(kernel, rows, device)
    raise typer.Exit(int(failed))


@app.command()
def masks(
    len_q: Annotated[int, typer.Option(min=1)] = 4, len_k: Annotated[int, typer.Option(min=1)] = 6
) -> None:
    """Show every mask as a picture: rows are queries, columns keys, # = visible."""
    from verify.spec.masks import KINDS, Mask

    examples = {
        "window": "window(2,0)",
        "prefix_lm": "prefix_lm(2)",
        "padding": "padding(4)",
        "blocks": "blocks(1,2)",
        "dense": "dense(50,1)",
    }
    for name, kind in KINDS.items():
        text = examples.get(name, name)
        console.print(
            f"[bold]{text}[/bold]  {(kind.rule.__doc__ or '').split(chr(10))[0]}", markup=True
        )
        console.print(Mask.parse(text).picture(len_q, len_k) + "\n", markup=False)


if __name__ == "__main__":
    main()
