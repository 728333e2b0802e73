"""Choices: one drawn number, of which all that is chosen for a case is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from hypothesis import strategies as st

BYTES = 48
T = TypeVar("T")


class Choices:
    """Independent choices, each as likely as the others, out of one number; 0 chooses the first of
    everything.

    Hypothesis draws integers near the ends of their range, and small ones, more often, and takes
    longer for thirty of them than for one number that holds all.
    """

    def __init__(self, number: int) -> None:
        self._left = number

    def below(self, n: int) -> int:
        """0 to n - 1."""
        self._left, chosen = divmod(self._left, n)
        return chosen

    def of(self, values: Sequence[T]) -> T:
        """One of the values."""
        return values[self.below(len(values))]

    def often(self, times: int, of: int) -> bool:
        """True so many times of so many."""
        return self.below(of) >= of - times


def _choices(drawn: bytes) -> Choices:
    return Choices(int.from_bytes(drawn, "big"))


CHOICES: st.SearchStrategy[Choices] = st.binary(min_size=BYTES, max_size=BYTES).map(_choices)
"""Made once, since making a strategy takes longer than drawing from it."""
