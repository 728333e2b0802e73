"""What a kernel allocates while it runs: unfilled memory arrives full of NaN, and everything lies between two guard bands.

A write past either end lands in a band, where it is seen; a read takes NaN, or in integers, as counters of atomics are, a small
number that is not 0. What is allocated through torch's Python functions is seen; for the rest NaN is left in the allocator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from verify.finding import Finding
from verify.layouts import BAND

UNFILLED = {torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided}
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
"""The bits of a NaN that no arithmetic gives, so that another NaN written over it shows, where the format has several."""
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


def leave(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Leave the same in memory that the allocator is likely to hand out next."""
    torch.full(shape, _UNFILLED_WITH[-1], dtype=dtype, device=device)


_UNFILLED_WITH = [torch.nan]


class Allocations(TorchFunctionMode):
    """Around a call of a kernel; afterwards `check`."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = func in UNFILLED or func in FILLED
        if not known or torch.compiler.is_compiling() or (kwargs and kwargs.get("out") is not None) or not _ordinary(result):
            return result
        size = result.untyped_storage().nbytes() // result.element_size()
        flat = torch.empty(size + 2 * BAND, dtype=result.dtype, device=result.device)
        flat.view(BITS[flat.element_size()]).fill_(PATTERN.get(flat.dtype, SMALL))
        inside = torch.empty(0, dtype=flat.dtype, device=flat.device)
        inside.set_(flat.untyped_storage(), BAND, result.shape, result.stride())
        if func in FILLED:
            inside.copy_(result)
        elif _UNFILLED_WITH[-1] == 0:
            inside.zero_()
        self._made.append((flat, inside))
        return inside

    def check(self) -> None:
        """Raises Finding where something was written beside what was allocated."""
        for device in {flat.device for flat, _ in self._made}:
            self._check([pair for pair in self._made if pair[0].device == device])

    @staticmethod
    def _check(made: list[tuple[Tensor, Tensor]]) -> None:
        wrong = []
        for flat, _ in made:  # both bands in one operation each, and one look at the GPU for all
            bits = flat.view(BITS[flat.element_size()])
            wrong.append(bits.as_strided((2, BAND), (len(bits) - BAND, 1)) != PATTERN.get(flat.dtype, SMALL))
        if not torch.stack(wrong).any():
            return
        number = next(n for n, elements in enumerate(wrong) if elements.any())
        (before, after), inside = wrong[number], made[number][1]
        if after.any():
            where = f"element {int(after.nonzero()[0])} after the end"
        else:
            where = f"element {int(before.nonzero()[-1]) - BAND} before the beginning"
        raise Finding(f"wrote outside what it allocated: {where} of {inside.dtype} {list(inside.shape)}")


def _ordinary(x: Tensor) -> bool:
    if type(x) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(x):  # of torch.vmap, say
        return False
    plain = x.layout == torch.strided and x.device.type in ("cpu", "cuda") and not x.requires_grad and not x.is_complex()
    return plain and x.numel() > 0 and not x.is_pinned()
