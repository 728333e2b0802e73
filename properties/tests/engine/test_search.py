"""The engine finds planted defects, on the CPU, within the budget of a short fuzz, and shrinks them
to what a hand can check.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from verify.engine.search import Budget, hunt
from verify.properties.catalogue import PROPERTIES
from verify.records.journal import Record
from verify.registry import REGISTRY, Kernel, KnownIssue, kernel
from verify.reports.terminal import known_defects
from verify.spec.arithmetic import Arithmetic
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
    records: list[Record] = []
    result = hunt(
        registered(fn),
        PROPERTIES[law],
        "cpu",
        budget=Budget(judged=400, shrink_seconds=100),
        seed=seed,
        record=records.append,
    )
    assert result.finding is not None
    p = result.finding[0].problem
    assert p.batch * p.heads_q * p.len_q * p.len_k <= largest, str(result.finding[0])
    assert [r.verdict for r in records[-2:]] == ["finding", "ended"]
    assert records[-2].case == str(result.finding[0])


@pytest.mark.parametrize("law", PROPERTIES)
def test_the_right_kernel_is_not_flagged(law: str) -> None:
    if why := PROPERTIES[law].refusal(registered(right), "cpu"):
        pytest.skip(why)
    result = hunt(registered(right), PROPERTIES[law], "cpu", budget=Budget(judged=60), seed=4)
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
    assert (
        hunt(claimed, PROPERTIES["oracle"], "cpu", budget=Budget(judged=400), seed=1).finding
        is not None
    )


def test_the_decorator_registers_what_hunt_judges() -> None:
    try:
        kernel(name="decorated", supports=_plain)(right)
        assert (
            hunt(
                REGISTRY["decorated"], PROPERTIES["oracle"], "cpu", budget=Budget(judged=5), seed=0
            ).judged
            >= 5
        )
    finally:
        REGISTRY.pop("decorated", None)


def test_a_kernel_that_is_wrong_now_and_then_is_a_finding_that_says_so() -> None:
    calls: list[int] = []

    def wrong_every_seventh_time(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, problem: Problem
    ) -> Tensor:
        calls.append(0)
        return right(q, k, v, scale=scale, mask=mask, problem=problem) + float(len(calls) % 7 == 0)

    result = hunt(
        registered(wrong_every_seventh_time),
        PROPERTIES["oracle"],
        "cpu",
        budget=Budget(judged=100),
        seed=1,
    )
    assert result.finding is not None
    assert result.finding[1].sentence.startswith("not every time: out[")


def test_a_known_defect_is_counted_and_a_mended_one_is_reported() -> None:
    """The scale that is off only where it is known to be: no finding, but every such case is on
    record.
    """
    known = (
        KnownIssue("scale off on long keys", lambda p, device: p.len_k > 16),
        KnownIssue("scale off at batch 3", lambda p, device: p.batch == 3),
    )

    def off_on_long_keys(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, problem: Problem
    ) -> Tensor:
        return right(
            q, k, v, scale=(1.1 if problem.len_k > 16 else 1.0) * scale, mask=mask, problem=problem
        )

    records: list[Record] = []
    subject = Kernel(
        "known",
        off_on_long_keys,
        frozenset({"scale", "mask", "problem"}),
        supports=_plain,
        known_issues=known,
    )
    assert (
        hunt(
            subject,
            PROPERTIES["oracle"],
            "cpu",
            budget=Budget(judged=100),
            seed=1,
            record=records.append,
        ).finding
        is None
    )
    lines = known_defects(records)
    assert any(
        "scale off on long keys; shown by" in line and "NOT SEEN" not in line for line in lines
    )
    assert any(
        "scale off at batch 3; shown by 0 of" in line and "NOT SEEN" in line for line in lines
    )


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
    records: list[Record] = []
    result = hunt(
        subject,
        PROPERTIES["repeat"],
        "cpu",
        budget=Budget(judged=20),
        seed=1,
        record=records.append,
    )
    assert (result.finding is not None) == declared
    nothing = [
        r.case for r in records if r.bitwise and "q0" not in r.case
    ]  # an output without elements repeats
    assert declared or not nothing
