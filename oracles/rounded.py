"""The honest low-precision emulation: float64 attention with a rounding exactly where an Arithmetic puts one.

What an honest kernel of that arithmetic is expected to be off by on these very inputs is the distance of this from the exact
answer. A product declared as FP32 (TF32) accumulation is a real FP32 product (of operands rounded to TF32).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verify.arithmetic import Arithmetic
from verify.case import TORCH_DTYPES, Inputs
from verify.exact import Block, Exact, by_key, from_keys, to_keys, ungrouped
from verify.oracles import dense
from verify.problem import Problem


def to_tf32(x: Tensor) -> Tensor:
    """Round to nearest, ties to even, at 10 stored bits of significand."""
    bits = x.to(torch.float32).view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def rounded(x: Tensor, fmt: str) -> Tensor:
    """x as float64, rounded to this format; overflow becomes infinite as it does in the format."""
    return (to_tf32(x) if fmt == "tf32" else x.to(TORCH_DTYPES[fmt])).to(torch.float64)


@dataclass(frozen=True)
class _Emulator:
    problem: Problem
    arithmetic: Arithmetic

    def store(self, x: Tensor, field: str) -> Tensor:
        return rounded(x, self.arithmetic.format(field, self.problem.dtype))

    def product(self, form, a: Tensor, b: Tensor, field: str) -> Tensor:
        """`form` (by_key, from_keys, to_keys) of a and b, accumulated in the declared format."""
        fmt = self.arithmetic.format(field, self.problem.dtype)
        if fmt == "fp64":
            return form(a, b)
        a, b = (to_tf32(a), to_tf32(b)) if fmt == "tf32" else (a.float(), b.float())
        return form(a, b).to(torch.float64)

    def scores(self, b: Block) -> Tensor:
        product = self.store(self.product(by_key, b.q, b.k, "scores"), "stored_scores")
        s = self.store(self.problem.softmax_scale * product, "stored_scores")
        if cap := self.problem.softcap:
            s = self.store(cap * self.store(torch.tanh(self.store(s / cap, "stored_scores")), "stored_scores"), "stored_scores")
        if b.bias is not None:
            s = self.store(s + self.store(b.bias, "stored_scores"), "stored_scores")
        return s.masked_fill(~b.visible, -torch.inf)

    def forward(self, b: Block) -> tuple[Tensor, Tensor, Tensor]:
        """(out, lse, P as the backward sees it)"""
        s = self.scores(b)
        row_max = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -torch.inf)
        row_max = row_max.masked_fill(row_max == -torch.inf, 0.0)
        weights = torch.exp(s - row_max)
        total = weights.sum(-1, keepdim=True)
        if self.arithmetic.normalized_probs:
            p = self.store(weights / total.masked_fill(total == 0, 1.0), "probs")
            return self.store(self.product(from_keys, p, b.v, "accumulate"), "output"), self.lse(row_max, total), p
        held = self.store(weights, "probs")
        total = held.sum(-1, keepdim=True) if self.arithmetic.rowsum == "rounded" else total
        out = self.product(from_keys, held, b.v, "accumulate") / total.masked_fill(total == 0, 1.0)
        lse = self.lse(row_max, total)
        return self.store(out, "output"), lse, torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0))

    def lse(self, row_max: Tensor, total: Tensor) -> Tensor:
        """The logarithm of the row sum, stored in FP32."""
        return rounded(row_max + total.log(), "fp64" if self.problem.dtype == "fp64" else "fp32")

    def ds(self, b: Block, out: Tensor, p: Tensor) -> Tensor:
        dp = self.store(self.product(by_key, b.do, b.v, "scores"), "stored_scores")
        delta = (b.do * out).sum(-1, keepdim=True) if self.arithmetic.delta == "out" else (p * dp).sum(-1, keepdim=True)
        return self.store(p, "ds_probs") * (dp - delta)

    def scaled(self, ds: Tensor) -> Tensor:
        """Scale * dS: a factor of the sums that follow, or a step of its own where every step is written to memory."""
        scaled = self.problem.softmax_scale * ds
        stores = self.arithmetic.format("stored_scores", self.problem.dtype) not in ("fp32", "fp64")
        return self.store(scaled, "dscores") if stores else scaled

    def add_rows(self, total: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        """Total + weights^T rows, kept apart for each query head: [B,Hk,G,K,D]. Where partial sums are spilled, one running sum
        goes through the tiles of all heads of the group: [B,Hk,1,K,D].
        """
        heads = [(weights[:, :, g : g + 1], rows[:, :, g : g + 1]) for g in range(weights.shape[2])]
        if not self.arithmetic.spill:
            return total + torch.stack([self.product(to_keys, w, r, "accumulate") for w, r in heads], 2)
        for w, r in heads:
            for start in range(0, weights.shape[3], self.arithmetic.spill[0]):
                part = slice(start, start + self.arithmetic.spill[0])
                partial = self.product(to_keys, w[:, :, :, part], r[:, :, :, part], "accumulate").unsqueeze(2)
                total = self.store(total + partial, "output")
        return total

    def add_keys(self, weights: Tensor, keys: Tensor) -> Tensor:
        """Weights times keys: [B,Hk,G,n,D]; stored between tiles where declared."""
        step = self.arithmetic.spill[1] if self.arithmetic.spill else weights.shape[4]
        total = weights.new_zeros((*weights.shape[:4], keys.shape[-1]))
        for start in range(0, weights.shape[4], max(1, step)):
            part = slice(start, start + step)
            total = self.store(total + self.product(from_keys, weights[..., part], keys[:, :, part], "accumulate"), "output")
        return total

    def group_sum(self, x: Tensor) -> Tensor:
        """[B,Hk,G,K,D] -> [B,Hk,K,D], stored"""
        fmt = self.arithmetic.format("group_sum", self.problem.dtype)
        return self.store((x if fmt in ("fp32", "fp64") else rounded(x, fmt)).sum(2), "output")


def emulate(problem: Problem, inputs: Inputs, arithmetic: Arithmetic) -> Exact:
    """out, lse and, where problem.grads, the gradients that an honest kernel of this arithmetic gives."""
    emulator, shapes = _Emulator(problem, arithmetic), problem.shapes
    result = {name: torch.zeros(shapes[name], dtype=torch.float64, device=inputs.q.device) for name in ("out", "lse")}
    if problem.grads:
        result |= {
            "d" + name: inputs.q.new_zeros(shapes[name], dtype=torch.float64)
            for name in ("q", "k", "v", "bias")
            if name in shapes
        }
    dk = dv = torch.zeros((), dtype=torch.float64, device=inputs.q.device)
    for block in dense.blocks(problem, inputs):
        out, lse, p = emulator.forward(block)
        result["out"][:, :, block.rows], result["lse"][:, :, block.rows] = ungrouped(out), ungrouped(lse).squeeze(-1)
        if problem.grads:
            ds = emulator.ds(block, out, p)
            if "dbias" in result:
                dense.add_bias_gradient(problem, result["dbias"], block.rows, ds)
            ds = emulator.scaled(
                emulator.store(ds * (1 - (block.capped / problem.softcap) ** 2) if problem.softcap else ds, "dscores")
            )
            result["dq"][:, :, block.rows] = ungrouped(emulator.add_keys(ds, block.k))
            dk = emulator.add_rows(dk, ds, block.q)
            dv = emulator.add_rows(dv, emulator.store(p, "probs"), block.do)
    if problem.grads and problem.len_q:
        result |= {"dk": emulator.group_sum(dk), "dv": emulator.group_sum(dv)}
    return Exact(**result, provenance="emulation")
