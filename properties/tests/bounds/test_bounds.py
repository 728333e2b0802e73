"""Bounds: no honest emulation crosses them, wrong kernels do, and what they cannot judge they
say.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verify.bounds.metrics import distance
from verify.generation.arithmetics import arithmetics
from verify.generation.small import small_cases
from verify.generation.strategies import cases
from verify.oracles import emulator, formats
from verify.properties.tests.support import ANYTHING, GRADIENTS
from verify.reference.reference import truth
from verify.spec.arithmetic import FLASH, Arithmetic, Quantisation
from verify.spec.case import Case
from verify.spec.masks import ways
from verify.studies.adversary import HOLES, attack, crossings, taken_back


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(case=cases(ANYTHING, "cpu", GRADIENTS), arithmetic=arithmetics())
@pytest.mark.slow
def test_no_honest_emulation_crosses_its_bound(case: Case, arithmetic: Arithmetic) -> None:
    known = truth(case, "cpu")
    limits = known.allowances(arithmetic)
    emulated = emulator.emulate(case.problem, known.inputs, arithmetic)
    for name in limits:
        error = distance(getattr(emulated, name), getattr(known.exact, name))
        assert bool((error <= limits[name].limit).all()), f"{name} of {case}, {arithmetic}"


@pytest.mark.parametrize("way", ways())
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(data=st.data(), arithmetic=arithmetics(), chosen=st.integers(0, 10**6))
def test_no_rounding_however_malicious_crosses_the_bound(
    way: str, data: st.DataObject, arithmetic: Arithmetic, chosen: int
) -> None:
    """Every rounding of every step turned against one element of each tensor, up to the most that
    its format allows.
    """
    case = data.draw(small_cases(way, "range"))
    tensors = len(truth(case, "cpu").allowances(arithmetic))
    for element in range(tensors * chosen, tensors * (chosen + 1)):
        crossed = [str(found) for found in crossings(case, arithmetic, element) if found]
        assert not crossed, crossed


ATTACKED = {
    "large score errors of small weights": ("q1.k3.d3.fp32.full/cancelling(1e9)#0", FLASH),
    "overflow of P V": ("q1.k4.d1.fp32.full/vast(1e38)#0", FLASH),
    "overflow of dP": (
        "q1.k3.d1:2.fp16.full.grads/vast(1e38)#0",
        Arithmetic(scores="fp16", dscores="fp32", output="fp32"),
    ),
    "overflow of softcap * dS": ("q1.k2.d1.fp32.full.softcap=1000.0.grads/vast(1e37)#0", FLASH),
    "overflow of dS on the way to dbias": (
        "q1.k2.d1.fp16.full.bias=qk.grads/vast(1e38)#39",
        Arithmetic(probs="e2m1", normalized_probs=True, output="fp32"),
    ),
    "codes that are larger than what they stand for": (
        "q3.k4.d1:2.fp16.full.scale=0.0/cancelling(1e9)#48",
        Arithmetic(
            quantised=Quantisation("e4m3", block=32, scales="ue8m0", values="blocks"),
            stored_scores="input",
        ),
    ),
    "flushed subnormals": ("q1.k2.d1.fp32.full.scale=0.5/faint(1e38)#0", FLASH),
    "S in FP16 before the scale": (
        "q1.k2.d1.fp16.full.scale=1000.0/tiny(2e-4)#1",
        Arithmetic(stored_scores="input"),
    ),
    "the floor of a scaled query": (
        "q1.k2.d1.fp16.full.scale=0.001/faint(1e4)#1",
        Arithmetic(scaled_query=True),
    ),
    "overflow of a scaled query": (
        "q1.k2.d2.fp16.full.scale=1000.0/faint(1e-4)#1",
        Arithmetic(scaled_query=True),
    ),
    "tiles below sixteen": (
        "q1.k6.d1.fp32.full.scale=0.0/normal#0",
        Arithmetic(tile=1, exp_ulp=20),
    ),
    "two stores, one after the other": (
        "q1.k1.d4:1.bf16.full.bias=qk.scale=0.0/normal#53",
        Arithmetic(stored_scores="input", rounding="stochastic"),
    ),
    "a bound of fused exponents": (
        "q5.k5.d2.fp32.full.bias=hqk.scale=10000.0/cancelling(1e+09)#0",
        Arithmetic(scores="fp22", exp="fused"),
    ),
    "steps of an accumulator of 16 bits": (
        "q1.k5.d1.fp16.full/tiny#0",
        Arithmetic(accumulate="fp16"),
    ),
}
"""A case that shows each of HOLES."""


@pytest.mark.parametrize("hole", HOLES)
def test_the_adversary_finds_every_hole_that_the_bound_once_had(hole: str) -> None:
    text, arithmetic = ATTACKED[hole]
    case = Case.parse(f"b1.h1.{text}")

    def crossed() -> bool:
        return any(found for n in range(8) for found in crossings(case, arithmetic, n))

    assert not crossed()
    with taken_back(hole):
        assert crossed()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_adversary_reaches_the_bound(dtype: str) -> None:
    """On two keys the proved bound is not far above what the worst roundings do: it is a bound, not
    a guess.
    """
    known = truth(Case.parse(f"b1.h1.q2.k2.d2.{dtype}.full/normal#5"), "cpu")
    limit = known.allowances(FLASH)["out"].limit
    reached = torch.zeros_like(limit)
    for index in np.ndindex(tuple(limit.shape)):
        for worst in attack(known.problem, known.inputs, FLASH, "out", index):
            reached = torch.maximum(reached, distance(worst.out, known.exact.out) / limit)
    assert bool((reached <= 1).all())
    assert reached.amin().item() > 1 / 3


ORDINARY = "b1.h2.q64.k512.d64.{dtype}.full.grads/normal#3"


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_ordinary_inputs_see_all_three_wrong_kernels_at_fp32_and_zeros_in_every_dtype(
    dtype: str,
) -> None:
    known = truth(Case.parse(ORDINARY.format(dtype=dtype)), "cpu")
    blind = known.blind_to(known.allowances(Arithmetic()), None)
    assert "zeros" not in blind
    assert dtype != "fp32" or not blind


@pytest.mark.parametrize("factor", [0.0, 0.9, 1.1, -1.0])
@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
def test_a_wrong_factor_in_a_gradient_is_seen(name: str, factor: float) -> None:
    known = truth(Case.parse(ORDINARY.format(dtype="fp32")), "cpu")
    right = getattr(known.exact, name)
    assert bool(
        (distance(factor * right, right) > known.allowances(Arithmetic())[name].limit).any()
    )


def test_terms_add_up_to_the_limit() -> None:
    known = truth(Case.parse(ORDINARY.format(dtype="bf16")), "cpu")
    for name, allowed in known.allowances(Arithmetic()).items():
        total = torch.stack([part.expand_as(allowed.limit) for part in allowed.terms.values()]).sum(
            0
        )
        assert bool((total <= allowed.limit).all()), name


def test_a_format_that_overflows_is_not_judged() -> None:
    """Scores of 1e6 do not fit FP16: a kernel that declares that it stores them there may return
    anything.
    """
    known = truth(Case.parse("b1.h1.q2.k3.d4.fp16.full.scale=1.0/constant(1000)#0"), "cpu")
    assert bool(known.allowances(Arithmetic(stored_scores="input"))["out"].limit.isinf().all())
    assert bool(known.allowances(Arithmetic())["out"].limit.isfinite().all())


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_tf32_rounding_keeps_eleven_bits(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    finite = x[x.isfinite() & (x.abs() < torch.finfo(torch.float32).max / 2)]
    tf32 = formats.to_tf32(finite)
    assert bool(
        ((tf32 - finite).abs() <= 2.0**-11 * finite.abs())
        .logical_or(finite.abs() < 2.0**-100)
        .all()
    )
    assert bool((tf32.view(torch.int32) & 0x1FFF == 0).all())
