"""What several test files share: searches, and what they draw from."""

from __future__ import annotations

from collections.abc import Callable

from verify.engine.corpus import Corpus
from verify.engine.search import Budget, search
from verify.properties.catalogue import Property
from verify.properties.property import PROPERTIES
from verify.records.events import CaseFinished, Event
from verify.records.summary import Result
from verify.registry import KEYWORDS, Kernel
from verify.spec.case import Case
from verify.spec.problem import DTYPES
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
