"""Laws of parts: of the keys, of the rows, and of keys that change nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from verify.bounds.constants import Allowance
from verify.properties.property import BOTH, Verdict, agree, answer, both, holds, limits, rng, sound
from verify.reference.compare import compare
from verify.reference.reference import Truth, about, truth
from verify.registry import Kernel
from verify.sandbox.call import Output, call
from verify.spec.case import Case
from verify.spec.layouts import laid_out
from verify.spec.masks import hiding

LARGEST = 2**23
"""Scores of a problem that a case is made into."""
FAR = 1e4
"""What stands in keys and values that nobody may see."""


@holds(full_mask=True, lse=True)
def split(kernel: Kernel, case: Case, device: str) -> Verdict:
    """Keys in two parts, merged through their LSE, give the whole: lse = ln(e^lse1 + e^lse2), out =
    sum e^(lse_i - lse) out_i.
    """
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
    if len(lses) < len(outputs):
        return Verdict(unsupported="returns no LSE")
    allowed = [limits(kernel, part) for part in parts]
    merged, bound = merge(
        [o.out for o in outputs], lses, [(a["out"].limit, a["lse"].limit) for a in allowed]
    )
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
    bias = None if x.bias is None else laid_out(x.bias[..., keys])
    return about(known.problem.but(len_k=k.shape[2]), replace(x, k=k, v=v, bias=bias))


def merge(
    outs: list[Tensor], lses: list[Tensor], errors: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """(the merged output in float64, how far it may be off): weights w_i = e^(lse_i - lse), off by
    a factor of e^(error of lse_1 + error of lse_2) at most, move it by w_1 w_2 |out_1 - out_2|
    times that less 1.
    """
    (one, two), (l1, l2) = (o.double() for o in outs), (x.double() for x in lses)
    whole = torch.logaddexp(l1, l2)
    w1, w2 = (
        torch.exp(part - whole).masked_fill(whole == -torch.inf, 0.0).unsqueeze(-1)
        for part in (l1, l2)
    )
    swing = torch.expm1((errors[0][1] + errors[1][1]).nan_to_num(0.0, posinf=math.inf)).unsqueeze(
        -1
    )
    apart = torch.where((w1 > 0) & (w2 > 0), w1 * w2 * (one - two).abs() * swing, 0.0)
    bound = (
        (w1 * errors[0][0]).nan_to_num() + (w2 * errors[1][0]).nan_to_num() + apart * (1 + swing)
    )
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
        p.but(len_k=2 * p.len_k, grads=False),
        replace(x, k=torch.cat([x.k, x.k], 2), v=torch.cat([x.v, x.v], 2), bias=bias),
    )
    if reason := kernel.unsupported(other.problem, device):
        return Verdict(unsupported=reason)
    once, twice = call(kernel, p.but(grads=False), x), answer(kernel, other)
    mine, theirs = limits(kernel, other), limits(kernel, known)
    allowed = {name: both(mine[name], theirs[name]) for name in BOTH}
    want = Output(once.out, None if once.lse is None else once.lse.double() + math.log(2))
    return Verdict(bitwise=agree(twice, want, allowed, "with every key once", BOTH, times=1))


@holds()
def hidden_keys_appended(kernel: Kernel, case: Case, device: str) -> Verdict:
    """More keys that nobody sees change nothing; nor do as many queries after the last, which a
    diagonal that ends in the lower right, and ALiBi, need to stay where they are.
    """
    known = truth(case, device)
    p, x = known.problem, known.inputs
    moves = p.bias == "alibi" or "last" in p.mask.anchors
    if p.mask.matrix:
        return Verdict(unsupported="the mask is another with more keys")
    more = 1 + case.seed % 70
    while more > 1 and p.batch * p.heads_q * (p.len_q + more * moves) * (p.len_k + more) > LARGEST:
        more //= 2
    rows, mask = more * moves, p.mask & hiding([p.len_k] * p.batch)
    problem = p.but(len_q=p.len_q + rows, len_k=p.len_k + more, mask=mask)
    if not sound(kernel, replace(case, problem=problem), device, "hidden-keys-appended"):
        return Verdict(
            unsupported="does not take the longer problem, or is known to be wrong there"
        )
    longer = {"q": (x.q, rows), "k": (x.k, more), "v": (x.v, more), "do": (x.do, rows)}
    extra = {
        name: torch.nn.functional.pad(t, (0, 0, 0, n), value=FAR) for name, (t, n) in longer.items()
    }
    bias = None if x.bias is None else torch.nn.functional.pad(x.bias, (0, more, 0, rows))
    return _rows(kernel, about(problem, replace(x, **extra, bias=bias)), known, slice(0, p.len_q))


@holds()
def last_rows(kernel: Kernel, case: Case, device: str) -> Verdict:
    """Decoding: the last queries alone, against all keys, give the last rows of the whole
    (lower-right masks).
    """
    known = truth(case, device)
    p, x = known.problem, known.inputs
    if "first" in p.mask.anchors:
        return Verdict(unsupported="the mask is aligned with the first query")
    n = 1 + case.seed % 3
    if p.len_q <= n:
        return Verdict(unsupported="they are the whole")
    bias = (
        None if x.bias is None else laid_out(x.bias[:, :, -n:])
    )  # a view may start at any alignment
    some = about(
        p.but(len_q=n, grads=False), replace(x, q=x.q[:, :, -n:], do=x.do[:, :, -n:], bias=bias)
    )
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
    bias = None if x.bias is None else laid_out(x.bias[:, :, :n, : n + offset])
    first = replace(
        x,
        q=x.q[:, :, :n],
        do=x.do[:, :, :n],
        k=x.k[:, :, : n + offset],
        v=x.v[:, :, : n + offset],
        bias=bias,
    )
    return _rows(
        kernel, known, about(p.but(len_q=n, len_k=n + offset, grads=False), first), slice(0, n)
    )


def _rows(kernel: Kernel, known: Truth, some: Truth, rows: slice) -> Verdict:
    if reason := kernel.unsupported(some.problem, some.device):
        return Verdict(unsupported=reason)
    whole, part = answer(kernel, known), answer(kernel, some)
    chosen = Output(whole.out[:, :, rows], None if whole.lse is None else whole.lse[:, :, rows])
    names = ("out", "lse")
    own, other = limits(kernel, some), limits(kernel, known)
    allowed = {name: both(own[name], other[name].limit[:, :, rows]) for name in names}
    return Verdict(
        bitwise=agree(
            part,
            chosen,
            allowed,
            f"rows {rows.start} to {rows.stop or known.problem.len_q} of the whole",
            BOTH,
            times=1,
        )
    )
