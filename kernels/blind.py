"""Ten known-wrong kernels of kinds that mutants.py and mutant_programs.py do not have, written by somebody who had not seen what
the suite draws or checks, after it was last changed. Nothing was changed for them; whoever changes the suite writes ten others.

The last was expected of call-sequence, which makes no backward.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from verify.kernels.emulated import Program
from verify.kernels.emulated_memory import CHANCE, STATE, Memory


class EmptyFirstRow(Program):
    """A tile of rows whose first row sees no key is taken for empty as a whole."""

    def attend(
        self, Q: Memory, K: Memory, V: Memory, B: Memory | None, rows: Tensor, s_scale: Tensor
    ) -> list[tuple[Tensor, ...]]:
        """Nothing, of such a tile."""
        blind = ~self.visible(rows[:1], torch.arange(self.problem.len_k)).any(-1, keepdim=True)
        parts = super().attend(Q, K, V, B, rows, s_scale)
        return [(a.masked_fill(blind, 0.0), n.masked_fill(blind, 0.0), m.masked_fill(blind, -torch.inf)) for a, n, m in parts]


class EndsWhereHidden(Program):
    """The walk over the keys ends at the first tile that is hidden as a whole (`break` for `continue`): right if causal."""

    def walk(self, q: Tensor, K: Memory, V: Memory, B: Memory | None, rows: Tensor, starts: list[int]) -> tuple[Tensor, ...]:
        """As far as that."""
        hidden = [not self.visible(rows, torch.arange(start, start + self.variant.keys)).any() for start in starts]
        return super().walk(q, K, V, B, rows, starts[: hidden.index(True)] if any(hidden) else starts)


class PackedHeads(Program):
    """The heads of a group are packed into rows, head by head; the causal diagonal takes them for packed row by row."""

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """[1,H,rows,keys] where it goes wrong."""
        p = self.problem
        if p.mask_as != "rule" or not p.mask.names <= {"causal_lower_right", "causal_upper_left"}:
            return super().visible(rows, keys)
        taken = ((self.heads % p.group)[:, None] * p.len_q + rows) // p.group
        return p.mask.visible(taken[None, :, :, None], keys, p.len_q, p.len_k, lift=lambda n: n[0]) & (keys < p.len_k)


class DistanceInBytes(Program):
    """ALiBi's distance is kept in 8 bits with a sign: 128 keys to the left are as far as 128, 129 as far as 127."""

    def scores(self, q: Tensor, k: Tensor, bias: Memory | None, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """With the wrapped distance."""
        s, slope = Program.scores(replace(self, slopes=None), q, k, bias, rows, keys)
        if self.slopes is None:
            return s, slope
        far = rows[:, None] + self.problem.len_k - self.problem.len_q - keys
        return s - self.slopes[:, None, None] * ((far + 128) % 256 - 128).abs(), slope


class EarlyLSE(Program):
    """Now and then a tile's LSE is stored before the row sum has been added up over the four threads of a row; out is not."""

    def normalised(self, acc: Tensor, total: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """With the LSE of a quarter of the sum."""
        out, lse = super().normalised(acc, total, top)
        return out, lse - math.log(4) if torch.rand((), generator=CHANCE) < 0.1 else lse


class HiddenPart(Program):
    """The keys are in two parts; one that a row sees nothing of has the LSE 0 in the merge, unless no row of a tile sees any."""

    def attend(self, *arguments) -> list[tuple[Tensor, ...]]:
        """In two parts."""
        return Program.attend(replace(self, variant=replace(self.variant, splits=2)), *arguments)

    def merged(self, parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
        """With the weight e^0; rows that see no key at all are right."""
        parts = [part for part in parts if (part[1] != 0).any()] or parts[:1]
        some = torch.stack([total != 0 for _, total, _ in parts]).any(0)
        gaps = [(total == 0) & some for _, total, _ in parts]
        return super().merged(
            [(a, n.masked_fill(g, 1.0), m.masked_fill(g, 0.0)) for (a, n, m), g in zip(parts, gaps, strict=True)]
        )


class InterleavedGroups(Program):
    """dK and dV are summed over query heads h, h + heads_kv, ...; the forward's groups are right."""

    def backward(self, q: Tensor, k: Tensor, v: Tensor, *more) -> tuple[Tensor | None, ...]:
        """By way of a key head for every query head; the same with one key head, or as many as query heads."""
        p = self.problem
        alone = replace(self, problem=p.but(heads_kv=p.heads_q))
        dq, dk, dv, dbias = Program.backward(alone, q, k[:, self.kv_head], v[:, self.kv_head], *more)
        summed = (t.float().unflatten(1, (p.group, p.heads_kv)).sum(1).to(t.dtype) for t in (dk, dv) if t is not None)
        return dq, *summed, dbias


class LargestSigned(Program):
    """FP8: a head's scale is from its largest value, not its largest magnitude; what is further below 0 saturates."""

    def largest(self, x: Tensor) -> Tensor:
        """Of each head [B,H,1,1]."""
        return x.amax((2, 3), keepdim=True) if x.numel() else super().largest(x)


class SlopeOfBiased(Program):
    """The softcap's slope is 1 - (S / softcap)^2 of the S that has its bias or ALiBi already."""

    def scores(self, *arguments) -> tuple[Tensor, Tensor]:
        """The same without a bias; only the backward uses it."""
        s, slope = super().scores(*arguments)
        return s, 1 - (s / self.softcap) ** 2 if self.softcap else slope


class DirtyAccumulator(Program):
    """dQ is added up in a buffer that is kept for each shape, and is zeroed only when it is made."""

    def backward(self, *arguments) -> tuple[Tensor | None, ...]:
        """On top of what the calls before have left."""
        dq, *others = super().backward(*arguments)
        assert dq is not None
        kept = STATE.setdefault(("dq", dq.shape), torch.zeros(dq.shape)).add_(dq)
        return kept.to(dq.dtype, copy=True), *others


BLIND: dict[str, tuple[str, str, type[Program]]] = {
    "tile with an empty first row": ("A", "oracle", EmptyFirstRow),
    "walk ends at a hidden tile": ("C", "one-hot", EndsWhereHidden),
    "causal rows of packed heads": ("D", "grouped-heads", PackedHeads),
    "ALiBi's distance in 8 bits": ("E", "oracle", DistanceInBytes),
    "LSE stored too early": ("F", "repeat", EarlyLSE),
    "hidden part weighs 1": ("G", "oracle", HiddenPart),
    "dK and dV of interleaved groups": ("H", "gradients", InterleavedGroups),
    "FP8 scale of the largest value": ("I", "oracle", LargestSigned),
    "softcap's slope after the bias": ("J", "gradients", SlopeOfBiased),
    "dQ's buffer not zeroed": ("L", "cotangent-scaling", DirtyAccumulator),
}
"""Class, the property that must catch it, and how it goes wrong; those of class I are in FP8."""
