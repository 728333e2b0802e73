"""Roundings chosen to hurt: every rounding of the emulation turned the way that moves one element
of the result farthest: ``python -m verify.studies.adversary --help``.

In the standard model each stored value, function result and product inside a sum may be off by
sigma times its largest error, for any sigma in [-1, 1]. The derivative of an element by all sigmas,
at 0, says which signs are the worst to first order. What does not fit a format is infinite, what is
subnormal may be flushed, and partial sums are taken in the order that overflows first.

The proved bound must hold against it. Each of HOLES takes back one repair of the bound: the same
attacks must then cross it, else they would not have found the hole.
"""

from __future__ import annotations

import inspect
import math
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any

import hypothesis
import numpy as np
import torch
import typer
from hypothesis import strategies as st
from torch import Tensor

from verify.bounds import backward, forward, score_error
from verify.bounds.constants import CUT, FLOOR, LARGEST, LOG, UNIT, Units
from verify.bounds.exact import Exact, by_key, from_keys
from verify.bounds.metrics import distance
from verify.generation.arithmetics import arithmetics
from verify.generation.small import small_cases
from verify.oracles.emulator import emulate
from verify.oracles.formats import EIGHT_BITS, Form, in_parts
from verify.reference.reference import truth
from verify.spec.arithmetic import SPLIT, Arithmetic
from verify.spec.case import Case, Inputs
from verify.spec.masks import ways
from verify.spec.problem import Problem

ROUNDOFFS = {"log": LOG, "tanh": 2 * Arithmetic.tanh_ulp}


class Adversary:
    """A Rounding that errs by sigma times the most that the model allows; the sigmas are 0 and
    recorded, or those given.
    """

    repeats = False

    def __init__(self, signs: list[Tensor] | None = None) -> None:
        self.signs = signs
        self.sigmas: list[Tensor] = []

    def _sigma(self, like: Tensor) -> Tensor:
        if self.signs is not None:
            self.sigmas.append(self.signs[len(self.sigmas)])
        else:
            self.sigmas.append(torch.zeros_like(like, requires_grad=True))
        return self.sigmas[-1]

    def _moved(self, x: Tensor, most: Tensor) -> Tensor:
        finite = x.isfinite()
        return torch.where(finite, x + self._sigma(x) * torch.where(finite, most, 0.0), x)

    def store(self, x: Tensor, fmt: str) -> Tensor:
        """x (1 + sigma u), or x + sigma floor near zero; zero is exact."""
        most = torch.maximum(UNIT[fmt] * x.abs(), FLOOR[fmt] * (x != 0))
        return _overflowed(self._moved(x, most), fmt)

    def directed(self, x: Tensor, fmt: str, how: str) -> Tensor:
        """As far as the next number on either side, or nearly so."""
        most = 2 * torch.maximum(UNIT[fmt] * x.abs(), FLOOR[fmt] * (x != 0))
        return _overflowed(self._moved(x, most), fmt)

    def function(self, name: str, x: Tensor, fmt: str, ulp: float) -> Tensor:
        """The function's result, off by its error."""
        unit = max(ROUNDOFFS.get(name, 0.0), 2 * ulp) * UNIT[fmt]
        most = torch.maximum(unit * x.abs(), FLOOR[fmt] * (x != 0))
        return _overflowed(self._moved(x, most), fmt)

    def rescaled(self, x: Tensor, times: Tensor, fmt: str, ulp: float) -> Tensor:
        """Every factor off by an exponential's error and a product's."""
        unit = (2 * ulp + 1) * UNIT[fmt]
        return self._moved(x, (times * math.log1p(unit)).expm1() * x)

    def raised(self, x: Tensor, most: float) -> Tensor:
        """As far off as is declared; towards overflow, where it can't be told."""
        return self._moved(x, torch.full_like(x, most)) if most else x

    def total(self, x: Tensor, fmt: str) -> Tensor:
        """Every term of the sum off by gamma."""
        moved = self._moved(x, _gamma(x.shape[-1], UNIT[fmt]) * x.abs())
        return _overflowed(moved.sum(-1, keepdim=True), fmt)

    def product(self, form: Form, a: Tensor, b: Tensor, fmt: str, *, cut: bool) -> Tensor:
        """Every product inside the sum off by gamma, or by what a step loses near zero."""
        if fmt in SPLIT:
            a, b = in_parts(form, a, b, fmt, self.store)
        fmt = "fp32" if fmt == "tf32" or fmt in SPLIT else fmt
        u = UNIT[fmt] * (CUT if cut or fmt == "fp22" else 1)
        a, b = (self._flushed(factor, fmt) for factor in (a, b))
        a, b = (
            a.unsqueeze(-2 if form is by_key else -1),
            b.unsqueeze(-2) if form not in (by_key, from_keys) else b[:, :, None, None],
        )
        along = [5] if form is by_key else [4] if form is from_keys else [2, 3]  # of [B,Hk,G,n,K,D]
        terms = a * b
        size = terms.numel() // max(1, terms.sum(along).numel())
        most = torch.maximum(_gamma(size, u) * terms.abs(), FLOOR[fmt] * (terms != 0))
        found = self._moved(terms, most).sum(along)
        one_sign = [terms.clamp(min=0.0).sum(along), -terms.clamp(max=0.0).sum(along)]
        return torch.where(torch.maximum(*one_sign) > LARGEST[fmt], torch.inf, found)

    def _flushed(self, x: Tensor, fmt: str) -> Tensor:
        """A factor: subnormal numbers of the working format may be flushed."""
        subnormal = x.abs() < FLOOR["fp64" if fmt == "fp64" else "fp32"]
        return self._moved(x, x.abs() * subnormal)


def _overflowed(x: Tensor, fmt: str) -> Tensor:
    """What does not fit the format is infinite; the 8-bit formats saturate."""
    if fmt in EIGHT_BITS or fmt == "e2m1":
        return x
    return torch.where(x.abs() > LARGEST[fmt], torch.inf * x.sign(), x)


def _gamma(n: int, u: float) -> float:
    return n * u / (1 - n * u)


def attack(
    problem: Problem, inputs: Inputs, arithmetic: Arithmetic, name: str, index: tuple[int, ...]
) -> list[Exact]:
    """What the worst two kernels of this arithmetic give: one pushes this element of tensor `name`
    up, one pushes it down.
    """
    recorder = Adversary()
    target = getattr(emulate(problem, inputs, arithmetic, recorder), name)[index]
    if not target.requires_grad:
        return []
    slopes = torch.autograd.grad(target, recorder.sigmas, allow_unused=True)
    up = [
        torch.zeros_like(s) if g is None else g.nan_to_num().sign()
        for s, g in zip(recorder.sigmas, slopes, strict=True)
    ]
    with torch.no_grad():
        return [
            emulate(problem, inputs, arithmetic, Adversary(signs))
            for signs in (up, [-s for s in up])
        ]


@dataclass(frozen=True)
class Crossing:
    """An element beyond the proved bound, and by which factor."""

    case: Case
    arithmetic: Arithmetic
    tensor: str
    attacked: str
    times: float

    def __str__(self) -> str:
        where = f"{self.tensor} of {self.case}, {self.arithmetic}, attacked {self.attacked}"
        return f"{where}: {self.times:.3g} times the bound"


def crossings(case: Case, arithmetic: Arithmetic, chosen: int) -> Iterator[Crossing | None]:
    """Attack one element of one tensor: what crosses the bound in each attack, None where nothing
    does.
    """
    known = truth(case, "cpu")
    limits = {name: a.limit for name, a in known.allowances(arithmetic).items()}
    some = [name for name, limit in limits.items() if limit.numel()]
    if not some:
        return
    name = some[chosen % len(some)]
    where = np.unravel_index(chosen // len(some) % limits[name].numel(), limits[name].shape)
    index = tuple(int(n) for n in where)
    for worst in attack(case.problem, known.inputs, arithmetic, name, index):
        apart = {n: distance(getattr(worst, n), getattr(known.exact, n)) for n in limits}
        beyond = [n for n in limits if not bool((apart[n] <= limits[n]).all())]
        factors = [_factor(apart[n], limits[n]) for n in beyond]
        yield (
            Crossing(case, arithmetic, beyond[0], f"{name}{list(index)}", factors[0])
            if beyond
            else None
        )


def _factor(apart: Tensor, limit: Tensor) -> float:
    ratio = apart / limit.clamp(min=torch.finfo(torch.float64).tiny)
    return ratio.nan_to_num(nan=torch.inf).max().item()


attacks = st.tuples(
    st.sampled_from(sorted(ways())).flatmap(lambda way: small_cases(way, "range")),
    arithmetics(),
    st.integers(0, 10**6),
)
"""(case, arithmetic, which element) of an attack."""


HOLES: dict[str, tuple[Callable[..., Any], str, str]] = {
    "large score errors of small weights": (
        forward.Rows._weights_error,
        "beyond = b.visible & (e > CLAMP)",
        "beyond = b.visible & (e > UNBOUNDED)",
    ),
    "overflow of P V": (
        forward.Rows._lost,
        "return lost + unbounded(torch.maximum(added, hull * sees) > largest)",
        "return lost",
    ),
    "overflow of dP": (
        backward._row_overflow,
        'over = units.sum_overflow("scores", do, v, 2.0)',
        "over = torch.zeros_like(b.lse)",
    ),
    "overflow of softcap * dS": (
        backward._row_overflow,
        "max(1.0, problem.softcap)",
        "1.0",
    ),
    "overflow of dS on the way to dbias": (
        backward._row_overflow,
        'return over + units.row_overflow("dscores", ds, nothing, cap)',
        "return over",
    ),
    "codes that are larger than what they stand for": (
        score_error.score_error,
        "largest_q, largest_k = q_size + q_error, k_size + k_error",
        "pass",
    ),
    "flushed subnormals": (
        Units.flushed,
        'self.step["scores"] * (terms + STEPS) + self.exp_floor * terms * largest',
        "0.0",
    ),
    "S in FP16 before the scale": (score_error.score_error, "(2 + scale) * floor", "2 * floor"),
    "the floor of a scaled query": (
        score_error.score_error,
        'floor_q = units.floor["inputs"] / (scale or UNBOUNDED)',
        "floor_q = 0.0",
    ),
    "overflow of a scaled query": (
        score_error.score_error,
        "scale * largest_q.amax(-1, keepdim=True) > largest",
        "largest_q.amax(-1, keepdim=True) > UNBOUNDED",
    ),
    "tiles below sixteen": (
        Units.__init__,
        "min(SHORTEST_TILE, arithmetic.tile or SHORTEST_TILE)",
        "SHORTEST_TILE",
    ),
    "two stores, one after the other": (
        score_error.score_error,
        "error = error + u * (b.s.abs() + error) + floor",
        "error = error + u * b.s.abs() + floor",
    ),
    "a bound of fused exponents": (
        forward.Rows.__init__,
        "(b.s.abs() + self.score).amax(-1, keepdim=True)",
        "b.s.abs().amax(-1, keepdim=True)",
    ),
    "steps of an accumulator of 16 bits": (
        Units.__init__,
        "max(self.exp_floor, self.floor[name])",
        "self.exp_floor",
    ),
}
"""Holes that the proved bound once had: the function, what repaired it, what was there before."""


@contextmanager
def taken_back(hole: str) -> Iterator[None]:
    """The bound as it was with one of HOLES."""
    function, repair, before = HOLES[hole]
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(repair) != 1:
        raise AssertionError(f"{repair!r} is not once in {function.__qualname__}")
    scope = dict(function.__globals__)
    exec(source.replace(repair, before), scope)  # noqa: S102 (this package's own source)
    whole = function.__code__
    function.__code__ = scope[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = whole


class _Over(Exception):
    """The time or the number of attacks is over."""


def tried(
    seed: int, *, seconds: float = math.inf, most: float = math.inf, stop: bool = False
) -> tuple[Counter[str], list[Crossing]]:
    """(attacks by dtype, or by format of the codes; what crossed the bound) of so much time or so
    many attacks; stop: at the first that crosses it.
    """
    counts: Counter[str] = Counter()
    found: list[Crossing] = []
    end = time.monotonic() + seconds

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=10**9,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(attacks)
    def search(drawn: tuple[Case, Arithmetic, int]) -> None:
        case, arithmetic, chosen = drawn
        for crossing in crossings(case, arithmetic, chosen):
            how = arithmetic.quantised
            counts[how.format if how else case.problem.dtype] += 1
            if crossing:
                found.append(crossing)
                break
        if time.monotonic() > end or counts.total() >= most or (stop and found):
            raise _Over

    try:
        search()
    except _Over:
        pass
    return counts, found


def main(
    seconds: Annotated[float, typer.Option(help="time to attack for")] = 60.0,
    seed: Annotated[int, typer.Option(help="seed of the cases")] = 0,
    hole: Annotated[
        str | None, typer.Option(help=f"take back a repair: {'; '.join(HOLES)}")
    ] = None,
) -> None:
    """Attack the proved bound; print what crosses it. Exits with 1 where something does."""
    torch.set_num_threads(1)
    if hole is not None and hole not in HOLES:
        raise typer.BadParameter(f"hole {hole!r}: one of {'; '.join(HOLES)}")
    with taken_back(hole) if hole else nullcontext():
        counts, found = tried(seed, seconds=seconds, stop=bool(hole))
    for crossing in found:
        typer.echo(crossing)
    by_format = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
    typer.echo(
        f"seed {seed}: {counts.total()} attacks ({by_format}), {len(found)} crossed the bound"
    )
    raise typer.Exit(1 if found else 0)


if __name__ == "__main__":
    typer.run(main)
