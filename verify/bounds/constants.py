"""How far is too far: the only place that holds a tolerance. What each format and each function may
be off by, with its source; verify/bounds/forward.py derives from it how far a kernel may be from
the exact answer. Nothing here was chosen to make a test pass.

Standard rounding model (Higham 2002, Accuracy and Stability of Numerical Algorithms, chapters 2-3):
one operation in a format of unit roundoff u has a relative error of at most u, and a sum of n
products, in any order, at most gamma_n = n u / (1 - n u) times the sum of the absolute products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from verify.bounds.exact import Block, by_key
from verify.spec.arithmetic import ROUNDED, Arithmetic
from verify.spec.problem import Problem

UNIT = {
    "fp64": 2.0**-53,
    "fp32": 2.0**-24,
    "fp22": 2.0**-14,
    "tf32": 2.0**-10,
    "fp16": 2.0**-11,
    "bf16": 2.0**-8,
}
UNIT |= {"e4m3": 2.0**-4, "e5m2": 2.0**-3, "int8": 0.0, "int4": 0.0}
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
FLOOR |= {"e4m3": 2.0**-10, "e5m2": 2.0**-17, "int8": 0.5, "int4": 0.5}
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
LARGEST |= {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0, "int4": 7.0}
"""A value beyond may overflow the format."""
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
        """What may be flushed of an exponential, a product, or an input that is subnormal."""
        self.step = {
            name: max(self.exp_floor, self.floor[name]) for name in ("scores", "accumulate")
        }
        """Absolute error of a step of a sum: what is flushed, or the accumulator's own spacing."""
        self.stores_scores = self.u["stored_scores"] > self.work

    def gamma(self, name: str, terms: int) -> float:
        """gamma_n of a sum of this many products. In TF32 the two operands are narrowed, the sum is
        FP32.
        """
        tf32 = self.format[name] == "tf32"
        cut = CUT if self.format[name] == "fp22" else self.cut.get(name, 1)
        n_u = cut * (terms + STEPS) * (UNIT["fp32"] if tf32 else self.u[name]) + (
            2 * UNIT["tf32"] if tf32 else 0.0
        )
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


def narrowed(size: Tensor, fmt: str, rows: int | None, *, columns: int = 1) -> Tensor:
    """|what quantisation leaves of x - x|: x of sizes [B,H,n,D] through an 8-bit format, the
    largest of each group (`rows` of a head share a scale, 0: all, None: the tensor) at the format's
    largest. For norms of rows of so many columns, which are rotated before: the error's norm.
    """
    if not size.numel():
        return size
    step = size.shape[2] if not rows else rows
    groups = [part.amax((2, 3), keepdim=True).expand(part.shape) for part in size.split(step, 2)]
    largest = size.amax().expand(size.shape) if rows is None else torch.cat(groups, 2)
    steps = (STEPS + CUT * columns * columns**0.5 if columns > 1 else STEPS) * UNIT["fp32"]
    floor = FLOOR[fmt] / LARGEST[fmt] * largest * columns**0.5
    return (UNIT[fmt] * size + floor) * (1 + steps) + steps * size
