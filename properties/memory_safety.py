"""Laws of memory: what is not the kernel's to read, layouts, arguments that do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from verify.bounds.exact import by_group
from verify.bounds.metrics import distance, same
from verify.properties.property import Verdict, agree, answer, holds, limits, rng
from verify.reference.reference import truth
from verify.registry import Kernel
from verify.sandbox.call import call, keywords, watched
from verify.spec.case import ARRANGED, TORCH_DTYPES, Case, Inputs, visibility
from verify.spec.finding import Finding
from verify.spec.layouts import laid_out
from verify.spec.problem import Problem
from verify.spec.quantization import seen_keys


@holds(arranged=True, backward=True)
def layout(kernel: Kernel, case: Case, device: str) -> Verdict:
    """The same values in other strides, NaN in the gaps: the same output and gradients."""
    known, chosen = truth(case, device), dict(case.layouts)
    present = {n: t for n in ARRANGED if (t := getattr(known.inputs, n)) is not None}
    moved = {name: laid_out(present[name], way) for name, way in chosen.items() if name in present}
    if not moved:
        return Verdict(unsupported="all tensors are contiguous")
    plain = {name: laid_out(t) for name, t in (present | moved).items()}
    here, there = (
        call(kernel, known.problem, replace(known.inputs, **tensors))
        for tensors in (present | moved, plain)
    )
    said = ", ".join(f"{name} {way}" for name, way in chosen.items() if name in moved)
    return Verdict(bitwise=agree(here, there, limits(kernel, known), f"contiguous; here {said};"))


@holds(hides=True, backward=True, calls=3)
def no_leak(kernel: Kernel, case: Case, device: str) -> Verdict:
    """K_j, V_j replaced where rows do not see key j: these rows the same, whatever was written
    there, and, if no other row overflows, dk and dv of the keys that only these rows see.
    """
    known = truth(case, device)
    p, x = known.problem, known.inputs
    seen = visibility(p, x.q.device).expand(p.batch, -1, -1, -1)  # [B,H|1,Q,K]
    row = int(rng(case).integers(p.len_q)) if p.len_q else 0
    shared = kernel.numerics(p, device).quantised is not None
    if shared:  # what another row or head sees may move the scales
        looked = seen_keys(p, x.q.device).mT.expand(p.batch, -1, -1, -1)
    else:
        looked = _of_key_heads(seen[:, :, row : row + 1], p)
    hidden = ~looked  # [B,Hk|1,1,K], from all heads of a group
    if not hidden.any():
        return Verdict(unsupported="the row sees every key")
    draw, largest = rng(case), torch.finfo(x.k.dtype).max ** 0.5
    noise = torch.from_numpy(draw.uniform(-largest, largest, (p.batch, 1, p.len_k, 1))).to(x.k)
    k, v = (laid_out(torch.where(hidden.mT, noise, t)) for t in (x.k, x.v))
    one, two, allowed = (
        answer(kernel, known),
        call(kernel, p, replace(x, k=k, v=v)),
        limits(kernel, known),
    )
    of_heads = hidden.repeat_interleave(p.heads_q // hidden.shape[1], 1)
    rows = ~(seen & of_heads).any(-1)  # [B,H,Q] that see none of them
    others = _of_key_heads(seen & ~rows.unsqueeze(-1), p).any(2)
    # keys that only these rows see [B,Hk,K]; 0 * NaN is NaN, of P V or of P recomputed
    ends = [t for t in (two.out, two.dq) if t is not None]
    alone = ~others & all(bool(t.isfinite().all()) for t in ends)
    for name in ("out", "lse", "dq", "dk", "dv"):
        got, want = getattr(two, name), getattr(one, name)
        if got is not None and want is not None:
            of = alone if name in ("dk", "dv") else rows
            mine = (of if got.dim() == 3 else of.unsqueeze(-1)).expand(got.shape)
            limit = allowed[name].limit
            wrong = mine & (distance(got, want) > 2 * limit)
            if wrong.any():
                at = tuple(wrong.nonzero()[0].tolist())
                group = 1 if name in ("dk", "dv") else p.group
                of = hidden.expand(-1, p.heads_kv, -1, -1)[at[0], at[1] // group, 0]
                keys = of.nonzero().flatten().tolist()
                raise Finding(
                    f"{name}{list(at)} was {want[at].item():.6g} and is {got[at].item():.6g} after "
                    f"keys {keys[:5]}, which its row"
                    f" does not see, were changed; allowed {2 * limit[at].item():.1e}"
                )
    return Verdict(
        bitwise=bool(
            same(one.out, two.out).masked_select(rows.unsqueeze(-1).expand(one.out.shape)).all()
        )
    )


def _of_key_heads(seen: Tensor, p: Problem) -> Tensor:
    """[B,H|1,n,K] -> [B,Hk|1,n,K]: whether some query head of a key head sees it."""
    return by_group(seen, p).any(2)


@holds(hides=True, backward=True, declares="hidden_nan")
def hidden_nan(kernel: Kernel, case: Case, device: str) -> Verdict:
    """NaN in K_j and V_j of keys that no row of any head sees: out, lse and dq the same, and dk and
    dv of the keys that are seen.
    """
    known = truth(case, device)
    p, x = known.problem, known.inputs
    seen = seen_keys(p, x.q.device)
    if seen.all():
        return Verdict(unsupported="every key is seen by some row")
    k, v = (laid_out(torch.where(seen, t, torch.nan)) for t in (x.k, x.v))
    one, two = answer(kernel, known), call(kernel, p, replace(x, k=k, v=v))
    if two.dk is not None and one.dk is not None:
        two = replace(two, dk=torch.where(seen, two.dk, one.dk))
    if two.dv is not None and one.dv is not None:
        two = replace(two, dv=torch.where(seen, two.dv, one.dv))
    against, names = "with numbers where no row looks", ("out", "lse", "dq", "dk", "dv")
    return Verdict(bitwise=agree(two, one, limits(kernel, known), against, names))


@holds(calls=3)
def nan(kernel: Kernel, case: Case, device: str) -> Verdict:
    """NaN in q_i: row i is NaN and no other. NaN in V_jc: column c of every row that sees j is NaN,
    no other column is.
    """
    known = truth(case, device)
    p, x = known.problem, known.inputs
    sees = known.exact.lse != -torch.inf
    if kernel.numerics(p, device).quantised is not None or not sees.any():
        return Verdict(unsupported="no row sees a key, or a scale is shared")
    before = answer(kernel, known).out.isnan()
    b, h, i = sees.nonzero()[case.seed % int(sees.sum())].tolist()
    q = x.q.clone()
    q[b, h, i] = torch.nan
    after = call(kernel, p, replace(x, q=q)).out.isnan()
    wanted = before.clone()
    wanted[b, h, i] = True
    _as_wanted(after, wanted, f"NaN in q[{b},{h},{i}]", torch.ones_like(wanted))
    seen = visibility(p, x.q.device).expand(p.batch, p.heads_q, p.len_q, p.len_k)[b]
    j, c = int(seen[h, i].nonzero()[0]), case.seed % p.dim_v
    v = x.v.clone()
    v[b, h // p.group, j, c] = torch.nan
    after = call(kernel, p, replace(x, v=v)).out.isnan()
    wanted, sure = before.clone(), torch.ones_like(before)
    heads = slice(h // p.group * p.group, (h // p.group + 1) * p.group)
    rows = seen[heads, :, j]  # [G,Q]
    wanted[b, heads, :, c] |= rows
    sure[b, heads, :, c] = rows  # whether it leaks to rows that do not see j: a convention
    _as_wanted(after, wanted, f"NaN in v[{b},{h // p.group},{j},{c}]", sure)
    return Verdict()


def _as_wanted(after: Tensor, wanted: Tensor, what: str, sure: Tensor) -> None:
    wrong = (after != wanted) & sure
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        how = "is not NaN" if wanted[tuple(at)] else "is NaN, too"
        raise Finding(f"{what}: out{at} {how}; {int(wrong.sum())} elements so")


@holds(calls=1, style=True)
def reject(kernel: Kernel, case: Case, device: str) -> Verdict:
    """Arguments that contradict each other raise; none is dropped or broadcast in silence."""
    p, x = case.problem.but(grads=False), truth(case, device).inputs
    if not p.len_k or not p.len_q:
        return Verdict(unsupported="nothing to contradict")
    for what, tensors in _contradictions(p, x):
        wrong = replace(x, **{name: laid_out(t) for name, t in tensors.items()})
        try:
            with watched():
                returned = kernel.fn(wrong.q, wrong.k, wrong.v, **keywords(kernel, p, wrong))
                if device == "cuda":
                    torch.cuda.synchronize()
        except Exception:  # noqa: S112 - whichever way a kernel says no
            continue
        out = returned[0] if isinstance(returned, tuple) else returned
        raise Finding(f"takes {what} without a word and returns {list(out.shape)}")
    return Verdict()


def _contradictions(p: Problem, x: Inputs) -> Iterator[tuple[str, dict[str, Tensor]]]:
    def longer(t: Tensor, dim: int) -> Tensor:
        return torch.cat([t, t.narrow(dim, 0, 1)], dim)

    yield f"{p.len_k} keys and {p.len_k + 1} values", {"v": longer(x.v, 2)}
    yield f"q of head dim {p.dim_qk + 1} and k of {p.dim_qk}", {"q": longer(x.q, 3)}
    other = "fp16" if p.dtype != "fp16" else "bf16"
    yield f"q in {p.dtype} and k in {other}", {"k": x.k.to(TORCH_DTYPES[other])}
    if p.heads_kv > 1 and p.heads_q % (p.heads_kv + 1):
        yield f"k of {p.heads_kv + 1} heads and v of {p.heads_kv}", {"k": longer(x.k, 1)}
    if p.batch > 1:
        yield (
            f"q of batch {p.batch} and k, v of batch {p.batch + 1}",
            {"k": longer(x.k, 0), "v": longer(x.v, 0)},
        )
