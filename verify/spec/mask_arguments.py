"""With which arguments masks are drawn: those that reach beyond a tile, end at a length, or hide
nothing; a strategy for each, cached, since making one takes longer than drawing from it.
"""

from __future__ import annotations

from functools import cache

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

NEAR = (0, 1, 2, 7, 17, 63, 64, 65)
FAR = (127, 128, 129, 130, 200, 255, 256, 511, 1000)
"""How far a drawn window reaches: within a usual tile, beyond it; not over all keys, which hides
nothing, but for once.
"""


def _sides(len_k: int) -> list[int]:
    return [*(n for n in NEAR + FAR if n < len_k - 1), max(len_k - 1, 0)]


@cache
def sliding(len_k: int) -> SearchStrategy[tuple[int, ...]]:
    """(left, 0), each distance as often as the others."""
    return st.sampled_from([(left, 0) for left in (*_sides(len_k), -1)])


@cache
def windows(len_k: int) -> SearchStrategy[tuple[int, ...]]:
    """(left, right), two thirds of them without a bound on one side."""
    sides, without = st.sampled_from(_sides(len_k)), st.just(-1)
    return st.tuples(sides, sides) | st.tuples(without, sides) | st.tuples(sides, without)


@cache
def lengths(batch: int, len_k: int) -> SearchStrategy[tuple[int, ...]]:
    """A number of keys for each entry: any; hardly anything beside all, in any order; both."""
    some, ends = st.integers(0, len_k), st.sampled_from(sorted({0, min(1, len_k), len_k}))
    beside = st.tuples(st.permutations(range(batch)), st.tuples(*[ends] * (batch - 1))).map(
        lambda drawn: tuple((*drawn[1], len_k)[n] for n in drawn[0])
    )
    return st.one_of(st.tuples(*[some] * batch), beside, st.tuples(*[ends | some] * batch))


@cache
def sequences(longest: int) -> SearchStrategy[tuple[int, ...]]:
    """One to four lengths of packed sequences."""
    return st.lists(st.integers(1, max(1, longest)), min_size=1, max_size=4).map(tuple)


@cache
def shares(*per_cent: int) -> SearchStrategy[tuple[int, ...]]:
    """(one of these per cents visible, seed)"""
    return st.tuples(st.sampled_from(per_cent), st.integers(0, 3))
