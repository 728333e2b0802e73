"""Options: what a kernel takes, value by value, and why not the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verify.sandbox.domain import HEADS, Change, relation
from verify.spec.problem import Problem


@dataclass(frozen=True)
class Options:
    """What a kernel takes; and why not, for the rest."""

    taken: dict[str, tuple[Any, ...]]
    """Values of each option; of dims (dim_qk, dim_v), of heads (heads_q, heads_kv), of lengths
    (len_q, len_k)."""
    refused: dict[str, dict[str, str]]
    """For each option: value -> why not."""
    layouts: dict[str, tuple[str, ...]]
    """By tensor: those that it takes without an exception."""
    returns_lse: bool = False
    slow: bool = False
    """A call takes long, as under Triton's interpreter: what was asked is little, and cases are
    small."""
    crawls: bool = False
    """A call takes seconds, as where each shape is compiled: it was asked nothing by being called.
    """
    anchors: tuple[Problem, ...] = ()
    """Accepted problems, one for each value taken; the first is the plainest."""
    raised: dict[str, dict[Any, str]] = field(default_factory=dict)
    """For each option what the kernel raises on, though it does not declare it."""
    multiples: tuple[int, int] = (1, 1)
    """What len_q and len_k must be multiples of, by the same."""
    ones: tuple[bool, bool] = (True, True)
    """Whether len_q and len_k may be 1 all the same."""

    def refusal(self, *, lse: bool = False) -> str | None:
        """Why the kernel takes no problem at all here, or returns no LSE; None where it does."""
        if not self.anchors:
            return "; ".join(self.refused["problem"].values())
        return "returns no LSE" if lse and not self.returns_lse else None

    def raises(self, problem: Problem) -> str | None:
        """Why the kernel was found not to take a problem, where it declares nothing about it."""
        for option, reasons in self.raised.items():
            if reason := reasons.get(value_in(option, problem)):
                return reason
        alike = [pair for pair in HEADS if _kind(*pair) == _kind(problem.heads_q, problem.heads_kv)]
        others = [self.raised.get("heads", {}).get(pair) for pair in alike]
        if alike and all(others):  # also of heads that it was not asked about
            return others[0]
        lengths = (problem.len_q, problem.len_k)
        for name, n, multiple, one in zip(("len_q", "len_k"), lengths, self.multiples, self.ones):
            if n % multiple and not (n == 1 and one):
                return f"{name}={n}: raises unless it is a multiple of {multiple}"
        return None


def _kind(heads_q: int, heads_kv: int) -> tuple[bool, bool]:
    return heads_q > heads_kv, heads_kv > 1


def value_of(change: Change) -> Any:
    """The new values of a change: one, or a tuple."""
    values = tuple(change.values())
    return values if len(values) > 1 else values[0]


def value_in(option: str, problem: Problem) -> Any:
    """Where a problem stands in an option, as `raised` has it."""
    pairs = {
        "dims": lambda p: (p.dim_qk, p.dim_v),
        "heads": lambda p: (p.heads_q, p.heads_kv),
        "lengths": _lengths,
        "mask": lambda p: p.mask.way,
    }
    return pairs[option](problem) if option in pairs else getattr(problem, option)


def _lengths(problem: Problem) -> str:
    """How the lengths stand to each other; none, and one query for one key, are classes of their
    own.
    """
    q, k = problem.len_q, problem.len_k
    if not q or not k:
        return "no keys" if q else "no queries" if k else "nothing"
    return "one query, one key" if q == k == 1 else relation(problem)


def label(value: Any) -> str:
    """A value as it is shown."""
    return f"{value[0]}:{value[1]}" if isinstance(value, tuple) else str(value)
