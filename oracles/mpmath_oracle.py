"""Attention in mpmath, at any precision, as the textbook writes it: the judge of the float64
oracle, for small problems.

For query i, summing over the keys j that it sees (Vaswani et al. 2017, section 3.2.1), and L =
sum(out * do):

    x_ij = scale q_i.k_j       s_ij = softcap tanh(x_ij / softcap) + bias_ij      p_ij = exp(s_ij) / sum_j exp(s_ij)
    out_i = sum_j p_ij v_j     lse_i = log sum_j exp(s_ij)                        dp_ij = do_i.v_j
    ds_ij = p_ij (dp_ij - sum_j p_ij dp_ij)        dbias_ij = ds_ij        dx_ij = ds_ij (1 - tanh^2(x_ij / softcap))
    dq_i = scale sum_j dx_ij k_j                   dk_j = scale sum_i dx_ij q_i          dv_j = sum_i p_ij do_i

mpmath's exponents are unbounded, so no maximum is subtracted; each sum of products is rounded once.
What is hidden is never read. The relative error of p is about (1 + max |s|) 10^-digits. mpmath
computes with gmpy2 where it is installed: `backend`.
"""

from __future__ import annotations

import mpmath
import numpy as np
from mpmath import fdot, mpf

from verify.errors import VerifyError
from verify.spec.case import Inputs
from verify.spec.problem import Problem

LARGEST = 2_000_000  # multiply-adds: under two seconds with gmpy2
FEWEST_DIGITS = 17  # with fewer, a float64 input would be rounded on its way in
Arrays = dict[str, np.ndarray]
_to_mpf, _exp, _tanh, _sech = (
    np.frompyfunc(f, 1, 1) for f in (mpf, mpmath.exp, mpmath.tanh, mpmath.sech)
)


def backend() -> str:
    """What mpmath's integers are: "gmpy" (gmpy2 is installed; nearly twice as fast at 50 digits) or
    "python".
    """
    return mpmath.libmp.BACKEND


def exact(problem: Problem, inputs: Inputs, *, digits: int = 50) -> Arrays:
    """Object arrays of mpf: out [B,H,Q,Dv], lse [B,H,Q]; with problem.grads dq, dk, dv, and dbias
    where the bias is a tensor.

    Inputs of any dtype are the exact values that they hold. A row that sees no key: out 0, lse
    -inf, gradients 0. Raises VerifyError where the problem is too large, or the digits too few.
    """
    _refuse(problem, digits)
    with (
        mpmath.workdps(digits),
        np.errstate(invalid="ignore"),
    ):  # numpy warns of a NaN that passes through mpf()
        given = {
            n: _to_mpf(t.detach().cpu().double().numpy())
            for n, t in vars(inputs).items()
            if t is not None
        }
        visible = _visible(problem)
        result, p, slope = _forward(problem, given, visible)
        return result | (
            _backward(problem, given, visible, p=p, slope=slope) if problem.grads else {}
        )


def _refuse(problem: Problem, digits: int) -> None:
    products = 3 if problem.grads else 1  # q.k and p v; then do.v, p do, dx k, dx q
    size = (
        problem.batch
        * problem.heads_q
        * problem.len_q
        * problem.len_k
        * (problem.dim_qk + problem.dim_v)
        * products
    )
    if size > LARGEST:
        raise VerifyError(
            f"{problem}: {size} multiply-adds; mpmath takes up to {LARGEST}, "
            "verify.oracles.float64 takes any"
        )
    if digits < FEWEST_DIGITS:
        raise VerifyError(
            f"digits={digits}: at least {FEWEST_DIGITS}, so that every float64 is taken exactly"
        )


def _visible(problem: Problem) -> np.ndarray:
    """[B,H,Q,K], the mask's rule on Python integers; evaluated for one head where all are alike."""
    batch, heads, lengths = problem.batch, problem.heads_q, (problem.len_q, problem.len_k)
    shape = (batch, heads if problem.mask.per_head else 1, *lengths)
    seen = [
        problem.mask.sees(i, j, *lengths, batch=batch, entry=b, head=h)
        for b, h, i, j in np.ndindex(shape)
    ]
    return np.broadcast_to(np.array(seen, dtype=bool).reshape(shape), (batch, heads, *lengths))


def _zeros(shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, mpf(0), dtype=object)


def _dots(rows: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """[n,D], [D] -> [n]: rows_n . vector"""
    return np.array([fdot(row, vector) for row in rows], dtype=object)


def _combine(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[n], [n,D] -> [D]: sum_n weights_n rows_n"""
    return _dots(rows.T, weights)


def _added(problem: Problem, given: Arrays) -> np.ndarray:
    """[B,H,Q,K], what is added to the scores: the bias, ALiBi's -slope_h |i + len_k - len_q - j|,
    or 0.
    """
    shape = (problem.batch, problem.heads_q, problem.len_q, problem.len_k)
    if problem.bias == "alibi":
        _, h, i, j = np.indices(shape)
        return -given["slopes"][h] * np.abs(i + problem.len_k - problem.len_q - j).astype(object)
    return np.broadcast_to(given["bias"], shape) if "bias" in given else _zeros(shape)


def _capped(x: np.ndarray, softcap: float) -> tuple[np.ndarray, np.ndarray]:
    """(softcap tanh(x / softcap), its derivative as sech^2, which does not cancel); without a
    softcap (x, 1).
    """
    if not softcap:
        return x, _zeros(x.shape) + 1
    return mpf(softcap) * _tanh(x / mpf(softcap)), _sech(x / mpf(softcap)) ** 2


def _forward(
    problem: Problem, given: Arrays, visible: np.ndarray
) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """({out, lse}, p, d capped / dx): the last two [B,H,Q,K], 0 where hidden."""
    out, lse = _zeros(problem.shapes["out"]), _zeros(problem.shapes["lse"]) - mpmath.inf
    p, slope = (_zeros((*lse.shape, problem.len_k)) for _ in range(2))
    scale, added = mpf(problem.softmax_scale), _added(problem, given)
    for b, h, i in np.ndindex(lse.shape):
        at, seen, g = (b, h, i), visible[b, h, i], h // problem.group
        capped, slope[at][seen] = _capped(
            scale * _dots(given["k"][b, g, seen], given["q"][at]), problem.softcap
        )
        e = _exp(capped + added[at][seen])
        total = mpmath.fsum(e)
        if total:  # zero where no key is seen, or a bias of -inf hides all that are
            p[at][seen] = e / total
            out[at] = _combine(e / total, given["v"][b, g, seen])
            lse[at] = mpmath.log(total)
    return {"out": out, "lse": lse}, p, slope


def _backward(
    problem: Problem, given: Arrays, visible: np.ndarray, *, p: np.ndarray, slope: np.ndarray
) -> Arrays:
    """{dq, dk, dv} and dbias where the bias is a tensor: summed over the dimensions that it is
    broadcast in.
    """
    q, k, v, do = (given[name] for name in ("q", "k", "v", "do"))
    dq, dk, dv = (_zeros(x.shape) for x in (q, k, v))
    scale, ds = mpf(problem.softmax_scale), _zeros(p.shape)
    for b, h, i in np.ndindex(p.shape[:3]):
        at, seen, g = (b, h, i), visible[b, h, i], h // problem.group
        p_i, dp = p[at][seen], _dots(v[b, g, seen], do[at])
        ds[at][seen] = p_i * (dp - fdot(p_i, dp))
        dq[at] = scale * _combine((ds[at] * slope[at])[seen], k[b, g, seen])
    dx = ds * slope
    for b, g, j in np.ndindex(k.shape[:3]):
        heads = slice(g * problem.group, (g + 1) * problem.group)
        rows = visible[b, heads, :, j]  # [G,Q]
        q_j, do_j, dx_j, p_j = (x[b, heads][rows] for x in (q, do, dx, p))  # [G,Q,D] -> [n,D]
        dk[b, g, j] = scale * _combine(dx_j[:, j], q_j)
        dv[b, g, j] = _combine(p_j[:, j], do_j)
    broadcast = tuple(axis for axis, size in enumerate(problem.shapes.get("bias", ())) if size == 1)
    return {"dq": dq, "dk": dk, "dv": dv} | (
        {"dbias": ds.sum(broadcast, keepdims=True)} if "bias" in given else {}
    )
