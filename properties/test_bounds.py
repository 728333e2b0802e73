"""Bounds: no honest emulation crosses them, wrong kernels do, and what they cannot judge they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verify.arithmetic import Arithmetic
from verify.case import Case
from verify.measure import distance
from verify.oracles import formats, rounded
from verify.properties.strategies import cases
from verify.properties.test_cases import ANYTHING
from verify.properties.truth import truth

ARITHMETICS = (
    Arithmetic(),
    Arithmetic(rowsum="rounded"),
    Arithmetic(delta="probs"),
    Arithmetic(probs="fp32", dscores="fp32", normalized_probs=True, delta="probs", group_sum="input"),
    Arithmetic(stored_scores="input", normalized_probs=True, delta="probs", group_sum="input"),
    Arithmetic(group_sum="input", spill=(32, 512)),
    Arithmetic(scores="tf32", accumulate="tf32"),
)
TENSORS = ("out", "lse", "dq", "dk", "dv", "dbias")


@pytest.mark.parametrize("number", range(len(ARITHMETICS)))
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(case=cases(ANYTHING, "cpu", grads=True))
def test_no_honest_emulation_crosses_its_bound(number: int, case: Case) -> None:
    known, arithmetic = truth(case, "cpu"), ARITHMETICS[number]
    limits = known.allowances(arithmetic)
    emulated = rounded.emulate(case.problem, known.inputs, arithmetic)
    for name in limits:
        error = distance(getattr(emulated, name), getattr(known.exact, name))
        assert bool((error <= limits[name].limit).all()), f"{name} of {case}"


ORDINARY = "b1.h2.q64.k512.d64.{dtype}.full.grads/normal#3"


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_ordinary_inputs_see_all_three_wrong_kernels_at_fp32_and_zeros_in_every_dtype(dtype: str) -> None:
    known = truth(Case.parse(ORDINARY.format(dtype=dtype)), "cpu")
    blind = known.blind_to(known.allowances(Arithmetic()), None)
    assert "zeros" not in blind
    assert dtype != "fp32" or not blind


@pytest.mark.parametrize("factor", [0.0, 0.9, 1.1, -1.0])
@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
def test_a_wrong_factor_in_a_gradient_is_seen(name: str, factor: float) -> None:
    known = truth(Case.parse(ORDINARY.format(dtype="fp32")), "cpu")
    right = getattr(known.exact, name)
    assert bool((distance(factor * right, right) > known.allowances(Arithmetic())[name].limit).any())


def test_terms_add_up_to_the_limit() -> None:
    known = truth(Case.parse(ORDINARY.format(dtype="bf16")), "cpu")
    for name, allowed in known.allowances(Arithmetic()).items():
        total = torch.stack([part.expand_as(allowed.limit) for part in allowed.terms.values()]).sum(0)
        assert bool((total <= allowed.limit).all()), name


def test_a_format_that_overflows_is_not_judged() -> None:
    """Scores of 1e6 do not fit FP16: a kernel that declares that it stores them there may return anything."""
    known = truth(Case.parse("b1.h1.q2.k3.d4.fp16.full.scale=1.0/constant(1000)#0"), "cpu")
    assert bool(known.allowances(Arithmetic(stored_scores="input"))["out"].limit.isinf().all())
    assert bool(known.allowances(Arithmetic())["out"].limit.isfinite().all())


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_tf32_rounding_keeps_eleven_bits(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    finite = x[x.isfinite() & (x.abs() < torch.finfo(torch.float32).max / 2)]
    tf32 = formats.to_tf32(finite)
    assert bool(((tf32 - finite).abs() <= 2.0**-11 * finite.abs()).logical_or(finite.abs() < 2.0**-100).all())
    assert bool((tf32.view(torch.int32) & 0x1FFF == 0).all())
