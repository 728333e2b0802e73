"""The float64 oracle is certified by the mpmath one, and its memory is O(len)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verify.bounds.constants import UNIT
from verify.generation.small import small_cases
from verify.oracles import float64, mpmath_oracle
from verify.reference.reference import oracle_limit
from verify.spec.case import Case, Inputs
from verify.spec.masks import ways


def differences(case: Case, inputs: Inputs) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each tensor: |float64 oracle - mpmath oracle| and the proved bound of any float64
    evaluation.
    """
    found, true = float64.exact(case.problem, inputs), mpmath_oracle.exact(case.problem, inputs)
    limits = oracle_limit(case.problem, inputs)
    pairs = {}
    for name, limit in limits.items():
        got, want = getattr(found, name).flatten().tolist(), true[name].ravel()
        errors = [0.0 if x == y else float(abs(y - x)) for x, y in zip(got, want, strict=True)]
        pairs[name] = (torch.tensor(errors, dtype=torch.float64).view(limit.shape), limit)
    return pairs


@pytest.mark.parametrize("way", ways())
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_certificate(way: str, data: st.DataObject) -> None:
    """mpmath at 50 digits bounds the float64 oracle's error: within the bound that judges kernels,
    at FP64's unit roundoff.
    """
    case = data.draw(small_cases(way))
    for name, (error, limit) in differences(case, case.inputs()).items():
        assert bool((error <= limit).all()), (
            f"{name} of {case}: {error.max():.1e} > {limit.max():.1e}"
        )


def test_the_certificate_is_sharp() -> None:
    """Were the float64 oracle off by a thousandth of an FP32 roundoff, the certificate would say
    so.
    """
    case = Case.parse("b1.h2.q5.k6.d4.fp32.causal_lower_right.grads/normal#1")
    wrong = 1 + UNIT["fp32"] / 1000
    for name, (_, limit) in differences(case, case.inputs()).items():
        exact = getattr(float64.exact(case.problem, case.inputs()), name)
        assert bool(((wrong - 1) * exact.abs() > limit).any()), name


def test_block_size_changes_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.parse("b2.h4:2.q37.k29.d8.fp32.window(5,1).bias=hqk.softcap=3.0.grads/normal#1")
    whole, limits = (
        float64.exact(case.problem, case.inputs()),
        oracle_limit(case.problem, case.inputs()),
    )
    monkeypatch.setitem(float64.BLOCK_ELEMENTS, "cpu", 300)
    for name, limit in limits.items():
        difference = getattr(float64.exact(case.problem, case.inputs()), name) - getattr(
            whole, name
        )
        assert bool((difference.nan_to_num(nan=0.0).abs() <= 2 * limit).all()), name


def test_memory_is_linear_in_the_length() -> None:
    """8k x 8k with gradients: the scores alone would be 512 MiB; the process's peak grows by far
    less.
    """
    script = """
import resource, torch
from verify.spec.case import Case
from verify.oracles import float64
def peak(n):
    case = Case.parse(f"b1.h1.q{n}.k{n}.d4.fp32.causal_lower_right.grads/normal#0")
    out = float64.exact(case.problem, case.inputs()).out
    assert out.isfinite().all()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small = peak(2**12)
print(peak(2**13) - small)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 8 * 2**26 / 4


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU: 32k x 32k with gradients"
)
def test_32k_fits_on_the_gpu() -> None:
    case = Case.parse("b1.h1.q32768.k32768.d64.bf16.causal_lower_right.grads/normal#0")
    torch.cuda.reset_peak_memory_stats()
    exact = float64.exact(case.problem, case.inputs("cuda"))
    assert exact.dq is not None
    assert bool(exact.dq.isfinite().all())
    assert (
        torch.cuda.max_memory_allocated() < 2 * 8 * 2**30
    )  # a dozen matrices of float64 scores would be 96 GiB
