"""The proved bound of the scores: quantised operands, the product Q K^T, stores, softcap, bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verify.bounds.constants import (
    LARGEST,
    STEPS,
    UNBOUNDED,
    UNIT,
    Units,
    narrowed,
    unbounded,
)
from verify.bounds.exact import Block, by_key, grouped
from verify.spec.arithmetic import Arithmetic, Quantisation
from verify.spec.case import Inputs
from verify.spec.problem import Problem
from verify.spec.quantization import FIT, centres, key_mean, rotation


@dataclass(frozen=True)
class Operands:
    """What quantisation may have moved q [B,H,Q,D], k [B,Hk,K,D], v [B,Hk,K,Dv] by, element by
    element; and for Q K^T the sizes and errors to multiply: the same, or the norms of rows [..., 1]
    where the kernel rotates them (Cauchy-Schwarz).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_pair: tuple[Tensor, Tensor]
    k_pair: tuple[Tensor, Tensor]
    v_mean: Tensor
    """[B,Hk,1,Dv]: what V lacks in P V and is added to the output, or 0"""
    overflow: Tensor
    """[B,Hk,1,1,1]: UNBOUNDED where a sum over keys, for a mean, may overflow"""

    @classmethod
    def of(cls, problem: Problem, inputs: Inputs, arithmetic: Arithmetic) -> Operands | None:
        """None where nothing is quantised."""
        how = arithmetic.quantised
        if how is None:
            return None
        x = inputs.exact(inputs.q.device)
        seen, k_mean, v_mean = centres(problem, x, how)
        pairs = []
        for t, mean in ((x.q, x.q.new_zeros(())), (x.k, k_mean)):
            size, moved = (
                s.norm(dim=-1, keepdim=True) if how.rotated else s.abs() for s in (t, t - mean)
            )
            columns = rotation(t.shape[-1]).shape[0] if how.rotated else 1
            lost = narrowed(moved, how, how.rows, columns=columns, block=how.block)
            lost = lost + FIT * (moved + lost) if how.fitted and t is x.q else lost
            lost = lost + STEPS * UNIT["fp32"] * (size + moved)
            given = t is x.q and how.queries == "given"
            pairs.append((size, torch.zeros_like(lost) if given else lost))
        q, k = (pair[1].expand(t.shape) for pair, t in zip(pairs, (x.q, x.k), strict=True))
        over = mean_overflow(x, how)
        if how.values == "given":
            return cls(q, k, torch.zeros_like(x.v), pairs[0], pairs[1], v_mean, over)
        moved = (x.v - v_mean).abs()
        if how.values in ("columns", "blocks"):
            block = how.block if how.values == "blocks" else 0
            lost = narrowed(moved.mT, how, 1, block=block).mT
        else:
            lost = narrowed(moved, how, 0 if how.values == "head" else how.rows)
        lost = lost + STEPS * UNIT["fp32"] * (x.v.abs() + moved)
        if how.balanced:  # a mean of what rounding took; its sum is in FP32
            lost = lost + key_mean(lost, seen).double() * (
                1 + (x.v.shape[2] + STEPS) * UNIT["fp32"]
            )
        return cls(q, k, lost, pairs[0], pairs[1], v_mean, over)


def mean_overflow(x: Inputs, how: Quantisation) -> Tensor:
    """UNBOUNDED [B,Hk,1,1,1] where a sum over the keys of a head, for a mean, may overflow."""
    summed = (t.abs().sum(2).amax(-1) for t in (x.k, x.v))
    over = unbounded(torch.maximum(*summed) > LARGEST["fp32"])[..., None, None, None]
    return over if how.centred or how.balanced else torch.zeros_like(over)


def score_error(
    problem: Problem, b: Block, units: Units, arithmetic: Arithmetic, operands: Operands | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """|s^ - s| [B,Hk,G,n,K]: quantised operands, the product Q K^T, each store of S in the declared
    format, softcap, bias. Then a bound of |s| itself, None where the first already holds STEPS
    roundings of it; and where a row may overflow the format of S, whichever way the scale is
    applied: UNBOUNDED [B,Hk,G,n,1].
    """
    scale, u, floor = (
        abs(problem.softmax_scale),
        units.u["stored_scores"],
        units.floor["stored_scores"],
    )
    gamma, q, k = units.gamma("scores", problem.dim_qk), b.q.abs(), b.k.abs()
    largest_q, largest_k = q, k
    if operands is not None:
        (q_size, q_error), (k_size, k_error) = operands.q_pair, operands.k_pair
        q_size, q_error = (grouped(t[:, :, b.rows], problem) for t in (q_size, q_error))
        largest_q, largest_k = q_size + q_error, k_size + k_error
    overflow = units.score_overflow(b, largest_q, largest_k, scale)
    flushed = (1 + scale) * units.flushed(problem.dim_qk, q, k)
    if not (
        units.stores_scores
        or problem.softcap
        or b.bias is not None
        or arithmetic.scaled_query
        or operands is not None
    ):
        # |s| <= scale |q|.|k|
        factor = scale * (gamma + (2 * u + STEPS * units.work) * (1 + gamma))
        return by_key(q * factor, k).add_(flushed), None, overflow
    size = by_key(q, k)
    error = size * gamma
    if arithmetic.scaled_query:
        largest = LARGEST[problem.dtype]
        overflow = overflow + unbounded(scale * largest_q.amax(-1, keepdim=True) > largest)
        floor_q = units.floor["inputs"] / (scale or UNBOUNDED)
        error = error + (units.u["inputs"] * size + floor_q * k.sum(-1)[:, :, None, None, :]) * (
            1 + gamma
        )
    if operands is not None:
        error = error + (by_key(q_error, k_size) + by_key(q_size + q_error, k_error)) * (1 + gamma)
    twice = u * (2 + u)  # two stores, one after the other
    error.mul_(scale * (1 + twice)).add_(b.raw.abs(), alpha=twice)
    error.add_(flushed + (2 + scale) * floor)  # before and after the scale
    if problem.softcap:
        error = error + u * (b.raw.abs() + error) + floor * problem.softcap  # s / softcap
        error = error + units.tanh * problem.softcap
        error = error + twice * (b.capped.abs() + error) + (2 + u) * floor * problem.softcap
    if b.bias is not None:
        # ALiBi's: slope / scale or slope * log2(e), its product with the distance, the store
        formed = STEPS if problem.bias == "alibi" else 1
        error = error + (formed * units.work + u) * b.bias.abs() + floor
        error = error + u * (b.s.abs() + error) + floor + units.exp_floor
    return error, b.s.abs(), overflow
