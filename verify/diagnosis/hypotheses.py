"""At which stage a kernel goes wrong: each hypothesis is recomputed, and named only where that
gives what the kernel gave.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from verify.bounds.constants import ALIKE
from verify.bounds.exact import ungrouped
from verify.bounds.metrics import measure
from verify.diagnosis.alternatives import alternatives, fitted_scale, other_weights
from verify.diagnosis.trial import Trial, tried
from verify.errors import VerifyError
from verify.oracles import float64
from verify.spec.arithmetic import ROUNDED
from verify.spec.finding import Finding

LN2 = math.log(2.0)
NARROWER = ("tf32", "fp16", "bf16")


def stages(trial: Trial) -> list[str]:
    """Every hypothesis that gives what the kernel gave for the first wrong tensor, and factors of
    all that are wrong.
    """
    name = trial.wrong[0]
    p, x = trial.known.problem.but(grads=False), trial.known.inputs
    if name != "dbias" and (only := _empty_rows(trial, name)):
        return only
    found = list(_lse(trial)) if name == "lse" else []
    if name in ("out", "lse"):
        others = alternatives(trial, p, x)
        found += [
            what.format(name)
            for what, problem, inputs in others
            if trial.fits(name, problem, inputs)
        ]
        found = (
            found
            or list(other_weights(trial, p, x))
            or ([] if name == "lse" else list(fitted_scale(trial, p, x)))
        )
    else:
        found += [*_delta(trial), *_row_sums(trial), *_key_sums(trial)]
    return list(dict.fromkeys(found)) or list(_factors(trial)) or _roundings(trial)


def _empty_rows(trial: Trial, name: str) -> list[str]:
    empty = (trial.known.exact.lse == -torch.inf).flatten(2).unsqueeze(-1)
    bad = trial.off(name, trial.got(name)).view(*trial.got(name).shape[:3], -1)
    only = name in ("out", "lse", "dq") and bad.any() and not (bad & ~empty).any()
    return ["rows that see no key (no other is wrong)"] if only else []


def _lse(trial: Trial) -> Iterator[str]:
    got, want = trial.got("lse"), trial.want("lse")
    top = torch.cat([ungrouped(block.row_max).squeeze(-1) for block in trial.known.blocks()], 2)
    finite = want.isfinite() & got.isfinite()
    constant = (got - want)[finite].mean().item() if int(finite.sum()) > 1 else 0.0
    hypotheses = {
        "its base (lse * ln 2 is exact: a logarithm to base 2)": got * LN2,
        "the maximum (lse is the logarithm of the row sum alone)": got + top,
        "the logarithm (lse is the row's maximum alone)": got - top + want,
        "its sign": -got,
        f"a constant (lse is off by {constant:.6g} everywhere)": got - constant,
    }
    for what, mended in hypotheses.items():
        if trial.right("lse", torch.where(finite, mended, got)):
            yield f"the LSE: {what}"


def _delta(trial: Trial) -> Iterator[str]:
    """Another delta moves dq by a multiple of the row's mean key, sum_j p_ij k_j, and by nothing
    else.
    """
    p, x = trial.known.problem, trial.known.inputs
    if "dq" not in trial.wrong or p.softcap:
        return
    mean_key = float64.exact(p.but(dim_v=p.dim_qk, grads=False), replace(x, v=x.k, do=x.q)).out
    error, got = trial.got("dq") - trial.want("dq"), trial.got("dq")
    delta = (x.do.to(torch.float64) * trial.known.exact.out).sum(-1, keepdim=True)
    along = (error * mean_key).sum(-1, keepdim=True) / mean_key.square().sum(-1, keepdim=True)
    if trial.right("dq", got - p.softmax_scale * delta * mean_key):
        yield "delta = rowsum(dO * O) (dq is that without it)"
    elif p.dim_qk > 1 and trial.right("dq", got - along.nan_to_num(0.0) * mean_key):
        yield (
            "delta = rowsum(dO * O) (every row of dq is off by a multiple of its mean key, and by "
            "nothing else)"
        )


def _row_sums(trial: Trial) -> Iterator[str]:
    """dk and dv are sums over rows and the heads of a group: those of which dO is 0 are left
    out.
    """
    p, x = trial.known.problem, trial.known.inputs
    rows, heads = (
        torch.arange(p.len_q, device=x.do.device)[:, None],
        torch.arange(p.heads_q, device=x.do.device)[:, None, None],
    )
    kept = {
        f"the tail of the rows ({{}} is that of the first {n} of {p.len_q})": rows < n
        for n in trial.ends(p.len_q)
    }
    if p.group > 1:
        of = "the sum over the query heads of a group ({} is that of the"
        kept |= {
            f"{of} first of each)": heads % p.group == 0,
            f"{of} last of each)": heads % p.group == p.group - 1,
        }
    summed = [name for name in ("dk", "dv") if name in trial.wrong]
    found = [
        what.format(n)
        for n in summed
        for what, some in kept.items()
        if trial.fits(n, p, replace(x, do=x.do * some))
    ]
    yield from found
    if summed and p.group > 1 and not found:
        alone = replace(trial.case, problem=p.but(heads_kv=p.heads_q))
        try:
            supported = trial.kernel.unsupported(alone.problem, trial.known.device) is None
            if supported and not {"dk", "dv"} & set(
                tried(trial.kernel, alone, trial.known.device)[0].wrong
            ):
                yield (
                    f"the sum over the query heads of a group ({', '.join(summed)} right where a "
                    "key head has one query head)"
                )
        except Finding:
            return


def _key_sums(trial: Trial) -> Iterator[str]:
    """dq is a sum over keys of dS, which is, before the slope of softcap, the gradient of a bias
    that nothing is broadcast in.
    """
    p, x, got = trial.known.problem, trial.known.inputs, trial.got("dq")
    if "dq" not in trial.wrong:
        return
    ds, k = (
        float64.exact(p.but(bias="bhqk"), x).dbias,
        x.k.to(torch.float64).repeat_interleave(p.group, 1),
    )
    assert ds is not None
    if p.softcap:
        if trial.right("dq", got + trial.want("dq") - p.softmax_scale * ds @ k):
            yield "the slope of softcap (dq is that without it)"
        return
    for n in trial.ends(p.len_k):
        if trial.right("dq", got + p.softmax_scale * ds[..., n:] @ k[:, :, n:]):
            yield f"the tail of the keys (dq is that of the first {n} of {p.len_k})"


def _factors(trial: Trial) -> Iterator[str]:
    """One factor for a whole tensor, or one for each of its rows."""
    p, found = trial.known.problem, dict[str, str]()
    named = {
        "scale": p.softmax_scale,
        "ln 2": LN2,
        "the group's size": float(p.group),
        "the batch's size": float(p.batch),
    }
    factors = named | {f"1 / {what}": 1 / factor for what, factor in named.items() if factor}
    for name in trial.wrong:
        got, want = trial.got(name), trial.want(name)
        alpha = measure(got, want).alpha
        if int((want != 0).sum()) < 2 or not math.isfinite(
            alpha
        ):  # one element is a multiple of anything
            continue
        if alpha and trial.right(name, got / alpha):
            words = [
                what
                for what, factor in factors.items()
                if factor not in (0, 1) and trial.right(name, got / factor)
            ]
            found[name] = f"{alpha:.6g}" + (f" ({', '.join(words)})" if words else "")
        elif name == "out" and got.shape[-1] > 1 and trial.off(name, got).any():
            by_row = (got * want).sum(-1, keepdim=True) / want.square().sum(-1, keepdim=True)
            if trial.right(name, torch.where(want == 0, got, got / by_row)):
                low, high = by_row.nan_to_num(1.0).aminmax()
                yield (
                    "the division by the row sum (each row of out is the exact one times "
                    f"{low:.4g} to {high:.4g})"
                )
    if trial.wrong[0] in found:
        stage = (
            "the scale of dS" if set(found) == {"dq", "dk"} else "a factor, e.g. a normalisation"
        )
        wrong = [f"{name} is {times} times the exact one" for name, times in found.items()]
        yield f"{stage} ({', '.join(wrong)})"


def _roundings(trial: Trial) -> list[str]:
    """A narrower format in one place explains the errors where they are as large as those of an
    emulation.
    """
    name, problem = trial.wrong[0], trial.known.problem
    declared, found = trial.kernel.numerics(problem, trial.known.device), dict[str, float]()
    changes: list[dict[str, Any]] = [
        {field: fmt} for field in ROUNDED for fmt in (*NARROWER, "input")
    ]
    changes += [{"probs": fmt, "normalized_probs": True} for fmt in (*NARROWER, "input")] + [
        {"scaled_query": True}
    ]
    for change in changes:
        try:
            arithmetic = replace(declared, **change)
        except VerifyError:  # nobody can declare the two together
            continue
        other = replace(trial, kernel=replace(trial.kernel, arithmetic=arithmetic))
        if other.expected is not None and other.right(name, other.got(name)):
            mine, honest = other.expected.rmse(name, other.got(name))
            if max(mine, honest) ** 2 <= ALIKE * min(mine, honest) ** 2:
                found[str(change)] = mine / honest
    nearest = sorted(found, key=lambda what: abs(math.log(found[what])))[:1]
    return [
        f"a rounding (the RMSE of {name} is {found[what]:.3g} times that expected with {what})"
        for what in nearest
    ]
