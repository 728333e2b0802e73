"""Ten known-wrong kernels of kinds that no other mutant has, written by somebody who had not seen
what the suite draws or checks. Nothing was changed for them; whoever changes the suite writes ten
others.

ALiBi's slope over the scale was expected of oracle, which sees it in 14 of 15 hunts of 400 cases.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from verify.kernels.mutants.memory import CHANCE, STATE, Memory
from verify.kernels.mutants.simulator import Program


class HiddenCorners(Program):
    """A tile is taken for hidden if its four corners are (a block mask by samples): right if
    causal, or a window of a square.
    """

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Nothing, of tiles through which a narrow window passes between the corners."""
        seen, last = super().visible(rows, keys), int((keys < self.problem.len_k).sum()) - 1
        tiles = seen.split(self.variant.rows, 2)
        corners = (
            tile[:, :, :: max(tile.shape[2] - 1, 1), : last + 1 : max(last, 1)] for tile in tiles
        )
        return torch.cat(
            [
                tile & four.any((2, 3), keepdim=True)
                for tile, four in zip(tiles, corners, strict=True)
            ],
            2,
        )


class StridesBySixteen(Program):
    """Strides are kept in units of 16 bytes, as in a TMA descriptor: right if rows begin at such,
    as contiguous ones do.
    """

    def memory(self, x: Tensor, name: str, like: Tensor | None = None) -> Memory:
        """Rounded down; head dims that are not whole units, and columns with a stride, are copied
        before.
        """
        made, unit = super().memory(x, name, like), 16 // x.element_size()
        if name != "bias" and x.stride(3) == 1 and x.shape[3] % unit == 0:
            made.strides = (*(stride // unit * unit for stride in made.strides[:3]), 1)
        return made


class UnsignedDiagonal(Program):
    """The causal row + len_k - len_q is unsigned: below 0 it is beyond every key. Right with no
    more rows than keys.
    """

    def bounds(self, low: int, high: int) -> tuple[int, int]:
        """All the keys for such rows."""
        first, last = super().bounds(low, high)
        return first, max(
            last, self.problem.len_k if low < self.problem.len_q - self.problem.len_k else 0
        )

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """With all the keys for such rows, which should see none."""
        p, seen = self.problem, super().visible(rows, keys)
        wraps = (rows < p.len_q - p.len_k) & (
            p.mask_as == "rule" and str(p.mask) == "causal_lower_right"
        )
        return seen | (wraps[:, None] & (keys < p.len_k))


class LateDelta(Program):
    """Delta comes from another stream; one tile in 5 reads it too early, as the last backward of
    such a shape has left it.
    """

    def backward(self, *arguments) -> tuple[Tensor | None, ...]:
        """Right if that one was the same, so that repeating it does not show."""
        q, k, v, bias, out, lse, do, dlse, needs = arguments
        delta = (do.float() * out.float()).sum(-1)
        left, STATE["delta", delta.shape] = STATE.get(("delta", delta.shape), delta), delta
        tiles = (
            torch.rand(*delta.shape[:2], -(-delta.shape[2] // self.variant.rows), generator=CHANCE)
            < 0.2
        )
        early = tiles.repeat_interleave(self.variant.rows, 2)[:, :, : delta.shape[2]]
        return super().backward(
            q, k, v, bias, out, lse, do, dlse + torch.where(early, delta - left, 0.0), needs
        )


class RingMerge(Program):
    """Two parts of the keys, merged as in ring attention: lse - logsigmoid(lse - new) is inf - inf
    if the first saw nothing.
    """

    def attend(self, *arguments) -> list[tuple[Tensor, ...]]:
        """In two parts."""
        return Program.attend(replace(self, variant=replace(self.variant, splits=2)), *arguments)

    def merged(self, parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
        """The LSE is NaN where only the second part sees keys; out is right, and so is all if the
        second has none.
        """
        (out, lse), (other, new) = (self.normalised(*part) for part in parts)
        both = out - torch.sigmoid(new - lse)[..., None] * (out - other)
        none = new == -torch.inf
        return torch.where(none[..., None], out, both), torch.where(
            none, lse, lse - logsigmoid(lse - new)
        )


class NegatedQ(Program):
    """A negative scale is made positive by negating Q, for the maximum's sake; the backward does
    not negate dQ back.
    """

    def backward(self, *arguments) -> tuple[Tensor | None, ...]:
        """With -dQ; dK, of -Q and the positive scale, is right."""
        dq, *others = super().backward(*arguments)
        assert dq is not None
        return -dq if self.scale < 0 else dq, *others


class Interleaved(Memory):
    """Of keys 0 1 4 5 2 3 6 7, as the registers of P have them."""

    def load(self, h: Tensor, rows: Tensor, columns: Tensor, **how) -> Tensor:
        """In P's order but for the last, incomplete eight."""
        taken = rows // 8 * 8 + torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])[rows % 8]
        return super().load(
            h, torch.where(rows < self.shape[2] // 8 * 8, rows, taken), columns, **how
        )


class TransposedTail(Program):
    """FP8: V is transposed by eights of keys, interleaved as P is; an incomplete eight is not, and
    P is: wrong from 3 keys on.
    """

    def memory(self, x: Tensor, name: str, like: Tensor | None = None) -> Memory:
        """V with the wrong weights there."""
        return Interleaved(x, self.faults, name) if name == "v" else super().memory(x, name, like)


class SlopeOverScale(Program):
    """S = scale * (Q K^T - slope / scale * distance) without a softcap, as in FlashAttention-2:
    with the scale 0, inf * 0.
    """

    def scores(self, *arguments) -> tuple[Tensor, Tensor]:
        """NaN with ALiBi and the scale 0; -inf with one so small that slope / scale overflows."""
        if self.slopes is None or self.softcap:
            return super().scores(*arguments)
        return Program.scores(
            replace(self, slopes=self.slopes / self.scale * self.scale), *arguments
        )


class LazyMaximum(Program):
    """The maximum moves only if it grows by more than 16 (as FlashAttention-4 skips rescaling): P
    up to e^16 is inf in FP16.
    """

    def walk(
        self, q: Tensor, K: Memory, V: Memory, B: Memory | None, rows: Tensor, starts: list[int]
    ) -> tuple[Tensor, ...]:
        """Right in BF16 and FP32, and until a later tile's score is 11 above the first's."""
        p, columns = self.problem, torch.arange(self.problem.dim_qk)
        top = torch.full((p.batch, p.heads_q, len(rows), 1), -torch.inf)
        total, acc = torch.zeros_like(top), torch.zeros(p.batch, p.heads_q, len(rows), p.dim_v)
        for start in starts:
            keys = torch.arange(start, start + self.variant.keys)
            s, _ = self.scores(q, K.load(self.kv_head, keys, columns), B, rows, keys)
            s = s.masked_fill(~self.visible(rows, keys), -torch.inf)
            old, top = (
                top,
                torch.where(s.amax(-1, keepdim=True) > top + 16.0, s.amax(-1, keepdim=True), top),
            )
            base = top.masked_fill(top == -torch.inf, 0.0)
            w, decay = self.exp(s - base), self.exp(old - base)
            total = total * decay + w.sum(-1, keepdim=True)
            acc = acc * decay + self.narrow(w) @ V.load(self.kv_head, keys, torch.arange(p.dim_v))
        return acc, total, top


class ScaledInPlace(Program):
    """After dV, the backward multiplies dO by the scale where it lies, for dQ and dK; whoever else
    has that dO finds it so.
    """

    def backward(self, *arguments) -> tuple[Tensor | None, ...]:
        """Right but for the next use of a contiguous dO; others are copied before."""
        gradients, do = super().backward(*arguments), arguments[6]
        (do if do.is_contiguous() else do.clone()).data.mul_(self.scale)
        return gradients


BLIND: dict[str, tuple[str, str, type[Program]]] = {
    "tile hidden by its corners": ("C", "one-hot", HiddenCorners),
    "strides in units of 16 bytes": ("D", "layout", StridesBySixteen),
    "causal diagonal unsigned": ("E", "empty-row", UnsignedDiagonal),
    "delta read too early": ("F", "call-sequence-gradients", LateDelta),
    "LSE of a ring merge": ("G", "oracle", RingMerge),
    "dQ of the negated Q": ("H", "gradients", NegatedQ),
    "FP8 V's last keys not interleaved": ("I", "one-hot", TransposedTail),
    "ALiBi's slope over the scale": ("J", "alibi-bias", SlopeOverScale),
    "maximum moved too late for FP16": ("K", "oracle", LazyMaximum),
    "dO scaled in place": ("L", "repeat-gradients", ScaledInPlace),
}
"""Class, the property that must catch it, and how it goes wrong; those of class I are in FP8."""
