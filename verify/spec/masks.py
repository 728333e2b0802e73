"""Every mask: one rule of integers, one picture, one citation. A mask is added here and nowhere
else.

A rule has the signature ``rule(q, k, len_q, len_k, x, y) -> visible``: query position, key
position, the two lengths and the mask's own two integers. It uses only comparisons, ``& | + - * %
//``, so that the same function is evaluated on Python ints (mpmath oracle, pictures), broadcast
over tensors (float64 oracle, boolean masks) and compiled by Triton. A rule that differs from query
head to query head takes the head's number as a seventh argument. Composition with ``&`` is the
conjunction. In pictures ``#`` is visible, rows are queries, columns are keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from verify.errors import VerifyError
from verify.spec.mask_arguments import lengths, sequences, shares, sliding, windows

Rule = Callable[..., Any]
Anchor = Literal["keys", "first", "last"]
_PRIME = 2**31 - 1


def full(q, k, len_q, len_k, x, y):
    """Every query sees every key (Vaswani et al. 2017, section 3.2.1).

    full at 2x3
        # # #
        # # #
    """
    return (q >= 0) & (k >= 0)


def causal_upper_left(q, k, len_q, len_k, x, y):
    """k <= q: the diagonal starts in the upper-left corner
    (torch.nn.attention.bias.causal_upper_left, `is_causal`).

    causal_upper_left at 3x5
        # . . . .
        # # . . .
        # # # . .
    causal_upper_left at 5x3
        # . .
        # # .
        # # #
        # # #
        # # #
    """
    return k <= q


def causal_lower_right(q, k, len_q, len_k, x, y):
    """k <= q + len_k - len_q: the diagonal ends in the lower-right corner (flash-attn since 2.1;
    decoding).

    causal_lower_right at 3x5
        # # # . .
        # # # # .
        # # # # #
    causal_lower_right at 5x3
        . . .
        . . .
        # . .
        # # .
        # # #
    """
    return k <= q + len_k - len_q


def window(q, k, len_q, len_k, x, y):
    """i - x <= k <= i + y with i = q + len_k - len_q: both ends inclusive, lower-right aligned, -1
    = unbounded.

    The convention of flash-attn since 2.1 (`window_size=(left, right)`); Beltagy et al. 2020
    (Longformer).

    window(1,0) at 4x4
        # . . .
        # # . .
        . # # .
        . . # #
    window(1,1) at 3x5
        . # # # .
        . . # # #
        . . . # #
    window(-1,1) at 3x3
        # # .
        # # #
        # # #
    """
    return ((x < 0) | (k >= q + len_k - len_q - x)) & ((y < 0) | (k <= q + len_k - len_q + y))


def prefix_lm(q, k, len_q, len_k, x, y):
    """The first x keys are visible to all, the rest is causal, upper-left (Raffel et al. 2020,
    figure 4; FlexAttention).

    prefix_lm(2) at 4x4
        # # . .
        # # . .
        # # # .
        # # # #
    """
    return (k < x) | (k <= q)


def padding(q, k, len_q, len_k, x, y):
    """Batch entry b sees its first lengths[b] keys; the rest is padding. It hides keys and moves no
    diagonal.

    padding(2) at 3x4
        # # . .
        # # . .
        # # . .
    """
    return k < x


def blocks(q, k, len_q, len_k, x, y):
    """Block-diagonal: packed sequences of these lengths, what is left over is one more
    (flash-attn's varlen interface).

    The rule of one boundary x: both before it, or both not before it. n lengths give n boundaries,
    all of which must hold.

    blocks(1,2) at 4x5
        # . . . .
        . # # . .
        . # # . .
        . . . # #
    """
    return (q >= x) == (k >= x)


def dense(q, k, len_q, len_k, x, y):
    """An arbitrary boolean matrix: each entry is visible with a probability of x per cent, drawn by
    hashing (q, k, seed y).

    Handed to a kernel as a boolean tensor. A hash and not a stored matrix, so that the oracle needs
    no O(len_q len_k) memory.

    dense(50,1) at 3x6
        . # . # . #
        # . . . # .
        # # # # # #
    """
    mixed = (q * 48271 + k * 69621 + y * 16807 + 12345) % _PRIME
    return (mixed * mixed % _PRIME) // 7 % 100 < x


def per_head(q, k, len_q, len_k, x, y, head):
    """Every query head sees keys of its own, each with a probability of x per cent, whatever the
    query: drawn by hashing (head, k, seed y). The picture is head 0's.

    What biases of one row for each head do (T5's, broadcast; token selection by head). Handed to a
    kernel as a boolean tensor.

    per_head(50,1) at 2x8
        . # # . # . . #
        . # # . # . . #
    """
    mixed = (head * 742938285 + k * 950706376 + y * 16807 + 12345) % _PRIME
    return (mixed * mixed % _PRIME) // 7 % 100 < x


@dataclass(frozen=True)
class Drawn:
    """A way in which a kind of mask is drawn; a kind that kernels have two paths for has two.

    `example` is the mask that kernels are asked about, and that pictures show.
    """

    name: str
    example: str
    arguments: Callable[[int, int, int], SearchStrategy[tuple[int, ...]]]
    """(batch, len_q, len_k) -> a strategy of legal arguments"""
    matches: Callable[[Sequence[int]], bool] = lambda arguments: True
    """Whether arguments of this kind are of this way; the first that matches counts."""
    common: bool = False
    """Models use it most: rows of covering arrays with it come twice."""


@dataclass(frozen=True)
class Kind:
    """A kind of mask, with everything that others need of it.

    anchor: what the rule is aligned with: `keys` (it does not look at the query), `first` (the
    first query) or `last` (the last query sees the last key: q + len_k - len_q).
    """

    rule: Rule
    arguments: str
    """What legal arguments are, as errors show it."""
    legal: Callable[[Sequence[int]], bool]
    bind: Callable[[Sequence[int], int], list[Any]]
    """(arguments, batch) -> one entry per conjunct, each holding (x, y) for every batch entry"""
    anchor: Anchor
    drawn: tuple[Drawn, ...]
    per_batch: bool = False
    """One argument for each batch entry."""
    per_head: bool = False
    """Its rule takes the query head's number, too."""
    matrix: bool = False
    """It stands for any boolean matrix, and is handed over as one."""
    mirror: str = ""
    """The kind that it is taken for by mistake."""

    def way(self, arguments: Sequence[int]) -> Drawn:
        """The way of drawing that these arguments are of."""
        return next(drawn for drawn in self.drawn if drawn.matches(arguments))


def _boundaries(lengths: Sequence[int], batch: int) -> list[tuple[tuple[int, int], ...]]:
    return [((sum(lengths[: n + 1]), 0),) * batch for n in range(len(lengths))]


def _none(rule: Rule, anchor: Anchor, *, common: bool = False, mirror: str = "") -> Kind:
    """A kind that takes no arguments."""
    name = rule.__name__
    drawn = Drawn(name, name, lambda batch, len_q, len_k: st.just(()), common=common)
    return Kind(
        rule,
        "no arguments",
        lambda a: not a,
        lambda a, batch: [((0, 0),) * batch],
        anchor,
        (drawn,),
        mirror=mirror,
    )


def _hashed(
    rule: Rule, anchor: Anchor, example: str, per_cent: tuple[int, ...], *, per_head: bool = False
) -> Kind:
    """A kind that stands for any boolean matrix, of which a per cent drawn from these is seen."""
    drawn = Drawn(rule.__name__, example, lambda batch, len_q, len_k: shares(*per_cent))
    return Kind(
        rule,
        "(per cent visible, seed)",
        lambda a: len(a) == 2 and min(a) >= 0 and a[0] <= 100,
        lambda a, batch: [(tuple(a),) * batch],
        anchor,
        (drawn,),
        per_head=per_head,
        matrix=True,
    )


KINDS: dict[str, Kind] = {
    "full": _none(full, "keys"),
    "causal_upper_left": _none(causal_upper_left, "first", mirror="causal_lower_right"),
    "causal_lower_right": _none(
        causal_lower_right, "last", common=True, mirror="causal_upper_left"
    ),
    "padding": Kind(
        padding,
        "(one key length per batch entry)",
        lambda a: min(a, default=-1) >= 0,
        lambda a, batch: [tuple((n, 0) for n in a)],
        "keys",
        (Drawn("padding", "padding(5)", lambda b, q, k: lengths(b, k), common=True),),
        per_batch=True,
    ),
    "window": Kind(
        window,
        "(left, right), each >= -1",
        lambda a: len(a) == 2 and min(a) >= -1,
        lambda a, batch: [(tuple(a),) * batch],
        "last",
        (
            # one that ends at the diagonal is what most models have, and kernels have a path for it
            Drawn("sliding", "window(3,0)", lambda b, q, k: sliding(k), lambda a: a[1] == 0),
            Drawn("window", "window(3,1)", lambda b, q, k: windows(k)),
        ),
    ),
    "prefix_lm": Kind(
        prefix_lm,
        "(prefix length)",
        lambda a: len(a) == 1 and a[0] >= 0,
        lambda a, batch: [((a[0], 0),) * batch],
        "first",
        (Drawn("prefix_lm", "prefix_lm(3)", lambda b, q, k: st.tuples(st.integers(0, k))),),
    ),
    "blocks": Kind(
        blocks,
        "(sequence lengths, each >= 1)",
        lambda a: min(a, default=0) >= 1,
        _boundaries,
        "first",
        (Drawn("blocks", "blocks(2,3)", lambda b, q, k: sequences(min(q, k))),),
    ),
    "dense": _hashed(dense, "first", "dense(60,1)", (50, 90, 10, 1)),
    "per_head": _hashed(per_head, "keys", "per_head(60,1)", (50, 75, 90, 25), per_head=True),
}
"""Every kind, the simplest first: masks shrink towards the beginning of this table."""


def ways() -> dict[str, tuple[str, Drawn]]:
    """Every way in which a mask is drawn, by its name, with the name of its kind."""
    return {drawn.name: (name, drawn) for name, kind in KINDS.items() for drawn in kind.drawn}


@dataclass(frozen=True)
class Term:
    """One conjunct of a mask: a rule, its integers, (x, y) per batch entry, and whether it takes
    the head.
    """

    rule: Rule
    integers: tuple[tuple[int, int], ...]
    per_head: bool = False


@dataclass(frozen=True)
class Mask:
    """A conjunction of named masks, e.g. ``Mask.parse("causal_lower_right&padding(5,7)")``. Prints
    as it parses.
    """

    parts: tuple[tuple[str, tuple[int, ...]], ...] = (("full", ()),)

    def __post_init__(self) -> None:
        for name, args in self.parts:
            if name not in KINDS:
                raise VerifyError(f"mask {name!r} is unknown: one of {', '.join(KINDS)}")
            if not KINDS[name].legal(args):
                raise VerifyError(f"mask {name}{args}: takes {KINDS[name].arguments}")

    @classmethod
    def parse(cls, text: str) -> Mask:
        """Inverse of str(). Raises VerifyError where the text is no mask."""
        parts = []
        for part in text.split("&"):
            found = re.fullmatch(r"(\w+)(?:\((-?\d+(?:,-?\d+)*)\))?", part)
            if not found:
                raise VerifyError(
                    f"mask {part!r} does not parse: write it like causal_lower_right or "
                    "window(64,0)"
                )
            parts.append((found[1], tuple(int(a) for a in found[2].split(",")) if found[2] else ()))
        return cls(tuple(parts))

    def __str__(self) -> str:
        return "&".join(
            f"{name}({','.join(map(str, args))})" if args else name for name, args in self.parts
        )

    def __and__(self, other: Mask) -> Mask:
        kept = tuple(p for p in self.parts + other.parts if p[0] != "full")
        return Mask(tuple(dict.fromkeys(kept)) or Mask().parts)

    @cached_property
    def names(self) -> frozenset[str]:
        """The kinds of mask in the conjunction."""
        return frozenset(name for name, _ in self.parts)

    @property
    def anchors(self) -> frozenset[Anchor]:
        """What the parts are aligned with (Kind.anchor)."""
        return frozenset(KINDS[name].anchor for name, _ in self.parts)

    @property
    def matrix(self) -> bool:
        """Whether a part stands for any boolean matrix (Kind.matrix)."""
        return any(KINDS[name].matrix for name, _ in self.parts)

    @property
    def per_batch(self) -> bool:
        """Whether the arguments speak of single batch entries."""
        return bool(self.batch_sizes)

    @property
    def per_head(self) -> bool:
        """Whether it differs from query head to query head."""
        return any(KINDS[name].per_head for name, _ in self.parts)

    @property
    def per_row(self) -> bool:
        """Whether it looks at the query's position."""
        return self.anchors != {"keys"}

    @cached_property
    def batch_sizes(self) -> set[int]:
        """The batch sizes that the arguments speak of: one for each part with one per entry."""
        return {len(args) for name, args in self.parts if KINDS[name].per_batch}

    def of_entries(self, choose: Callable[[tuple[int, ...]], Sequence[int]]) -> Mask:
        """The mask of a problem whose batch entries are chosen from this one's.

        `choose` makes the new arguments from those that a part has for each entry: a slice of
        them, another order, one of them for all.
        """
        return Mask(
            tuple((n, tuple(choose(a)) if KINDS[n].per_batch else a) for n, a in self.parts)
        )

    def reordered(self, order: Sequence[int]) -> Mask:
        """The mask of the same problem with its batch entries in this order."""
        return self.of_entries(lambda arguments: [arguments[i] for i in order])

    @property
    def mirrored(self) -> Mask:
        """The mask with each part replaced by the kind that it is taken for by mistake."""
        return Mask(tuple((KINDS[name].mirror or name, args) for name, args in self.parts))

    @property
    def way(self) -> str:
        """The way in which it is drawn: one of `ways()`, or `two` for a conjunction."""
        (name, arguments), *others = self.parts
        return TWO if others else KINDS[name].way(arguments).name

    def terms(self, batch: int) -> list[Term]:
        """The conjuncts, in order; `full` has none."""
        kinds = [(KINDS[name], args) for name, args in self.parts if name != "full"]
        return [
            Term(kind.rule, integers, kind.per_head)
            for kind, args in kinds
            for integers in kind.bind(args, batch)
        ]

    def visible(
        self,
        q: Any,
        k: Any,
        len_q: int,
        len_k: int,
        *,
        batch: int = 1,
        head: Any = None,
        lift: Callable[[Sequence[int]], Any],
    ) -> Any:
        """Visibility over positions q and k; `lift` makes whatever broadcasts against them from one
        integer per batch entry. head: the query head's number, or numbers that broadcast; needed
        where the mask is `per_head`.
        """
        seen = full(q, k, len_q, len_k, 0, 0)
        for term in self.terms(batch):
            xs, ys = zip(*term.integers, strict=True)
            heads = (head,) if term.per_head else ()
            seen = seen & term.rule(q, k, len_q, len_k, lift(xs), lift(ys), *heads)
        return seen

    def sees(
        self,
        q: int,
        k: int,
        len_q: int,
        len_k: int,
        *,
        batch: int = 1,
        entry: int = 0,
        head: int = 0,
    ) -> bool:
        """Whether query q of a head sees key k in a batch entry: the rule on Python integers."""
        lift = lambda integers: integers[entry]  # noqa: E731
        return bool(self.visible(q, k, len_q, len_k, batch=batch, head=head, lift=lift))

    def picture(
        self, len_q: int, len_k: int, *, batch: int = 1, entry: int = 0, head: int = 0
    ) -> str:
        """Rows are queries, columns keys; # = visible."""
        rows = (
            [
                self.sees(q, k, len_q, len_k, batch=batch, entry=entry, head=head)
                for k in range(len_k)
            ]
            for q in range(len_q)
        )
        return "\n".join(" ".join("#" if seen else "." for seen in row) for row in rows)


FULL = Mask()
TWO = "two"
"""Any conjunction of two masks, as a level of the covering arrays."""


def hiding(lengths: Sequence[int]) -> Mask:
    """The mask by which batch entry b sees its first lengths[b] keys."""
    return Mask((("padding", tuple(lengths)),))
