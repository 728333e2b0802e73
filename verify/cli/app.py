"""What every command shares: the application, the console, options made from RunConfig."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from verify.reports.pages import WIDTH

STARTED = time.monotonic()
"""When this process began, but for what Python itself takes."""
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Decide whether an attention kernel is right.",
)
console = Console(highlight=False)
if console.width < WIDTH:  # a narrow terminal or a pipe: long lines wrap there, cells are not cut
    console = Console(highlight=False, width=WIDTH)

Target = Annotated[
    str, typer.Argument(help="a kernel's name, path/to/file.py or path/to/file.py::name")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is a GPU")]
Kernels = Annotated[
    list[str] | None, typer.Option("--kernel", help="only this kernel (name or file); repeatable")
]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command; its docstring is its help, as one paragraph."""
    text = " ".join(inspect.cleandoc(function.__doc__ or "").split())
    return app.command(help=text)(function)


def plain(text: str) -> None:
    """Print a line as it is: no markup, no wrapping."""
    console.print(text, markup=False, soft_wrap=True)


def with_run_options(function: Callable[..., None]) -> Callable[..., None]:
    """A command (*arguments, given) as one that takes an option for each field of RunConfig that
    has one here; `given` maps fields to values, None where an option was not given.
    """
    from verify.engine.config import options

    mine = [option for option in options() if option.names["cli"]]
    own = [p for p in inspect.signature(function).parameters.values() if p.name != "given"]

    @functools.wraps(function)
    def with_options(**values: Any) -> None:
        given = {option.field: values.pop(option.field) for option in mine}
        function(**values, given={name: value for name, value in given.items() if value})

    keyword = inspect.Parameter.KEYWORD_ONLY
    made = [inspect.Parameter(o.field, keyword, default=None, annotation=_hint(o)) for o in mine]
    signature = inspect.Signature([p.replace(kind=keyword) for p in own] + made)
    with_options.__signature__ = signature  # type: ignore[attr-defined]
    hints = inspect.get_annotations(function, eval_str=True)
    with_options.__annotations__ = {p.name: hints[p.name] for p in own}
    with_options.__annotations__ |= {p.name: p.annotation for p in made}
    return with_options


def _hint(option: Any) -> Any:
    name = option.names["cli"]
    if option.kind is bool:
        return Annotated[bool | None, typer.Option(name, help=option.text)]
    kinds: dict[type, Any] = {int: int, float: float, Path: Path}
    kind = kinds.get(option.kind, str)
    described = typer.Option(name, help=option.text, metavar=option.metavar)
    return Annotated[list[str] | None if option.many else kind | None, described]
