"""Laws of the formula: what scaling, shifting, splitting, repeating and hiding do to out and LSE."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from verify.bounds import Allowance
from verify.case import Case, Inputs
from verify.guard import Output, call
from verify.masks import Mask
from verify.problem import Problem
from verify.properties.property import Verdict, agree, answer, both, doubled, holds, limits, rng
from verify.properties.truth import Truth, about, truth
from verify.properties.verdict import compare
from verify.registry import Kernel

SHIFTS = (50.0, -50.0, 90.0, -90.0, 130.0, -130.0, 1e4, -1e4)
"""What all scores of a row are moved by: where exp, exp2 and FP16 over- and underflow."""
HUGE_CAP = 2.0**20
FAR = 1e4
"""What stands in keys and values that nobody may see."""


@holds()
def value_scaling(kernel: Kernel, case: Case, device: str) -> Verdict:
    """out(2 V) = 2 out(V), to the last bit where the kernel repeats its bits: V enters linearly."""
    known = truth(case, device)
    twice, factor = _scaled(known.inputs.v)
    if twice is None:
        return Verdict(unsupported="2 V and V / 2 are not both representable")
    other = about(known.problem, replace(known.inputs, v=twice))
    return _scales(kernel, known, other, factor, "out of V")


@holds()
def query_scaling(kernel: Kernel, case: Case, device: str) -> Verdict:
    """out(2 Q, scale / 2) = out(Q, scale), to the last bit where the kernel repeats its bits: only their product enters."""
    known = truth(case, device)
    twice, factor = _scaled(known.inputs.q)
    if twice is None:
        return Verdict(unsupported="2 Q and Q / 2 are not both representable")
    problem = known.problem.but(scale=known.problem.softmax_scale / factor)
    if reason := kernel.unsupported(problem, device):
        return Verdict(unsupported=reason)
    return _scales(kernel, known, about(problem, replace(known.inputs, q=twice)), 1.0, "out of Q and scale")


def _scaled(x: Tensor) -> tuple[Tensor | None, float]:
    """(x times 2 or 1/2, which of them), exact; None where neither is."""
    for factor in (2.0, 0.5):
        scaled = x * factor
        if bool((scaled.double() == x.double() * factor).all()):
            return scaled, factor
    return None, 1.0


def _scales(kernel: Kernel, known: Truth, other: Truth, factor: float, against: str) -> Verdict:
    once, scaled = answer(kernel, known).out, answer(kernel, other).out
    allowed = both(limits(kernel, other)["out"], limits(kernel, known)["out"].limit * factor)
    compare("out", scaled, once.double() * factor, allowed, against=f"{factor:g} times {against}")
    if kernel.numerics(known.problem, known.device).deterministic:
        doubled("out", scaled, once, factor, against)
    return Verdict(bitwise=bool((scaled.double() == once.double() * factor).all()))


@holds()
def shift(kernel: Kernel, case: Case, device: str) -> Verdict:
    """s_ij + c for all j: out the same, lse + c."""
    return _shifted(kernel, case, device)


@holds(grads=True)
def shift_gradients(kernel: Kernel, case: Case, device: str) -> Verdict:
    """s_ij + c for all j, through one column of Q and K: dv the same, dq and dk the same in the other columns."""
    return _shifted(kernel, case, device)


def _shifted(kernel: Kernel, case: Case, device: str) -> Verdict:
    known = truth(case, device)
    p, x = known.problem, known.inputs
    if p.softcap or p.softmax_scale == 0:
        return Verdict(unsupported="a softcap bends the shift, a scale of 0 undoes it")
    q, k, moved = x.q.clone(), x.k.clone(), x.k.clone()
    q[..., 0], k[..., 0] = 1.0, 0.0
    moved[..., 0] = max(-1.0, min(1.0, SHIFTS[case.seed % len(SHIFTS)] / p.softmax_scale / torch.finfo(k.dtype).max * 2)) * (
        torch.finfo(k.dtype).max / 2
    )
    c = moved.flatten()[0].double().item() * p.softmax_scale if moved.numel() else 0.0
    still, shifted = (about(p, replace(x, q=q, k=keys)) for keys in (k, moved))
    one, two = answer(kernel, still), answer(kernel, shifted)
    before, after = limits(kernel, still), limits(kernel, shifted)
    columns = {"dq": slice(1, None), "dk": slice(1, None)}
    for name in ("out", "lse", "dv", "dq", "dk"):
        got, want = getattr(two, name), getattr(one, name)
        if got is None or want is None or (name in columns and p.dim_qk == 1):
            continue
        part = (..., columns.get(name, slice(None)))
        allowed = both(_part(after[name], part), before[name].limit[part])
        want = want[part].double() + (c if name == "lse" else 0.0)
        compare(name, got[part], want, allowed, against=f"before all scores moved by {c:g}")
    return Verdict(bitwise=torch.equal(one.out, two.out))


def _part(allowed: Allowance, part: tuple[object, ...]) -> Allowance:
    return Allowance(allowed.limit[part], {name: term[part] for name, term in allowed.terms.items()})


@holds(full_mask=True, lse=True)
def split(kernel: Kernel, case: Case, device: str) -> Verdict:
    """Keys in two parts, merged through their LSE, give the whole: lse = ln(e^lse1 + e^lse2), out = sum e^(lse_i - lse) out_i."""
    known = truth(case, device)
    p, x = known.problem, known.inputs
    if p.bias == "alibi":
        return Verdict(unsupported="ALiBi moves with the number of keys")
    n = int(rng(case).integers(0, p.len_k + 1))
    parts = [_keys(known, keys) for keys in (slice(0, n), slice(n, None))]
    if reasons := [r for part in parts if (r := kernel.unsupported(part.problem, device))]:
        return Verdict(unsupported=reasons[0])
    outputs = [answer(kernel, part) for part in parts]
    lses = [output.lse for output in outputs if output.lse is not None]
    allowed = [limits(kernel, part) for part in parts]
    merged, bound = merge([o.out for o in outputs], lses, [(a["out"].limit, a["lse"].limit) for a in allowed])
    compare(
        "out",
        merged,
        known.exact.out,
        Allowance(bound, {"parts merged": bound}),
        against=f"exact, keys split at {n} of {x.k.shape[2]},",
    )
    return Verdict()


def _keys(known: Truth, keys: slice) -> Truth:
    x = known.inputs
    k, v = x.k[:, :, keys], x.v[:, :, keys]
    bias = None if x.bias is None else x.bias[..., keys]
    return about(known.problem.but(len_k=k.shape[2]), replace(x, k=k, v=v, bias=bias))


def merge(outs: list[Tensor], lses: list[Tensor], errors: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(the merged output in float64, how far it may be off): weights w_i = e^(lse_i - lse), off by a factor of e^(error of lse_1
    + error of lse_2) at most, move it by w_1 w_2 |out_1 - out_2| times that less 1.
    """
    (one, two), (l1, l2) = (o.double() for o in outs), (x.double() for x in lses)
    whole = torch.logaddexp(l1, l2)
    w1, w2 = (torch.exp(part - whole).masked_fill(whole == -torch.inf, 0.0).unsqueeze(-1) for part in (l1, l2))
    swing = torch.expm1(sum(e[1] for e in errors).nan_to_num(0.0, posinf=math.inf)).unsqueeze(-1)
    apart = torch.where((w1 > 0) & (w2 > 0), w1 * w2 * (one - two).abs() * swing, 0.0)
    bound = (w1 * errors[0][0]).nan_to_num() + (w2 * errors[1][0]).nan_to_num() + apart * (1 + swing)
    return w1 * one.nan_to_num() + w2 * two.nan_to_num(), bound


@holds(full_mask=True)
def duplicate_keys(kernel: Kernel, case: Case, device: str) -> Verdict:
    """Every key twice: out the same, lse + ln 2."""
    known = truth(case, device)
    p, x = known.problem, known.inputs
    if p.bias == "alibi":
        return Verdict(unsupported="ALiBi moves with the number of keys")
    bias = None if x.bias is None else torch.cat([x.bias, x.bias], -1)
    other = about(
        p.but(len_k=2 * p.len_k, grads=False), replace(x, k=torch.cat([x.k, x.k], 2), v=torch.cat([x.v, x.v], 2), bias=bias)
    )
    return _same(kernel, known, other, "with every key once", shift=math.log(2))


@holds()
def hidden_keys_appended(kernel: Kernel, case: Case, device: str) -> Verdict:
    """More keys that nobody sees change nothing."""
    known = truth(case, device)
    p, x = known.problem, known.inputs
    if p.bias == "alibi" or not p.mask.names <= {"full", "causal_upper_left", "padding", "prefix_lm", "blocks"}:
        return Verdict(unsupported="the mask or ALiBi moves with the number of keys")
    more = 1 + case.seed % 70
    mask = p.mask & Mask((("padding", (p.len_k,) * p.batch),))
    problem = p.but(len_k=p.len_k + more, mask=mask, grads=False)
    if reason := kernel.unsupported(problem, device):
        return Verdict(unsupported=reason)
    extra = {n: torch.cat([t, t.new_full((*t.shape[:2], more, t.shape[3]), FAR)], 2) for n, t in (("k", x.k), ("v", x.v))}
    bias = None if x.bias is None else torch.nn.functional.pad(x.bias, (0, more))
    return _same(kernel, known, about(problem, replace(x, **extra, bias=bias)), f"without {more} hidden keys")


@holds()
def last_rows(kernel: Kernel, case: Case, device: str) -> Verdict:
    """Decoding: the last queries alone, against all keys, give the last rows of the whole (lower-right masks)."""
    known = truth(case, device)
    p, x = known.problem, known.inputs
    if not p.mask.names <= {"full", "causal_lower_right", "window", "padding"}:
        return Verdict(unsupported="the mask is aligned with the first query")
    n = 1 + case.seed % 3
    if p.len_q <= n:
        return Verdict(unsupported="they are the whole")
    bias = None if x.bias is None else x.bias[:, :, -n:]
    some = about(p.but(len_q=n, grads=False), replace(x, q=x.q[:, :, -n:], do=x.do[:, :, -n:], bias=bias))
    return _rows(kernel, known, some, slice(p.len_q - n, None))


@holds()
def prefix(kernel: Kernel, case: Case, device: str) -> Verdict:
    """Causal: row i of the whole is row i of the prefix that ends with it."""
    known = truth(case, device)
    p, x = known.problem, known.inputs
    offset = {"causal_upper_left": 0, "causal_lower_right": p.len_k - p.len_q}.get(str(p.mask))
    if offset is None or p.bias == "alibi":
        return Verdict(unsupported="not causal alone")
    low, high = max(1, 1 - offset), min(p.len_q, p.len_k - offset)
    if low > high:
        return Verdict(unsupported="no prefix of both queries and keys")
    n = int(rng(case).integers(low, high + 1))
    bias = None if x.bias is None else x.bias[:, :, :n, : n + offset]
    first = replace(x, q=x.q[:, :, :n], do=x.do[:, :, :n], k=x.k[:, :, : n + offset], v=x.v[:, :, : n + offset], bias=bias)
    return _rows(kernel, known, about(p.but(len_q=n, len_k=n + offset, grads=False), first), slice(0, n))


def _rows(kernel: Kernel, known: Truth, some: Truth, rows: slice) -> Verdict:
    if reason := kernel.unsupported(some.problem, some.device):
        return Verdict(unsupported=reason)
    whole, part = answer(kernel, known), answer(kernel, some)
    chosen = Output(whole.out[:, :, rows], None if whole.lse is None else whole.lse[:, :, rows])
    names = ("out", "lse")
    own, other = limits(kernel, some), limits(kernel, known)
    allowed = {name: both(own[name], other[name].limit[:, :, rows]) for name in names}
    return Verdict(bitwise=_near(part, chosen, allowed, f"rows {rows.start} to {rows.stop or known.problem.len_q} of the whole"))


def _same(kernel: Kernel, known: Truth, other: Truth, against: str, *, shift: float = 0.0) -> Verdict:
    """Two problems of one answer (LSE moved by `shift`)."""
    if reason := kernel.unsupported(other.problem, other.device):
        return Verdict(unsupported=reason)
    one, two = call(kernel, known.problem.but(grads=False), known.inputs), answer(kernel, other)
    mine, theirs = limits(kernel, other), limits(kernel, known)
    allowed = {name: both(mine[name], theirs[name]) for name in ("out", "lse")}
    want = Output(one.out, None if one.lse is None else one.lse.double() + shift)
    return Verdict(bitwise=_near(two, want, allowed, against))


def _near(got: Output, want: Output, allowed: dict[str, Allowance], against: str) -> bool:
    half = {name: Allowance(a.limit / 2, {n: t / 2 for n, t in a.terms.items()}) for name, a in allowed.items()}
    return agree(got, want, half, against, ("out", "lse"))


@holds()
def neutral_options(kernel: Kernel, case: Case, device: str) -> Verdict:
    """A bias of 0, ALiBi slopes of 0, a softcap far above every score and the default scale written out change nothing."""
    known = truth(case, device)
    p, x = known.problem, known.inputs
    zero = x.q.new_zeros((1, 1, p.len_q, p.len_k))
    ways: list[tuple[str, Problem, Inputs]] = []
    if p.bias == "none" and p.mask_as != "float":
        ways.append(("a bias of 0", p.but(bias="qk"), replace(x, bias=zero)))
        ways.append(("slopes of 0", p.but(bias="alibi"), replace(x, slopes=torch.zeros(p.heads_q, device=device))))
    if not p.softcap:
        ways.append((f"a softcap of {HUGE_CAP:g}", p.but(softcap=HUGE_CAP), x))
    if p.scale is None:
        ways.append(("the scale written out", p.but(scale=p.softmax_scale), x))
    ways = [way for way in ways if kernel.unsupported(way[1].but(grads=False), device) is None]
    if not ways:
        return Verdict(unsupported="has no option that is not in use")
    first, allowed, bitwise = call(kernel, p.but(grads=False), x), limits(kernel, known), True
    for name, problem, inputs in ways:
        other = about(problem.but(grads=False), inputs)
        moved = {n: (getattr(other.exact, n) - getattr(known.exact, n)).abs().nan_to_num() for n in ("out", "lse")}
        room = {n: both(both(allowed[n], limits(kernel, other)[n]), moved[n]) for n in ("out", "lse")}
        bitwise &= _near(answer(kernel, other), first, room, f"without {name}")
    return Verdict(bitwise=bitwise)
