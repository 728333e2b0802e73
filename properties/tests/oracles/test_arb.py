"""The interval oracle encloses what mpmath finds, is sharp to a float64 rounding, and refuses what
it cannot answer.
"""

from __future__ import annotations

import math
from dataclasses import replace

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from verify.bounds.constants import UNIT
from verify.errors import VerifyError
from verify.generation.small import small_cases
from verify.oracles import arb, float64, mpmath_oracle
from verify.reference.reference import oracle_limit
from verify.spec.case import Case, Inputs
from verify.spec.masks import ways
from verify.spec.problem import Problem

flint = pytest.importorskip("flint", reason="the interval oracle needs python-flint")

BITS, SMALLEST = (16, 64, 256), math.ulp(0.0)
SMALL = Case.parse("b1.h1.q2.k3.d4.fp32.full/normal#1")


def sharp(value: Tensor, limit: Tensor) -> Tensor:
    """An ulp, and what 256 bits leave of a float64 evaluation's error bound: no radius proves that
    a sum cancels to zero.
    """
    return 2 * UNIT["fp64"] * value.abs() + SMALLEST + limit * (2.0 ** -BITS[-1] / UNIT["fp64"])


@pytest.mark.parametrize("way", ways())
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_encloses_mpmath(way: str, data: st.DataObject) -> None:
    """At any precision. mpmath's 100 digits may themselves be off, by far less than 50 digits are
    from them.
    """
    case, bits = data.draw(small_cases(way)), data.draw(st.sampled_from(BITS))
    exact, uncertainty = arb.exact(case.problem, case.inputs(), bits=bits)
    few, many = (
        mpmath_oracle.exact(case.problem, case.inputs(), digits=digits) for digits in (50, 100)
    )
    assert uncertainty.keys() == few.keys()
    for name, bound in uncertainty.items():
        values, bounds = getattr(exact, name).flatten().tolist(), bound.flatten().tolist()
        assert getattr(exact, name).shape == bound.shape == few[name].shape
        with mpmath.workdps(1000):  # nothing is rounded
            for x, u, a, b in zip(
                values, bounds, few[name].ravel(), many[name].ravel(), strict=True
            ):
                assert math.isinf(u) or b == x or abs(b - x) <= u + abs(a - b), (
                    f"{name} of {case}, {bits} bits: {b}, {x}, {u}"
                )


@pytest.mark.parametrize("way", ways())
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_is_sharp(way: str, data: st.DataObject) -> None:
    case = data.draw(small_cases(way))
    exact, uncertainty = arb.exact(case.problem, case.inputs())
    for name, limit in oracle_limit(case.problem, case.inputs()).items():
        value, u = getattr(exact, name), uncertainty[name]
        assert bool(torch.where(value.isinf(), u == 0, u <= sharp(value, limit)).all()), (
            f"{name} of {case}: {u.max():.1e}"
        )


def test_judges_the_float64_oracle_where_mpmath_is_slow() -> None:
    case = Case.parse(
        "b1.h2:1.q64.k64.d64.fp32.causal_lower_right.bias=qk.softcap=3.0.grads/normal#1"
    )
    (exact, uncertainty), got = (
        arb.exact(case.problem, case.inputs()),
        float64.exact(case.problem, case.inputs()),
    )
    for name, limit in oracle_limit(case.problem, case.inputs()).items():
        assert bool(
            ((getattr(got, name) - getattr(exact, name)).abs() <= limit + uncertainty[name]).all()
        ), name


@pytest.mark.parametrize(
    ("v", "out", "off"),
    [((1.0, 2.0**-60), 0.5, 2.0**-61), ((SMALLEST, 0.0), 0.0, SMALLEST), ((3.0, -1.0), 1.0, 0.0)],
)
def test_the_mean_of_two_on_paper(v: tuple[float, float], out: float, off: float) -> None:
    """Half the smallest subnormal is bounded by a whole one."""
    nothing = torch.zeros(1, 1, 2, 1, dtype=torch.float64)
    inputs = Inputs(
        nothing[:, :, :1],
        nothing,
        torch.tensor(v, dtype=torch.float64).view(1, 1, 2, 1),
        nothing[:, :, :1],
    )
    exact, uncertainty = arb.exact(Problem(len_k=2, dtype="fp64"), inputs)
    assert (exact.out.item(), uncertainty["out"].item()) == (out, off)


def test_beyond_float64_the_uncertainty_is_infinite() -> None:
    with flint.ctx.workprec(99):
        exact, uncertainty = arb.exact(
            SMALL.problem, SMALL.inputs().exact().map(lambda t: t * 1e200)
        )
        assert flint.ctx.prec == 99  # the caller's
    assert bool((exact.lse.isinf() & uncertainty["lse"].isinf()).all())
    assert bool((uncertainty["out"] <= 2 * UNIT["fp64"] * exact.out.abs()).all())


def test_refuses_what_it_cannot_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = SMALL.inputs()
    with pytest.raises(VerifyError, match="arb takes up to"):
        arb.exact(SMALL.problem.but(len_q=4096, len_k=4096), inputs)
    with pytest.raises(VerifyError, match="k: holds NaN or Inf"):
        arb.exact(SMALL.problem, replace(inputs, k=inputs.k / 0))
    with pytest.raises(VerifyError, match="bits=1: at least 2"):
        arb.exact(SMALL.problem, inputs, bits=1)
    monkeypatch.setattr(arb, "flint", None)
    with pytest.raises(VerifyError, match="pip install"):
        arb.exact(SMALL.problem, inputs)
