"""The engine finds planted defects, on the CPU, within the budget of a short fuzz, and shrinks them
to what a hand can check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from verify.engine.search import Budget, Search
from verify.properties.catalogue import PROPERTIES
from verify.properties.tests.support import searched
from verify.records.events import (
    CaseFinished,
    Ended,
    Event,
    FindingShrunk,
    KernelInspected,
    PropertyFinished,
)
from verify.registry import REGISTRY, Kernel, KnownIssue, find, kernel
from verify.reports.terminal import known_issues
from verify.spec.arithmetic import Arithmetic
from verify.spec.case import Case
from verify.spec.masks import Mask
from verify.spec.problem import Problem


def right(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, problem: Problem
) -> Tensor:
    q32, k32, v32 = q.float(), k.float(), v.float()
    assert q.dtype == k.dtype == v.dtype
    with sdpa_kernel(
        [SDPBackend.MATH]
    ):  # the other backend swallows NaN and takes more values than keys (torch 2.13)
        return F.scaled_dot_product_attention(
            q32, k32, v32, attn_mask=mask, scale=scale, enable_gqa=True
        ).to(q.dtype)


def scale_off(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, problem: Problem
) -> Tensor:
    return right(q, k, v, scale=1.01 * scale, mask=mask, problem=problem)


def upper_left(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, problem: Problem
) -> Tensor:
    if problem.mask == Mask.parse("causal_lower_right"):
        mask = torch.ones(problem.len_q, problem.len_k, dtype=torch.bool).tril()
    return right(q, k, v, scale=scale, mask=mask, problem=problem)


def last_key(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, problem: Problem
) -> Tensor:
    n = k.shape[2] - (k.shape[2] % 64 != 0)
    mask = mask if mask is None else mask[..., :n]
    return right(q, k[:, :, :n], v[:, :, :n], scale=scale, mask=mask, problem=problem)


def all_zero(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, problem: Problem
) -> Tensor:
    return q.new_zeros(problem.shapes["out"])


def mean_of_v(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, problem: Problem
) -> Tensor:
    return right(q, k, v, scale=0.0, mask=mask, problem=problem)


def heads_swapped(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, problem: Problem
) -> Tensor:
    k, v = (t.repeat(1, problem.group, 1, 1) for t in (k, v))
    return right(q, k, v, scale=scale, mask=mask, problem=problem.but(heads_kv=problem.heads_q))


def gradient_of_k_halved(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, problem: Problem
) -> Tensor:
    return right(q, (k + k.detach()) / 2, v, scale=scale, mask=mask, problem=problem)


def batch_entry_0_for_all(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, problem: Problem
) -> Tensor:
    return right(q, k[:1].expand_as(k), v, scale=scale, mask=mask, problem=problem)


def registered(fn: Callable[..., Tensor]) -> Kernel:
    return Kernel(fn.__name__, fn, frozenset({"scale", "mask", "problem"}), supports=_plain)


def _plain(problem: Problem, device: str) -> str | None:
    return "no softcap" if problem.softcap else "no bias" if problem.bias != "none" else None


@pytest.mark.parametrize(
    ("fn", "law", "largest"),
    [
        (scale_off, "oracle", 4),
        (upper_left, "oracle", 4),
        (last_key, "oracle", 4),
        (all_zero, "oracle", 4),
        (mean_of_v, "oracle", 4),
        (heads_swapped, "oracle", 16),
        (heads_swapped, "head-permutation", 16),
        (gradient_of_k_halved, "gradients", 4),
        (batch_entry_0_for_all, "batch-permutation", 16),
        (
            last_key,
            "key-permutation",
            128,
        ),  # one row; fewer keys need another seed, for the last must weigh and must move
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_planted_defect_is_found_and_shrunk(
    fn: Callable[..., Tensor], law: str, largest: int, seed: int
) -> None:
    """`largest`: batch * heads * len_q * len_k of the shrunk case."""
    events: list[Event] = []
    result = searched(registered(fn), law, judged=400, seed=seed, shrink_seconds=100, events=events)
    assert result.finding is not None
    p = Case.parse(result.finding.case).problem
    assert p.batch * p.heads_q * p.len_q * p.len_k <= largest, result.finding.case
    assert [type(event) for event in events[-2:]] == [FindingShrunk, PropertyFinished]
    assert events[-2] == result.finding


@pytest.mark.parametrize("law", PROPERTIES)
def test_the_right_kernel_is_not_flagged(law: str) -> None:
    """On problems of a few tiles; the matrix has larger ones."""
    kernel = replace(registered(right), affordable=lambda device: 1)
    if why := PROPERTIES[law].refusal(kernel, "cpu"):
        pytest.skip(why)
    result = searched(kernel, law, judged=60, seed=4)
    assert result.finding is None
    assert result.judged == 60


def test_a_kernel_that_declares_too_fine_an_arithmetic_is_flagged() -> None:
    """P rounded to BF16 under a declaration of FP32: no element is visibly wrong, the bound sees
    it.
    """

    def rounds_p(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, problem: Problem
    ) -> Tensor:
        return right(
            q, k, v.to(torch.bfloat16).to(v.dtype), scale=scale, mask=mask, problem=problem
        )

    claimed = Kernel(
        "claims-fp32",
        rounds_p,
        frozenset({"scale", "mask", "problem"}),
        Arithmetic(probs="fp32"),
        _plain,
    )
    assert searched(claimed, "oracle", judged=400).finding is not None


def test_the_decorator_registers_what_a_search_judges() -> None:
    try:
        kernel(name="decorated", supports=_plain)(right)
        assert searched(REGISTRY["decorated"], "oracle", judged=5, seed=0).judged == 5
    finally:
        REGISTRY.pop("decorated", None)


def test_a_kernel_that_is_wrong_now_and_then_is_a_finding_that_says_so() -> None:
    calls: list[int] = []

    def wrong_every_seventh_time(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, problem: Problem
    ) -> Tensor:
        calls.append(0)
        return right(q, k, v, scale=scale, mask=mask, problem=problem) + float(len(calls) % 7 == 0)

    result = searched(registered(wrong_every_seventh_time), "oracle", judged=100)
    assert result.finding is not None
    assert result.finding.reason.startswith("not every time: out[")


def test_a_known_defect_is_counted_and_a_mended_one_is_reported() -> None:
    """The scale that is off only where it is known to be: no finding, but every such case is on
    record.
    """
    known = (
        KnownIssue("scale off on long keys", lambda p, device: p.len_k > 16),
        KnownIssue("scale off at batch 3", lambda p, device: p.batch == 3, shows_in=1.0),
        KnownIssue("now and then", lambda p, device: p.len_k == 1, shows_in=0.001),
    )

    def off_on_long_keys(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, problem: Problem
    ) -> Tensor:
        return right(
            q, k, v, scale=(1.1 if problem.len_k > 16 else 1.0) * scale, mask=mask, problem=problem
        )

    subject = Kernel(
        "known",
        off_on_long_keys,
        frozenset({"scale", "mask", "problem"}),
        supports=_plain,
        known_issues=known,
    )
    issues = {issue.summary: {"shows_in": issue.shows_in} for issue in known}
    events: list[Event] = [KernelInspected(kernel="known", target="known", issues=issues)]
    assert searched(subject, "oracle", judged=100, events=events).finding is None
    long_keys, three, now_and_then = known_issues(events)[::-1]
    assert "scale off on long keys; shown by" in long_keys
    assert "scale off at batch 3; shown by 0 of" in three
    assert "NOT SEEN" in three
    assert "now and then; shown by 0 of" in now_and_then
    assert "NOT SEEN" not in long_keys + now_and_then  # the last was not looked for often enough


@pytest.mark.parametrize("declared", [True, False])
def test_a_kernel_that_declares_that_it_repeats_its_bits_must(declared: bool) -> None:  # noqa: FBT001 (parametrised)
    calls: list[int] = []

    def last_bit_wavers(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, problem: Problem
    ) -> Tensor:
        calls.append(0)
        out = right(q, k, v, scale=scale, mask=mask, problem=problem)
        return torch.nextafter(out, out.new_full((), torch.inf)) if len(calls) % 2 else out

    takes = frozenset({"scale", "mask", "problem"})
    subject = Kernel(
        "wavers",
        last_bit_wavers,
        takes,
        Arithmetic(deterministic=declared),
        _plain,
        dtypes=("fp32",),
    )
    events: list[Event] = []
    result = searched(subject, "repeat", judged=20, events=events)
    assert (result.finding is not None) == declared
    finished = [event for event in events if isinstance(event, CaseFinished)]
    same = [e.case for e in finished if e.bitwise and "q0" not in e.case]  # without elements
    assert declared or not same


@pytest.mark.parametrize(("in_vain", "ended"), [(3, Ended.NO_TIME), (30, Ended.UNSUPPORTED)])
def test_what_was_asked_in_vain_did_not_lack_time(in_vain: int, ended: Ended) -> None:
    one = Search(find("naive")[0], PROPERTIES["oracle"], "cpu", budget=Budget(), seed=1)
    one.unsupported["takes no `scale`"] = in_vain
    assert one.timed_out() is ended
    assert one.ending(ended).reason == ("takes no `scale`" if in_vain == 30 else "")
    one.tested = 1
    assert one.timed_out() is Ended.TIME
