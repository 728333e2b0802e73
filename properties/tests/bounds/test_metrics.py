"""Measurements are never NaN: what is not finite is wrong, not incomparable."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verify.bounds.metrics import distance, measure, worst

ANY = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(ANY, ANY), min_size=1, max_size=8))
def test_no_figure_is_ever_nan(pairs: list[tuple[float, float]]) -> None:
    x, ref = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    assert not distance(x, ref).isnan().any()
    assert not any(math.isnan(figure) for figure in vars(measure(x, ref)).values())


@pytest.mark.parametrize(
    ("x", "ref", "far"),
    [
        ("nan", "1", True),
        ("1", "nan", True),
        ("inf", "-inf", True),
        ("nan", "nan", False),
        ("inf", "inf", False),
    ],
)
def test_the_pattern_of_finiteness_is_compared_first(x: str, ref: str, far: bool) -> None:  # noqa: FBT001 (parametrised)
    error = distance(torch.tensor([float(x)]), torch.tensor([float(ref)]))
    assert error.item() == (math.inf if far else 0.0)


def test_alpha_shows_a_global_factor() -> None:
    ref = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert measure(2 * ref, ref).alpha == 2.0
    assert measure(ref, ref).rmse == 0.0


def test_worst_is_the_element_that_exceeds_its_limit_most() -> None:
    error, limit = (
        torch.tensor([[3.0, 1.0], [2.0, torch.inf]]),
        torch.tensor([[2.0, 1.0], [0.5, torch.inf]]),
    )
    assert worst(error, limit) == (1, 0)
    assert worst(limit, limit) is None


def test_nothing_to_measure_is_no_error() -> None:
    assert measure(torch.empty(0, 3), torch.empty(0, 3)).rmse == 0.0
