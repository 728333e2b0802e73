"""Roundings chosen to hurt: every rounding of the emulation turned the way that moves one element
of the result farthest.

In the standard model each stored value, function result and product inside a sum may be off by
sigma times its largest error, for any sigma in [-1, 1]. The derivative of an element by all sigmas,
at 0, says which signs are the worst to first order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verify.bounds.constants import CUT, FLOOR, LARGEST, LOG, TANH, UNIT
from verify.bounds.exact import Exact, by_key, from_keys
from verify.oracles.emulator import emulate
from verify.oracles.formats import EIGHT_BITS, Form
from verify.spec.arithmetic import Arithmetic
from verify.spec.case import Inputs
from verify.spec.problem import Problem

ROUNDOFFS = {"log": LOG, "tanh": TANH}


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
        """x (1 + sigma u), or x + sigma floor near zero; zero is exact. What does not fit is
        infinite.
        """
        most = torch.maximum(UNIT[fmt] * x.abs(), FLOOR[fmt] * (x != 0))
        return _overflowed(self._moved(x, most), fmt)

    def function(self, name: str, x: Tensor, fmt: str, ulp: float) -> Tensor:
        """The function's result, off by its error."""
        unit = ROUNDOFFS.get(name, 2 * ulp) * UNIT[fmt]
        most = torch.maximum(unit * x.abs(), FLOOR[fmt] * (x != 0))
        return _overflowed(self._moved(x, most), fmt)

    def total(self, x: Tensor, fmt: str) -> Tensor:
        """Every term of the sum off by gamma."""
        moved = self._moved(x, _gamma(x.shape[-1], UNIT[fmt]) * x.abs())
        return _overflowed(moved.sum(-1, keepdim=True), fmt)

    def product(self, form: Form, a: Tensor, b: Tensor, fmt: str, *, cut: bool) -> Tensor:
        """Every product inside the sum off by gamma, or by what a step loses near zero; factors
        that are subnormal may be flushed; partial sums in the worst order may overflow.
        """
        fmt = "fp32" if fmt == "tf32" else fmt
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
        """x, of which subnormal numbers of the working format may be flushed."""
        subnormal = x.abs() < FLOOR["fp64" if fmt == "fp64" else "fp32"]
        return self._moved(x, x.abs() * subnormal)


def _overflowed(x: Tensor, fmt: str) -> Tensor:
    """What does not fit the format is infinite; the 8-bit formats saturate."""
    if fmt in EIGHT_BITS:
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
