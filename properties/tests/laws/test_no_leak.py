"""What is written where rows do not look may overflow other rows: no leak."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from verify.engine.evaluate import evaluate
from verify.properties.catalogue import PROPERTIES
from verify.records.events import TESTED
from verify.registry import Kernel
from verify.spec.case import Case

CASE = Case.parse("b1.h1.q3.k4.d3.fp32.causal_upper_left.grads/integers#0")


class DeltaFromProbs(torch.autograd.Function):
    """Attention whose backward computes S again in another order, and delta as rowsum(P * dP)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:  # noqa: D102
        s = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
        lse = torch.logsumexp(s, -1, keepdim=True)
        ctx.save_for_backward(q, k, v, lse, mask)
        ctx.scale = scale
        return torch.softmax(s, -1) @ v

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        q, k, v, lse, mask = ctx.saved_tensors
        p = ((q * ctx.scale) @ k.mT - lse).exp().masked_fill(~mask, 0.0)
        dp = do @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * ctx.scale
        return ds @ k, ds.mT @ q, p.mT @ do, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor) -> Tensor:
    return DeltaFromProbs.apply(q, k, v, scale, mask)


def test_a_row_that_overflows_in_the_backward_is_no_leak() -> None:
    kernel = Kernel("delta-from-probs", attend, frozenset({"scale", "mask"}))
    event = evaluate(kernel, "cpu", PROPERTIES["no-leak-gradients"], CASE)  # raises a finding
    assert event.outcome in TESTED
