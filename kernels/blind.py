"""Ten known-wrong kernels of kinds that mutants.py and mutant_programs.py do not have, written by somebody who had not seen what
the suite draws or checks, after it was last changed. Nothing was changed for them; whoever changes the suite writes ten others.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from verify.kernels.emulated import Program
from verify.kernels.emulated_memory import STATE, Memory


class NextHeadsRows(Program):
    """The backward masks Q past the last row, not dO and the LSE: the next head's first rows are there, and dV takes them in."""

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, do: Tensor, *more
    ) -> tuple[Tensor | None, ...]:
        """With P = e^(0 - LSE) of those; right if the rows are in tiles."""
        dq, dk, dv, dbias = super().backward(q, k, v, bias, out, lse, do, *more)
        assert dv is not None
        p, beyond = self.problem, -self.problem.len_q % self.variant.rows
        probs = torch.exp(-lse.masked_fill(lse == -torch.inf, 0.0))[..., None]
        taken = (probs * do.float()).flatten(0, 1)[:, :beyond].sum(1).roll(-1, 0)
        taken[-1] = 0.0
        return dq, dk, (dv.float() + taken.view(p.batch, p.heads_kv, p.group, 1, p.dim_v).sum(2)).to(dv.dtype), dbias


class SequenceOfTile(Program):
    """Of packed sequences, a tile of rows is taken for the sequence of its first row: right if they begin at tiles."""

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """[1,1,rows,keys] where it goes wrong."""
        p, size = self.problem, self.variant.rows
        if p.mask_as != "rule" or p.mask.names != {"blocks"}:
            return super().visible(rows, keys)
        first = (rows // size * size)[:, None]
        return (p.mask.visible(first, keys, p.len_q, p.len_k, lift=lambda n: n[0]) & (keys < p.len_k))[None, None]


class GradientLikeQ(Program):
    """dQ is allocated with the order of Q's strides (`empty_like`), and stored as if it were contiguous."""

    def backward(self, q: Tensor, *more) -> tuple[Tensor | None, ...]:
        """Scrambled where Q is a transposed view."""
        dq, *others = super().backward(q, *more)
        assert dq is not None
        made = torch.empty_like(q)
        made.as_strided((made.numel(),), (1,)).copy_(dq.flatten())
        return made, *others


class ColumnALiBi(Program):
    """Under a causal rule ALiBi is slope * key for -slope * distance: the same in every row but for the LSE, which moves."""

    def scores(self, q: Tensor, k: Tensor, bias: Memory | None, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """With the softmax that it should have."""
        p = self.problem
        if self.slopes is None or p.mask_as != "rule" or "causal_lower_right" not in p.mask.names:
            return super().scores(q, k, bias, rows, keys)
        s, slope = Program.scores(replace(self, slopes=None), q, k, bias, rows, keys)
        return s + self.slopes[:, None, None] * keys, slope


class ZeroScale(Program):
    """FP8: a head of zeros (or of hidden keys alone) has the scale 0, by which it is divided."""

    def quantised(self, x: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """With 0 / 0 there."""
        narrow, scale = super().quantised(x, seen)
        return narrow.masked_fill((narrow == 0).flatten(2).all(-1)[..., None, None], torch.nan), scale


class UnscaledMaximum(Program):
    """The maximum is of Q K^T before the scale, as if that were never negative: then it is the minimum, and e^x overflows."""

    def walk(self, q: Tensor, K: Memory, V: Memory, B: Memory | None, rows: Tensor, starts: list[int]) -> tuple[Tensor, ...]:
        """With a negative scale and nothing added to the scores; right until P is beyond its format."""
        if self.scale >= 0 or self.softcap or B is not None or self.slopes is not None or not starts:
            return super().walk(q, K, V, B, rows, starts)
        keys = torch.cat([torch.arange(start, start + self.variant.keys) for start in starts])
        s, _ = self.scores(q, K.load(self.kv_head, keys, torch.arange(self.problem.dim_qk)), B, rows, keys)
        s = s.masked_fill(~self.visible(rows, keys), torch.inf)
        base = s.amin(-1, keepdim=True)
        w = self.exp(s - base.masked_fill(base == torch.inf, 0.0)).masked_fill(s == torch.inf, 0.0)
        acc = self.narrow(w) @ V.load(self.kv_head, keys, torch.arange(self.problem.dim_v))
        return acc, w.sum(-1, keepdim=True), base.masked_fill(base == torch.inf, -torch.inf)


class QuotientTanh(Program):
    """The softcap's tanh is (e^2x - 1) / (e^2x + 1): inf / inf from x = 44.4 up, fine as far below 0 as one likes."""

    def scores(self, q: Tensor, k: Tensor, bias: Memory | None, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """NaN where the score is more than 44 softcaps."""
        s, slope = super().scores(q, k, bias, rows, keys)
        if not self.softcap:
            return s, slope
        raw, _ = Program.scores(replace(self, softcap=0.0, slopes=None), q, k, None, rows, keys)
        over = torch.exp(2 * raw / self.softcap) == torch.inf
        return s.masked_fill(over, torch.nan), slope.masked_fill(over, torch.nan)


class UnwrittenPart(Program):
    """Four parts of the keys, by a workspace: one with nothing to do is not written, and is merged as an earlier call left it."""

    def attend(self, *arguments) -> list[tuple[Tensor, ...]]:
        """As the workspace has it."""
        parts = Program.attend(replace(self, variant=replace(self.variant, splits=4)), *arguments)
        keys = [("part", n, int(arguments[4][0]), part[0].shape) for n, part in enumerate(parts)]
        STATE.update({key: part for key, part in zip(keys, parts, strict=True) if (part[1] != 0).any()})
        return [STATE.get(key, part) for key, part in zip(keys, parts, strict=True)]


class TunedInPlace(Program):
    """The first backward of a padded head dim is run three times to tune it, and dQ, which is added up, is not zeroed between."""

    def backward(self, *arguments) -> tuple[Tensor | None, ...]:
        """Three times dQ, once."""
        dq, *others = super().backward(*arguments)
        assert dq is not None
        runs = STATE.setdefault(("tuned", (self.problem.dim_qk - 1).bit_length()), [3, 1])
        return dq * (runs.pop(0) if len(runs) > 1 else 1), *others


class SwappedBack(Program):
    """With one query, a group's heads are its rows; the LSE comes back as [group, key head] for [key head, group]."""

    def forward(self, *arguments) -> tuple[Tensor, Tensor]:
        """The LSE of other heads; out is right."""
        p, (out, lse) = self.problem, super().forward(*arguments)
        return out, lse.unflatten(1, (p.heads_kv, p.group)).transpose(1, 2).flatten(1, 2) if p.len_q == 1 else lse


BLIND: dict[str, tuple[str, str, type[Program]]] = {
    "dO past the end is the next head's": ("B", "gradients", NextHeadsRows),
    "sequence of a tile's first row": ("C", "one-hot", SequenceOfTile),
    "dQ stored by Q's order": ("D", "layout-gradients", GradientLikeQ),
    "causal ALiBi by column": ("G", "oracle", ColumnALiBi),
    "FP8 scale of zeros": ("I", "uniform", ZeroScale),
    "maximum before a negative scale": ("J", "oracle", UnscaledMaximum),
    "tanh by a quotient": ("K", "oracle", QuotientTanh),
    "part not written": ("L", "call-sequence", UnwrittenPart),
    "tuned without zeroing dQ": ("L", "gradients", TunedInPlace),
    "LSE of packed heads swapped": ("M", "grouped-heads", SwappedBack),
}
"""Class, the property that must catch it, and how it goes wrong; those of class I are in FP8."""
