"""Attention in ball arithmetic: every value with a proved bound of its own error, whatever the
problem. Needs python-flint.

The formulas of verify.oracles.mpmath_oracle, except that a row's largest score c, any number, is
subtracted and added back:

    p_ij = exp(s_ij - c_i) / sum_j exp(s_ij - c_i)        lse_i = c_i + log sum_j exp(s_ij - c_i)

A ball is a midpoint and a radius; each operation encloses all results that its operands' balls
allow (Johansson 2017, "Arb: efficient arbitrary-precision midpoint-radius interval arithmetic",
IEEE Trans. Computers 66(8)). Products are arb_mat's.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verify.bounds.exact import Exact
from verify.errors import VerifyError
from verify.spec.case import Inputs, visibility
from verify.spec.problem import Problem

# Any, so that mypy says the same with and without it
flint: Any = importlib.import_module("flint") if importlib.util.find_spec("flint") else None

LARGEST = 100_000_000  # multiply-adds at 256 bits: one to two seconds
PER_SCORE = 200  # what exp, tanh and the rest cost for each score, in multiply-adds
Arrays = dict[str, np.ndarray]


def available() -> bool:
    """Whether python-flint is installed."""
    return flint is not None


def exact(problem: Problem, inputs: Inputs, *, bits: int = 256) -> tuple[Exact, dict[str, Tensor]]:
    """The answer in float64 on the CPU, and for each of its tensors the distance within which the
    true value provably lies.

    Gradients where problem.grads, dbias where the bias is a tensor. Inputs of any dtype are the
    exact values that they hold. A row that sees no key: out 0, lse -inf, gradients 0, uncertainty
    0. It is infinite beyond float64, and with too few bits. Raises VerifyError without
    python-flint, where an input is not finite, and where the problem is too large.
    """
    _refuse(problem, bits)
    given = {n: t.detach().cpu().double().numpy() for n, t in vars(inputs).items() if t is not None}
    for name, array in given.items():
        if not np.isfinite(array).all():
            raise VerifyError(f"{name}: holds NaN or Inf; ball arithmetic takes finite inputs")
    with flint.ctx.workprec(bits):
        exactly = {n: _each(flint.arb, array) for n, array in given.items()}
        balls, p, slope = _forward(problem, exactly)
        balls |= _backward(problem, exactly, p=p, slope=slope) if problem.grads else {}
        pairs = {n: np.frompyfunc(_rounded, 1, 2)(array) for n, array in balls.items()}
    value, uncertainty = (
        {n: torch.from_numpy(pair[i].astype(np.float64)) for n, pair in pairs.items()}
        for i in range(2)
    )
    return Exact(**value, provenance=f"arb, {bits} bits"), uncertainty


def work(problem: Problem) -> int:
    """Multiply-adds of one pass over the scores; what a score itself costs is counted as some."""
    scores = problem.batch * problem.heads_q * problem.len_q * problem.len_k
    return scores * (problem.dim_qk + problem.dim_v + PER_SCORE)


def _refuse(problem: Problem, bits: int) -> None:
    if not available():
        raise VerifyError("the interval oracle needs python-flint: pip install python-flint")
    if bits < 2:
        raise VerifyError(f"bits={bits}: at least 2; 256 leave nothing but float64's own rounding")
    products = 3 if problem.grads else 1  # q.k and p v; then do.v, p do, dx k, dx q
    size = work(problem) * products * max(bits, 256) // 256
    if size > LARGEST:
        raise VerifyError(
            f"{problem}: {size} multiply-adds; arb takes up to {LARGEST}, verify.oracles.float64 "
            "takes any"
        )


def _each(change: Any, array: np.ndarray) -> np.ndarray:
    """The function of every element; objects of the same shape."""
    return np.frompyfunc(change, 1, 1)(array)


def _rounded(ball: Any) -> tuple[float, float]:
    """(the midpoint in float64, a float64 not below the distance from there to any point of the
    ball)
    """
    value = float(ball.mid())
    if not math.isfinite(
        value
    ):  # -inf itself (an empty row's lse), beyond float64, or no number at all
        return value, 0.0 if ball == value else math.inf
    distance = (ball - value).abs_upper()
    bound = float(distance)  # whichever way that rounds
    return value, bound if distance <= bound else math.nextafter(bound, math.inf)


def _grouped(x: np.ndarray, problem: Problem) -> np.ndarray:
    """[B,H,Q,n] -> [B,Hk,G*Q,n]: the rows that share a key head"""
    return x.reshape(problem.batch, problem.heads_kv, problem.group * problem.len_q, x.shape[3])


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[B,Hk,n,d] x [B,Hk,d,m] -> [B,Hk,n,m]"""
    result = np.empty((*a.shape[:3], b.shape[3]), dtype=object)
    for at in np.ndindex(result.shape[:2]):
        left, right = (flint.arb_mat(*x[at].shape, x[at].ravel().tolist()) for x in (a, b))
        result[at] = np.array((left * right).entries(), dtype=object).reshape(result.shape[2:])
    return result


def _added(problem: Problem, given: Arrays) -> np.ndarray:
    """[B,H,Q,K] or broadcastable to it, what is added to the scores: the bias, ALiBi's -slope_h |i
    + len_k - len_q - j|, or 0.
    """
    if problem.bias == "alibi":
        i, j = np.indices((problem.len_q, problem.len_k))
        return -given["slopes"][:, None, None] * np.abs(
            i + problem.len_k - problem.len_q - j
        ).astype(object)
    return given.get("bias", np.full((), flint.arb(0)))


def _capped(x: np.ndarray, softcap: float) -> tuple[np.ndarray, np.ndarray]:
    """(softcap tanh(x / softcap), its derivative as sech^2, which does not cancel); without a
    softcap (x, 1).
    """
    if not softcap:
        return x, np.full(x.shape, flint.arb(1))
    ratio, cap = x / flint.arb(softcap), flint.arb(softcap)
    return _each(flint.arb.tanh, ratio) * cap, _each(flint.arb.sech, ratio) ** 2


def _softmax(s: np.ndarray, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[B,H,Q,K] -> p, 0 where hidden, and lse [B,H,Q]"""
    p, lse = np.full(s.shape, flint.arb(0)), np.full(s.shape[:3], flint.arb("-inf"))
    for at in np.ndindex(lse.shape):
        seen = visible[at]
        if seen.any():
            top = max(x.mid() for x in s[at][seen])  # exact, so subtracting it changes nothing
            e = _each(flint.arb.exp, s[at][seen] - top)
            p[at][seen], lse[at] = e / e.sum(), top + e.sum().log()
    return p, lse


def _forward(problem: Problem, given: Arrays) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """({out, lse}, p, d capped / dx): the last two [B,H,Q,K], p 0 where hidden."""
    shape = (problem.batch, problem.heads_q, problem.len_q, problem.len_k)
    x = _product(_grouped(given["q"], problem), given["k"].swapaxes(2, 3)) * flint.arb(
        problem.softmax_scale
    )
    capped, slope = _capped(x.reshape(shape), problem.softcap)
    visible = np.broadcast_to(visibility(problem, torch.device("cpu")).numpy(), shape)
    p, lse = _softmax(capped + _added(problem, given), visible)
    out = _product(_grouped(p, problem), given["v"]).reshape(problem.shapes["out"])
    return {"out": out, "lse": lse}, p, slope


def _backward(problem: Problem, given: Arrays, *, p: np.ndarray, slope: np.ndarray) -> Arrays:
    """{dq, dk, dv} and dbias where the bias is a tensor: summed over the dimensions that it is
    broadcast in.
    """
    k, v, scale, rows = (
        given["k"],
        given["v"],
        flint.arb(problem.softmax_scale),
        _grouped(given["do"], problem),
    )
    dp = _product(rows, v.swapaxes(2, 3)).reshape(p.shape)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    dx = _grouped(ds * slope, problem)
    dq, dk = (
        _product(dx, k) * scale,
        _product(dx.swapaxes(2, 3), _grouped(given["q"], problem)) * scale,
    )
    grads = {
        "dq": dq.reshape(problem.shapes["q"]),
        "dk": dk,
        "dv": _product(_grouped(p, problem).swapaxes(2, 3), rows),
    }
    broadcast = tuple(axis for axis, size in enumerate(problem.shapes.get("bias", ())) if size == 1)
    return grads | ({"dbias": ds.sum(broadcast, keepdims=True)} if "bias" in given else {})
