"""Inputs as a kernel quantises them: codes of 8 bits, scales, what is left when they are multiplied
again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from verify.bounds.constants import CUT, LARGEST, STEPS, UNIT, Units
from verify.bounds.score_error import Operands, mean_overflow
from verify.oracles.formats import rounded
from verify.spec.arithmetic import Quantisation
from verify.spec.case import Inputs
from verify.spec.problem import Problem
from verify.spec.quantization import FIT, centres, fit, key_mean, rotation


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
    apart = how.values in ("head", "columns") or (how.values == "rows" and not how.rows)
    scale = v.new_ones(()) if how.values == "given" else _scale_of_v(v, how)
    v8 = v if how.values == "given" else rounded(v / scale, how.format) * scale
    v_scale = scale if apart else v.new_ones(())
    v_mean = v_mean + key_mean(v - v8, seen).double() if how.balanced else v_mean
    q8, k8 = _coded_queries(x.q, how, turn), _coded(k, how, turn)
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
    problem: Problem, inputs: Inputs, how: Quantisation, units: Units
) -> tuple[Problem, Inputs, Operands]:
    """(the problem and the values, as float64, that such a kernel multiplies; how far its own may
    be from these): it turns, centres and divides in FP32, and what lies at a tie may be rounded to
    the other side.
    """
    found, x = quantised(problem, inputs, how), inputs.exact(inputs.q.device)
    seen, _, v_mean = centres(problem, x, how)
    turn = _turn(problem.dim_qk, x.q.device) if how.rotated else None
    few, many = (_gamma(n) for n in (problem.dim_qk, problem.len_k))
    k_off, v_off = (many * key_mean(t.abs(), seen).double() * how.centred for t in (x.k, x.v))
    v_off = v_off * (how.values != "given")
    k, v = ((t - m).masked_fill(~seen, 0.0) for t, m in ((x.k, found.k_mean), (x.v, v_mean)))
    q_err = _moved(x.q, x.q.new_zeros(()), how, turn)
    k_err = _moved(k, k_off, how, turn)
    q_size, k_size = ((code * scale).abs() for code, scale in (found.q, found.k))
    if how.fitted:  # its factor is a quotient of two sums over a row
        turned = _turned(x.q, turn)
        along = (_whole(_coded(x.q, how, turn)) * turned).sum(-1, keepdim=True).abs()
        turned_off = (q_err * turned.abs()).sum(-1, keepdim=True)
        share = turned_off / along.clamp(min=torch.finfo(along.dtype).tiny)
        q_err = q_err * (1 + FIT) + q_size * (share + 4 * few).clamp(max=2 * FIT)
    q_err = q_err + units.gamma("scores", q_size.shape[-1]) * q_size
    q_err = torch.zeros_like(q_err) if how.queries == "given" else q_err
    v_err = torch.zeros_like(v) if how.values == "given" else _moved(v, v_off, how, of_v=True)
    if how.balanced:
        v8 = found.inputs.v
        v_err = v_err + key_mean(v_err + many * (v - v8).abs(), seen).double()
    v_err = v_err + v_off
    pairs = (q_size, q_err), (k_size, k_err)
    operands = Operands(q_err, k_err, v_err, *pairs, found.v_mean, mean_overflow(x, how))
    problem, left = widened(problem, found, how)
    return problem, replace(left, v=left.v + found.v_mean), operands


def widened(problem: Problem, found: Quantised, how: Quantisation) -> tuple[Problem, Inputs]:
    """The problem of what is multiplied, in all the columns that rows are padded to before they are
    turned: what rounding leaves in these is multiplied, too.
    """
    if not how.rotated:
        return problem, found.inputs
    turn = _turn(problem.dim_qk, found.k_mean.device)
    k = _whole(found.k, turn) + _padded(found.k_mean, turn)
    wide = problem.but(dim_qk=turn.shape[0], scale=problem.softmax_scale)
    return wide, replace(found.inputs, q=_whole(found.q, turn), k=k)


def _moved(
    x: Tensor, moved: Tensor, how: Quantisation, turn: Tensor | None = None, *, of_v: bool = False
) -> Tensor:
    """How far x, turned, coded and multiplied out in FP32, may be from what it is in float64; x
    itself may be off by `moved`.
    """
    turned = _turned(x, turn)
    if not turned.numel():
        return turned
    if turn is not None:
        moved = (x.abs() * _gamma(x.shape[-1]) + moved).sum(-1, keepdim=True) / math.sqrt(
            turned.shape[-1]
        )
    scale = _scale_of_v(x, how) if of_v else _scale_of_rows(turned, how)
    off = 2 * STEPS * UNIT["fp32"] + moved.amax() / (scale * LARGEST[how.format])
    scales = [scale]
    if how.scales != "fp32":  # it may be rounded to its other side, too
        of = partial(_scale_of_v, x) if of_v else partial(_scale_of_rows, turned)
        scales += [of(how, times=1 + side * off.amax()) for side in (-1, 1)]
    doubts = [((off * turned.abs() + moved) / s, s) for s in scales]
    ends = [rounded(turned / s + d, how.format) * s for doubt, s in doubts for d in (-doubt, doubt)]
    low, high = torch.stack(ends).amin(0), torch.stack(ends).amax(0)
    return (high - low).abs() + off * torch.maximum(low.abs(), high.abs())


def _gamma(terms: int) -> float:
    """Of a sum in FP32 that tensor cores may truncate."""
    return CUT * (terms + STEPS) * UNIT["fp32"]


def _turned(x: Tensor, turn: Tensor | None) -> Tensor:
    """Padded and turned, if it is."""
    if turn is None:
        return x
    return _padded(x, turn) @ turn


def _padded(x: Tensor, turn: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, turn.shape[0] - x.shape[-1]))


def _scale_of_rows(x: Tensor, how: Quantisation, times: Tensor | float = 1.0) -> Tensor:
    """[B,H,n,1], or of each block of columns [B,H,n,D]. times: of the largest number of each."""
    if how.block:
        return _scale_of_blocks(x, how, times)
    over = (0, 1, 2, 3) if how.rows is None else (2, 3)
    parts = [
        _scales(part, how, over, times).expand(*part.shape[:3], 1)
        for part in x.split(how.rows or max(1, x.shape[2]), 2)
    ]
    return torch.cat(parts, 2)


def _scale_of_blocks(x: Tensor, how: Quantisation, times: Tensor | float) -> Tensor:
    parts = [_scales(p, how, (3,), times, x).expand(p.shape) for p in x.split(how.block, 3)]
    return torch.cat(parts, 3)


def _scale_of_v(v: Tensor, how: Quantisation, times: Tensor | float = 1.0) -> Tensor:
    if how.values == "blocks":
        return _scale_of_blocks(v.mT, how, times).mT
    if how.values == "rows" and how.rows:
        return _scale_of_rows(v, how, times)
    over = {"rows": (0, 1, 2, 3) if how.rows is None else (2, 3), "head": (2, 3), "columns": (2,)}
    return _scales(v, how, over[how.values], times)


def _coded_queries(q: Tensor, how: Quantisation, turn: Tensor | None) -> tuple[Tensor, Tensor]:
    if how.queries == "given":
        return q, q.new_ones((*q.shape[:3], 1))
    return _coded(q, how, turn, fitted=how.fitted)


def _coded(
    x: Tensor, how: Quantisation, turn: Tensor | None = None, *, fitted: bool = False
) -> tuple[Tensor, Tensor]:
    """x [B,H,n,D], turned, as it is in the 8-bit format, and a float32 scale for each row
    [B,H,n,1], or for each number.
    """
    x = _turned(x, turn)
    scale = _scale_of_rows(x, how)
    coded = rounded(x / scale, how.format)
    return coded, (scale * fit(x / scale, coded)).float().double() if fitted else scale


def _whole(
    coded: tuple[Tensor, Tensor], turn: Tensor | None = None, columns: int | None = None
) -> Tensor:
    """Dequantised and turned back."""
    x = coded[0] * coded[1]
    return x if turn is None else (x @ turn.T)[..., :columns]


def _scales(
    x: Tensor,
    how: Quantisation,
    over: tuple[int, ...],
    times: Tensor | float = 1.0,
    tensor: Tensor | None = None,
) -> Tensor:
    """Of each group of x, all along these dimensions; `tensor`: that x is a part of."""
    if not x.numel():
        return x.new_ones(())
    most, largest = x.abs().amax(over, keepdim=True) * times, LARGEST[how.format]
    scale, instead = (most / largest).float().double(), torch.ones_like(most)
    if how.scales == "ue8m0":
        part, power = torch.frexp(scale)
        scale = torch.where(scale > 0, torch.exp2((power - (part == 0.5).int()).double()), 0.0)
    elif how.scales == "ue8m0_floor":
        power = torch.frexp(most).exponent - 1 - math.floor(math.log2(largest))
        scale = torch.where(most > 0, torch.exp2(power.double()), 0.0)
    elif how.scales == "e4m3":
        whole = x if tensor is None else tensor
        unit = (whole.abs().amax() / (largest * LARGEST["e4m3"])).float().double()
        unit = unit.masked_fill(unit == 0, 1.0)
        scale, instead = rounded((scale / unit).float().double(), "e4m3") * unit, instead * unit
    return torch.where(scale == 0, instead, scale)


def _turn(dim: int, device: torch.device) -> Tensor:
    signs = rotation(dim).to(device)
    return signs / math.sqrt(signs.shape[0])
