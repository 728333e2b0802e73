"""What a family of inputs is, and the list of them all; the families are in inputs.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from verify.spec.problem import Problem

Triple = tuple[np.ndarray, np.ndarray, np.ndarray]
Stress = Literal["scales", "delta", "range"]
"""What some inputs are hard on: scales that are shared or found too early, as kernels that quantise
have them; dP and delta, which are large and nearly cancel, in gradients; the range of a format, of
which they come near an end, and its digits, where they cancel.
"""


@dataclass(frozen=True)
class Distribution:
    """A family of inputs, with everything that others need of it."""

    values: Callable[..., Triple]
    """(rng, problem, *params) -> (q, k, v) in float64"""
    drawn: Mapping[str, int]
    """How many times, among all, each of these texts is in the list that cases are drawn from."""
    stresses: Mapping[Stress, int]
    """So many times more for kernels that have what it is hard on."""
    whole: bool
    """Values are whole numbers; bias and cotangent are then, too."""
    one_sign: bool
    """V has one sign; the cotangent then has one, too, so that delta = rowsum(dO * O) is large."""
    says: Callable[[Problem], bool]
    """Whether it is what it says on a problem; on others it is not drawn."""


DISTRIBUTIONS: dict[str, Distribution] = {}


def distribution(
    drawn: Mapping[str, int],
    *,
    stresses: Mapping[Stress, int] | None = None,
    whole: bool = False,
    one_sign: bool = False,
    says: Callable[[Problem], bool] = lambda problem: True,
) -> Callable[[Callable[..., Triple]], Callable[..., Triple]]:
    """Register a family of inputs by its function's name. Arguments: Distribution's fields."""

    def register(values: Callable[..., Triple]) -> Callable[..., Triple]:
        family = Distribution(values, drawn, stresses or {}, whole, one_sign, says)
        DISTRIBUTIONS[values.__name__] = family
        return values

    return register


def drawn_from(*hard_on: Stress, problem: Problem | None = None) -> list[str]:
    """The texts that a case's distribution is drawn from, each as often as it should come up.

    A failing case shrinks to the first. hard_on: what the kernel and the property have of it;
    problem: the case's, where only those count that have something to say of it.
    """
    return [
        text
        for family in DISTRIBUTIONS.values()
        if problem is None or family.says(problem)
        for text, times in family.drawn.items()
        for _ in range(times + sum(family.stresses.get(stress, 0) for stress in hard_on))
    ]
