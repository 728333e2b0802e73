"""What a kernel allocates while it runs: unfilled memory arrives full of NaN, and everything lies
between two guard bands.

A write past either end lands in a band, where it is seen; a read takes NaN, or in integers, as
counters of atomics are, a small number that is not 0. What is allocated through torch's Python
functions is seen; for the rest NaN is left in the allocator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from verify.spec.finding import Finding
from verify.spec.layouts import BAND

UNFILLED = {
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    Tensor.new_empty,
    Tensor.new_empty_strided,
}
FILLED = {torch.zeros, torch.zeros_like, torch.ones, torch.ones_like, torch.full, torch.full_like}
FILLED |= {Tensor.new_zeros, Tensor.new_ones, Tensor.new_full}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PATTERN = {
    torch.float16: 0x7E5A,
    torch.bfloat16: 0x7FDA,
    torch.float32: 0x7FDA5A5A,
    torch.float64: 0x7FFA5A5A5A5A5A5A,
    torch.float8_e4m3fn: 0x7F,
    torch.float8_e5m2: 0x7D,
}
"""The bits of a NaN that no arithmetic gives, so that another NaN written over it shows, where the
format has several.
"""
SMALL = 3
"""The same for integers."""


@contextmanager
def zeroed() -> Iterator[None]:
    """Zeros instead of NaN in what is not filled, to see whether that matters."""
    _UNFILLED_WITH.append(0.0)
    try:
        yield
    finally:
        _UNFILLED_WITH.pop()


def leave(sizes: set[int], device: torch.device) -> None:
    """Leave the same in memory that the allocator is likely to hand out next for tensors of these
    many bytes.
    """
    if device.type == "cuda":
        sizes = {-(-size // CUDA_BLOCK) * CUDA_BLOCK for size in sizes}
    every_bit = 255 if _UNFILLED_WITH[-1] else 0  # all of them set: a NaN in every format
    [
        torch.full((size,), every_bit, dtype=torch.uint8, device=device) for size in sizes
    ]  # all there at once


_UNFILLED_WITH = [torch.nan]
CUDA_BLOCK = 512
"""Bytes; torch's allocator hands out multiples of it on a GPU."""


class Allocations(TorchFunctionMode):
    """Around a call of a kernel; afterwards `bands` are to be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs) if kwargs else func(*args)
        known = func in UNFILLED or func in FILLED
        if (
            not known
            or torch.compiler.is_compiling()
            or (kwargs and kwargs.get("out") is not None)
            or not _ordinary(result)
        ):
            return result
        size, bits = (
            result.untyped_storage().nbytes() // result.element_size(),
            BITS[result.element_size()],
        )
        flat = torch.full(
            (size + 2 * BAND,), PATTERN.get(result.dtype, SMALL), dtype=bits, device=result.device
        )
        inside = result.new_empty(0).set_(
            flat.untyped_storage(), BAND, result.shape, result.stride()
        )
        if func in FILLED:
            inside.copy_(result)
        elif _UNFILLED_WITH[-1] == 0:
            inside.zero_()
        self._made.append((flat, inside))
        return inside

    def bands(self) -> tuple[list[Tensor], list[Tensor]]:
        """What should lie after and before each allocation, and what lies there, as bytes."""
        wanted, found = [], []
        for flat, inside in self._made:
            memory, size = flat.view(torch.uint8), BAND * flat.element_size()
            wanted += 2 * [_band(inside.dtype, flat.dtype, flat.device)]
            found += [memory[-size:], memory[:size]]
        return wanted, found

    def finding(self, at: int) -> Finding:
        """What to say of a band that is not as it should be."""
        (wanted, found), inside = ([bands[at] for bands in self.bands()]), self._made[at // 2][1]
        wrong = (wanted != found).view(BAND, -1).any(1).nonzero()
        where = (
            f"{int(wrong[-1]) - BAND} before the beginning"
            if at % 2
            else f"{int(wrong[0])} after the end"
        )
        return Finding(
            f"wrote outside what it allocated: element {where} of {inside.dtype} "
            f"{list(inside.shape)}"
        )


@cache
def _band(dtype: torch.dtype, bits: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((BAND,), PATTERN.get(dtype, SMALL), dtype=bits, device=device).view(
        torch.uint8
    )


def _ordinary(x: Tensor) -> bool:
    if type(x) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(
        x
    ):  # of torch.vmap, say
        return False
    plain = (
        x.layout == torch.strided
        and x.device.type in ("cpu", "cuda")
        and not x.requires_grad
        and not x.is_complex()
    )
    return plain and x.numel() > 0 and not x.is_pinned()
