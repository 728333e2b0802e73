"""What the emulated kernels compute with: pointers and strides, what a correct one may choose, what
a stale one remembers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
P_SCALE = 256.0
STATE: dict[Any, Any] = {}
"""What stale kernels remember between calls."""
CHANCE = torch.Generator()
"""Of kernels that err now and then; torch's own random state is not theirs to change."""


@dataclass(frozen=True)
class Variant:
    """What a correct kernel may choose: tiles, the base of the exponential, parts of the keys
    merged through their LSE, P's format, the order of tiles, FP8.
    """

    rows: int = 64
    keys: int = 64
    binary: bool = False
    splits: int = 1
    exact_probs: bool = False
    reverse: bool = False
    fp8: bool = False


class Memory:
    """A tensor [B,H,L,D] as a kernel sees it: a pointer, strides, and no idea of what lies
    beyond.
    """

    def __init__(
        self, x: Tensor, faults: frozenset[str], name: str, strides: tuple[int, ...] | None = None
    ) -> None:
        self.flat = x.new_empty(0).set_(x.untyped_storage()).detach()
        self.shape, self.strides, self.start = (
            x.shape,
            strides or x.stride(),
            int(x.storage_offset()),
        )
        if f"{name}: taken for contiguous" in faults:
            _b, h, s, d = x.shape
            self.strides = (h * s * d, s * d, d, 1)
        if name == "k" and "batch of K by all query heads" in faults:
            self.strides = (2 * self.strides[0], *self.strides[1:])
        if "storage offset ignored" in faults:
            self.start = 0
        self.narrow_offsets = "offsets in 16 bits" in faults

    def load(
        self,
        h: Tensor,
        rows: Tensor,
        columns: Tensor,
        *,
        rows_below: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """[B,len(h),rows,columns] in float32; 0 beyond `rows_below` rows (the length, by default)
        and `width` columns.
        """
        b = torch.arange(self.shape[0])[:, None, None, None]
        at = b * self.strides[0] + h[None, :, None, None] * self.strides[1]
        at = at + rows[None, None, :, None] * self.strides[2] + columns * self.strides[3]
        if self.narrow_offsets:
            at = (at + 2**15) % 2**16 - 2**15
        values = (
            self.flat[(self.start + at).clamp(0, max(self.flat.numel() - 1, 0))].float()
            if self.flat.numel()
            else at.float()
        )
        inside = (rows < (self.shape[2] if rows_below is None else rows_below))[:, None] & (
            columns < (self.shape[3] if width is None else width)
        )
        return torch.where(inside, values, 0.0)
