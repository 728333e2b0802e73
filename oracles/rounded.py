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
from verify.exact import Block, Exact, by_key, from_keys, grouped, to_keys, ungrouped
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
        s = self.store(self.problem.softmax_scale * self.product(by_key, b.q, b.k, "scores"), "stored_scores")
        if cap := self.problem.softcap:
            s = self.store(cap * self.store(torch.tanh(self.store(s / cap, "stored_scores")), "stored_scores"), "stored_scores")
        if b.bias is not None:
            s = self.store(s + b.bias, "stored_scores")
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
            return self.store(self.product(from_keys, p, b.v, "accumulate"), "output"), row_max + total.log(), p
        held = self.store(weights, "probs")
        total = held.sum(-1, keepdim=True) if self.arithmetic.rowsum == "rounded" else total
        out = self.product(from_keys, held, b.v, "accumulate") / total.masked_fill(total == 0, 1.0)
        lse = rounded(row_max + total.log(), "fp64" if self.problem.dtype == "fp64" else "fp32")
        return self.store(out, "output"), lse, torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0))

    def ds(self, b: Block, out: Tensor, p: Tensor) -> Tensor:
        dp = self.store(self.product(by_key, b.do, b.v, "scores"), "stored_scores")
        delta = (b.do * out).sum(-1, keepdim=True) if self.arithmetic.delta == "out" else (p * dp).sum(-1, keepdim=True)
        return p * (dp - delta)

    def dk_dv(self, weights: Tensor, rows: Tensor) -> Tensor:
        """A sum over rows, kept apart for each query head of the group: [B,Hk,G,K,D]"""
        heads = [self.product(to_keys, weights[:, :, g : g + 1], rows[:, :, g : g + 1], "accumulate") for g in range(weights.shape[2])]
        return torch.stack(heads, 2)

    def group_sum(self, x: Tensor) -> Tensor:
        """[B,Hk,G,K,D] -> [B,Hk,K,D], stored"""
        fmt = self.arithmetic.format("group_sum", self.problem.dtype)
        return self.store((x if fmt in ("fp32", "fp64") else rounded(x, fmt)).sum(2), "output")


def emulate(problem: Problem, inputs: Inputs, arithmetic: Arithmetic) -> Exact:
    """out, lse and, where problem.grads, the gradients that an honest kernel of this arithmetic gives: float64 holding rounded values."""
    emulator, device = _Emulator(problem, arithmetic), inputs.q.device
    parts: dict[str, list[Tensor]] = {"out": [], "lse": [], "dq": []}
    sums = {"dk": torch.zeros(()), "dv": torch.zeros(())}
    dbias = torch.zeros(problem.shapes["bias"], dtype=torch.float64, device=device) if "bias" in problem.shapes else None
    for block in dense.blocks(problem, inputs):
        out, lse, p = emulator.forward(block)
        parts["out"].append(ungrouped(out))
        parts["lse"].append(ungrouped(lse).squeeze(-1))
        if problem.grads:
            ds = emulator.ds(block, out, p)
            if dbias is not None:
                dense.add_bias_gradient(problem, dbias, block.rows, ds)
            ds = emulator.store(ds * (1 - (block.capped / problem.softcap) ** 2) if problem.softcap else ds, "dscores")
            parts["dq"].append(ungrouped(emulator.store(problem.softmax_scale * emulator.product(from_keys, ds, block.k, "accumulate"), "output")))
            sums["dk"] = sums["dk"].to(device) + problem.softmax_scale * emulator.dk_dv(ds, block.q)
            sums["dv"] = sums["dv"].to(device) + emulator.dk_dv(emulator.store(p, "probs"), block.do)
    joined = {name: torch.cat(pieces, 2) if pieces else torch.zeros(problem.shapes[name[-1] if name == "dq" else name], dtype=torch.float64) for name, pieces in parts.items()}
    if not problem.grads:
        return Exact(joined["out"], joined["lse"], provenance="emulation")
    grads = {n: emulator.group_sum(t) if t.dim() else torch.zeros(problem.shapes[n[1:]], dtype=torch.float64) for n, t in sums.items()}
    return Exact(**joined, **grads, dbias=dbias, provenance="emulation")
