"""The commands that ask: kernels, identify, determinism, masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from verify import environment
from verify.cli.app import Device, Target, command, console, plain

if TYPE_CHECKING:
    from verify.sandbox.options import Options


@command
def kernels(
    target: Annotated[
        str | None,
        typer.Argument(help="a kernel's name or path/to/file.py[::name]; default: all bundled"),
    ] = None,
    device: Device = None,
) -> None:
    """List kernels, what each was found to take on this device and why not the rest."""
    device = environment.prepare(device)
    from verify.engine.resolve import resolve
    from verify.sandbox.capabilities import options
    from verify.sandbox.process import isolated

    found, unavailable = resolve((target,) if target else (), bundled_only=True)
    table = Table(title=f"kernels on {device}")
    for heading in ("kernel", "takes", "does not take"):
        table.add_column(heading, overflow="fold")
    for name, kernel in found.items():
        if target is None:  # ours do not crash on a plain problem
            table.add_row(kernel.name, *taken_and_not(options(kernel, device)))
            continue
        with isolated(name, kernel, device) as worker:
            table.add_row(kernel.name, *taken_and_not(worker.options()))
    for name, reason in unavailable.items():
        table.add_row(name, "unavailable", reason)
    console.print(table)


def taken_and_not(found: Options) -> tuple[str, str]:
    """(what a kernel takes, option by option; what it does not, by reason)"""
    from verify.sandbox.options import label

    if why := found.refusal():
        return "nothing here", why
    shown = {name: [label(value) for value in values] for name, values in found.taken.items()}
    shown["dims"] = [_dims(value) for value in found.taken["dims"]]
    lines = [f"{name}: {', '.join(values)}" for name, values in shown.items() if values]
    layouts: dict[str, list[str]] = {}
    for tensor, ways in found.layouts.items():
        layouts.setdefault(", ".join(ways), []).append(tensor)
    lines += [f"layouts of {', '.join(tensors)}: {ways}" for ways, tensors in layouts.items()]
    reasons: dict[str, dict[str, list[str]]] = {}
    for option, values in found.refused.items():
        for value, reason in values.items():
            shown_value = _dims(tuple(value.split(":"))) if option == "dims" else value
            reasons.setdefault(reason, {}).setdefault(option, []).append(shown_value)
    multiples = zip(("len_q", "len_k"), found.multiples)
    lines += [f"{name}: multiples of {n}" for name, n in multiples if n > 1]
    rest = [f"{_values(what)}: {reason}" for reason, what in reasons.items()]
    return "\n".join(lines), "\n".join(rest) or "-"


def _values(what: dict[str, list[str]]) -> str:
    """`dtype fp64; mask dense(60,1), full`; of layouts the tensor and its layout."""
    return "; ".join(
        option if values == ["layout"] else f"{option} {', '.join(values)}"
        for option, values in what.items()
    )


def _dims(value: tuple[Any, ...]) -> str:
    return str(value[0]) if value[0] == value[1] else f"{value[0]}:{value[1]}"


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
