"""Known-wrong kernels whose backward alone is wrong, and is more than a switch in the emulated
one.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from verify.kernels.mutants.forward import same_call
from verify.kernels.mutants.memory import CHANCE, STATE
from verify.kernels.mutants.simulator import Program
from verify.spec.masks import Mask


class NarrowerBackward(Program):
    """The backward's window ends one key earlier on the left than the forward's."""

    def backward(self, *arguments) -> tuple[Tensor | None, ...]:
        """With another mask."""
        name, sides = self.problem.mask.parts[0]
        if name == "window" and sides[0] > 0 and len(self.problem.mask.parts) == 1:
            narrower = self.problem.but(mask=Mask((("window", (sides[0] - 1, sides[1])),)))
            return Program.backward(replace(self, problem=narrower), *arguments)
        return super().backward(*arguments)


class UnseenKeys(Program):
    """dK and dV of keys that no row sees are left as the memory was."""

    def backward(self, *arguments) -> tuple[Tensor | None, ...]:
        """Nothing stored there."""
        p, (dq, *both, dbias) = self.problem, super().backward(*arguments)
        seen = self.visible(torch.arange(p.len_q), torch.arange(p.len_k))
        nobody = ~seen.any(2).any(1)  # [B|1,K]
        unseen = nobody[:, None, :, None]
        return dq, *(t if t is None else t.masked_fill(unseen, torch.nan) for t in both), dbias


class NarrowDelta(Program):
    """delta = rowsum(do * out) sums over dim_qk columns where dim_v is more."""

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, *more
    ) -> tuple[Tensor | None, ...]:
        """Without the others."""
        some = torch.arange(self.problem.dim_v) < self.problem.dim_qk
        return super().backward(q, k, v, bias, out * some, *more)


class RowsRoundedUp(Program):
    """The backward of a causal mask; see below."""

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """From the first whole tile of rows on that begins at the tile of keys' diagonal or
        later.
        """
        p, size = self.problem, self.variant.rows
        first = max(int(keys[0]) - (p.len_k - p.len_q), 0)
        late = rows >= -(-first // size) * size
        return super().visible(rows, keys) & (
            late[:, None] | (str(p.mask) != "causal_lower_right") | (p.mask_as != "rule")
        )


class LateRows(Program):
    """The causal backward's first row for a tile of keys is rounded up to a tile, not down: right
    if the offset is in tiles.
    """

    def backward(self, *arguments) -> tuple[Tensor | None, ...]:
        """Without the rows before."""
        return same_call(RowsRoundedUp, self).backward(*arguments)


class BinaryGradient(Program):
    """The LSE's gradient is taken for that of the LSE in base 2, which the kernel keeps."""

    def backward(self, *arguments) -> tuple[Tensor | None, ...]:
        """Too small by log 2."""
        q, k, v, bias, out, lse, do, dlse, needs = arguments
        return super().backward(q, k, v, bias, out, lse, do, dlse * math.log(2), needs)


class InterleavedGroups(Program):
    """dK and dV are summed over query heads h, h + heads_kv, ...; the forward's groups are
    right.
    """

    def backward(self, q: Tensor, k: Tensor, v: Tensor, *more) -> tuple[Tensor | None, ...]:
        """By way of a key head for every query head; the same with one key head, or as many as
        query heads.
        """
        p = self.problem
        alone = replace(self, problem=p.but(heads_kv=p.heads_q))
        dq, dk, dv, dbias = Program.backward(
            alone, q, k[:, self.kv_head], v[:, self.kv_head], *more
        )
        summed = (
            t.float().unflatten(1, (p.group, p.heads_kv)).sum(1).to(t.dtype)
            for t in (dk, dv)
            if t is not None
        )
        return dq, *summed, dbias


class SlopeOfBiased(Program):
    """The softcap's slope is 1 - (S / softcap)^2 of the S that has its bias or ALiBi already."""

    def scores(self, *arguments) -> tuple[Tensor, Tensor]:
        """The same without a bias; only the backward uses it."""
        s, slope = super().scores(*arguments)
        return s, 1 - (s / self.softcap) ** 2 if self.softcap else slope


class DirtyAccumulator(Program):
    """dQ is added up in a buffer that is kept for each shape, and is zeroed only when it is
    made.
    """

    def backward(self, *arguments) -> tuple[Tensor | None, ...]:
        """On top of what the calls before have left."""
        dq, *others = super().backward(*arguments)
        assert dq is not None
        kept = STATE.setdefault(("dq", dq.shape), torch.zeros(dq.shape)).add_(dq)
        return kept.to(dq.dtype, copy=True), *others


class LSEOfTheLastForward(Program):
    """The backward reads the LSE in a workspace of its shape, where the last forward of such a
    shape has left it.
    """

    def forward(self, *arguments) -> tuple[Tensor, Tensor]:
        """Leaves it there."""
        out, lse = super().forward(*arguments)
        STATE["workspace", lse.shape] = lse.clone()
        return out, lse

    def backward(self, *arguments) -> tuple[Tensor | None, ...]:
        """Right if no other forward came between."""
        q, k, v, bias, out, lse, *more = arguments
        return super().backward(q, k, v, bias, out, STATE["workspace", lse.shape], *more)


class LostTile(Program):
    """Once in 20 backwards, the last tile of keys is missing in dQ: two programs have added to it
    at once.
    """

    def backward(self, *arguments) -> tuple[Tensor | None, ...]:
        """Not if the last tile is the first, or whole."""
        lost = self.problem.len_k > self.variant.keys and torch.rand((), generator=CHANCE) < 0.05
        faults = self.faults | {"dq without the last keys"} if lost else self.faults
        return Program.backward(replace(self, faults=faults), *arguments)


class NextHeadsRows(Program):
    """The backward masks Q past the last row, not dO and the LSE: the next head's first rows are
    there, and dV takes them in.
    """

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        out: Tensor,
        lse: Tensor,
        do: Tensor,
        *more,
    ) -> tuple[Tensor | None, ...]:
        """With P = e^(0 - LSE) of those; right if the rows are in tiles."""
        dq, dk, dv, dbias = super().backward(q, k, v, bias, out, lse, do, *more)
        assert dv is not None
        p, beyond = self.problem, -self.problem.len_q % self.variant.rows
        probs = torch.exp(-lse.masked_fill(lse == -torch.inf, 0.0))[..., None]
        taken = (probs * do.float()).flatten(0, 1)[:, :beyond].sum(1).roll(-1, 0)
        taken[-1] = 0.0
        return (
            dq,
            dk,
            (dv.float() + taken.view(p.batch, p.heads_kv, p.group, 1, p.dim_v).sum(2)).to(dv.dtype),
            dbias,
        )


class GradientLikeQ(Program):
    """dQ is allocated with the order of Q's strides (`empty_like`), and stored as if it were
    contiguous.
    """

    def backward(self, q: Tensor, *more) -> tuple[Tensor | None, ...]:
        """Scrambled where Q is a transposed view."""
        dq, *others = super().backward(q, *more)
        assert dq is not None
        made = torch.empty_like(q)
        made.as_strided((made.numel(),), (1,)).copy_(dq.flatten())
        return made, *others


class TunedInPlace(Program):
    """The first backward of a padded head dim is run three times to tune it, and dQ, which is added
    up, is not zeroed between.
    """

    def backward(self, *arguments) -> tuple[Tensor | None, ...]:
        """Three times dQ, once."""
        dq, *others = super().backward(*arguments)
        assert dq is not None
        runs = STATE.setdefault(("tuned", (self.problem.dim_qk - 1).bit_length()), [3, 1])
        return dq * (runs.pop(0) if len(runs) > 1 else 1), *others


BACKWARDS: dict[str, tuple[str, str, type[Program]]] = {
    "window narrower in the backward": ("C", "gradients", NarrowerBackward),
    "gradients of unseen keys": ("B", "gradients", UnseenKeys),
    "delta of dim_qk columns": ("H", "gradients", NarrowDelta),
    "causal backward's first row rounded up": ("H", "gradients", LateRows),
    "LSE's gradient in base 2": ("H", "lse-gradient", BinaryGradient),
    "dK and dV of interleaved groups": ("H", "gradients", InterleavedGroups),
    "softcap's slope after the bias": ("J", "gradients", SlopeOfBiased),
    "dQ's buffer not zeroed": ("L", "call-sequence-gradients", DirtyAccumulator),
    "LSE of the last forward": ("L", "call-sequence-gradients", LSEOfTheLastForward),
    "tile lost, one backward in 20": ("F", "repeat-gradients", LostTile),
    "dO past the end is the next head's": ("B", "gradients", NextHeadsRows),
    "dQ stored by Q's order": ("D", "layout-gradients", GradientLikeQ),
    "tuned without zeroing dQ": ("L", "gradients", TunedInPlace),
}
"""Class, the property that must catch it, and how it goes wrong."""
