"""Events: what happens in a run, as frozen values that turn into one line of JSON and back.

The engine emits them; the command line, the pytest plugin, journals and reports consume them.
Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """What became of a case. The values are the words that stand in records."""

    PASSED = "held"
    INCONCLUSIVE = "uninformative"
    """The property holds, but every one of WRONG_OUTPUTS would have passed, too."""
    KNOWN_ISSUE = "known"
    """The property is broken in a way that the kernel's author declared."""
    FAILED = "failed"
    """The property is broken; the case is about to be shrunk."""
    UNSUPPORTED = "unsupported"
    """The kernel declares that it does not take it, or was found not to before the first case."""
    REFUSED = "refused"
    """The kernel raised: of its own accord, or anything where it declares no `supports`."""


WRONG_OUTPUTS = ("zeros", "mean(V)", "scale*1.05")
"""Outputs of wrong kernels that a case against the oracle must reject to say anything: all zeros,
the mean of the visible V, a softmax scale 5 % off.
"""
TESTED = frozenset(Outcome) - {Outcome.UNSUPPORTED, Outcome.REFUSED}
"""The outcomes of cases in which the kernel was called and judged."""


class Ended(StrEnum):
    """Why the search for a case that breaks a property ended."""

    FINDING = "finding"
    CASES = "cases"
    """As many cases were judged as were asked for."""
    EXHAUSTED = "exhausted"
    """Hardly any drawn case can be judged: fewer were than were asked for."""
    TIME = "time"
    NO_TIME = "no time"
    """The time was up before a single case was judged."""
    UNSUPPORTED = "unsupported"
    """The property cannot be judged on this kernel at all, or no drawn case could."""
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """The first event. `config` is what `verify resume` needs to go on with the run."""

    config: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    """Versions and settings that can change a number."""


@dataclass(frozen=True, kw_only=True)
class KernelInspected:
    """What one kernel turned out to be, before its first case."""

    kernel: str
    target: str
    """What finds it alone: its name, or path/to/file.py::name."""
    origin: str = ""
    vendor: str = ""
    """Whose it is, where what breaks is to be reported as theirs."""
    conventions: list[tuple[str, str]] = field(default_factory=list)
    """(convention, what was found)"""
    refusal: str = ""
    """Why it can do nothing here."""
    issues: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Known issues by their summaries: `shows_in`, `tracker`."""


@dataclass(frozen=True, kw_only=True)
class PairsTaken:
    """Which pairs of options a kernel takes: reports count those that its cases had."""

    kernel: str
    rows: list[dict[str, str]] = field(default_factory=list)
    """Rows of covering arrays, of option -> level, that hold every pair."""


@dataclass(frozen=True, kw_only=True)
class CaseStarted:
    """A case is about to be judged. A process that ended within it leaves this as its last line."""

    kernel: str
    property: str
    case: str
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class CaseFinished:
    """One case of one property, judged or found unsupported."""

    kernel: str
    property: str
    case: str
    outcome: Outcome
    reason: str = ""
    """The finding's sentence, or why the case is unsupported."""
    known: str = ""
    """The known issue that this case could show."""
    blind_to: list[str] = field(default_factory=list)
    """Those of WRONG_OUTPUTS that would have passed."""
    bitwise: bool | None = None
    """Whether results that must agree agreed to the last bit."""
    measured: dict[str, float] = field(default_factory=dict)
    """Errors over what was expected and proved."""
    seconds: float | None = None
    """What judging took."""
    seed: int | None = None
    """That it was drawn with; None where it comes from the corpus."""


@dataclass(frozen=True, kw_only=True)
class FindingShrunk:
    """The smallest case that was found to break a property, and the largest violation seen."""

    kernel: str
    property: str
    case: str
    reason: str
    measured: dict[str, float] = field(default_factory=dict)
    seed: int | None = None
    worst: str = ""
    """The case with the largest violation that was seen, by error / allowed."""
    worst_reason: str = ""
    cut: bool = False
    """The run ended before the case was as small as it gets."""


@dataclass(frozen=True, kw_only=True)
class FindingExplained:
    """Why a finding's case fails, and how to see it again."""

    kernel: str
    property: str
    case: str
    why: list[str] = field(default_factory=list)
    script: str = ""
    """The path of a script that shows it, or why there is none."""
    replay: str = ""
    """The command that shows it again."""
    call: str = ""
    """The command that shows the wrong call alone, where it is not that of the case."""
    same_as: str = ""
    """The property whose finding has the same cause, where that was found before."""


@dataclass(frozen=True, kw_only=True)
class DeclaredOtherwise:
    """A kernel is right, but not as it declares: from here on it is judged as it is."""

    kernel: str
    declare: str
    """What to declare: the arguments of `@kernel`."""
    property: str = ""
    """The property that it broke as declared; empty for conventions."""
    case: str = ""
    harmless: bool = False
    """It declared nothing, and differs in what anybody may choose."""


@dataclass(frozen=True, kw_only=True)
class PropertyFinished:
    """The search for a case that breaks one property of one kernel has ended."""

    kernel: str
    property: str
    ended: Ended
    reason: str = ""
    judged: int = 0
    seconds: float = 0.0
    """From the first to the last of its cases, drawing and shrinking included."""
    seed: int | None = None
    """The run's."""
    style: bool = False
    """What the property finds is no wrong result."""


@dataclass(frozen=True, kw_only=True)
class RunFinished:
    """The last event of a run that was not killed. An interrupted one can be resumed."""

    interrupted: bool = False
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CaseUnfinished:
    """Read from a journal, never emitted: the process ended while it judged this case."""

    kernel: str
    property: str
    case: str
    seed: int | None = None


Event = (
    RunStarted
    | KernelInspected
    | PairsTaken
    | CaseStarted
    | CaseFinished
    | FindingShrunk
    | FindingExplained
    | DeclaredOtherwise
    | PropertyFinished
    | RunFinished
    | CaseUnfinished
)
KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in Event.__args__}
ENUMS: dict[str, type[StrEnum]] = {"outcome": Outcome, "ended": Ended}
EMPTY: tuple[Any, ...] = ("", [], {}, None)
"""Values that records leave out."""
STORED = {"outcome": "verdict"}
"""Fields that have another name in records."""
FIELDS = {name: frozenset(f.name for f in fields(kind)) for name, kind in KINDS.items()}


def to_json(event: Event) -> dict[str, Any]:
    """The event as a mapping of plain values; fields that are empty are left out."""
    filled = {name: value for name, value in vars(event).items() if value not in EMPTY}
    return {"event": type(event).__name__} | {STORED.get(n, n): v for n, v in filled.items()}


def from_json(line: Mapping[str, Any]) -> Event | None:
    """Inverse of to_json; None for a line that is of another version, or cut short."""
    name = line.get("event", "")
    if name not in KINDS:
        return None
    named = {STORED.get(field, field): field for field in FIELDS[name]}
    values = {named[key]: value for key, value in line.items() if key in named}
    try:
        for field_name, kind in ENUMS.items():
            if field_name in values:
                values[field_name] = kind(values[field_name])
        return KINDS[name](**values)
    except (TypeError, ValueError):
        return None
