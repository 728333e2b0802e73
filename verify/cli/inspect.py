"""The commands that ask: kernels, identify, determinism, masks."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from verify import environment
from verify.cli.app import Device, Target, command, console, plain


@command
def kernels(device: Device = None) -> None:
    """List the kernels, what each supports on this device and why not the rest."""
    from verify import registry
    from verify.sandbox.capabilities import options

    device = environment.prepare(device)
    registry.load_bundled()
    table = Table(title=f"kernels on {device}")
    for heading in ("kernel", "supports", "does not support"):
        table.add_column(heading, overflow="fold")
    for kernel in registry.REGISTRY.values():
        found = options(kernel, device)
        if why := found.refusal():
            table.add_row(kernel.name, "nothing here", why)
            continue
        reasons: dict[str, list[str]] = {}
        for option in found.taken:
            for value, reason in found.refused[option].items():
                reasons.setdefault(reason, []).append(f"{option}={value}")
        not_taken = [f"{', '.join(what)}: {reason}" for reason, what in reasons.items()]
        dtypes, masks = (", ".join(map(str, found.taken[name])) for name in ("dtype", "mask"))
        table.add_row(kernel.name, f"{dtypes}; {masks}", "\n".join(not_taken) or "-")
    for name, reason in registry.UNAVAILABLE.items():
        table.add_row(name, "unavailable", reason)
    console.print(table)


@command
def identify(target: Target, device: Device = None) -> None:
    """Find out from a kernel's errors which arithmetic it has: formats, sums, extra roundings.
    Prints the line to declare.
    """
    from verify import registry
    from verify.inspection import identify as identification
    from verify.spec.problem import Problem

    device = environment.prepare(device)
    usual = Problem.parse("b1.h8:2.q512.k64.d64.fp16.full.grads")
    for kernel in registry.find(target):
        identity = identification.identify(kernel, device)
        console.print(identity.table(kernel.numerics(usual, device)))
        plain(f"arithmetic={identity.arithmetic}")


@command
def determinism(
    target: Target,
    calls: Annotated[int, typer.Option(min=2, max=10_000, help="calls on the same inputs")] = 20,
    device: Device = None,
) -> None:
    """Say whether a kernel repeats its bits, and whether batch entries and heads are independent.
    Exit code 1 where it declares to be deterministic and is not.
    """
    device = environment.prepare(device)
    from verify import registry
    from verify.inspection import determinism as answers
    from verify.sandbox.process import isolated
    from verify.spec.finding import Finding

    failed = False
    for name, kernel in registry.named(target, registry.find(target)).items():
        with isolated(name, kernel, device) as worker:
            try:
                worker.options()
                rows = worker.run(answers.verdicts, calls)
            except Finding as finding:
                plain(f"{name}: {finding.sentence}")
                failed = True
                continue
        console.print(answers.table(kernel, rows, device))
        failed |= answers.broken(kernel, rows, device)
    raise typer.Exit(int(failed))


@command
def masks(
    len_q: Annotated[int, typer.Option(min=1)] = 4, len_k: Annotated[int, typer.Option(min=1)] = 6
) -> None:
    """Show every mask as a picture: rows are queries, columns keys, # = visible."""
    from verify.spec.masks import KINDS, Mask, ways

    for name, drawn in ways().values():
        says = (KINDS[name].rule.__doc__ or "").partition("\n")[0]
        console.print(f"[bold]{drawn.example}[/bold]", end="  ")
        plain(says)
        plain(Mask.parse(drawn.example).picture(len_q, len_k) + "\n")
