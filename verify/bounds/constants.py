"""How far is too far: the only place that holds a tolerance. What each format and each function may
be off by, with its source; verify/bounds/forward.py derives from it how far a kernel may be from
the exact answer. Nothing here was chosen to make a test pass.

Standard rounding model (Higham 2002, Accuracy and Stability of Numerical Algorithms, chapters 2-3):
one operation in a format of unit roundoff u has a relative error of at most u, and a sum of n
products, in any order, at most gamma_n = n u / (1 - n u) times the sum of the absolute products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from verify.bounds.exact import Block, by_key
from verify.spec.arithmetic import ROUNDED, SPLIT, Arithmetic, Quantisation
from verify.spec.problem import Problem

UNIT = {
    "fp64": 2.0**-53,
    "fp32": 2.0**-24,
    "fp22": 2.0**-14,
    "tf32": 2.0**-10,
    "fp16": 2.0**-11,
    "bf16": 2.0**-8,
}
UNIT |= {"e4m3": 2.0**-4, "e5m2": 2.0**-3, "e2m1": 2.0**-2, "int8": 0.0, "int4": 0.0}
"""Unit roundoff (half the spacing at 1), to nearest; TF32's is the whole spacing: tensor cores may
cut the operand's low bits.
"""
FLOOR = {
    "fp64": 2.0**-1022,
    "fp32": 2.0**-126,
    "fp22": 2.0**-126,
    "tf32": 2.0**-126,
    "fp16": 2.0**-25,
    "bf16": 2.0**-126,
}
FLOOR |= {"e4m3": 2.0**-10, "e5m2": 2.0**-17, "e2m1": 0.25, "int8": 0.5, "int4": 0.5}
"""Absolute error of a store near zero: half the smallest subnormal of a short exponent; elsewhere
subnormals may be flushed. Whole numbers are half a unit apart everywhere.
"""
LARGEST = {
    "fp64": 1.7e308,
    "fp32": 3.4e38,
    "fp22": 3.4e38,
    "tf32": 3.4e38,
    "fp16": 65504.0,
    "bf16": 3.38e38,
}
LARGEST |= {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0, "int8": 127.0, "int4": 7.0}
"""A value beyond may overflow the format."""
for _fmt, (_part, _) in SPLIT.items():  # sums are in FP32, a factor must fit its first part
    UNIT[_fmt], FLOOR[_fmt], LARGEST[_fmt] = UNIT["fp32"], FLOOR["fp32"], LARGEST[_part]
CUT = 3
"""A truncated sum of n products errs by this many times n unit roundoffs: each product is cut to
the largest exponent present (one spacing = two roundoffs), the accumulator at least every fourth
product (Fasi et al. 2021, PeerJ Comput. Sci. 7:e330)."""
LOG = 2
"""log errs by at most this many unit roundoffs: CUDA's logf 1 ulp (CUDA C++ Programming Guide,
mathematical functions).
"""
STEPS = 4
"""Roundings around a product besides its sum: Q and K each scaled, the scaled sum, a change of
base.
"""
SHORTEST_TILE = 16
"""Key tiles of kernels that declare none are at least this long: the running maximum moves at most
len_k / 16 times."""
UNBOUNDED = 1e100
"""Stands for infinity while bounds are multiplied (infinity times zero is NaN)."""
FALSE_ALARM = 1e-9
"""Probability that the decision rule on expected errors accuses an honest kernel, for each case
(verify/bounds/expected.py).
"""
RESOLUTION = 0.03
"""The emulation's own accuracy: order of tiles and FP32 sums move a real kernel's RMSE by up to 2 %
(BOUNDS.md, Sharpness).
"""
DISTINCT, LEVELS = 0.9, 16
"""For roundings to be taken as independent, such a part of a sample of scores must differ, and they
must spread over so many unit roundoffs of P (else all of P is rounded the same way)."""
LINEAR = 0.5
"""Where an honest kernel is off by more than this part of the exact tensor, errors are no sum of
small independent ones, and their direction is no evidence."""
ALIKE_PART = 16
"""Exponents that differ by less than this part of a roundoff of P are rounded alike."""
ORDER = 2
"""FP32 in another order than the emulation's, or fused, may err by this many times a random
roundoff at every step.
"""
ALIKE = 2
"""Two random errors of the same size differ by at most this factor in their mean square
(verify/inspection/identify.py, exponentials).
"""
CERTAIN = 1e-6
"""An arithmetic is taken as identified where the probability that chance made it look so is below
this (verify/inspection/identify.py).
"""
CLAMP = 30.0
"""Errors of an exponent up to this are handled as factors expm1(e) of a weight; larger ones, which
overflow as factors, are added to the logarithm of the weight."""
SATURATED = 0.5
"""Of the weights of a row: where their errors are a larger part, a bound no longer grows in
proportion to the unit roundoff."""
REGRESSION = 0.01
"""A recorded RMSE may grow by this share of itself: a deterministic kernel repeats its figure to
the last digit, and one that sums with atomics moves by a few FP32 roundings, far less.
"""


def _twice(out: Tensor, upcast: Tensor, same_dtype: Tensor) -> bool:
    return bool((out - upcast).abs().max() <= 2 * (same_dtype - upcast).abs().max() + 1e-5)


def _torch_defaults(out: Tensor, upcast: Tensor, same_dtype: Tensor) -> bool:
    rtol, atol = {
        torch.float16: (1e-3, 1e-5),
        torch.bfloat16: (1.6e-2, 1e-5),
        torch.float32: (1.3e-6, 1e-5),
    }[out.dtype]
    return torch.allclose(out, upcast.to(out.dtype), rtol=rtol, atol=atol)


ELSEWHERE: dict[str, Callable[[Tensor, Tensor, Tensor], bool]] = {
    "flash-attention 2x": _twice,
    "assert_close": _torch_defaults,
    "Triton tutorial": lambda out, upcast, same_dtype: bool((out - upcast).abs().max() <= 1e-2),
    "KernelBench": lambda out, upcast, same_dtype: torch.allclose(
        out.float(), upcast.float(), rtol=1e-2, atol=1e-2
    ),
}
"""What other suites accept, for comparison (``python -m verify.studies.bounds power``): (out,
attention of the upcast inputs in FP32, attention in the inputs' dtype) -> accepted.
flash-attention's tests/test_flash_attn.py; the defaults of torch.testing.assert_close; Triton's
tutorial 06 (atol 1e-2, rtol 0); KernelBench's eval.py."""

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Allowance:
    """How far one tensor may be from the exact one, in the tensor's shape, and the named parts that
    add up to it.
    """

    limit: Tensor
    terms: Terms


class Units:
    """Unit roundoffs, floors and gammas in force for an arithmetic in a problem."""

    def __init__(self, problem: Problem, arithmetic: Arithmetic, device: str) -> None:
        self.format = {name: arithmetic.format(name, problem.dtype) for name in ROUNDED}
        self.cut = {
            name: CUT if arithmetic.truncates(name, problem.dtype, device) else 1
            for name in ("scores", "accumulate")
        }
        self.format["inputs"] = problem.dtype
        times = {name: spacings(arithmetic, f) for name, f in self.format.items()}
        self.u = {name: times[name] * UNIT[f] for name, f in self.format.items()}
        self.floor = {name: times[name] * FLOOR[f] for name, f in self.format.items()}
        self.work = UNIT["fp64" if problem.dtype == "fp64" else "fp32"]
        shortest = min(SHORTEST_TILE, arithmetic.tile or SHORTEST_TILE)
        self.tiles = problem.len_k // shortest + arithmetic.splits
        """Rescalings, and sums over splits."""
        self.exp = 2 * arithmetic.exp_ulp * self.work  # one ulp is two roundoffs
        self.tanh = 2 * arithmetic.tanh_ulp * self.work
        self.exp_floor = FLOOR["fp64" if problem.dtype == "fp64" else "fp32"]
        """What may be flushed of an exponential, a product, or an input that is subnormal: of each
        part, where factors are split."""
        self.exp_floor *= max(products(self.format[name]) for name in ("scores", "accumulate"))
        self.promoted = arithmetic.promoted
        self.step = {
            name: max(self.exp_floor, self.floor[name]) for name in ("scores", "accumulate")
        }
        """Absolute error of a step of a sum: what is flushed, or the accumulator's own spacing."""
        self.stores_scores = self.u["stored_scores"] > self.work

    def gamma(self, name: str, terms: int) -> float:
        """gamma_n of a sum of this many products, and what its factors lose. In TF32, and where
        they are split, the two factors are narrowed, the sum is FP32.
        """
        fmt, lost = self.format[name], 0.0
        cut = CUT if fmt == "fp22" else self.cut.get(name, 1)
        n_u = cut * (terms + STEPS) * (UNIT["fp32"] if fmt == "tf32" else self.u[name])
        if fmt == "tf32":
            lost = 2 * UNIT["tf32"]
        elif fmt in SPLIT:
            lost, grown = split_loss(fmt)
            n_u = cut * (products(fmt) * terms + STEPS) * UNIT["fp32"] * grown
        elif fmt in PROMOTED and 0 < self.promoted < terms:
            n_u = cut * (self.promoted + STEPS) * self.u[name] + (terms + STEPS) * UNIT["fp32"]
        n_u += lost
        return n_u / (1 - n_u) if n_u < 1 else UNBOUNDED

    def overflow(self, name: str, size: Tensor) -> Tensor:
        """UNBOUNDED where a value of this size may not fit the format, 0 elsewhere."""
        return unbounded(size > LARGEST[self.format[name]])

    def row_overflow(self, name: str, size: Tensor, error: Tensor, factor: float) -> Tensor:
        """UNBOUNDED for rows [.., 1] in which `factor` times a value of these sizes, that much off,
        may not fit the format.
        """
        largest = LARGEST[self.format[name]] / factor
        if not size.numel() or (_amax(size) + _amax(error)).item() <= largest:
            return size.new_zeros((*size.shape[:-1], 1))
        return unbounded((size + error).amax(-1, keepdim=True) > largest)

    def sum_overflow(self, name: str, weights: Tensor, keys: Tensor, factor: float = 1.0) -> Tensor:
        """UNBOUNDED for rows [.., 1] of which `factor` times the sum of products of these absolute
        values [B,Hk,G,n,D] and [B,Hk,K,D] may not fit the format.
        """
        largest = LARGEST[self.format[name]] / factor
        most = _amax(weights) * _amax(keys) * weights.shape[-1] if keys.shape[-2] else 0.0
        if not weights.numel() or float(most) <= largest:
            return weights.new_zeros((*weights.shape[:-1], 1))
        return unbounded(by_key(weights, keys).amax(-1, keepdim=True) > largest)

    def split_overflow(self, *factors: Tensor) -> float:
        """UNBOUNDED where the first part of a factor that is split may overflow, 0 elsewhere."""
        formats = {self.format[name] for name in ("scores", "accumulate")} & set(SPLIT)
        largest = max((_amax(t).item() for t in factors if formats and t.numel()), default=0.0)
        return UNBOUNDED if any(largest > LARGEST[f] for f in formats) else 0.0

    def flushed(self, terms: int, weights: Tensor, keys: Tensor) -> float:
        """What a sum of this many products, a score, may lose near zero: in each step, and of
        either factor of a product.
        """
        largest = sum(_amax(t).item() for t in (weights, keys) if t.numel())
        return self.step["scores"] * (terms + STEPS) + self.exp_floor * terms * largest

    def score_overflow(self, b: Block, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """UNBOUNDED for rows where S, of products of these absolute values, may overflow its
        format, however scale is applied.
        """
        largest = min(LARGEST[self.format[name]] for name in ("scores", "stored_scores"))
        factor = max(1.0, scale)
        if (
            not k.shape[-2]
            or not q.numel()
            or (factor * q.amax() * k.amax() * q.shape[-1] + _amax(b.s)).item() <= largest
        ):
            return torch.zeros_like(b.row_max)
        return unbounded((by_key(q, k) * factor + b.s.abs()).amax(-1, keepdim=True) > largest)

    def store(self, terms: Terms, name: str, exact: Tensor) -> None:
        """Append the rounding of `exact` + what `terms` have moved it by, on its way to memory."""
        size = exact.abs() + total(terms)
        rounding = self.u[name] * size + self.floor[name] + self.overflow(name, size)
        terms[f"store in {self.format[name]}"] = rounding


PROMOTED = ("fp22", "fp16", "bf16")
"""Accumulators of which partial sums may be added up in FP32."""


def products(fmt: str) -> int:
    """So many products of parts stand for one of factors."""
    parts = SPLIT[fmt][1] if fmt in SPLIT else 1
    return parts * (parts + 1) // 2


def split_loss(fmt: str) -> tuple[float, float]:
    """(what a product of split factors lacks, of itself; what the absolute products of its parts
    add up to, of its absolute value). With u the parts' roundoff, part i is at most u^i (1 + u) of
    the factor and n parts leave u^n of it: products i + j = n are (n - 1) u^n, those left over
    2 u^n, the rest is of higher order.
    """
    part, n = SPLIT[fmt]
    u = UNIT[part]
    return (n + 1) * u**n * (1 + 2 * u) ** 2, 1 + 8 * u


def spacings(arithmetic: Arithmetic, fmt: str) -> int:
    """So many unit roundoffs, each half of the spacing, a store in this format errs by at most."""
    short = fmt in ("fp16", "bf16", "e4m3", "e5m2")
    return 2 if short and arithmetic.rounding != "nearest" else 1


def dropout_error(units: Units, p: Tensor, error: Tensor, rate: float) -> Tensor:
    """How far a kept weight may be from p / (1 - rate) that is up to `error` from p where nothing
    is dropped (or so for a sum of weights). The rate is rounded, subtracted from 1 and inverted in
    the working format; the factor and its product with P are rounded to P's format.
    """
    steps = (rate / (1 - rate) + 2) * units.work + 2 * units.u["probs"]
    scaled = (error + steps / (1 - steps) * (p + error)) / (1 - rate)
    return (scaled + units.floor["probs"]).clamp(max=UNBOUNDED)


def _amax(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, torch.inf)


def unbounded(where: Tensor) -> Tensor:
    """UNBOUNDED where true, 0 elsewhere."""
    return where.to(torch.float64) * UNBOUNDED


def finite(lse: Tensor) -> Tensor:
    """The LSE with 0 for rows that see no key."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def reciprocal(x: Tensor) -> Tensor:
    """1 / x; UNBOUNDED where x is not positive."""
    return 1 / x.clamp(min=1 / UNBOUNDED)


def total(terms: Terms) -> Tensor:
    """The sum of all parts, broadcast."""
    whole, *rest = terms.values()
    for part in rest:
        whole = whole + part
    return whole


def mapped(terms: Terms, change: Callable[[Tensor], Tensor]) -> Terms:
    """Every part changed."""
    return {name: change(part) for name, part in terms.items()}


def narrowed(
    size: Tensor,
    how: Quantisation,
    rows: int | None,
    *,
    columns: int = 1,
    block: int = 0,
) -> Tensor:
    """|what quantisation leaves of x - x|: x of sizes [B,H,n,D] through an 8-bit format, the
    largest of each group (`rows` of a head share a scale, 0: all, None: the tensor; instead, so
    many columns as `block` says) at the format's largest. For norms of rows of so many columns,
    which are rotated before: the error's norm.
    """
    if not size.numel():
        return size
    if block:
        blocks = size.split(block, -1)
        largest = torch.cat([p.amax(-1, keepdim=True).expand(p.shape) for p in blocks], -1)
    elif rows is None:
        largest = size.amax().expand(size.shape)
    else:
        groups = size.split(rows or size.shape[2], 2)
        largest = torch.cat([p.amax((2, 3), keepdim=True).expand(p.shape) for p in groups], 2)
    fmt = how.format
    steps = (STEPS + CUT * columns * columns**0.5 if columns > 1 else STEPS) * UNIT["fp32"]
    unit, largest, lost = _by_scales(how, largest, size)
    floor = FLOOR[fmt] / LARGEST[fmt] * largest * columns**0.5
    return (unit * size + floor + lost) * (1 + steps) + steps * size


def _by_scales(
    how: Quantisation, largest: Tensor, size: Tensor
) -> tuple[float, Tensor, Tensor | float]:
    """(relative error of a code, the largest number that the format's largest may stand for, what
    a saturated one loses): a scale that is a power of two is up to twice as large as it need be, or
    up to half as large; one in E4M3 is off by its roundoff, or by its smallest number.
    """
    fmt, unit = how.format, UNIT[how.format]
    if how.scales == "ue8m0":
        return unit, 2 * largest, 0.0
    if how.scales == "ue8m0_floor":
        beyond = 2.0 ** (1 + math.floor(math.log2(LARGEST[fmt])))
        return max(unit, 1 - LARGEST[fmt] / beyond), 2 * largest, 0.0
    if how.scales == "e4m3":
        smallest = FLOOR["e4m3"] / LARGEST["e4m3"] * size.amax()
        return max(unit, UNIT["e4m3"]), (1 + UNIT["e4m3"]) * largest + smallest, smallest
    return unit, largest, 0.0
