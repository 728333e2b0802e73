"""Hypothesis strategy of small cases: those of which oracles and bounds are tried, not kernels."""

from __future__ import annotations

from hypothesis import strategies as st

from verify.generation.strategies import masks
from verify.sandbox.domain import HEADS, SCALES
from verify.spec.case import Case
from verify.spec.distribution import Stress, drawn_from
from verify.spec.inputs import Recipe
from verify.spec.masks import ways
from verify.spec.problem import DTYPES, Problem

NARROW = ("fp32", "fp16", "bf16")
STEEP = (1e3, 1e4)
"""Scales beyond those that kernels are asked for."""


@st.composite
def small_cases(draw, way: str, *hard_on: Stress) -> Case:
    """A small problem with this way of drawing a mask, every option, gradients. hard_on: what its
    inputs often are; then it is of no FP64.
    """
    batch, len_q, len_k = draw(st.integers(1, 2)), draw(st.integers(0, 5)), draw(st.integers(0, 6))
    heads = draw(st.sampled_from([h for h in HEADS if h[0] <= 4]))
    mask = draw(masks(frozenset({way}), batch, len_q, len_k)) & draw(
        masks(frozenset(ways()), batch, len_q, len_k)
    )
    problem = Problem(
        batch=batch,
        heads_q=heads[0],
        heads_kv=heads[1],
        len_q=len_q,
        len_k=len_k,
        dim_qk=draw(st.integers(1, 4)),
        dim_v=draw(st.integers(1, 4)),
        dtype=draw(st.sampled_from(NARROW if hard_on else DTYPES)),
        mask=mask,
        bias=draw(st.sampled_from(["none", "bhqk", "hqk", "qk", "alibi"])),
        scale=draw(st.sampled_from(SCALES + STEEP)),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        grads=True,
    )
    return Case(
        problem, Recipe.parse(draw(st.sampled_from(drawn_from(*hard_on)))), draw(st.integers(0, 99))
    )
