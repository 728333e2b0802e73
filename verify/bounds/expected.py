"""How far a kernel should be from the exact answer, and when its error is too large, or leans to
one side, to be an honest one's.

An emulation of the declared arithmetic is one honest kernel on these very inputs. Were the kernel
another, then its squared error and the emulation's could be swapped in every row without anybody
noticing: their difference d_r is symmetric about 0, and

    P( sum_r d_r > t sqrt(sum_r d_r^2) ) <= exp(-t^2 / 2)            (Hoeffding's inequality on the signs; Efron 1969)

whatever the distribution, if rows err independently. Where they don't, columns do (an error of
delta or of a key's V is shared by a whole column of rows), so the smaller of the two statistics
counts. Derivation, limits, what it catches: verify/bounds/BOUNDS.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from verify.bounds.constants import FALSE_ALARM, LINEAR, ORDER, RESOLUTION, Allowance
from verify.bounds.exact import Exact
from verify.bounds.metrics import finite

DIRECTIONS = {
    "alpha": "off by a factor",
    "bias": "off by a constant",
    "tilt": "as with another softmax scale",
}
"""What a signed error is compared with: the exact tensor, ones, and the derivative by the logarithm
of the scale (out only).
"""

ABOVE = tuple(n / 4 * math.log(2) for n in (1, 2, 3))
"""Upper bounds of the maximum, in nats above it, for which roundings of P differ: a whole binade
changes none. Weights that are all near 1 are rounded twice as coarsely just above a power of two as
just below one."""


@dataclass(frozen=True)
class Surprise:
    """A test that an honest kernel fails less often than FALSE_ALARM: of the size of the error, or
    of its lean to one side.
    """

    what: str
    score: float
    level: float


@dataclass(frozen=True)
class Expectation:
    """Honest errors on one case. `emulate(kind, above)` gives the emulations, when needed, with
    exponents relative to so many nats more than the maximum; `tilt` d out / d log(scale).
    """

    exact: Exact
    emulate: Callable[..., Exact]
    tilt: Callable[[], Tensor]
    tests: int
    """How many tests share FALSE_ALARM."""
    exp_error: float
    """Largest relative error of an exponential: where it is not the same in P and in the row sum,
    out is off by that factor.
    """
    alarm: float = FALSE_ALARM
    """Probability that an honest kernel alarms on the case."""
    limits: Callable[[], Mapping[str, Allowance]] | None = None
    """How far each tensor may be off. Where any distance is allowed, since a format may overflow,
    or where much of it is the oracle's own error, no statistics hold either."""
    shared: bool = False
    """Whether an error of one key is all rows', as that of its code is: where errors are as large
    as the answer, one key may be all of it."""
    leans: bool = False
    """Whether honest errors lean to a side, by as much as tiles and splits say: all of them are cut
    towards zero. Then a lean is no evidence."""
    maximum: float = 0.0
    """Nats by which what exponents are relative to may be off from the largest score."""
    held: Callable[[], Tensor] | None = None
    """How far out is moved by rounding each row's largest weight [B,H,n,C]. The emulation does not
    round it, since it is 1; where exponents are relative to an upper bound of the maximum, it is
    another number."""

    @cached_property
    def nearest(self) -> Exact:
        """Every rounding to nearest."""
        return self.emulate("nearest")

    @cached_property
    def fp32(self) -> list[Exact]:
        """The same kernel with nothing narrower than FP32: off at random wherever that rounds, and
        with products truncated.
        """
        return [self.emulate("jittered fp32"), self.emulate("truncated fp32")]

    def errors(self, name: str, got: Tensor) -> tuple[Tensor, Tensor]:
        """(the kernel's, the emulation's) signed errors of one tensor, [B,H,n,C]; 0 where any of
        them is not finite.
        """
        exact, honest = getattr(self.exact, name), getattr(self.nearest, name)
        mine, its = got.to(torch.float64) - exact, honest - exact
        if finite(mine) and finite(its):
            return _columns(mine), _columns(its)
        judged = mine.isfinite() & its.isfinite()
        return _columns(torch.where(judged, mine, 0.0)), _columns(torch.where(judged, its, 0.0))

    def rmse(self, name: str, got: Tensor) -> tuple[float, float]:
        """(the kernel's, the emulation's)"""
        mine, honest = (
            x.square().mean().sqrt().item() if x.numel() else 0.0 for x in self.errors(name, got)
        )
        return mine, honest

    def surprise(self, name: str, got: Tensor) -> Surprise | None:
        """Why no honest kernel gives this, or None. First with the emulation's resolution as the
        only slack, then FP32's.
        """
        mine, honest = self.errors(name, got)
        if self.shared and self._large(name, honest):
            return None
        found = self._worst(name, mine, honest, torch.zeros_like(honest))
        if found.score > found.level:
            if self.limits:
                allowed = self.limits()[name]
                # nothing is known where a format may overflow, or the oracle itself may be off
                known = allowed.terms["oracle"] <= RESOLUTION * allowed.limit
                bounded = _columns(allowed.limit.isfinite() & known)
                mine, honest = (torch.where(bounded, x, 0.0) for x in (mine, honest))
            order = self._order(name)
            if self.held and name == "out":
                held = self.held()
                if self.maximum:
                    order = torch.hypot(order, _explained(held, mine))
                else:
                    mine, honest = (x - _along(held, x) for x in (mine, honest))
            found = self._worst(name, mine, honest, order)
            raised = self.maximum and name == "out" and found.score > found.level
            for above in ABOVE if raised else ():
                other = _columns(self.emulate("nearest", above).out) - _columns(self.exact.out)
                other = torch.where(mine == 0, 0.0, other.nan_to_num(0.0, 0.0, 0.0))
                found = min(found, self._worst(name, mine, other, order), key=_excess)
        return found if found.score > found.level else None

    def _large(self, name: str, honest: Tensor) -> bool:
        """Whether an honest kernel is off by a large part of the exact tensor."""
        exact = _columns(getattr(self.exact, name))
        size = exact.square().nan_to_num(0.0, 0.0, 0.0).sum()
        return bool(honest.square().sum() > LINEAR**2 * size)

    def _order(self, name: str) -> Tensor:
        """How far FP32 in another order may move each element: [B,H,n,C]."""
        exact = _columns(getattr(self.exact, name))
        order = ORDER * self.exp_error * exact.abs().nan_to_num(0.0, 0.0, 0.0)
        for other in self.fp32:
            off = _columns(getattr(other, name)) - exact
            order = torch.hypot(order, ORDER * off.nan_to_num(0.0, 0.0, 0.0))
        return order

    def _worst(self, name: str, mine: Tensor, honest: Tensor, order: Tensor) -> Surprise:
        level = math.sqrt(2 * math.log(self.tests / self.alarm))
        margin = ((1 + RESOLUTION) ** 2 - 1) * honest * honest + order * order
        whole, heads = scores(mine * mine - honest * honest, margin)
        if name == "dk":
            # an error of delta is shared by all keys: what is left without their mean must be too large
            mine_c, honest_c = (x - x.mean(2, keepdim=True) for x in (mine, honest))
            whole_c, heads_c = scores(mine_c * mine_c - honest_c * honest_c, margin)
            whole, heads = min(whole, whole_c), torch.minimum(heads, heads_c)
        found = [Surprise("error", whole, level)]
        if heads.numel() > 1:
            at = int(heads.argmax())
            where = f"error in head {at % heads.shape[1]} of batch entry {at // heads.shape[1]}"
            found.append(Surprise(where, heads.max().item(), level))
        for direction, along in self._directions(name, honest).items():
            slack = order * along.abs()
            apart, own = (
                max(scores(side * along, slack, by_head=name == "dk")[0] for side in (d, -d))
                for d in (mine - honest, mine)
            )
            # one that leans less than an honest kernel is no worse than it
            found.append(Surprise(direction, min(apart, own), level))
        return max(found, key=_excess)

    def _directions(self, name: str, honest: Tensor) -> dict[str, Tensor]:
        """What a lean is looked for along; nothing where honest errors lean, too, as an LSE that
        has a mean of K in it.
        """
        exact = _columns(getattr(self.exact, name))
        exact = exact if finite(exact) else exact.masked_fill(~exact.isfinite(), 0.0)
        if self.leans or (self.shared and name == "lse") or self._large(name, honest):
            return {}
        return {"alpha": exact, "bias": torch.ones_like(exact)} | (
            {"tilt": self.tilt()} if name == "out" else {}
        )


def _excess(found: Surprise) -> float:
    return found.score / found.level


def _along(held: Tensor, errors: Tensor) -> Tensor:
    """What rounding each row's largest weight explains of errors [B,H,n,C]: its direction is known,
    its size is at most that of `held`.
    """
    size = held.square().sum(-1, keepdim=True)
    part = (errors * held).sum(-1, keepdim=True) / size.clamp(min=torch.finfo(size.dtype).tiny)
    return part.clamp(-1.0, 1.0) * held


def _explained(held: Tensor, errors: Tensor) -> Tensor:
    """The same, as the slack that it takes where it decides how out is rounded, too, so that it
    can't be taken off the errors. Errors of any other kind lie by chance along it, in one of so
    many directions as there are columns.
    """
    part = _along(held, errors)
    explained = part.square().sum()
    share = errors.square().sum() / errors.shape[-1] / explained if explained > 0 else 1.0
    return part * math.sqrt(max(0.0, 1.0 - float(share)))


def scores(d: Tensor, margin: Tensor, *, by_head: bool = False) -> tuple[float, Tensor]:
    """(sum of d - margin) / sqrt(sum of squares of d), rows or columns as units, the smaller: of
    all [B,H,n,C], and [B,H].

    by_head: whole heads are units, too, where nothing less is independent.
    """
    excess = (d - margin).sum((2, 3))
    units = [d.sum(-1).square().sum(-1)] + (
        [d.sum(-2).square().sum(-1)] if d.shape[-1] > 1 else []
    )  # each [B,H]
    units += [d.sum((2, 3)).square()] if by_head else []
    heads = torch.stack([_ratio(excess, u) for u in units]).amin(0)
    whole = min(_ratio(excess.sum(), u.sum()).item() for u in units)
    return whole, heads


def _ratio(excess: Tensor, squares: Tensor) -> Tensor:
    return torch.where(
        squares > 0, excess / squares.sqrt().clamp(min=torch.finfo(torch.float64).tiny), 0.0
    )


def _columns(x: Tensor) -> Tensor:
    return x.unsqueeze(-1) if x.dim() == 3 else x  # lse [B,H,Q] is one column
