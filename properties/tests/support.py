"""What several test files share: searches, and what they draw from."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from verify.engine.corpus import Corpus
from verify.engine.search import Budget, search
from verify.generation.strategies import masks
from verify.properties.catalogue import Property
from verify.properties.property import PROPERTIES
from verify.records.events import CaseFinished, Event
from verify.records.summary import Result
from verify.registry import KEYWORDS, Kernel
from verify.sandbox.domain import HEADS, SCALES
from verify.spec.case import Case
from verify.spec.inputs import Recipe, drawn_from
from verify.spec.masks import ways
from verify.spec.problem import DTYPES, Problem
from verify.spec.requirements import Requirements

ANYTHING = Kernel("anything", lambda q, k, v: q, frozenset(KEYWORDS), dtypes=DTYPES)
"""A kernel that takes every problem."""
GRADIENTS = Requirements(grads=True)
ATTEND = """
import torch
from verify import kernel

def attend(q, k, v, scale, mask):
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    s = q.float() @ k.float().mT * scale
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    return (torch.softmax(s, -1).nan_to_num() @ v.float()).to(q.dtype)
"""
"""The text of a file in which kernels are to be registered: attention in FP32."""


def searched(
    kernel: Kernel,
    prop: str,
    device: str = "cpu",
    *,
    judged: int,
    seed: int = 1,
    shrink_seconds: float = 20.0,
    corpus: Corpus | None = None,
    evaluate_case: Callable[[Property, Case], CaseFinished] | None = None,
    events: list[Event] | None = None,
) -> Result:
    """What a search for a case that breaks a property comes to. `events`: a list to add them to."""
    budget = Budget(judged, shrink_seconds=shrink_seconds)
    found = search(
        kernel,
        PROPERTIES[prop],
        device,
        budget=budget,
        seed=seed,
        corpus=corpus,
        evaluate_case=evaluate_case,
    )
    all_events = list(found)
    if events is not None:
        events += all_events
    return Result.of(iter(all_events))


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
        dtype=draw(st.sampled_from(["fp64", "fp32", "bf16", "fp16"])),
        mask=mask,
        bias=draw(st.sampled_from(["none", "bhqk", "hqk", "qk", "alibi"])),
        scale=draw(st.sampled_from((*SCALES, 1e3, 1e4))),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        grads=True,
    )
    return Case(
        problem, Recipe.parse(draw(st.sampled_from(drawn_from()))), draw(st.integers(0, 99))
    )
