"""Laws of memory and state: what is not the kernel's to read, layouts, calls after each other, arguments that do not fit."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from verify import environment
from verify.case import ARRANGED, TORCH_DTYPES, Case, Inputs, visibility
from verify.finding import Finding
from verify.guard import call, keywords, watched
from verify.layouts import laid_out
from verify.masks import Mask
from verify.measure import same
from verify.problem import Problem
from verify.properties.options import options
from verify.properties.property import TENSORS, Verdict, agree, answer, difference, holds, limits, rng
from verify.properties.truth import Truth, about, truth
from verify.properties.verdict import judge
from verify.registry import Kernel

REPEATS = 20
"""Calls on the same inputs; `verify determinism` makes more."""
WARM, MEASURED = 3, 8
"""Calls before memory is measured, and while it is."""
ROUGHLY = 512
"""Bytes: what torch's allocator on a GPU hands out at least."""


@holds()
def repeat(kernel: Kernel, case: Case, device: str) -> Verdict:
    """f(x) = f(x) in 20 calls, gradients included: no farther apart than two right answers may be, and to the last bit where the
    kernel declares that it is deterministic.
    """
    known = truth(case, device)
    first, repeats = answer(kernel, known), True
    for number in range(2, REPEATS + 1):
        again = answer(kernel, known)
        found = difference(first, again)
        if found and kernel.numerics(case.problem, device).deterministic:
            raise Finding(f"call {number} differs from call 1: {found}")
        if found:
            repeats = False
            agree(again, first, limits(kernel, known), f"in call 1, here call {number};")
    return Verdict(bitwise=repeats)


@holds()
def memory_growth(kernel: Kernel, case: Case, device: str) -> Verdict:
    """f(x) again and again, its results dropped: not every call leaves more memory in use than the one before."""
    known = truth(case, device)
    if environment.in_use(device) is None:
        return Verdict(unsupported="this system does not say how much memory is in use")
    for _ in range(WARM):
        answer(kernel, known)
    grown = _growth(kernel, known, gc.isenabled)
    if grown >= ROUGHLY:
        grown = _growth(kernel, known, gc.collect)  # what cycles of objects keep is no leak
    if grown >= ROUGHLY:
        raise Finding(f"keeps memory: each of {MEASURED} calls on the same inputs left at least {grown} bytes more in use")
    return Verdict()


def _growth(kernel: Kernel, known: Truth, settle: Callable[[], object]) -> int:
    """The least that one of a few calls left behind, bytes."""
    used = []
    for _ in range(MEASURED + 1):
        answer(kernel, known)
        settle()
        used.append(environment.in_use(known.device) or 0)
    return min(b - a for a, b in pairwise(used))


@holds()
def layout(kernel: Kernel, case: Case, device: str) -> Verdict:
    """The same values in other strides, NaN in the gaps: the same output and gradients."""
    known, chosen = truth(case, device), dict(case.layouts)
    present = {n: t for n in ARRANGED if (t := getattr(known.inputs, n)) is not None}
    moved = {name: laid_out(present[name], way) for name, way in chosen.items() if name in present}
    if not moved:
        return Verdict(unsupported="all tensors are contiguous")
    plain = {name: laid_out(t) for name, t in (present | moved).items()}
    here, there = (call(kernel, known.problem, replace(known.inputs, **tensors)) for tensors in (present | moved, plain))
    said = ", ".join(f"{name} {way}" for name, way in chosen.items() if name in moved)
    return Verdict(bitwise=agree(here, there, limits(kernel, known), f"contiguous; here {said};"))


@holds(hides=True)
def no_leak(kernel: Kernel, case: Case, device: str) -> Verdict:
    """K_j, V_j replaced where rows do not see key j: these rows the same, whatever was written there."""
    known = truth(case, device)
    p, x = known.problem, known.inputs
    seen = visibility(p, x.q.device).expand(p.batch, 1, p.len_q, p.len_k)
    row = int(rng(case).integers(p.len_q)) if p.len_q else 0
    shared = kernel.numerics(p, device).quantised is not None  # what another row sees may move the scales
    hidden = ~(seen.any(2, keepdim=True) if shared else seen[:, :, row : row + 1])  # [B,1,1,K]
    if not hidden.any():
        return Verdict(unsupported="the row sees every key")
    draw, largest = rng(case), torch.finfo(x.k.dtype).max ** 0.5
    noise = torch.from_numpy(draw.uniform(-largest, largest, (p.batch, 1, p.len_k, 1))).to(x.k)
    k, v = (laid_out(torch.where(hidden.mT, noise, t)) for t in (x.k, x.v))
    one, two = answer(kernel, known), call(kernel, p, replace(x, k=k, v=v))
    rows = ~(seen & hidden).any(-1)  # [B,1,Q] that see none of them
    for name in ("out", "lse", "dq"):
        got, want = getattr(two, name), getattr(one, name)
        if got is not None and want is not None:
            mine = (rows if got.dim() == 3 else rows.unsqueeze(-1)).expand(got.shape)
            limit = limits(kernel, known)[name].limit
            wrong = mine & ~(same(got, want) | ((got.double() - want.double()).abs() <= 2 * limit))
            if wrong.any():
                at = tuple(wrong.nonzero()[0].tolist())
                keys = hidden[at[0], 0, 0].nonzero().flatten().tolist()
                raise Finding(
                    f"{name}{list(at)} was {want[at].item():.6g} and is {got[at].item():.6g} after keys {keys[:5]}, which its row"
                    f" does not see, were changed; allowed {2 * limit[at].item():.1e}"
                )
    return Verdict(bitwise=bool(same(one.out, two.out).masked_select(rows.unsqueeze(-1).expand(one.out.shape)).all()))


@holds()
def nan(kernel: Kernel, case: Case, device: str) -> Verdict:
    """NaN in q_i: row i is NaN and no other. NaN in V_jc: column c of every row that sees j is NaN, no other column is."""
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
    seen = visibility(p, x.q.device).expand(p.batch, 1, p.len_q, p.len_k)[b, 0, i]
    j, c = int(seen.nonzero()[0]), case.seed % p.dim_v
    v = x.v.clone()
    v[b, h // p.group, j, c] = torch.nan
    after = call(kernel, p, replace(x, v=v)).out.isnan()
    rows = visibility(p, x.q.device).expand(p.batch, 1, p.len_q, p.len_k)[b, 0, :, j]
    wanted, sure = before.clone(), torch.ones_like(before)
    heads = slice(h // p.group * p.group, (h // p.group + 1) * p.group)
    wanted[b, heads, rows, c] = True
    sure[b, heads, :, c] = rows[:, None].T.expand(p.group, p.len_q)  # whether it leaks to rows that do not see j: a convention
    _as_wanted(after, wanted, f"NaN in v[{b},{h // p.group},{j},{c}]", sure)
    return Verdict()


def _as_wanted(after: Tensor, wanted: Tensor, what: str, sure: Tensor) -> None:
    wrong = (after != wanted) & sure
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        how = "is not NaN" if wanted[tuple(at)] else "is NaN, too"
        raise Finding(f"{what}: out{at} {how}; {int(wrong.sum())} elements so")


@holds()
def call_sequence(kernel: Kernel, case: Case, device: str) -> Verdict:
    """f(x), f(y), f(z), f(x), where y and z differ from x in one argument each: their answers are right, x's is the same both
    times, and the first result has not changed meanwhile.
    """
    known = truth(case, device)
    others = [
        (what, other)
        for what, other in _neighbours(case, known, options(kernel, device).layouts)
        if kernel.unsupported(other.problem, device) is None
    ]
    first = answer(kernel, known)
    kept = {name: t.clone() for name in TENSORS if (t := getattr(first, name)) is not None}
    chosen = [others[n] for n in rng(case).permutation(len(others))[:2]]
    for what, other in chosen:
        judge(kernel, answer(kernel, other), other, names=("out", "lse"))
        for name, tensor in kept.items():
            if not same(tensor, getattr(first, name)).all():
                raise Finding(f"{name} of the first call changed when the kernel was called again with {what}")
    between = " and ".join(what for what, _ in chosen)
    return Verdict(bitwise=agree(answer(kernel, known), first, limits(kernel, known), f"before calls with {between};"))


def _neighbours(case: Case, known: Truth, layouts: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, Truth]]:
    p, x = known.problem, known.inputs
    plain = p.but(grads=False)
    yield "other values", about(plain, replace(case, seed=case.seed + 1).inputs(known.device))
    yield "another scale", about(plain.but(scale=0.75 * p.softmax_scale), x)
    ways = [way for way in ("gapped", "packed", "bshd") if way in layouts["k"]]
    if ways:
        yield "another layout", about(plain, replace(x, k=laid_out(x.k, ways[0])))
    for mask in ("causal_lower_right", "window(0,2)") if p.mask_as != "rule" else ("full",):
        if str(p.mask) != mask:
            yield f"the mask {mask}", about(plain.but(mask=Mask.parse(mask)), x)
    keys = {"k": x.k, "v": x.v}
    if p.bias == "none" and p.len_k > 1:
        half = {n: t[:, :, : p.len_k // 2] for n, t in keys.items()}
        yield "half the keys", about(plain.but(len_k=p.len_k // 2), replace(x, **half))
        twice = {n: laid_out(torch.cat([t, t], 2)) for n, t in keys.items()}
        yield "twice the keys", about(plain.but(len_k=2 * p.len_k), replace(x, **twice))


@holds()
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
        yield f"q of batch {p.batch} and k, v of batch {p.batch + 1}", {"k": longer(x.k, 0), "v": longer(x.v, 0)}
