"""What several test files draw from."""

from __future__ import annotations

from hypothesis import strategies as st

from verify.generation.strategies import masks
from verify.registry import KEYWORDS, Kernel
from verify.sandbox.capabilities import HEADS, SCALES
from verify.spec.case import Case
from verify.spec.inputs import Recipe, drawn_from
from verify.spec.masks import ways
from verify.spec.problem import DTYPES, Problem
from verify.spec.requirements import Requirements

ANYTHING = Kernel("anything", lambda q, k, v: q, frozenset(KEYWORDS), dtypes=DTYPES)
"""A kernel that takes every problem."""
GRADIENTS = Requirements(grads=True)


@st.composite
def small_cases(draw, way: str) -> Case:
    """A small problem with this way of drawing a mask, every option, gradients."""
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
        dtype=draw(st.sampled_from(["fp64", "fp32", "bf16"])),
        mask=mask,
        bias=draw(st.sampled_from(["none", "bhqk", "hqk", "qk", "alibi"])),
        scale=draw(st.sampled_from(SCALES)),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        grads=True,
    )
    return Case(
        problem, Recipe.parse(draw(st.sampled_from(drawn_from()))), draw(st.integers(0, 99))
    )
