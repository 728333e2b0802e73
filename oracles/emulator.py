"""The honest low-precision emulation: float64 attention with a rounding exactly where an Arithmetic
puts one.

What an honest kernel of that arithmetic is expected to be off by on these very inputs is the
distance of this from the exact answer. How each rounding goes is handed in (formats.Nearest by
default), so that a test can round adversarially.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from verify.bounds.constants import PROMOTED, spacings
from verify.bounds.exact import Block, Exact, by_key, from_keys, grouped, to_keys, ungrouped
from verify.oracles import float64
from verify.oracles.formats import CONTRACTED, Form, Nearest, in_chunks
from verify.oracles.quantised import Quantised, quantised, widened
from verify.spec.arithmetic import Arithmetic
from verify.spec.case import Inputs
from verify.spec.problem import Problem


class Rounding(Protocol):
    """How a value is stored, a function evaluated, a sum and a product accumulated, in a named
    format.
    """

    repeats: bool
    """Whether what is computed a second time comes out the same: kernels may add in another order
    when they recompute S.
    """

    def store(self, x: Tensor, fmt: str) -> Tensor: ...  # noqa: D102
    def directed(self, x: Tensor, fmt: str, how: str) -> Tensor: ...  # noqa: D102
    def function(self, name: str, x: Tensor, fmt: str, ulp: float) -> Tensor: ...  # noqa: D102
    def rescaled(self, x: Tensor, times: Tensor, fmt: str, ulp: float) -> Tensor: ...  # noqa: D102
    def raised(self, x: Tensor, most: float) -> Tensor: ...  # noqa: D102
    def total(self, x: Tensor, fmt: str) -> Tensor: ...  # noqa: D102
    def product(self, form: Form, a: Tensor, b: Tensor, fmt: str, *, cut: bool) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class _Emulator:
    problem: Problem
    arithmetic: Arithmetic
    rounding: Rounding
    device: str
    coded: Quantised | None = None
    """The inputs as tensor cores see them, where the kernel quantises"""

    @property
    def work(self) -> str:
        return "fp64" if self.problem.dtype == "fp64" else "fp32"

    def store(self, x: Tensor, field: str) -> Tensor:
        return self.stored(x, self.arithmetic.format(field, self.problem.dtype))

    def stored(self, x: Tensor, fmt: str) -> Tensor:
        if spacings(self.arithmetic, fmt) > 1:
            return self.rounding.directed(x, fmt, self.arithmetic.rounding)
        return self.rounding.store(x, fmt)

    def working(self, x: Tensor) -> Tensor:
        return self.rounding.store(x, self.work)

    def operand(self, x: Tensor, field: str) -> Tensor:
        """A factor of a product: TF32 narrows it on the way in."""
        return (
            self.store(x, field)
            if self.arithmetic.format(field, self.problem.dtype) == "tf32"
            else x
        )

    @property
    def _one_sum(self) -> bool:
        """Whether the heads of a group are added up in one accumulator, and it matters."""
        whole = self.arithmetic.format("group_sum", self.problem.dtype) in ("fp32", "fp64")
        return whole and self.arithmetic.truncates("accumulate", self.problem.dtype, self.device)

    def product(self, form: Form, a: Tensor, b: Tensor, field: str) -> Tensor:
        cut = self.arithmetic.truncates(field, self.problem.dtype, self.device)
        fmt, terms = self.arithmetic.format(field, self.problem.dtype), self.arithmetic.promoted
        if fmt not in PROMOTED or not 0 < terms < a.shape[CONTRACTED[form][0]]:
            return self.rounding.product(form, a, b, fmt, cut=cut)
        parts = [
            self.rounding.product(form, x, y, fmt, cut=cut) for x, y in in_chunks(form, a, b, terms)
        ]
        return self.rounding.total(torch.stack(parts, -1), self.work).squeeze(-1)

    def scores(self, b: Block) -> tuple[Tensor, float, Tensor]:
        """(S [B,Hk,G,n,K] in units of the exponential, -inf where hidden; what a unit is in nats;
        the slope of the softcap)
        """
        scale, q, arithmetic = self.problem.softmax_scale, b.q, self.arithmetic
        if arithmetic.scaled_query:
            scale, q = 1.0, self.stored(scale * q, self.problem.dtype)
        exactly = arithmetic.scores == "fp22" and arithmetic.truncates(
            "scores", self.problem.dtype, self.device
        )
        by_row = arithmetic.quantised and not arithmetic.quantised.block
        if self.coded and exactly and by_row and not arithmetic.scaled_query:
            z = self.coded_scores(b, self.coded)
        else:
            z = self.product(
                by_key, self.operand(q, "scores"), self.operand(b.k, "scores"), "scores"
            )
        z, binary = self.store(z, "stored_scores"), arithmetic.exp != "natural"
        log2e, cap, slope = 1 / math.log(2), self.problem.softcap, z.new_ones(())
        if binary and not cap and b.bias is None:
            return (
                self.in_base_two(z, scale * log2e).masked_fill(~b.visible, -torch.inf),
                math.log(2),
                slope,
            )
        s = self.store(scale * z, "stored_scores")
        if cap:
            ratio = self.store(s / cap, "stored_scores")
            bent = self.store(self.function("tanh", torch.tanh(ratio)), "stored_scores")
            s, slope = self.store(cap * bent, "stored_scores"), self.working(1 - bent * bent)
        if b.bias is not None:
            s = self.store(s + self.store(b.bias, "stored_scores"), "stored_scores")
        s = self.in_base_two(s, log2e) if binary else s
        return s.masked_fill(~b.visible, -torch.inf), math.log(2) if binary else 1.0, slope

    def coded_scores(self, b: Block, coded: Quantised) -> Tensor:
        """Q K^T of the 8-bit codes, scaled; K's mean apart."""
        q, q_scale = (grouped(t[:, :, b.rows], self.problem) for t in coded.q)
        z = (
            self.product(from_keys, q, coded.k[0].mT, "scores")
            * q_scale
            * coded.k[1].mT.unsqueeze(2)
        )
        return z + by_key(b.q, coded.k_mean)

    def in_base_two(self, s: Tensor, factor: float) -> Tensor:
        """s * factor, the factor rounded; the product too, unless it is fused with the subtraction
        of the maximum.
        """
        product = s * self.working(s.new_tensor(factor))
        return product if self.arithmetic.exp == "fused" else self.working(product)

    def exp(self, x: Tensor, unit: float) -> Tensor:
        return self.function("exp", torch.exp(unit * self.working(x)))

    def function(self, name: str, x: Tensor) -> Tensor:
        coarse = self.arithmetic.tanh_ulp > Arithmetic.tanh_ulp
        ulp = {"exp": self.arithmetic.exp_ulp, "tanh": self.arithmetic.tanh_ulp if coarse else 1.0}
        return self.rounding.function(name, x, self.work, ulp.get(name, 1.0))

    def forward(self, b: Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(out, lse, P as the backward sees it, the slope of the softcap)"""
        s, unit, slope = self.scores(b)
        row_max = (
            s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -torch.inf)
        )
        row_max = row_max.masked_fill(row_max == -torch.inf, 0.0)
        held, times = running_max(s, row_max, self.arithmetic)
        if self.arithmetic.exp == "fused":  # elsewhere a maximum is one of the stored scores
            row_max, held = self.working(row_max), self.working(held)
        held = self.rounding.raised(unit * held, self.arithmetic.maximum) / unit
        exponents = s - held
        if self.arithmetic.stored_exponents:
            exponents = self.store(exponents, "stored_scores")
        weights, later = self.exp(exponents, unit), torch.exp(unit * (held - row_max))
        grown = self.rounding.rescaled(
            torch.ones_like(later), times, self.work, self.arithmetic.exp_ulp
        )
        later = later * grown
        v = self.operand(b.v, "accumulate")
        factor = self.arithmetic.probs_scale
        if self.arithmetic.normalized_probs:
            total = self.rounding.total(weights * later, self.work)
            p = (
                self.store(
                    self.working(weights * later / total.masked_fill(total == 0, 1.0)) * factor,
                    "probs",
                )
                / factor
            )
            out = self.weighted(p, v)
            return self.output(out, total), self.lse(unit * row_max, total), p, slope
        stored = self.store(weights * factor, "probs") / factor
        total = self.row_sum(stored if self.arithmetic.rowsum == "rounded" else weights, later)
        if self.arithmetic.splits > 1 and self.arithmetic.partials != "fp32":
            out, total = self.merged(
                stored, weights, v, unit * (s - row_max), unit * (held - row_max), grown
            )
        else:
            out = self.weighted(stored, v, later)
        lse = self.lse(unit * row_max, total)
        seen = self.working(lse.masked_fill(lse == -torch.inf, 0.0) / unit)
        s = s if self.rounding.repeats or not self.problem.grads else self.scores(b)[0]
        return (
            self.output(out / total.masked_fill(total == 0, 1.0), total),
            lse,
            self.exp(s - seen, unit),
            slope,
        )

    def merged(
        self, stored: Tensor, weights: Tensor, v: Tensor, s: Tensor, held: Tensor, grown: Tensor
    ) -> tuple[Tensor, Tensor]:
        """P V, of splits that are divided by their row sums, stored, and multiplied again; and the
        sum of these. s, held: relative to the row's maximum; grown: what rescalings err by.
        """
        whole = s.new_zeros((*s.shape[:-1], 1))
        out = s.new_zeros((*s.shape[:-1], v.shape[-1]))
        for part in _shares(s.shape[-1], self.arithmetic):
            top = s[..., part].amax(-1, keepdim=True)
            top = top.masked_fill(top == -torch.inf, 0.0)
            later = torch.exp(held[..., part] - top) * grown[..., part]
            p, unrounded = stored[..., part], weights[..., part]
            later = torch.where((p == 0) & (unrounded == 0), 0.0, later)  # no maximum so far
            added = p if self.arithmetic.rowsum == "rounded" else unrounded
            total = self.row_sum(added, later)
            divided = self.weighted(p, v[:, :, part], later) / total.masked_fill(total == 0, 1.0)
            out = out + self.store(divided, "partials") * total * torch.exp(top)
            whole = whole + total * torch.exp(top)
        return out, whole

    def row_sum(self, weights: Tensor, later: Tensor) -> Tensor:
        """Of rounded weights as tensor cores add them up, where they would truncate."""
        rounded = self.arithmetic.rowsum == "rounded" and self.arithmetic.accumulate == "fp32"
        if rounded and self.arithmetic.truncates("accumulate", self.problem.dtype, self.device):
            ones = weights.new_ones((*weights.shape[:2], weights.shape[-1], 1))
            return self.product(from_keys, weights * later, ones, "accumulate")
        return self.rounding.total(weights * later, self.work)

    def weighted(
        self, p: Tensor, v: Tensor, later: Tensor | float = 1.0
    ) -> Tensor:  # P V, tiles rescaled to the last maximum
        scale = self.coded.v_scale if self.coded else v.new_ones(())
        out = self.product(
            from_keys, self.operand(p, "accumulate") * later, v / scale, "accumulate"
        )
        return out * (scale.unsqueeze(2) if scale.dim() else scale)

    def output(self, out: Tensor, total: Tensor) -> Tensor:
        """Stored, V's mean added where a row sees anything."""
        if self.coded:
            out = out + torch.where(total == 0, 0.0, self.coded.v_mean.unsqueeze(2))
        return self.store(out, "output")

    def lse(self, row_max: Tensor, total: Tensor) -> Tensor:  # stored in FP32
        return self.working(row_max + self.function("log", total.log()))

    def ds(self, b: Block, out: Tensor, p: Tensor) -> Tensor:
        v = b.v + self.coded.v_mean if self.coded else b.v
        dp = self.product(by_key, self.operand(b.do, "scores"), self.operand(v, "scores"), "scores")
        dp = self.store(dp, "stored_scores")
        if self.arithmetic.delta == "product":
            product = self.stored(self.working(p * dp), self.problem.dtype)
            return self.working(product - self.working(p * self.rounding.total(product, self.work)))
        delta = self.rounding.total(
            b.do * out if self.arithmetic.delta == "out" else p * dp, self.work
        )
        return self.working(self.store(p, "ds_probs") * self.working(dp - delta))

    def scaled(self, ds: Tensor, slope: Tensor) -> Tensor:
        """Scale * slope * dS as it enters the products: rounded once, or after each step that is
        written to memory.
        """
        cap, scale = self.problem.softcap, self.problem.softmax_scale
        if self.arithmetic.format("stored_scores", self.problem.dtype) in ("fp32", "fp64"):
            inside, outside = (scale, 1.0) if self.arithmetic.scaled_dscores else (1.0, scale)
            ds = self.working(cap * ds) / cap if cap else ds
            return outside * self.store(inside * ds * slope, "dscores")
        ds = self.store(ds, "dscores")
        if cap:
            ds = self.store(
                self.store(self.store(cap * ds, "dscores") * slope, "dscores") / cap, "dscores"
            )
        return self.store(scale * ds, "dscores")

    def add_rows(self, total: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        """Total + weights^T rows, kept apart for each query head: [B,Hk,G,K,D]. Where partial sums
        are spilled, one running sum goes through the tiles of all heads of the group: [B,Hk,1,K,D].
        So it does where it is truncated and the group is added up in FP32: how much is cut depends
        on how large the sum is.
        """
        weights, rows = self.operand(weights, "accumulate"), self.operand(rows, "accumulate")
        heads = [(weights[:, :, g : g + 1], rows[:, :, g : g + 1]) for g in range(weights.shape[2])]
        if not self.arithmetic.spill and self._one_sum:
            return total + self.product(to_keys, weights, rows, "accumulate").unsqueeze(2)
        if not self.arithmetic.spill:
            return total + torch.stack(
                [self.product(to_keys, w, r, "accumulate") for w, r in heads], 2
            )
        for w, r in heads:
            for start in range(0, weights.shape[3], self.arithmetic.spill[0]):
                part = slice(start, start + self.arithmetic.spill[0])
                partial = self.product(
                    to_keys, w[:, :, :, part], r[:, :, :, part], "accumulate"
                ).unsqueeze(2)
                total = self.store(total + self.added(partial), "output")
        return total

    def add_keys(self, weights: Tensor, keys: Tensor) -> Tensor:
        """Weights times keys: [B,Hk,G,n,D]; stored between tiles where declared."""
        weights, keys = self.operand(weights, "accumulate"), self.operand(keys, "accumulate")
        step = self.arithmetic.spill[1] if self.arithmetic.spill else weights.shape[4]
        total = weights.new_zeros((*weights.shape[:4], keys.shape[-1]))
        for start in range(0, weights.shape[4], max(1, step)):
            part = slice(start, start + step)
            partial = self.product(from_keys, weights[..., part], keys[:, :, part], "accumulate")
            total = self.store(total + self.added(partial), "output")
        return total

    def added(self, partial: Tensor) -> Tensor:
        """A part as it is added to a running sum that is stored."""
        return self.store(partial, "output") if self.arithmetic.atomic else partial

    def bias_gradient(self, ds: Tensor, shape: Sequence[int]) -> Tensor:
        """DS [B,Hk,G,n,K] -> rows of dbias [B|1,H|1,n,K]: summed over what the bias is broadcast
        in, stored.
        """
        parts = ungrouped(self.store(ds, "dscores"))
        if shape[1] == 1:
            # one bias for heads of different masks has a gradient for each of them first
            own = self.problem.mask.per_head and parts.shape[1] > 1
            parts = (self.store(parts, "batch_sum") if own else parts).sum(1, keepdim=True)
        if shape[0] == 1 and parts.shape[0] > 1:
            parts = self.store(parts, "batch_sum").sum(0, keepdim=True)
        return self.store(parts, "output")

    def group_sum(self, x: Tensor) -> Tensor:  # [B,Hk,G,K,D] -> [B,Hk,K,D], stored
        return self.store((self.store(x, "group_sum") if x.shape[2] > 1 else x).sum(2), "output")


def running_max(s: Tensor, row_max: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """(the maximum that was in force when P of each key was rounded, how many more times the sums
    are rescaled): [.., n, K], or [.., n, 1] where it is the row's.
    """
    if not s.shape[-1] or (arithmetic.tile == 0 and arithmetic.splits == 1):
        return row_max, torch.zeros((), device=s.device)
    parts, times = [], []
    for share in _shares(s.shape[-1], arithmetic):
        part = s[..., share]
        tiles = part.split(arithmetic.tile or part.shape[-1], -1)
        tops = torch.cat([tile.amax(-1, keepdim=True) for tile in tiles], -1).cummax(-1).values
        parts += [
            top.expand(tile.shape) for top, tile in zip(tops.split(1, -1), tiles, strict=True)
        ]
        left = len(tiles) + (arithmetic.splits > 1)  # a merge is one more
        times += [n for at, tile in enumerate(tiles, 1) for n in [left - at] * tile.shape[-1]]
    held = torch.cat(parts, -1)
    return torch.where(held == -torch.inf, row_max, held), torch.tensor(times, device=s.device)


def _shares(len_k: int, arithmetic: Arithmetic) -> list[slice]:
    """The keys of each split: whole tiles."""
    tile = arithmetic.tile or 1
    step = -(-len_k // (arithmetic.splits * tile)) * tile
    return [slice(start, start + step) for start in range(0, len_k, max(1, step))]


def emulate(
    problem: Problem,
    inputs: Inputs,
    arithmetic: Arithmetic,
    rounding: Rounding | None = None,
    blocks: Iterable[Block] | None = None,
) -> Exact:
    """out, lse and, where problem.grads, the gradients that an honest kernel of this arithmetic
    gives.

    `rounding`: to nearest by default. `blocks`: the exact softmax of these inputs, if at hand and
    the kernel does not quantise.
    """
    coded, how, shapes = None, arithmetic.quantised, problem.shapes
    if how:
        coded = quantised(problem, inputs, how)
        inputs = coded.inputs
        if not problem.grads:
            problem, inputs = widened(problem, coded, how)
    emulator = _Emulator(problem, arithmetic, rounding or Nearest(), inputs.q.device.type, coded)
    result = {
        name: torch.zeros(shapes[name], dtype=torch.float64, device=inputs.q.device)
        for name in ("out", "lse")
    }
    if problem.grads:
        result |= {
            "d" + name: inputs.q.new_zeros(shapes[name], dtype=torch.float64)
            for name in ("q", "k", "v", "bias")
            if name in shapes
        }
    dk = dv = torch.zeros((), dtype=torch.float64, device=inputs.q.device)
    for block in blocks or float64.blocks(problem, inputs):
        out, lse, p, slope = emulator.forward(block)
        result["out"][:, :, block.rows], result["lse"][:, :, block.rows] = (
            ungrouped(out),
            ungrouped(lse).squeeze(-1),
        )
        if problem.grads:
            ds = emulator.ds(block, out, p)
            if "dbias" in result:
                result["dbias"][:, :, block.rows] = emulator.bias_gradient(
                    ds, result["dbias"].shape
                )
            ds = emulator.scaled(ds, slope)
            result["dq"][:, :, block.rows] = ungrouped(emulator.add_keys(ds, block.k))
            dk = emulator.add_rows(dk, ds, block.q)
            dv = emulator.add_rows(
                dv, p if arithmetic.normalized_probs else emulator.store(p, "probs"), block.do
            )
    if problem.grads and problem.len_q:
        result |= {"dk": emulator.group_sum(dk), "dv": emulator.group_sum(dv)}
    return Exact(**result, provenance="emulation")
