"""Inputs as a kernel quantises them: codes of 8 bits, scales, what is left when they are multiplied
again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verify.bounds.constants import LARGEST, STEPS, UNIT
from verify.bounds.score_error import Operands
from verify.oracles.formats import rounded
from verify.spec.arithmetic import Quantisation
from verify.spec.case import Inputs
from verify.spec.problem import Problem
from verify.spec.quantization import centres, fit, key_mean, rotation


@dataclass(frozen=True)
class Quantised:
    """What a kernel that quantises has left of its inputs."""

    inputs: Inputs
    """q, k, v as float64: dequantised, rotated back, K's mean added"""
    v_mean: Tensor
    """what V lacks, added to the output [B,Hk,1,Dv]"""
    v_scale: Tensor
    """V's scales, where they are those of columns or heads, else 1"""
    q: tuple[Tensor, Tensor]
    """(as tensor cores see it [B,H,Q,n], scales)"""
    k: tuple[Tensor, Tensor]
    k_mean: Tensor


def quantised(problem: Problem, inputs: Inputs, how: Quantisation) -> Quantised:
    """What such a kernel multiplies."""
    x = inputs.exact(inputs.q.device)
    seen, k_mean, v_mean = centres(problem, x, how)
    k, v = ((t - mean).masked_fill(~seen, 0.0) for t, mean in ((x.k, k_mean), (x.v, v_mean)))
    turn = _turn(problem.dim_qk, x.q.device) if how.rotated else None
    by_rows = how.values == "rows" and bool(how.rows)
    over = {"rows": (0, 1, 2, 3) if how.rows is None else (2, 3), "head": (2, 3), "columns": (2,)}
    v_scale = v.new_ones(())
    if how.values == "given":
        v8 = v
    elif by_rows:
        v8 = _whole(_coded(v, how))
    else:
        v_scale = _scales(v, how.format, over[how.values])
        v8 = rounded(v / v_scale, how.format) * v_scale
    v_mean = v_mean + key_mean(v - v8, seen).double() if how.balanced else v_mean
    q8, k8 = _coded(x.q, how, turn, fitted=how.fitted), _coded(k, how, turn)
    left = Inputs(
        _whole(q8, turn, x.q.shape[-1]),
        _whole(k8, turn, k.shape[-1]) + k_mean,
        v8,
        x.do,
        x.bias,
        x.slopes,
    )
    return Quantised(left, v_mean, v_scale, q8, k8, k_mean)


def dequantised(problem: Problem, inputs: Inputs, how: Quantisation) -> Inputs:
    """The values that such a kernel multiplies, as float64: exact attention of them is the
    reference of its own arithmetic.
    """
    left = quantised(problem, inputs, how)
    return replace(left.inputs, v=left.inputs.v + left.v_mean)


def left_over(
    problem: Problem, inputs: Inputs, how: Quantisation
) -> tuple[Inputs, Operands] | None:
    """(the values that such a kernel multiplies, as float64; how far its own may be from these): it
    divides by its scale in FP32, and what lies at a tie may be rounded to the other side. None
    where rotations and means come before, which add up in an order of their own.
    """
    if how.rotated or how.centred or how.fitted or how.balanced:
        return None
    found = quantised(problem, inputs, how)
    x, left = inputs.exact(inputs.q.device), found.inputs
    codes = [_coded(t, how) for t in (x.q, x.k)]
    q, k = (_at_ties(t, scale, how.format) for t, (_, scale) in zip((x.q, x.k), codes, strict=True))
    if how.values == "given":
        v = torch.zeros_like(x.v)
    else:
        by_rows = how.values == "rows" and bool(how.rows)
        v = _at_ties(x.v, _coded(x.v, how)[1] if by_rows else found.v_scale, how.format)
    nothing = v.new_zeros((*v.shape[:2], 1, 1, 1))
    pairs = (left.q.abs(), q), (left.k.abs(), k)
    return left, Operands(q, k, v, *pairs, found.v_mean, nothing)


def _at_ties(x: Tensor, scale: Tensor, fmt: str) -> Tensor:
    """How far x, coded and multiplied out in FP32, may be from what it is in float64."""
    off = 2 * STEPS * UNIT["fp32"]
    low, high = (rounded(x / scale * factor, fmt) * scale for factor in (1 - off, 1 + off))
    return (high - low).abs() + off * torch.maximum(low.abs(), high.abs())


def _coded(
    x: Tensor, how: Quantisation, turn: Tensor | None = None, *, fitted: bool = False
) -> tuple[Tensor, Tensor]:
    """x [B,H,n,D], turned, as it is in the 8-bit format, and a float32 scale for each row
    [B,H,n,1].
    """
    if turn is not None:
        x = torch.nn.functional.pad(x, (0, turn.shape[0] - x.shape[-1])) @ turn
    over = (0, 1, 2, 3) if how.rows is None else (2, 3)
    parts = [
        _scales(part, how.format, over).expand(*part.shape[:3], 1)
        for part in x.split(how.rows or max(1, x.shape[2]), 2)
    ]
    scale = torch.cat(parts, 2)
    coded = rounded(x / scale, how.format)
    return coded, (scale * fit(x / scale, coded)).float().double() if fitted else scale


def _whole(
    coded: tuple[Tensor, Tensor], turn: Tensor | None = None, columns: int | None = None
) -> Tensor:
    """Dequantised and turned back."""
    x = coded[0] * coded[1]
    return x if turn is None else (x @ turn.T)[..., :columns]


def _scales(x: Tensor, fmt: str, over: tuple[int, ...]) -> Tensor:
    if not x.numel():
        return x.new_ones(())
    scale = (x.abs().amax(over, keepdim=True) / LARGEST[fmt]).float().double()
    return scale.masked_fill(scale == 0, 1.0)


def _turn(dim: int, device: torch.device) -> Tensor:
    signs = rotation(dim).to(device)
    return signs / math.sqrt(signs.shape[0])
