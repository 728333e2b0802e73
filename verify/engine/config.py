"""RunConfig: what a run is asked for, declared once.

The options of `verify fuzz` and of the pytest plugin are made from its fields, and its JSON is what
`verify resume` goes on with.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from verify.environment import CALL_SECONDS
from verify.errors import VerifyError

FrontEnd = Literal["cli", "pytest"]
SHRINK_SECONDS = 20.0
CASES = {"cpu": 25, "cuda": 40}
"""Cases judged for each kernel and property in a plain `pytest` run."""
LEAST_CASES = 2
"""The same for a kernel of which few calls are affordable, however many a case takes."""
SECONDS = 60.0
"""Time of a plain `verify fuzz`."""
CORPUS = Path(".verify") / "corpus.tsv"


def _option(
    default: Any, help: str, *, cli: str = "", pytest: str = "", metavar: str | None = None
) -> Any:
    """A field that is an option: by which name in which front end, if it has one there."""
    names = {"cli": cli, "pytest": pytest}
    return field(default=default, metadata={"help": help, "metavar": metavar, "names": names})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What is run: which kernels, which properties, how long, how, and where records go.

    Raises VerifyError for a number that is out of range.
    """

    targets: tuple[str, ...] = _option(
        (),
        "a kernel's name or path/to/file.py[::name]; default: all bundled",
        pytest="--kernel",
        metavar="TARGET",
    )
    properties: tuple[str, ...] = _option(
        (),
        "only this property; may be repeated",
        cli="--property",
        pytest="--property",
        metavar="NAME",
    )
    seconds: float | None = _option(
        None, "time for all kernels and properties together", cli="--seconds", pytest="--seconds"
    )
    cases: int | None = _option(
        None, "cases to judge for each kernel and property", cli="--cases", pytest="--cases"
    )
    seed: int = _option(0, "seed of the drawn cases", cli="--seed", pytest="--draw-seed")
    device: str = _option(
        "",
        "cpu or cuda; default: cuda where there is a GPU",
        cli="--device",
        pytest="--device",
    )
    workers: int | None = _option(
        None,
        "processes that call the kernel at once; default: one for each core, on a GPU one",
        cli="--workers",
    )
    call_seconds: float = _option(
        CALL_SECONDS,
        "a call that takes longer hangs",
        cli="--call-seconds",
        pytest="--call-seconds",
    )
    shrink_seconds: float = _option(
        SHRINK_SECONDS,
        "time to shrink each finding",
        cli="--shrink-seconds",
        pytest="--shrink-seconds",
    )
    records: Path | None = _option(
        None,
        "folder where records are appended; default: .verify/runs/<time>",
        cli="--out",
        pytest="--records",
        metavar="DIR",
    )
    corpus: Path = _option(
        CORPUS, "file of cases to try first", cli="--corpus", pytest="--corpus", metavar="FILE"
    )
    in_process: bool = _option(
        False,
        "call kernels in this process (for a debugger): a crash ends the run",
        cli="--in-process",
        pytest="--in-process",
    )
    strict: bool = _option(
        False,
        "findings in other people's kernels fail the run, too",
        cli="--strict",
        pytest="--verify-strict",  # pytest has a --strict of its own
    )

    def __post_init__(self) -> None:
        for name, least in (("cases", 1), ("workers", 1), ("call_seconds", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise VerifyError(f"{name}={value:g}: at least {least}")
        if self.seconds is not None and self.seconds <= 0:
            raise VerifyError(f"seconds={self.seconds:g}: a positive number")
        if self.shrink_seconds < 0:
            raise VerifyError(f"shrink_seconds={self.shrink_seconds:g}: 0 or more")

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `from_json` turns back, wherever it runs; not where records go."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "records"}
        values["targets"] = [str(Path(t).resolve()) if ".py" in t else t for t in self.targets]
        values["properties"] = list(self.properties)
        values["corpus"] = str(self.corpus.resolve())
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunConfig:
        """Inverse of to_json; what another version wrote and this one does not know is left out."""
        return cls.of(lambda option: values.get(option.field))

    @classmethod
    def of(cls, value: Callable[[Option], Any]) -> RunConfig:
        """A configuration from the value of each option, None where it was not given."""
        given = [(option, value(option)) for option in options()]
        return cls(**{option.field: option.cast(v) for option, v in given if v is not None})

    def but(self, **changes: Any) -> RunConfig:
        """This configuration with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Option:
    """One field of RunConfig as an option of a command line."""

    field: str
    help: str
    default: Any
    kind: type
    """bool, int, float, str or Path: of one value."""
    many: bool
    """It may be repeated; its value is a tuple."""
    optional: bool
    metavar: str | None
    names: dict[FrontEnd, str]
    """Its name in each front end, --like-this; empty where it has none."""

    def cast(self, value: Any) -> Any:
        """A given value, in the field's type."""
        return tuple(map(self.kind, value)) if self.many else self.kind(value)

    @property
    def text(self) -> str:
        """The help, with the default where it says something."""
        shown = not (self.many or self.optional or self.default in ("", False))
        return f"{self.help}; default: {self.default:g}" if shown and self._number else self.help

    @property
    def _number(self) -> bool:
        return isinstance(self.default, int | float) and not isinstance(self.default, bool)


def options() -> Iterator[Option]:
    """Every field of RunConfig as an option, in order."""
    hints = get_type_hints(RunConfig)
    for f in fields(RunConfig):
        hint = hints[f.name]
        optional = isinstance(hint, types.UnionType)
        many = get_origin(hint) is tuple
        kind = get_args(hint)[0] if optional or many else hint
        meta = f.metadata
        yield Option(
            f.name, meta["help"], f.default, kind, many, optional, meta["metavar"], meta["names"]
        )
