"""Layouts: how the values of a tensor [B,H,L,D] lie in memory. A layout is added here and nowhere
else.

Whatever memory is allocated beside the values holds NaN, or in some cases huge numbers: gaps
between rows, other slots of a packed buffer, a band before the first and after the last element. So
what a kernel reads and does not own shows, whatever it multiplies it with: 0 times NaN is NaN, and
a maximum that passes over NaN does not pass over what is huge.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BAND = 1024
"""Elements before and after; a multiple of 16 bytes in every dtype, so that it moves no
alignment.
"""
GAP = 3
"""Elements between rows that are `gapped`: odd, so that rows start at every alignment."""


_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True)
class Layout:
    """The shape of the buffer for a tensor [B,H,L,D], the view of it that has this shape, and
    elements to skip before it.
    """

    buffer: Callable[[int, int, int, int], tuple[int, ...]]
    view: Callable[[Tensor, tuple[int, ...]], Tensor]
    skip: int = 0


LAYOUTS: dict[str, Layout] = {
    "bhsd": Layout(lambda b, h, s, d: (b, h, s, d), lambda t, shape: t),
    "bshd": Layout(lambda b, h, s, d: (b, s, h, d), lambda t, shape: t.transpose(1, 2)),
    "sbhd": Layout(lambda b, h, s, d: (s, b, h, d), lambda t, shape: t.permute(1, 2, 0, 3)),
    "packed": Layout(
        lambda b, h, s, d: (b, s, 3, h, d), lambda t, shape: t[:, :, 1].transpose(1, 2)
    ),
    "odd": Layout(lambda b, h, s, d: (b, h, s, d), lambda t, shape: t, skip=1),
    "gapped": Layout(lambda b, h, s, d: (b, h, s, d + GAP), lambda t, shape: t[..., : shape[3]]),
    "columns": Layout(lambda b, h, s, d: (b, h, d, s), lambda t, shape: t.mT),
    "expanded": Layout(lambda b, h, s, d: (b, 1, s, d), lambda t, shape: t.expand(shape)),
}
"""bhsd: contiguous. packed: K of a tensor [B,L,3,H,D]. odd: contiguous, one element off any
alignment. expanded: stride 0 over the heads, all with the values of the first."""


def laid_out(x: Tensor, layout: str = "bhsd", around: float = torch.nan) -> Tensor:
    """The values of x [B,H,L,D] in this layout, NaN or `around` beside them. `expanded` takes those
    of the first head for all.
    """
    kind, shape = LAYOUTS[layout], tuple(x.shape)
    wanted = kind.buffer(*shape)
    size = math.prod(wanted)
    flat = torch.full((2 * BAND + kind.skip + size,), around, dtype=x.dtype, device=x.device)
    view = kind.view(flat[BAND + kind.skip :][:size].view(wanted), shape)
    if layout == "expanded":
        view[:, :1].copy_(x[:, :1])
    else:
        view.copy_(x)
    return view


def memory(x: Tensor) -> Tensor:
    """All the memory that x lies in, gaps and bands included, as bytes [n]."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def moved(x: Tensor, to: Tensor) -> Tensor:
    """x, with the same strides and offset, in other memory, which holds the same as memory(x)."""
    return x.new_empty(0).set_(to.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def same_memory(x: Tensor) -> Tensor:
    """A copy of x with the same strides, in a copy of all the memory that x lies in, gaps and bands
    included.
    """
    return moved(x, memory(x).clone())


def touched(before: list[Tensor], after: list[Tensor]) -> int | None:
    """The first of several pairs of memories that are not the same to the last bit; None where all
    are.
    """
    for device in dict.fromkeys(memory.device for memory in before):
        there = [n for n, memory in enumerate(before) if memory.device == device]
        if device.type == "cpu":  # a few times faster than torch at these sizes
            differ = (
                n
                for n in there
                if _memcmp(before[n].data_ptr(), after[n].data_ptr(), len(before[n]))
            )
        elif torch.equal(
            torch.cat([before[n] for n in there]), torch.cat([after[n] for n in there])
        ):  # one look for all
            continue
        else:
            differ = (n for n in there if not torch.equal(before[n], after[n]))
        if (first := next(differ, None)) is not None:
            return first
    return None
