"""Honest computations that once crossed the proved bound, or the float64 oracle's own: each must
hold now, and what says nothing must say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from verify.bounds.constants import UNIT
from verify.bounds.metrics import distance
from verify.oracles import certified, emulator, mpmath_oracle
from verify.reference.reference import Truth, about, oracle_limit, truth
from verify.spec.arithmetic import EAGER, FLASH, Arithmetic, Quantisation
from verify.spec.case import TORCH_DTYPES, Case, Inputs, visibility
from verify.spec.problem import Problem


def inputs(problem: Problem, *values: list[float] | Tensor) -> Inputs:
    """q, k, v, do of these values; do is 1 where it is not given."""
    shapes, dtype = problem.shapes, TORCH_DTYPES[problem.dtype]
    given = [torch.as_tensor(x, dtype=torch.float64).to(dtype) for x in values]
    given += [torch.ones(shapes["do"], dtype=dtype)] * (4 - len(given))
    return Inputs(
        *(t.reshape(shapes[n]) for t, n in zip(given, ("q", "k", "v", "do"), strict=True))
    )


def holds(known: Truth, arithmetic: Arithmetic, **got: Tensor) -> None:
    """No element of these tensors is farther from the exact one than it may be."""
    limits = known.allowances(arithmetic)
    for name, value in got.items():
        error = distance(value.reshape(limits[name].limit.shape), getattr(known.exact, name))
        assert bool((error <= limits[name].limit).all()), (name, error, limits[name].limit)


@pytest.fixture
def flushing() -> Iterator[None]:
    """Subnormals are flushed, as GPUs may and CPUs can."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    yield
    torch.set_flush_denormal(False)


def test_a_weight_of_nothing_whose_score_cancels() -> None:
    """exp(s - max) of the second key is 9e-27; its score is off by 124 in FP32."""
    problem = Problem(len_k=2, dim_qk=3, dim_v=3, scale=1.0)
    x = inputs(problem, [1.0] * 3, [960.0, 0, 0, 2.0**31, 900, -(2.0**31)], [1.0] * 3 + [-1.0] * 3)
    scores = torch.tensor([960.0, 1024.0])  # 2^31 + 900 is 2^31 + 1024 in FP32
    out = torch.softmax(scores, 0) @ x.v[0, 0]
    holds(about(problem, x), FLASH, out=out, lse=torch.logsumexp(scores, 0))


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
def test_the_float64_oracle_knows_where_it_is_wrong(dtype: str) -> None:
    """Scores that cancel from 2^60: float64 takes the wrong key for the winner."""
    problem = Problem(len_k=2, dim_qk=3, scale=1.0, dtype=dtype)
    keys = [1080.0, 0.0, 0.0, 2.0**60, 1136.0, -(2.0**60)]
    x = inputs(problem, [1.0] * 3, keys, [1.0, -1.0])
    exact = mpmath_oracle.exact(problem, x, digits=60)["out"].ravel()[0]
    known = about(problem, x)
    off = abs(float(exact) - known.exact.out.item())
    limit = oracle_limit(problem, x)["out"].item()
    assert off <= limit
    assert off <= known.allowances(FLASH)["out"].limit.item()
    assert dtype == "fp64" or off > 1  # else there is nothing to know


@pytest.mark.parametrize("size", [2.0**100, 2.0**300, 1e153])
def test_scores_that_cancel_beyond_any_fixed_precision(size: float) -> None:
    """Two keys of scores size**2 + 3 and size**2: which one wins is in the 200th bit or beyond."""
    problem = Problem(len_k=2, dim_qk=2, scale=1.0, dtype="fp64")
    x = inputs(problem, [size, 1.0], [size, 3.0, size, 0.0], [1.0, 0.0])
    exact = mpmath_oracle.exact(problem, x, digits=700)["out"].ravel()[0]
    found = certified.exact(problem, x)
    assert found is not None
    answer, off = found
    assert abs(exact - answer.out.item()) <= off["out"].item() < UNIT["fp32"]


@pytest.mark.parametrize(
    ("problem", "q", "k"),
    [
        (Problem(len_k=2, scale=1.0), [1e-39], [1e38, -1e38]),  # inputs
        (Problem(len_k=2, scale=1e20), [1e-20], [1e-20, -1e-20]),  # products, then scaled
        (Problem(len_k=2, scale=1e37, dtype="bf16"), [1e-19], [1e-19, -1e-19]),
    ],
)
def test_subnormals_that_are_flushed(
    problem: Problem, q: list[float], k: list[float], flushing: None
) -> None:
    x = inputs(problem, q, k, [1.0, -1.0])
    s = (x.q.float() @ x.k.float().mT) * problem.softmax_scale
    out, lse = torch.softmax(s, -1) @ x.v.float(), torch.logsumexp(s, -1)
    torch.set_flush_denormal(False)
    holds(about(problem, x), FLASH, out=out.to(x.v.dtype), lse=lse)


def test_scores_stored_in_fp16_before_a_large_scale() -> None:
    """A product below FP16's subnormals, times 1000."""
    case = Case.parse("b1.h1.q1.k1.d1.fp16.full.scale=1000.0/tiny(2e-4)#1")
    x = case.inputs()
    known = about(case.problem, x)
    stored = (x.q @ x.k.mT) * case.problem.softmax_scale
    arithmetic = Arithmetic(stored_scores="input", normalized_probs=True)
    holds(known, arithmetic, out=torch.softmax(stored, -1) @ x.v, lse=torch.logsumexp(stored, -1))


def test_a_scaled_query_of_fp16_that_is_subnormal() -> None:
    problem = Problem(dtype="fp16", scale=1 / 1024)
    x = inputs(problem, [2.0**-15], [60000.0], [1.0])
    query = (x.q.float() / 1024).half().float()
    arithmetic = Arithmetic(scaled_query=True, output="fp32")
    holds(about(problem, x), arithmetic, lse=query @ x.k.float().mT)


def test_a_scaled_query_that_overflows() -> None:
    problem = Problem(len_k=2, dtype="fp16", scale=4.0)
    x = inputs(problem, [30000.0], [1.0, 2.0], [1.0, 2.0])
    limits = about(problem, x).allowances(Arithmetic(scaled_query=True))
    assert bool(limits["out"].limit.isinf().all())


@pytest.mark.parametrize(
    ("dtype", "value", "arithmetic"),
    [("bf16", 1e38, FLASH), ("fp16", 1e4, Arithmetic(accumulate="fp16"))],
)
def test_a_sum_that_overflows_before_it_is_divided(
    dtype: str, value: float, arithmetic: Arithmetic
) -> None:
    problem = Problem(len_k=1024, dim_qk=8, dtype=dtype)
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, 8, generator=rng) for n in (1, 1024))
    known = about(problem, inputs(problem, q, k, torch.full((1024, 1), value)))
    assert bool(known.allowances(arithmetic)["out"].limit.isinf().all())
    normalised = Arithmetic(normalized_probs=True, accumulate=arithmetic.accumulate)
    assert bool(known.allowances(normalised)["out"].limit.isfinite().all())


def test_a_product_of_the_backward_that_overflows() -> None:
    """dP = 4e38 in FP32; delta is as large."""
    problem = Problem(len_q=2, len_k=2, dim_v=4, dtype="bf16", grads=True)
    x = inputs(problem, [1.0, 1.0], [1.0, 2.0], [1e38] * 8, [1.0] * 8)
    known = about(problem, x)
    given = emulator.emulate(problem, x, FLASH)
    assert given.dq is not None
    assert bool(given.dq.isnan().any())
    limits = known.allowances(FLASH)
    assert bool(limits["dq"].limit.isinf().all())
    assert bool(limits["dk"].limit.isinf().all())
    assert bool(limits["dv"].limit.isfinite().all())


def test_a_row_whose_weights_overflow_takes_all_its_columns_along() -> None:
    """P recomputed of scores of 1e10 may be infinite: its product with a zero of K is NaN."""
    problem = Problem(len_k=2, dim_qk=2, scale=1.0, grads=True)
    x = inputs(problem, [1e5, 1.0], [1e5, 0.0, 1e5, 0.0], [1.0, -1.0], [0.0])
    limits = about(problem, x).allowances(FLASH)
    for name in ("dq", "dk", "dv"):
        assert bool(limits[name].limit.isinf().all()), name


def test_a_bound_beyond_every_number_is_infinite() -> None:
    """Scores of 4.5e9 in FP8, splits that cannot be merged: once infinity times zero."""
    case = Case.parse("b1.h1.q1.k180.d256.bf16.blocks(54).scale=0.001.grads/constant(133120)#218")
    limits = about(case.problem, case.inputs()).allowances(
        Arithmetic(quantised=Quantisation(), splits=2)
    )
    for name, allowed in limits.items():
        assert bool(allowed.limit.isinf().all()), name


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_scores_that_are_lost_leave_a_mean_of_what_the_row_sees(dtype: str) -> None:
    """Scores of -3e4, off by 15: any weights are honest, those of hidden keys are not."""
    case = Case.parse(f"b1.h1.q4.k6.d2.{dtype}.causal_upper_left.scale=1.0/sunken(30000)#0")
    known = truth(case, "cpu")
    x, limit = known.inputs, known.allowances(EAGER)["out"].limit
    hidden = ~visibility(case.problem, x.q.device)

    def off(fill: float) -> Tensor:
        scores = (x.q @ x.k.mT).masked_fill(hidden, fill)
        return distance(torch.softmax(scores, -1) @ x.v, known.exact.out)

    assert bool((off(-torch.inf) <= limit).all())
    assert bool((off(-1e4) > limit)[0, 0, 0].any())  # this row sees one key


def test_sums_of_heads_that_are_stored_may_overflow() -> None:
    """dk of each of two heads is beyond FP16, their sum is not."""
    case = Case.parse("b1.h2:1.q65.k65.d72.fp16.full.scale=1.0.grads/faint(0.0001)#7")
    known = truth(case, "cpu")
    for arithmetic, infinite in ((EAGER, True), (FLASH, False)):
        limit = known.allowances(arithmetic)["dk"].limit
        assert bool((limit.isinf() & (known.exact.dk.abs() < 6e4)).any()) is infinite


CODED = [
    Quantisation(),
    Quantisation("e5m2", 0, values="head"),
    Quantisation("e4m3", 16, values="columns"),
    Quantisation("int8", 1, values="given"),
    Quantisation("int4", 0),
    Quantisation("e4m3", block=8, scales="ue8m0", values="blocks"),
    Quantisation("e4m3", block=8, scales="ue8m0_floor", values="columns"),
    Quantisation("e2m1", block=4, scales="e4m3", values="blocks"),
    Quantisation("e5m2", 1, queries="given"),
    Quantisation("int8", 16, values="given", centred=True),
    Quantisation("e4m3", 16, rotated=True),
    Quantisation(
        "e4m3", 16, rotated=True, values="columns", centred=True, fitted=True, balanced=True
    ),
]


@pytest.mark.parametrize("how", CODED, ids=str)
@pytest.mark.parametrize("recipe", ["normal", "outliers(0.01,10)"])
def test_a_kernel_that_quantises_is_near_the_answer_of_its_own_codes(
    how: Quantisation, recipe: str
) -> None:
    """The bound from the exact answer lets zeros pass here, the other does not."""
    case = Case.parse(f"b1.h2:1.q24.k40.d12.bf16.causal_lower_right/{recipe}#3")
    known, arithmetic = truth(case, "cpu"), Arithmetic(quantised=how)
    left = known.left(arithmetic)
    assert left is not None
    exact, limits = left
    given = emulator.emulate(case.problem, known.inputs, replace(arithmetic, tile=16))
    for name, allowed in limits.items():
        error = distance(getattr(given, name), getattr(exact, name))
        assert bool((error <= allowed.limit).all()), name
    assert bool((exact.out.abs() > limits["out"].limit).any())


@pytest.mark.parametrize("tile", [1, 2, 4, 8, 16])
def test_a_tile_below_sixteen_is_rescaled_more_often(tile: int) -> None:
    """Scores that rise with every key, and a cubic for every exponential (FlashAttention-4)."""
    keys = 512
    problem = Problem(len_k=keys, scale=1.0)
    x = inputs(problem, [1.0], torch.arange(keys) * 2e-5, torch.ones(keys).index_fill(0, LATE, -1))
    known = about(problem, x)
    s, v = (x.q @ x.k.mT).flatten(), x.v.flatten()
    top, total, out = torch.tensor(-torch.inf), torch.zeros(()), torch.zeros(())
    for start in range(0, keys, tile):
        part = slice(start, start + tile)
        new = torch.maximum(top, s[part].max())
        old, weights = cubic(top - new), cubic(s[part] - new)
        total, out = total * old + weights.sum(), out * old + (weights * v[part]).sum()
        top = new
    arithmetic = Arithmetic(tile=tile, exp="binary", exp_ulp=900)
    holds(known, arithmetic, out=out / total, lse=top + total.log())


LATE = torch.arange(256, 512)


def cubic(x: Tensor) -> Tensor:
    """exp(x) by a polynomial of degree 3 in the fraction of x log2(e): off by up to 9e-5."""
    t = x * 1.4426950408889634
    whole = t.floor()
    f = t - whole
    found = ((0.0771190896 * f + 0.2275643945) * f + 0.6951461434) * f + 1.0
    return torch.where(x == -torch.inf, 0.0, found * torch.exp2(whole))
