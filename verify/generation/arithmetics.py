"""Hypothesis strategy of arithmetics: anything that a kernel may declare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from verify.spec.arithmetic import SHORT, SPLIT, Arithmetic, Quantisation

QUANTISED = (
    Quantisation(),
    Quantisation("e5m2", 0),
    Quantisation("e4m3", 4, values="head"),
    Quantisation("e4m3", 3, rotated=True),
    Quantisation("e4m3", 16, rotated=True, values="columns", centred=True),
    Quantisation(
        "e4m3", 16, rotated=True, values="columns", centred=True, fitted=True, balanced=True
    ),
    Quantisation("e5m2", 3, fitted=True, balanced=True),
    Quantisation("int8", 4, values="given", centred=True),
    Quantisation("int4", 1, values="columns"),
    Quantisation("e4m3", block=32, scales="ue8m0", values="blocks"),
    Quantisation("e4m3", block=2, scales="ue8m0_floor", values="columns"),
    Quantisation("e2m1", block=16, scales="e4m3", values="blocks"),
    Quantisation("e4m3", 1, queries="given"),
    Quantisation("int8", 0, queries="given"),
)


@st.composite
def arithmetics(draw: Callable[..., Any]) -> Arithmetic:
    """Anything that a kernel may declare; shrinks to the defaults."""

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    narrow = one_of("input", "fp32", "bf16", "fp16", "e4m3", "e5m2", "tf32", "e2m1")
    quantised = one_of(None, None, None, None, None, *QUANTISED)
    normalised = one_of(False, True)
    short = () if quantised else SHORT
    spill = one_of(None, None, (16, 32))
    return Arithmetic(
        quantised=quantised,
        scaled_query=one_of(False, False, False, True),
        scores=one_of(*3 * ("fp32",), "tf32", "fp22", *SPLIT, *short),
        stored_scores=one_of("fp32", "fp32", "input"),
        stored_exponents=one_of(False, False, True),
        exp=one_of("natural", "binary", "fused"),
        exp_ulp=one_of(2.0, 2.0, 20.0, 65536.0),
        tile=one_of(0, 16, 1, 3),
        maximum=one_of(0.0, 0.0, 0.0, 0.7, 5.5),
        splits=one_of(1, 1, 2, 3),
        partials="fp32" if normalised else one_of("fp32", "fp32", "input", "fp16"),
        rounding=one_of(*3 * ("nearest",), "zero", "stochastic"),
        tanh_ulp=one_of(4.0, 4.0, 4096.0),
        probs=narrow,
        probs_scale=256.0 if narrow == "e4m3" else 1.0,
        normalized_probs=normalised,
        rowsum=one_of("unrounded", "rounded"),
        accumulate=one_of(*5 * ("fp32",), "tf32", "fp22", *SPLIT, *short),
        promoted=one_of(0, 0, 2, 16),
        summation=one_of("hardware", "truncated"),
        output=one_of("input", "fp32"),
        dscores=one_of("input", "fp32", "bf16"),
        scaled_dscores=one_of(False, True),
        ds_probs=one_of("fp32", "input"),
        delta=one_of("out", "probs", "product"),
        group_sum=one_of("fp32", "input"),
        batch_sum=one_of("fp32", "input"),
        spill=spill,
        atomic=spill is not None and one_of(False, True),
    )
