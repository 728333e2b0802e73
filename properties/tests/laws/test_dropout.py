"""The law of dropout holds for kernels that drop as they should, and every way of dropping wrongly
is found.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from verify.properties import dropout as law
from verify.properties.tests.support import searched
from verify.records.summary import Result
from verify.registry import Kernel, find
from verify.spec.arithmetic import Arithmetic
from verify.spec.finding import Finding
from verify.spec.problem import Problem


def scores(q: Tensor, k: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    s = scale * (q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT)
    return s if mask is None else s.masked_fill(~mask, torch.finfo(s.dtype).min)


def weights(q: Tensor, k: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    p = torch.softmax(scores(q, k, scale=scale, mask=mask), -1)
    return p if mask is None else p * mask


def times(p: Tensor, v: Tensor) -> Tensor:
    return p @ v.repeat_interleave(p.shape[1] // v.shape[1], dim=1)


def bernoulli(p: Tensor, keep: float, generator: torch.Generator | None = None) -> Tensor:
    """What is kept; without dropout torch's random state is left alone."""
    return (
        torch.bernoulli(torch.full(p.shape, keep, dtype=p.dtype), generator=generator)
        if keep < 1
        else torch.ones_like(p)
    )


def right(p: Tensor, v: Tensor, rate: float) -> Tensor:
    return times(p * bernoulli(p, 1 - rate) / (1 - rate), v)


def not_divided(p: Tensor, v: Tensor, rate: float) -> Tensor:
    return times(p * bernoulli(p, 1 - rate), v)


def shared_by_the_heads(p: Tensor, v: Tensor, rate: float) -> Tensor:
    return times(p * bernoulli(p[:, :1], 1 - rate) / (1 - rate), v)


def shared_by_the_batch(p: Tensor, v: Tensor, rate: float) -> Tensor:
    return times(p * bernoulli(p[:1], 1 - rate) / (1 - rate), v)


def the_same_in_every_call(p: Tensor, v: Tensor, rate: float) -> Tensor:
    return times(p * bernoulli(p, 1 - rate, torch.Generator().manual_seed(1)) / (1 - rate), v)


def another_in_the_backward(p: Tensor, v: Tensor, rate: float) -> Tensor:
    seen, lived = (p * bernoulli(p, 1 - rate) / (1 - rate) for _ in range(2))
    forward, backward = times(seen, v), times(lived, v)
    return backward + (forward - backward).detach()


def keeps_what_it_should_drop(p: Tensor, v: Tensor, rate: float) -> Tensor:
    return times(p * bernoulli(p, rate if rate else 1.0) / (1 - rate), v)


def drops_a_little_more(p: Tensor, v: Tensor, rate: float) -> Tensor:
    return times(p * bernoulli(p, (1 - rate) * (0.9 if rate else 1.0)) / (1 - rate), v)


def renormalised(p: Tensor, v: Tensor, rate: float) -> Tensor:
    dropped = p * bernoulli(p, 1 - rate)
    return times(dropped / dropped.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny), v)


def ignored(p: Tensor, v: Tensor, rate: float) -> Tensor:
    return times(p, v)


def drops_always(p: Tensor, v: Tensor, rate: float) -> Tensor:
    return right(p, v, rate or 0.5)


def subject(drop: Callable[[Tensor, Tensor, float], Tensor]) -> Kernel:
    """A kernel that drops in this way: (P [B,H,Q,K], V [B,Hk,K,Dv], p) -> out [B,H,Q,Dv]."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, dropout: float
    ) -> Tensor:
        p = weights(q.float(), k.float(), scale=scale, mask=mask)
        return drop(p, v.float(), dropout).to(q.dtype)

    arithmetic = Arithmetic(
        probs="fp32", dscores="fp32", normalized_probs=True, delta="probs", group_sum="input"
    )
    return Kernel(
        drop.__name__, attention, frozenset({"scale", "mask", "dropout"}), arithmetic, _has_keys
    )


def _has_keys(problem: Problem, device: str) -> str | None:
    return None if problem.len_k else "no keys"


def judged(kernel: Kernel, cases: int, seed: int) -> Result:
    return searched(kernel, "dropout", judged=cases, seed=seed, shrink_seconds=2)


@pytest.mark.parametrize("name", ["naive", "sdpa-math"])
@pytest.mark.parametrize("seed", [1, 2])
def test_bundled_kernels_hold(name: str, seed: int) -> None:
    result = judged(find(name)[0], 30, seed)
    assert result.finding is None
    assert result.judged == 30


def test_the_right_kernel_is_not_flagged() -> None:
    result = judged(subject(right), 60, 3)
    assert result.finding is None
    assert result.judged == 60


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        (not_divided, "with p ="),
        (shared_by_the_heads, "drop the same weights"),
        # weights of the same entries, in every call: neither independent of each other nor of them
        (shared_by_the_batch, "drop the same weights|depend on each other"),
        (the_same_in_every_call, "two calls drop the same weights"),
        (another_in_the_backward, r"dv\["),
        (keeps_what_it_should_drop, "weights are kept"),
        (drops_a_little_more, "at p ="),
        (renormalised, "with p ="),
        (ignored, "with p ="),
        (drops_always, "changed torch's random state"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("seed", [1, 2])
def test_dropping_wrongly_is_found(
    drop: Callable[[Tensor, Tensor, float], Tensor], said: str, seed: int
) -> None:
    result = judged(subject(drop), 60, seed)
    assert result.finding is not None
    assert re.search(said, result.finding.reason)


def test_a_kernel_without_dropout_is_not_judged() -> None:
    without = Kernel("without", ignored, frozenset({"scale", "mask"}))
    assert judged(without, 5, 1).reason == "takes no `dropout`"


def test_masks_are_not_called_dependent_for_their_rate() -> None:
    """FlashAttention compares 8 random bits and keeps 230 / 256 at p = 0.1, not 0.9: that two calls
    depend does not follow.
    """
    generator = torch.Generator().manual_seed(5)
    one, two = (
        bernoulli(torch.ones(1, 1, 2000, 2000), 230 / 256, generator).bool() for _ in range(2)
    )
    seen = law._Weights(
        0.1, torch.ones(one.shape), torch.zeros(one.shape), torch.ones_like(one), one
    )
    law._calls_differ(seen, two)
    with pytest.raises(Finding, match="weights are kept"):
        law._kept_as_often(seen)
    rows = torch.arange(2000)[:, None] < 200
    with pytest.raises(Finding, match="depend on each other"):
        law._calls_differ(seen, torch.where(rows, one, two))
