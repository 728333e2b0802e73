"""Ten more known-wrong kernels, of kinds that mutants.py did not have, written after the suite was last changed (2026-11-23) to
see what it finds of what nobody had in mind. The suite was not changed for them; whoever changes it writes ten others.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from verify.kernels.emulated import Program
from verify.kernels.emulated_memory import Memory
from verify.masks import Mask


class OddColumn(Program):
    """Loads two columns at a time, and not the last of an odd number."""

    def operands(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Memory, Memory, Memory, Tensor, Tensor]:
        """Q without it."""
        if self.problem.dim_qk % 2 and self.problem.dim_qk > 1:
            q = torch.cat([q[..., :-1], torch.zeros_like(q[..., -1:])], -1)
        return super().operands(q, k, v)


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
        nobody = ~self.visible(torch.arange(p.len_q), torch.arange(p.len_k)).any(2).squeeze(1)  # [B|1,K]
        unseen = nobody[:, None, :, None]
        return dq, *(t if t is None else t.masked_fill(unseen, torch.nan) for t in both), dbias


class PaddedLSE(Program):
    """Stores the LSE with rows padded to tiles, in a tensor that has none."""

    def forward(self, *arguments) -> tuple[Tensor, Tensor]:
        """The LSE as its reader finds it."""
        out, lse = super().forward(*arguments)
        room = -(-lse.shape[2] // self.variant.rows) * self.variant.rows
        return out, torch.nn.functional.pad(lse, (0, room - lse.shape[2])).flatten()[: lse.numel()].view(lse.shape)


class HalfScale(Program):
    """The scale is handed over in FP16."""

    def scores(self, *arguments) -> tuple[Tensor, Tensor]:
        """By another scale."""
        return Program.scores(replace(self, scale=float(torch.tensor(self.scale).half())), *arguments)


class GroupByHeads(Program):
    """Key head h // heads_kv for h // group: the same where there are as many groups as heads in one."""

    @property
    def kv_head(self) -> Tensor:
        """Not beyond the last."""
        return (self.heads // self.problem.heads_kv).clamp(max=self.problem.heads_kv - 1)


class Flushed(Program):
    """Subnormal results are 0."""

    def stored(self, out: Tensor) -> Tensor:
        """In the output's dtype."""
        return super().stored(out.masked_fill(out.abs() < torch.finfo(self.dtype).tiny, 0.0))


class NearOnly(Program):
    """e^x is 0 from -10 down, where it is still 4.5e-5."""

    def exp(self, x: Tensor) -> Tensor:
        """e^x"""
        return super().exp(x).masked_fill(x < -10.0, 0.0)


class ByEight(Program):
    """Reads the mask once for eight keys."""

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """By the first of the eight."""
        if self.mask is None:
            return super().visible(rows, keys)
        eighths = self.mask[..., torch.arange(self.problem.len_k) // 8 * 8]
        return Program.visible(replace(self, mask=eighths), rows, keys)


class FirstTileScale(Program):
    """FP8: a head's scale is from its first 64 rows; what is larger saturates."""

    def largest(self, x: Tensor) -> Tensor:
        """Of what it looks at."""
        return super().largest(x[:, :, :64])


BLIND: dict[str, tuple[str, str, type[Program]]] = {
    "last of odd columns": ("B", "oracle", OddColumn),
    "window narrower in the backward": ("C", "gradients", NarrowerBackward),
    "gradients of unseen keys": ("B", "gradients", UnseenKeys),
    "LSE by padded rows": ("G", "oracle", PaddedLSE),
    "scale in FP16": ("J", "oracle", HalfScale),
    "key head h // heads_kv": ("D", "grouped-heads", GroupByHeads),
    "subnormal results flushed": ("K", "oracle", Flushed),
    "small weights dropped": ("K", "oracle", NearOnly),
    "mask read for eight keys": ("C", "one-hot", ByEight),
    "scale of the first tile": ("I", "oracle", FirstTileScale),
}
"""Class, the property that must catch it, and how it goes wrong; the last is in FP8."""
