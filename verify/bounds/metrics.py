"""Errors that are never NaN: a non-finite value where the exact one is finite is infinitely wrong,
not incomparable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Measurement:
    """How far a tensor is from a reference. Plain numbers, so that it can be recorded.

    rmse, largest absolute error, worst row's rmse; bias: mean signed error; alpha: slope <x, ref> /
    <ref, ref> (1 = no global factor; 1 also where ref is all zero and x equals it); size: root mean
    square of the reference; count of elements.
    """

    rmse: float
    max_abs: float
    worst_row: float
    bias: float
    alpha: float
    size: float
    count: int


def same(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors are equal, infinities and NaN included."""
    return (a == b) | (a.isnan() & b.isnan())


def finite(x: Tensor) -> bool:
    """Whether all of it is; where its sum is, found in a twentieth of the time, all must be."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def distance(x: Tensor, ref: Tensor) -> Tensor:
    """|x - ref| in float64: 0 where they are equal (infinities and NaN included), infinite where
    only one is finite.
    """
    a, b = x.to(torch.float64), ref.to(torch.float64)
    apart = (a - b).abs()
    if finite(apart):
        return apart
    comparable = a.isfinite() & b.isfinite()
    return torch.where(same(a, b), 0.0, torch.where(comparable, apart, torch.inf))


def measure(x: Tensor, ref: Tensor) -> Measurement:
    """Measure x against ref (same shape, rows along the last dimension)."""
    error, a, b = distance(x, ref), x.to(torch.float64), ref.to(torch.float64)
    if not error.numel():
        return Measurement(0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0)
    both = a.isfinite() & b.isfinite()
    a, b = torch.where(both, a, 0.0), torch.where(both, b, 0.0)
    power = (b * b).sum().item()
    rows = (error * error).mean(-1).sqrt() if error.dim() > 1 else error
    alpha = (
        _never_nan((a * b).sum().item() / power) if power else (1.0 if not a.any() else math.inf)
    )
    return Measurement(
        rmse=(error * error).mean().sqrt().item(),
        max_abs=error.max().item(),
        worst_row=rows.max().item(),
        bias=math.inf
        if not both.all() and error.isinf().any()
        else _never_nan((a - b).mean().item()),
        alpha=alpha,
        size=math.sqrt(power / b.numel()),
        count=error.numel(),
    )


def _never_nan(figure: float) -> float:
    """Sums of huge values may overflow both ways: that is infinitely wrong too."""
    return math.inf if math.isnan(figure) else figure


def worst(error: Tensor, limit: Tensor) -> tuple[int, ...] | None:
    """Index of the element that exceeds its limit by the largest factor; None where none does."""
    ratio = torch.where(
        error > limit, error / limit.clamp(min=torch.finfo(torch.float64).tiny), 0.0
    )
    if not ratio.numel() or not (error > limit).any():
        return None
    return tuple(
        int(n) for n in torch.unravel_index(ratio.nan_to_num(nan=torch.inf).argmax(), ratio.shape)
    )
