"""The float64 oracle is certified by the mpmath one, and its memory is O(len)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verify.bounds import UNIT
from verify.case import Case, Inputs
from verify.masks import KINDS
from verify.oracles import dense, high
from verify.problem import Problem
from verify.properties.options import HEADS, SCALES
from verify.properties.strategies import RECIPES, masks
from verify.properties.truth import oracle_limit
from verify.recipes import Recipe


@st.composite
def small_cases(draw, kind: str) -> Case:
    """A small problem with this kind of mask, every option, gradients."""
    batch, len_q, len_k = draw(st.integers(1, 2)), draw(st.integers(0, 5)), draw(st.integers(0, 6))
    heads = draw(st.sampled_from([h for h in HEADS if h[0] <= 4]))
    mask = draw(masks(frozenset({kind}), batch, len_q, len_k)) & draw(masks(frozenset(KINDS), batch, len_q, len_k))
    problem = Problem(
        batch=batch,
        heads_q=heads[0],
        heads_kv=heads[1],
        len_q=len_q,
        len_k=len_k,
        dim_qk=draw(st.integers(1, 4)),
        dim_v=draw(st.integers(1, 4)),
        dtype=draw(st.sampled_from(["fp64", "fp32", "bf16"])),
        mask=mask,
        bias=draw(st.sampled_from(["none", "bhqk", "hqk", "qk", "alibi"])),
        scale=draw(st.sampled_from(SCALES)),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        grads=True,
    )
    return Case(problem, Recipe.parse(draw(st.sampled_from(RECIPES))), draw(st.integers(0, 99)))


def differences(case: Case, inputs: Inputs) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each tensor: |float64 oracle - mpmath oracle| and the proved bound of any float64 evaluation."""
    found, true = dense.exact(case.problem, inputs), high.exact(case.problem, inputs)
    limits = oracle_limit(case.problem, inputs)
    pairs = {}
    for name, limit in limits.items():
        got, want = getattr(found, name).flatten().tolist(), true[name].ravel()
        errors = [0.0 if x == y else float(abs(y - x)) for x, y in zip(got, want, strict=True)]
        pairs[name] = (torch.tensor(errors, dtype=torch.float64).view(limit.shape), limit)
    return pairs


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_certificate(kind: str, data: st.DataObject) -> None:
    """mpmath at 50 digits bounds the float64 oracle's error: within the bound that judges kernels, at FP64's unit roundoff."""
    case = data.draw(small_cases(kind))
    for name, (error, limit) in differences(case, case.inputs()).items():
        assert bool((error <= limit).all()), f"{name} of {case}: {error.max():.1e} > {limit.max():.1e}"


def test_the_certificate_is_sharp() -> None:
    """Were the float64 oracle off by a thousandth of an FP32 roundoff, the certificate would say so."""
    case = Case.parse("b1.h2.q5.k6.d4.fp32.causal_lower_right.grads/normal#1")
    wrong = 1 + UNIT["fp32"] / 1000
    for name, (_, limit) in differences(case, case.inputs()).items():
        exact = getattr(dense.exact(case.problem, case.inputs()), name)
        assert bool(((wrong - 1) * exact.abs() > limit).any()), name


def test_block_size_changes_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.parse("b2.h4:2.q37.k29.d8.fp32.window(5,1).bias=hqk.softcap=3.0.grads/normal#1")
    whole, limits = dense.exact(case.problem, case.inputs()), oracle_limit(case.problem, case.inputs())
    monkeypatch.setitem(dense.BLOCK_ELEMENTS, "cpu", 300)
    for name, limit in limits.items():
        difference = getattr(dense.exact(case.problem, case.inputs()), name) - getattr(whole, name)
        assert bool((difference.nan_to_num(nan=0.0).abs() <= 2 * limit).all()), name


def test_memory_is_linear_in_the_length() -> None:
    """8k x 8k with gradients: the scores alone would be 512 MiB; the process's peak grows by far less."""
    script = """
import resource, torch
from verify.case import Case
from verify.oracles import dense
def peak(n):
    case = Case.parse(f"b1.h1.q{n}.k{n}.d4.fp32.causal_lower_right.grads/normal#0")
    out = dense.exact(case.problem, case.inputs()).out
    assert out.isfinite().all()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small = peak(2**12)
print(peak(2**13) - small)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 8 * 2**26 / 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: 32k x 32k with gradients")
def test_32k_fits_on_the_gpu() -> None:
    case = Case.parse("b1.h1.q32768.k32768.d64.bf16.causal_lower_right.grads/normal#0")
    torch.cuda.reset_peak_memory_stats()
    exact = dense.exact(case.problem, case.inputs("cuda"))
    assert exact.dq is not None
    assert bool(exact.dq.isfinite().all())
    assert torch.cuda.max_memory_allocated() < 2 * 8 * 2**30  # a dozen matrices of float64 scores would be 96 GiB
