"""Number formats: float64 tensors rounded as a format rounds, added as a processor adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from verify.bounds.constants import LARGEST
from verify.bounds.exact import by_key, from_keys, to_keys
from verify.spec.arithmetic import SPLIT
from verify.spec.case import TORCH_DTYPES

EIGHT_BITS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
WHOLE = ("int8", "int4")
STORED_BITS = {"fp32": 23, "fp22": 13, "tf32": 10, "exponent": 0}
"""Stored bits of the significand."""
MMA_TERMS = {"fp32": 16, "fp22": 32}
"""Products that one tensor-core instruction adds to the accumulator (wgmma k16 of 16-bit operands,
k32 of 8-bit ones).
"""
USUAL_ULP = 2.0
"""What every exponential may be off by: no cause to expect an error of its own."""
GUARD_BITS = 2
"""Bits beyond FP32 that a product of 16-bit operands keeps when it is aligned with the accumulator:
what gives the bias that kernels show on an H200 on V of one sign (BOUNDS.md, Truncation)."""
ELEMENTS = 2**26
"""Products that are held at a time where each is cut by itself."""
CONTRACTED = {by_key: (-1, -1), from_keys: (-1, -2), to_keys: (-2, -2)}
"""The dimensions of both factors that are summed over."""
Form = Callable[[Tensor, Tensor], Tensor]


def truncated(x: Tensor, fmt: str) -> Tensor:
    """x (float64) cut towards zero to the stored bits of fp32, fp22 or tf32; its exponent range is
    left alone.
    """
    cut = 52 - STORED_BITS[fmt]
    return ((x.contiguous().view(torch.int64) >> cut) << cut).view(torch.float64)


def to_tf32(x: Tensor) -> Tensor:
    """Round to nearest, ties to even, at 10 stored bits of significand."""
    bits = x.to(torch.float32).view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def rounded(x: Tensor, fmt: str) -> Tensor:
    """x as float64, rounded to nearest in this format. Overflow is infinite; in the 8-bit formats
    it saturates.
    """
    if fmt in WHOLE:
        return x.round().clamp(-LARGEST[fmt], LARGEST[fmt])
    if fmt == "e2m1":  # 0, 1/2, 1, 3/2, 2, 3, 4, 6
        x = x.clamp(-LARGEST[fmt], LARGEST[fmt])
        spacing = torch.exp2(_exponent(x.abs().clamp(min=1.0).float()).double() - 1)
        return (x / spacing).round() * spacing
    if fmt in EIGHT_BITS:
        largest = LARGEST[fmt]
        return x.clamp(-largest, largest).to(torch.float32).to(EIGHT_BITS[fmt]).to(torch.float64)
    if fmt == "fp22":
        return truncated(x.to(torch.float32).to(torch.float64), fmt)
    return (to_tf32(x) if fmt == "tf32" else x.to(TORCH_DTYPES[fmt])).to(torch.float64)


class Nearest:
    """Every rounding to nearest."""

    repeats = True

    def __init__(self, above: float = 0.0) -> None:
        self.above = above
        self.generators: dict[torch.device, torch.Generator] = {}

    def store(self, x: Tensor, fmt: str) -> Tensor:
        """x as this format holds it."""
        return x if fmt == "fp64" else rounded(x, fmt)

    def directed(self, x: Tensor, fmt: str, how: str) -> Tensor:
        """x as this format holds it, of 16 or 8 bits: rounded towards `zero`, or `stochastic`."""
        bits = torch.int8 if fmt in EIGHT_BITS else torch.int16
        dtype = EIGHT_BITS.get(fmt) or TORCH_DTYPES[fmt]
        near = rounded(x, fmt)
        code = near.to(torch.float32).to(dtype).view(bits)
        beyond = near.abs() > x.abs()
        inside = torch.where(beyond, code - 1, code).view(dtype).to(torch.float64)
        if how == "zero":
            return torch.where(x.isfinite(), inside, x)
        outside = torch.where(beyond | (near == x), code, code + 1).view(dtype).to(torch.float64)
        outside = torch.where((near == 0) & ~beyond, outside.abs() * x.sign(), outside)
        up = self._draw(x) * (outside - inside).abs() < (x - inside).abs()
        return torch.where(x.isfinite(), torch.where(up, outside, inside), x)

    def function(self, name: str, x: Tensor, fmt: str, ulp: float) -> Tensor:
        """The result x of `name` (exp, log, tanh) in this format; off at random where it is
        declared to be off by many ulp.
        """
        if ulp > USUAL_ULP and fmt == "fp32":
            x = self._random(x, 2 * ulp * x.abs())
        return self.store(x, fmt)

    def _random(self, x: Tensor, size: Tensor) -> Tensor:
        """x moved by up to FP32's unit roundoff of `size`, evenly distributed."""
        moved = (2 * self._draw(x) - 1) * size.nan_to_num() * 2.0 ** -(STORED_BITS["fp32"] + 1)
        return torch.where(x.isfinite(), x + moved, x)

    def _draw(self, x: Tensor) -> Tensor:
        """Numbers in [0, 1), as many as x."""
        if x.device not in self.generators:
            self.generators[x.device] = torch.Generator(x.device).manual_seed(1)
        return torch.rand(
            x.shape, dtype=x.dtype, device=x.device, generator=self.generators[x.device]
        )

    def rescaled(self, x: Tensor, times: Tensor, fmt: str, ulp: float) -> Tensor:
        """The factor exp(m - m_last) of sums that are rescaled so many times on the way to the last
        maximum: what they round is far less than a stored weight's roundoff.
        """
        return x

    def raised(self, x: Tensor, most: float) -> Tensor:
        """What exponents are relative to, at most so many nats from these maxima."""
        return x + self.above if most else x

    def total(self, x: Tensor, fmt: str) -> Tensor:
        """The sum along the last dimension, kept."""
        return (
            x.sum(-1, keepdim=True) if fmt == "fp64" else x.float().sum(-1, keepdim=True).double()
        )

    def product(self, form: Form, a: Tensor, b: Tensor, fmt: str, *, cut: bool) -> Tensor:
        """`form` (by_key, from_keys, to_keys) of a and b, accumulated in this format; cut: by
        truncation, as tensor cores do.
        """
        if fmt == "fp64":
            return form(a, b)
        if fmt in SPLIT:
            a, b = in_parts(form, a, b, fmt, self.store)
            return self.product(form, a, b, "fp32", cut=cut)
        if fmt in ("fp16", "bf16"):
            return _by_steps(form, a, b, fmt)
        if fmt == "fp22" and form is from_keys:
            return _by_products(a, b)
        if cut:
            return _by_instructions(form, a, b, "fp22" if fmt == "fp22" else "fp32")
        found = form(a.float(), b.float()).to(torch.float64)
        return truncated(found, fmt) if fmt == "fp22" else found


class Jittered(Nearest):
    """Narrow formats to nearest; a random error of up to one unit roundoff wherever FP32 rounds:
    honest kernels differ by it.
    """

    repeats = False

    def function(self, name: str, x: Tensor, fmt: str, ulp: float) -> Tensor:
        """The function's result, off by up to its error."""
        return self._random(x, 2 * ulp * x.abs()) if fmt == "fp32" else x

    def store(self, x: Tensor, fmt: str) -> Tensor:
        """x as this format holds it; FP32 at random."""
        return self._random(x, x.abs()) if fmt == "fp32" else super().store(x, fmt)

    def total(self, x: Tensor, fmt: str) -> Tensor:
        """The sum, off as one in another order may be."""
        found = x.sum(-1, keepdim=True)
        return self._random(found, _partial_sums(found, x.abs().sum(-1, keepdim=True), x.shape[-1]))

    def product(self, form: Form, a: Tensor, b: Tensor, fmt: str, *, cut: bool) -> Tensor:
        """The product, off as one in another order may be."""
        if fmt in ("fp64", "fp22", *SPLIT):
            return super().product(form, a, b, fmt, cut=cut)
        found = form(a, b)
        return self._random(
            found, _partial_sums(found, form(a.abs(), b.abs()), a.shape[CONTRACTED[form][0]])
        )


def in_parts(
    form: Form, a: Tensor, b: Tensor, fmt: str, store: Callable[[Tensor, str], Tensor]
) -> tuple[Tensor, Tensor]:
    """Factors whose product by `form` is that of a and b split into parts (SPLIT): the parts that
    are multiplied, one after the other along the dimension that is summed over.
    """
    part, n = SPLIT[fmt]
    along_a, along_b = CONTRACTED[form]
    left, right = ([], [])  # type: tuple[list[Tensor], list[Tensor]]
    for parts, whole in ((left, a), (right, b)):
        for _ in range(n):
            parts.append(store(whole - sum(parts), part))
    # the smallest first
    pairs = sorted(((i, j) for i in range(n) for j in range(n - i)), key=sum, reverse=True)
    return (
        torch.cat([left[i] for i, _ in pairs], along_a),
        torch.cat([right[j] for _, j in pairs], along_b),
    )


def in_chunks(form: Form, a: Tensor, b: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Factors of so many products at a time, along the dimension that is summed over."""
    along_a, along_b = CONTRACTED[form]
    yield from zip(a.split(length, along_a), b.split(length, along_b), strict=True)


def _partial_sums(found: Tensor, sizes: Tensor, terms: int) -> Tensor:
    """What the roundings of a sum in any order add up to, in unit roundoffs: n random ones of
    partial sums as large as the whole, where terms have one sign; as the sum of sizes, where they
    cancel (Higham 2002, section 4.2; random signs)."""
    return torch.maximum(sizes, math.sqrt(max(1, terms)) * found.abs())


def _by_steps(form: Form, a: Tensor, b: Tensor, fmt: str) -> Tensor:
    """An exact sum of MMA_TERMS products at a time, added to an accumulator of 16 bits."""
    along_a, along_b = CONTRACTED[form]
    steps = range(0, a.shape[along_a], MMA_TERMS["fp32"])
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for start in steps:
        terms = min(MMA_TERMS["fp32"], a.shape[along_a] - start)
        part = form(a.narrow(along_a, start, terms), b.narrow(along_b, start, terms))
        total = rounded(total + part, fmt)
    return total if steps else form(a, b)


def _by_instructions(form: Form, a: Tensor, b: Tensor, fmt: str) -> Tensor:
    """An exact sum of MMA_TERMS products at a time, added to the accumulator, which is cut. To
    FP32: each product, aligned with it, is cut GUARD_BITS below its last place and on average loses
    half a unit there, towards zero, which is taken off here. Products of 8-bit operands have too
    few bits to lose any unless the accumulator is far larger: _by_products.
    """
    along_a, along_b = CONTRACTED[form]
    total, step = torch.zeros((), dtype=torch.float64, device=a.device), MMA_TERMS[fmt]
    for start in range(0, a.shape[along_a], step):
        terms = min(step, a.shape[along_a] - start)
        left, right = a.narrow(along_a, start, terms), b.narrow(along_b, start, terms)
        total = total + form(left, right)
        if fmt == "fp32":
            lost = 0.5 * 2.0 ** -(STORED_BITS[fmt] + GUARD_BITS)
            total = total - lost * truncated(total, "exponent").abs() * form(
                left.sign(), right.sign()
            )
        total = truncated(total, fmt)
    return total if total.dim() else form(a, b)


def _by_products(a: Tensor, b: Tensor) -> Tensor:
    """[B,Hk,G,n,K] times [B,Hk,K,D] as Hopper's FP8 tensor cores do: of 32 products and the
    accumulator each is cut towards zero 13 bits below the largest exponent (a product's is the sum
    of its factors'), and so is the sum. Found on an H200: with factors of 8 bits, 60 000 sums of 32
    to 8192 products are equal to the bit.
    """
    a, b = a.float(), b.float().unsqueeze(2)
    rows = max(1, ELEMENTS // max(1, math.prod(a.shape[:-2]) * MMA_TERMS["fp22"] * b.shape[-1]))
    return torch.cat([_rows_by_products(part, b) for part in a.split(rows, -2)], -2).to(
        torch.float64
    )


def _rows_by_products(a: Tensor, b: Tensor) -> Tensor:
    total = a.new_zeros(*a.shape[:-1], b.shape[-1])
    for some_a, some_b in zip(
        a.split(MMA_TERMS["fp22"], -1), b.split(MMA_TERMS["fp22"], -2), strict=True
    ):
        if some_a.shape[-1]:
            left, right = some_a.unsqueeze(-1), some_b.unsqueeze(-3)
            highest = torch.maximum((_exponent(left) + _exponent(right)).amax(-2), _exponent(total))
            unit = torch.exp2((highest - STORED_BITS["fp22"]).clamp(min=-126).float())
            total = (
                (left * right / unit.unsqueeze(-2)).trunc().sum(-2) + (total / unit).trunc()
            ) * unit
            unit = torch.exp2((_exponent(total) - STORED_BITS["fp22"]).clamp(min=-126).float())
            total = (total / unit).trunc() * unit
    return total


def _exponent(x: Tensor) -> Tensor:
    """floor(log2 |x|) of float32; -127 for zero and subnormal numbers."""
    return ((x.contiguous().view(torch.int32) >> 23) & 0xFF) - 127
