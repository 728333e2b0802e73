"""At which stage a kernel goes wrong: each hypothesis is recomputed, and named only where that gives what the kernel gave."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from verify.arithmetic import ROUNDED
from verify.bounds import ALIKE
from verify.case import Inputs
from verify.exact import ungrouped
from verify.finding import Finding
from verify.masks import FULL, KINDS, Mask
from verify.measure import measure
from verify.oracles import dense
from verify.problem import Problem
from verify.properties.trial import Trial, tried
from verify.properties.truth import Truth

EXCHANGED = {"causal_upper_left": "causal_lower_right", "causal_lower_right": "causal_upper_left"}
LN2 = math.log(2.0)
NARROWER = ("tf32", "fp16", "bf16")
STEPS = 8
"""Newton steps towards the scale that a kernel used."""
Other = tuple[str, Problem, Inputs]


def stages(trial: Trial) -> list[str]:
    """Every hypothesis that gives what the kernel gave for the first wrong tensor, and factors of all that are wrong."""
    name = trial.wrong[0]
    p, x = trial.known.problem.but(grads=False), trial.known.inputs
    found = list(_lse(trial)) if name == "lse" else []
    if name in ("out", "lse"):
        others = (*_other_masks(p, x), *_tails(trial, p, x), *_other_scores(p, x), *_other_slices(p, x))
        found += [what.format(name) for what, problem, inputs in others if trial.fits(name, problem, inputs)]
        found += [] if found or name == "lse" else _fitted_scale(trial, p, x)
    else:
        found += [*_delta(trial), *_row_sums(trial), *_key_sums(trial)]
    return list(dict.fromkeys(found)) or list(_factors(trial)) or _roundings(trial)


def by_elimination(trial: Trial) -> list[str]:
    """The stage that is left where some tensors are wrong and others, which share the rest of the computation, are right."""
    wrong, right = set(trial.wrong), set(trial.names) - set(trial.wrong)
    return [
        f"{stage} ({', '.join(sorted(bad))} wrong, {why})" for bad, good, stage, why in LEFT if bad <= wrong and good <= right
    ][:1]


LEFT: tuple[tuple[set[str], set[str], str, str], ...] = (
    ({"lse"}, {"out"}, "the LSE: its base, or the maximum", "out, of the same weights, right"),
    ({"out"}, {"lse"}, "P V, or the division by the row sum", "lse, of the same scores, right"),
    ({"out"}, set(), "the scores, the softmax or P V", "and all that follows from it"),
    ({"dq", "dk", "dv"}, set(), "P recomputed in the backward, or the cotangent that it reads", "nothing of the backward right"),
    ({"dq", "dk"}, {"dv"}, "delta = rowsum(dO * O), or the scale of dS", "dv, of the same P, right"),
    ({"dk", "dv"}, {"dq"}, "the sum over the rows and the heads of a group", "dq, of the same dS, right"),
    ({"dq"}, {"dk"}, "dq = scale dS K: the tail of the keys, or how dq is accumulated", "dk, of the same dS, right"),
    ({"dk"}, {"dq"}, "dk = scale dS^T Q: the tail of the rows, or how dk is accumulated", "dq, of the same dS, right"),
    ({"dv"}, {"dq"}, "dv = P^T dO: the tail of the rows, or how dv is accumulated", "dS, of the same P, right in dq"),
    ({"dbias"}, {"dq"}, "dbias: the sum over what the bias is broadcast in", "dq, of the same dS, right"),
)
"""(these wrong, these right, what is left, why): the first that applies."""


def _other_masks(p: Problem, x: Inputs) -> Iterator[Other]:
    parts = p.mask.parts
    exchanged = Mask(tuple((EXCHANGED.get(name, name), args) for name, args in parts))
    yield f"the mask's alignment ({{}} is that of {exchanged})", p.but(mask=exchanged), x
    for n, (name, args) in enumerate(parts):
        rest = Mask(parts[:n] + parts[n + 1 :] or FULL.parts)
        yield f"the mask ({{}} is that without {name})", p.but(mask=rest), x
        moved = ((*args[:i], args[i] + by, *args[i + 1 :]) for i in range(len(args)) for by in (-1, 1))
        for other in (Mask(((name, a),)) for a in moved if KINDS[name].legal(a)):
            yield f"the mask's edge ({{}} is that of {other}, not of {Mask(((name, args),))})", p.but(mask=rest & other), x


def _tails(trial: Trial, p: Problem, x: Inputs) -> Iterator[Other]:
    for n in _ends(trial, p.len_k):
        mask = p.mask & Mask((("padding", (n,) * p.batch),))
        yield f"the tail of the keys ({{}} is that of the first {n} of {p.len_k})", p.but(mask=mask), x


def _ends(trial: Trial, length: int) -> list[int]:
    """Where a loop may end too early: before the last, partial tile, or before the last element."""
    return sorted(({length - length % tile for tile in trial.tiles} | {length - 1}) - {-1, length})


def _other_scores(p: Problem, x: Inputs) -> Iterator[Other]:
    scale = p.softmax_scale
    scales = {"1": 1.0, "scale ** 2": scale**2, "scale * ln 2": scale * LN2, "scale / ln 2": scale / LN2, "-scale": -scale}
    scales |= {"1 / sqrt(dim_qk)": p.dim_qk**-0.5, "1 / sqrt(dim_v)": p.dim_v**-0.5}
    for what, other in scales.items():
        yield f"the scale ({{}} is that of {what} = {other:.6g}, not {scale:.6g})", p.but(scale=other), x
    if p.softcap:
        yield "softcap ({} is that without it)", p.but(softcap=0.0), x
    if p.bias != "none":
        yield "the bias ({} is that without it)", p.but(bias="none"), replace(x, bias=None, slopes=None)


def _other_slices(p: Problem, x: Inputs) -> Iterator[Other]:
    """Keys and values of another head or batch entry."""
    for names in (("k",), ("v",), ("k", "v")):
        of, tensors = " and ".join(names), {n: getattr(x, n) for n in names}
        if p.batch > 1:
            first = {n: t[:1].expand_as(t) for n, t in tensors.items()}
            yield f"the batch entry ({{}} is that of {of} of entry 0 for all)", p, replace(x, **first)
        if p.heads_kv > 1:
            first = {n: t[:, :1].expand_as(t) for n, t in tensors.items()}
            yield f"the key head ({{}} is that of {of} of head 0 for all)", p, replace(x, **first)
    if p.heads_kv > 1 and p.group > 1:
        cycled = {n: getattr(x, n).repeat(1, p.group, 1, 1) for n in ("k", "v")}
        yield "the key head ({} is that of h % heads_kv, not h // group)", p.but(heads_kv=p.heads_q), replace(x, **cycled)


def _fitted_scale(trial: Trial, p: Problem, x: Inputs) -> Iterator[str]:
    scale = p.softmax_scale
    for _ in range(STEPS):
        near = Truth(p.but(scale=scale), x, dense.exact(p.but(scale=scale), x))
        step = ((trial.got("out") - near.exact.out) * near.tilt).sum() / near.tilt.square().sum()
        if not step.isfinite():
            return
        scale *= math.exp(step.clamp(-1, 1).item())
    if p.batch * p.heads_q * p.len_q > 1 and trial.fits("out", p.but(scale=scale), x):  # one row can always be fitted
        yield f"the scale (out is that of {scale / p.softmax_scale:.6g} times the scale)"


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
    """Another delta moves dq by a multiple of the row's mean key, sum_j p_ij k_j, and by nothing else."""
    p, x = trial.known.problem, trial.known.inputs
    if "dq" not in trial.wrong or p.softcap:
        return
    mean_key = dense.exact(p.but(dim_v=p.dim_qk, grads=False), replace(x, v=x.k, do=x.q)).out
    error, got = trial.got("dq") - trial.want("dq"), trial.got("dq")
    delta = (x.do.to(torch.float64) * trial.known.exact.out).sum(-1, keepdim=True)
    along = (error * mean_key).sum(-1, keepdim=True) / mean_key.square().sum(-1, keepdim=True)
    if trial.right("dq", got - p.softmax_scale * delta * mean_key):
        yield "delta = rowsum(dO * O) (dq is that without it)"
    elif p.dim_qk > 1 and trial.right("dq", got - along.nan_to_num(0.0) * mean_key):
        yield "delta = rowsum(dO * O) (every row of dq is off by a multiple of its mean key, and by nothing else)"


def _row_sums(trial: Trial) -> Iterator[str]:
    """dk and dv are sums over rows and the heads of a group: those of which dO is 0 are left out."""
    p, x = trial.known.problem, trial.known.inputs
    rows, heads = torch.arange(p.len_q, device=x.do.device)[:, None], torch.arange(p.heads_q, device=x.do.device)[:, None, None]
    kept = {f"the tail of the rows ({{}} is that of the first {n} of {p.len_q})": rows < n for n in _ends(trial, p.len_q)}
    if p.group > 1:
        of = "the sum over the query heads of a group ({} is that of the"
        kept |= {f"{of} first of each)": heads % p.group == 0, f"{of} last of each)": heads % p.group == p.group - 1}
    summed = [name for name in ("dk", "dv") if name in trial.wrong]
    found = [what.format(n) for n in summed for what, some in kept.items() if trial.fits(n, p, replace(x, do=x.do * some))]
    yield from found
    if summed and p.group > 1 and not found:
        alone = replace(trial.case, problem=p.but(heads_kv=p.heads_q))
        try:
            supported = trial.kernel.unsupported(alone.problem, trial.known.device) is None
            if supported and not {"dk", "dv"} & set(tried(trial.kernel, alone, trial.known.device)[0].wrong):
                yield f"the sum over the query heads of a group ({', '.join(summed)} right where a key head has one query head)"
        except Finding:
            return


def _key_sums(trial: Trial) -> Iterator[str]:
    """dq is a sum over keys; dS is the gradient of a bias that nothing is broadcast in."""
    p, x = trial.known.problem, trial.known.inputs
    if "dq" not in trial.wrong or p.softcap:
        return
    ds, k = dense.exact(p.but(bias="bhqk"), x).dbias, x.k.to(torch.float64).repeat_interleave(p.group, 1)
    assert ds is not None
    for n in _ends(trial, p.len_k):
        dropped = p.softmax_scale * ds[..., n:] @ k[:, :, n:]
        if trial.right("dq", trial.got("dq") + dropped):
            yield f"the tail of the keys (dq is that of the first {n} of {p.len_k})"


def _factors(trial: Trial) -> Iterator[str]:
    """One factor for a whole tensor, or one for each of its rows."""
    p, found = trial.known.problem, dict[str, str]()
    named = {"scale": p.softmax_scale, "ln 2": LN2, "the group's size": float(p.group), "the batch's size": float(p.batch)}
    factors = named | {f"1 / {what}": 1 / factor for what, factor in named.items() if factor}
    for name in trial.wrong:
        got, want = trial.got(name), trial.want(name)
        alpha = measure(got, want).alpha
        if int((want != 0).sum()) < 2 or not math.isfinite(alpha):  # one element is a multiple of anything
            continue
        if not got.any():
            yield f"the store of {name} (it is all zeros)"
        elif alpha and trial.right(name, got / alpha):
            words = [what for what, factor in factors.items() if factor not in (0, 1) and trial.right(name, got / factor)]
            found[name] = f"{alpha:.6g}" + (f" ({', '.join(words)})" if words else "")
        elif name == "out" and got.shape[-1] > 1:
            by_row = (got * want).sum(-1, keepdim=True) / want.square().sum(-1, keepdim=True)
            if trial.right(name, torch.where(want == 0, got, got / by_row)):
                low, high = by_row.nan_to_num(1.0).aminmax()
                yield f"the division by the row sum (each row of out is the exact one times {low:.4g} to {high:.4g})"
    if found:
        stage = "the scale of dS" if set(found) == {"dq", "dk"} else "a factor, e.g. a normalisation"
        yield f"{stage} ({', '.join(f'{name} is {times} times the exact one' for name, times in found.items())})"


def _roundings(trial: Trial) -> list[str]:
    """A narrower format in one place explains the errors where they are as large as those of an emulation."""
    name, problem = trial.wrong[0], trial.known.problem
    declared, found = trial.kernel.numerics(problem, trial.known.device), dict[str, float]()
    changes: list[dict[str, Any]] = [{field: fmt} for field in ROUNDED for fmt in (*NARROWER, "input")]
    changes += [{"probs": fmt, "normalized_probs": True} for fmt in (*NARROWER, "input")] + [{"scaled_query": True}]
    for change in changes:
        other = replace(trial, kernel=replace(trial.kernel, arithmetic=replace(declared, **change)))
        if other.expected is not None and other.right(name, other.got(name)):
            mine, honest = other.expected.rmse(name, other.got(name))
            if max(mine, honest) ** 2 <= ALIKE * min(mine, honest) ** 2:
                found[str(change)] = mine / honest
    nearest = sorted(found, key=lambda what: abs(math.log(found[what])))[:1]
    return [f"a rounding (the RMSE of {name} is {found[what]:.3g} times that expected with {what})" for what in nearest]
