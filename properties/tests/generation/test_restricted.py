"""Right kernels with honest restrictions get in: what they take is found, drawn, and judged."""

from __future__ import annotations

import time
from itertools import combinations

import pytest
import torch
from torch import Tensor

from verify.engine.drawing import draw
from verify.inspection import conventions
from verify.properties.catalogue import PROPERTIES
from verify.properties.tests.support import searched
from verify.registry import Kernel
from verify.sandbox import probe as probing
from verify.sandbox.capabilities import anchors, fitted, options
from verify.sandbox.domain import PLAIN, first_accepted
from verify.spec.case import Case
from verify.spec.masks import FULL
from verify.spec.problem import Problem
from verify.spec.requirements import Requirements

RULES = {
    "decode only": lambda p: p.len_q == 1,
    "causal only": lambda p: str(p.mask) == "causal_upper_left" and p.len_q == p.len_k,
    "multiples of 64": lambda p: p.len_q % 64 == p.len_k % 64 == 0 < min(p.len_q, p.len_k),
    "d = 128": lambda p: p.dim_qk == p.dim_v == 128,
    "one key head": lambda p: p.heads_kv == 1 < p.heads_q,
    "192:128": lambda p: (p.dim_qk, p.dim_v) == (192, 128),
    "576:512": lambda p: (p.dim_qk, p.dim_v) == (576, 512),
    "windows only": lambda p: p.mask.names == {"window"},
    "grouped only": lambda p: p.group > 1,
    "heads by eight": lambda p: p.heads_q % 8 == 0,
}
CONTRADICTING = {
    frozenset(pair)
    for pair in (
        ("decode only", "multiples of 64"),
        ("causal only", "windows only"),
        ("d = 128", "192:128"),
        ("d = 128", "576:512"),
        ("192:128", "576:512"),
    )
}


def right(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    group = q.shape[1] // k.shape[1]
    s = q.float() @ k.float().repeat_interleave(group, 1).mT * scale
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    p = s.softmax(-1).masked_fill(s.isneginf().all(-1, keepdim=True), 0.0)
    return (p @ v.float().repeat_interleave(group, 1)).to(q.dtype)


def restricted(*names: str) -> Kernel:
    """One that takes what all of these rules allow."""

    def supports(problem: Problem, device: str) -> str | None:
        return None if all(RULES[name](problem) for name in names) else "not that"

    return Kernel(" and ".join(names), right, frozenset({"scale", "mask"}), supports=supports)


@pytest.mark.parametrize("name", RULES)
def test_a_restricted_kernel_is_drawn_as_it_is_and_not_accused(name: str) -> None:
    kernel = restricted(name)
    drawn: list[Case] = []
    for prop in ("oracle", "gradients"):
        draw(drawn.append, kernel, PROPERTIES[prop], "cpu", seed=1)
    assert all(kernel.unsupported(case.problem, "cpu") is None for case in drawn)
    assert len({case.problem for case in drawn}) > 40
    assert len({case.problem.dtype for case in drawn}) == 3
    for prop in ("oracle", "gradients", "one-hot"):
        found = searched(kernel, prop, judged=8)
        assert found.finding is None
        assert found.judged == 8


def test_any_two_restrictions_are_found_together() -> None:
    for pair in combinations(RULES, 2):
        found = options(restricted(*pair), "cpu").anchors
        assert bool(found) == (frozenset(pair) not in CONTRADICTING), pair


@pytest.mark.parametrize("dims", [(640, 640), (1024, 1024), (576, 512)])
def test_large_head_dims_are_found_with_another_restriction(dims: tuple[int, int]) -> None:
    def refuses(p: Problem) -> str | None:
        return None if (p.dim_qk, p.dim_v) == dims and p.dtype == "bf16" else "not that"

    found = first_accepted(refuses, {})
    assert found is not None
    assert found == PLAIN.but(dim_qk=dims[0], dim_v=dims[1], dtype="bf16")


def test_what_a_property_needs_and_a_kernel_never_takes_is_said() -> None:
    kernel = restricted("causal only")
    assert not anchors(kernel, "cpu", Requirements(full_mask=True))
    found = searched(kernel, "oracle", judged=2)
    assert found.judged == 2
    assert PROPERTIES["hull"].refusal(kernel, "cpu") == "takes no problem without a mask"


def picky(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    """Declares nothing; says what it does not take when it is called."""
    if q.shape[2] % 16 or k.shape[2] % 16:
        raise ValueError("lengths must be multiples of 16")
    assert q.shape[-1] in (32, 64, 128), "head dim"
    s = q.float() @ k.float().mT * scale  # torch raises where there are groups
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    p = s.softmax(-1).masked_fill(s.isneginf().all(-1, keepdim=True), 0.0)
    return (p @ v.float()).to(q.dtype)


def test_a_kernel_that_declares_nothing_is_asked_by_calling_it() -> None:
    kernel = Kernel("picky", picky, frozenset({"scale", "mask"}))
    found = options(kernel, "cpu")
    assert {a for a, b in found.taken["dims"] if a == b} == {32, 64, 128}
    assert found.multiples == (16, 16)
    assert (4, 2) not in found.taken["heads"]
    assert "raised AssertionError: head dim" in found.refused["dims"]["96:96"]
    drawn: list[Case] = []
    draw(drawn.append, kernel, PROPERTIES["oracle"], "cpu", seed=1)
    assert all(p.len_q % 16 == 0 for p in (case.problem for case in drawn))
    result = searched(kernel, "oracle", judged=20)
    assert result.finding is None
    assert result.judged == 20


def test_a_wanted_problem_is_moved_only_as_far_as_it_must() -> None:
    kernel = restricted("causal only", "heads by eight")
    wanted = PLAIN.but(len_q=30, len_k=40, dim_qk=16, dim_v=16, heads_q=14, heads_kv=2, mask=FULL)
    found = fitted(kernel, "cpu", wanted)
    assert kernel.unsupported(found, "cpu") is None
    assert (found.len_q, found.len_k) == (40, 40)
    assert (found.dim_qk, found.dim_v) == (16, 16)


@pytest.mark.parametrize(("slow_calls", "slow"), [(1, False), (2, False), (9, True)])
def test_a_kernel_is_slow_where_no_call_is_fast(
    monkeypatch: pytest.MonkeyPatch, slow_calls: int, *, slow: bool
) -> None:
    """One call may be delayed by whatever else the machine does."""
    monkeypatch.setattr(probing, "SLOW_SECONDS", 0.02)
    left = [slow_calls]

    def tries(case: Case) -> tuple[str, bool]:
        left[0] -= 1
        time.sleep(0.03 if left[0] >= 0 else 0.0)
        return "", False

    assert (probing._pace(PLAIN, lambda problem: None, tries) > 0.02) is slow


def test_a_kernel_that_takes_seconds_is_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute would be gone before anything is judged."""
    monkeypatch.setattr(probing, "CRAWL_SECONDS", 0.01)
    calls = []

    def crawls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(time.sleep(0.02))
        return q * v.mean()

    kernel = Kernel("crawls", crawls, frozenset(), origin="mine.py:1")
    assert options(kernel, "cpu").crawls
    assert conventions.rows(kernel, "cpu")[0][0] == "calls"
    assert conventions.detected(kernel, "cpu") == {}
    assert len(calls) < 5
