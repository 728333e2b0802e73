"""Laws with an answer that nobody needs to compute: probes that see which keys were seen, and
whether weights add up to 1.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from verify.bounds.exact import Exact
from verify.properties.property import Verdict, answer, holds, limits, rng, sound
from verify.reference.compare import compare, judge
from verify.reference.reference import about, truth
from verify.registry import Kernel
from verify.spec.case import Case, visibility
from verify.spec.finding import Finding
from verify.spec.masks import Mask
from verify.spec.problem import HANDED


@holds(calls=1)
def ones(kernel: Kernel, case: Case, device: str) -> Verdict:
    """V = 1: out_i = 1 in every row that sees a key, whatever P is."""
    known = truth(case, device)
    known = about(known.problem, replace(known.inputs, v=torch.ones_like(known.inputs.v)))
    sees = known.exact.lse.unsqueeze(-1) != -torch.inf
    out, allowed = answer(kernel, known).out, limits(kernel, known)["out"]
    want = torch.where(sees, 1.0, known.exact.out).expand(out.shape)
    compare("out", torch.where(sees, out, known.exact.out.to(out)), want, allowed, against="V = 1")
    return Verdict()


@holds(no_bias=True, calls=1)
def uniform(kernel: Kernel, case: Case, device: str) -> Verdict:
    """Q = 0: out_i = mean of the visible V, lse_i = ln(how many)."""
    return _without_scores(kernel, case, device, one_hot=False)


@holds(no_bias=True, hides=True, calls=1)
def one_hot(kernel: Kernel, case: Case, device: str) -> Verdict:
    """Q = 0, V_j = e_(j mod Dv): out_ic = (visible keys j with j mod Dv = c) / (visible keys):
    which keys a row saw.
    """
    return _without_scores(kernel, case, device, one_hot=True)


@holds(no_bias=True)
def edges(kernel: Kernel, case: Case, device: str) -> Verdict:
    """Q = 0, V_j = e_(j mod Dv) under a window, then under packed sequences, of drawn sizes: which
    keys a row saw.
    """
    p, draw, verdict = (
        case.problem,
        rng(case),
        Verdict(unsupported="takes no window and no packed sequences"),
    )
    sides, lengths = (
        draw.integers(-1, max(p.len_k, 1), 2).tolist(),
        draw.integers(1, max(2, min(p.len_q, p.len_k)), 3).tolist(),
    )
    for mask in (Mask((("window", tuple(sides)),)), Mask((("blocks", tuple(lengths)),))):
        ways = (replace(case, problem=p.but(mask=mask, mask_as=form)) for form in HANDED)
        if way := next((way for way in ways if sound(kernel, way, device, "edges")), None):
            verdict = _without_scores(kernel, way, device, one_hot=True)
    return verdict


def _without_scores(kernel: Kernel, case: Case, device: str, *, one_hot: bool) -> Verdict:
    p = case.problem
    if p.bias != "none":
        return Verdict(unsupported="a bias moves the scores")
    inputs = truth(case, device).inputs
    v = inputs.v
    if one_hot:
        columns = torch.arange(p.len_k, device=device) % p.dim_v
        v = torch.nn.functional.one_hot(columns, p.dim_v).to(v).expand(v.shape)
    known = about(p, replace(inputs, q=torch.zeros_like(inputs.q), v=v))
    seen = visibility(p, known.inputs.q.device).expand(p.batch, -1, -1, -1).double()
    count = seen.sum(-1, keepdim=True)
    values = known.inputs.v.double().repeat_interleave(p.group, 1)
    exact = replace(
        known.exact,
        out=(seen @ values) / count.clamp(min=1),
        lse=count.squeeze(-1).log().expand(p.shapes["lse"]),
    )
    output = answer(kernel, known)
    try:
        judge(kernel, output, replace(known, exact=exact), names=("out", "lse"))
    except Finding as finding:
        raise Finding(
            finding.sentence + _seen(output.out, seen, exact) * one_hot, measured=finding.measured
        ) from None
    return Verdict()


def _seen(out: torch.Tensor, seen: torch.Tensor, exact: Exact) -> str:
    """Where every key has its own column: what the first wrong row saw."""
    if seen.shape[-1] > out.shape[-1] or not out.isfinite().all():
        return ""
    wrong = (
        ((out[..., : seen.shape[-1]] > 0) != (exact.out[..., : seen.shape[-1]] > 0))
        .any(-1)
        .nonzero()
    )
    if not len(wrong):
        return ""
    b, h, row = wrong[0].tolist()
    keys = (out[b, h, row, : seen.shape[-1]] > 0).nonzero().flatten().tolist()
    wanted = seen.expand(-1, out.shape[1], -1, -1)[b, h, row].nonzero().flatten().tolist()
    return f"; row {row} of head {h}, entry {b}, saw keys {keys}, should see {wanted}"


@holds(grads=True)
def empty_row(kernel: Kernel, case: Case, device: str) -> Verdict:
    """No visible key: out_i is as declared (0 or NaN), lse_i = -inf, dq_i = 0, and every gradient
    is finite.
    """
    known = truth(case, device)
    empty = known.exact.lse == -torch.inf
    if not empty.any():
        return Verdict(unsupported="every row sees a key")
    output = answer(kernel, known)
    nan = kernel.empty_row == "nan"
    dq = output.dq
    if dq is not None:  # 0 times a dP that overflows is NaN
        dq = dq.masked_fill(limits(kernel, known)["dq"].limit.isinf(), 0.0)
    found = {
        "out": output.out[empty].isnan() if nan else output.out[empty] == 0,
        "lse": None if output.lse is None else output.lse[empty] == -torch.inf,
        "dq": None if dq is None else dq[empty] == 0,
    }
    for name, right in found.items():
        if right is not None and not right.all():
            value = getattr(output, name)[empty].flatten()[(~right).flatten()][0].item()
            wanted = {"out": kernel.empty_row, "lse": "-inf", "dq": "0"}[name]
            raise Finding(
                f"{name} of a row that sees no key is {value:g}, not {wanted}, in "
                f"{int((~right).sum())} elements"
            )
    for name in ("dk", "dv", "dbias"):
        gradient, want = getattr(output, name), getattr(known.exact, name)
        if (
            gradient is not None
            and not gradient[limits(kernel, known)[name].limit.isfinite()].isfinite().all()
        ):
            raise Finding(
                f"{name} is not finite where rows see no key; exact {want.abs().max().item():.3g} "
                "at most"
            )
    return Verdict()


@holds(full_mask=True)
def hull(kernel: Kernel, case: Case, device: str) -> Verdict:
    """min_j V_jc <= out_ic <= max_j V_jc: a mean lies between the values."""
    known = truth(case, device)
    if not case.problem.len_k:
        return Verdict(unsupported="no keys")
    v = known.inputs.v.double().repeat_interleave(case.problem.group, 1)
    out = answer(kernel, known).out.double()
    nearest = out.clamp(v.amin(2, keepdim=True), v.amax(2, keepdim=True))
    compare("out", out, nearest, limits(kernel, known)["out"], against="the nearest mean of V")
    return Verdict()
