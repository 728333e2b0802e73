"""Laws of exchange: permuting, repeating and taking apart what attention treats alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from verify.properties.property import Verdict, agree, answer, both, holds, limits, rng
from verify.reference.compare import compare
from verify.reference.reference import about, truth
from verify.registry import Kernel
from verify.sandbox.call import call
from verify.spec.case import TORCH_DTYPES, Case, Inputs, has_empty_row, part, visibility
from verify.spec.masks import FULL, Mask, hiding
from verify.spec.problem import HANDED, Problem


@holds(full_mask=True)
def key_permutation(kernel: Kernel, case: Case, device: str) -> Verdict:
    """out(Q, K[pi], V[pi], bias[:, pi]) = out(Q, K, V, bias): attention is a sum over a set of
    keys.
    """
    if case.problem.bias == "alibi":
        return Verdict(unsupported="ALiBi depends on the keys' order")
    pi = _permutation(case, case.problem.len_k, device)
    columns = {"k": (2, pi), "v": (2, pi), "bias": (3, pi)}
    return _same_after(
        kernel,
        case,
        device,
        columns,
        case.problem,
        restore=lambda out: out,
        what="before permuting the keys",
    )


@holds(full_mask=True)
def query_permutation(kernel: Kernel, case: Case, device: str) -> Verdict:
    """out(Q[pi], K, V, bias[pi]) = out(Q, K, V, bias)[pi]: rows do not see each other."""
    if case.problem.bias == "alibi":
        return Verdict(unsupported="ALiBi depends on the queries' order")
    pi = _permutation(case, case.problem.len_q, device)
    moved = {"q": (2, pi), "bias": (2, pi)}
    restore = _along(2, pi)
    return _same_after(
        kernel,
        case,
        device,
        moved,
        case.problem,
        restore=restore,
        what="before permuting the queries",
    )


@holds(several=True)
def batch_permutation(kernel: Kernel, case: Case, device: str) -> Verdict:
    """Permuting the batch entries of every input (padding lengths too) permutes the output."""
    pi = _permutation(case, case.problem.batch, device)
    moved = {name: (0, pi) for name in ("q", "k", "v", "bias")}
    problem = case.problem.but(mask=case.problem.mask.reordered(pi.tolist()))
    return _same_after(
        kernel,
        case,
        device,
        moved,
        problem,
        restore=_along(0, pi),
        what="before permuting the batch",
    )


@holds(same_heads=True)
def head_permutation(kernel: Kernel, case: Case, device: str) -> Verdict:
    """Permuting key heads together with their groups of query heads (bias and ALiBi slopes too)
    permutes the output.
    """
    p = case.problem
    pi = _permutation(case, p.heads_kv, device)
    query_heads = (pi[:, None] * p.group + torch.arange(p.group, device=device)).flatten()
    moved = {
        "q": (1, query_heads),
        "k": (1, pi),
        "v": (1, pi),
        "bias": (1, query_heads),
        "slopes": (0, query_heads),
    }
    return _same_after(
        kernel,
        case,
        device,
        moved,
        p,
        restore=_along(1, query_heads),
        what="before permuting the heads",
    )


@holds(several=True)
def replicate(kernel: Kernel, case: Case, device: str) -> Verdict:
    """Identical requests: entry 0 of the batch in every entry gives every entry the same output."""
    problem, x = case.problem, truth(case, device).inputs
    if problem.batch == 1:
        return Verdict(unsupported="one request")
    mask = problem.mask.of_entries(lambda arguments: arguments[:1] * len(arguments))
    repeated = replace(
        x,
        **{
            n: t[:1].expand(t.shape).clone()
            for n in ("q", "k", "v", "bias")
            if (t := getattr(x, n)) is not None
        },
    )
    known = about(problem.but(mask=mask), repeated)
    out, allowed = answer(kernel, known).out, limits(kernel, known)["out"]
    compare(
        "out",
        out,
        out[:1].expand(out.shape),
        allowed,
        against="entry 0, the same request,",
        times=2,
    )
    return Verdict(bitwise=bool((out == out[:1]).all()))


@holds(several=True, same_heads=True)
def alone(kernel: Kernel, case: Case, device: str) -> Verdict:
    """out(q[b, h]) alone = out[b, h]: a batch entry and a key head with its query heads depend on
    no other.
    """
    p, x = case.problem, truth(case, device).inputs
    b, g = (int(n) for n in rng(case).integers((p.batch, p.heads_kv)))
    if p.batch * p.heads_kv == 1:
        return Verdict(unsupported="it is alone")
    known = about(*part(p, x, slice(b, b + 1), slice(g, g + 1)))
    whole = answer(kernel, truth(case, device)).out[b : b + 1, g * p.group : (g + 1) * p.group]
    out = answer(kernel, known).out
    compare(
        "out",
        out,
        whole,
        limits(kernel, known)["out"],
        against=f"within the batch (entry {b}, key head {g})",
        times=2,
    )
    return Verdict(bitwise=torch.equal(out, whole))


@holds(calls=3, grouped=True)
def grouped_heads(kernel: Kernel, case: Case, device: str) -> Verdict:
    """GQA: out(Q, K, V) = out(Q, repeat_interleave(K, group), repeat_interleave(V, group))."""
    p, known = case.problem, truth(case, device)
    if p.group == 1:
        return Verdict(unsupported="every query head has its own key head")
    repeated = p.but(heads_kv=p.heads_q)
    if reason := kernel.unsupported(repeated, device):
        return Verdict(unsupported=reason)
    k, v = (t.repeat_interleave(p.group, 1) for t in (known.inputs.k, known.inputs.v))
    other = call(kernel, repeated, replace(known.inputs, k=k, v=v))
    bitwise = agree(
        answer(kernel, known), other, limits(kernel, known), "with K and V repeated", ("out", "lse")
    )
    return Verdict(bitwise=bitwise)


@holds(calls=7)
def mask_equivalence(kernel: Kernel, case: Case, device: str) -> Verdict:
    """One mask, whatever it is called and however it is handed over (rule, booleans, additive -inf
    or the lowest finite number, in every shape that can hold it), gives one output.
    """
    known, p = truth(case, device), case.problem
    ways = [(w, known.inputs, f"the mask {w.mask} as {w.mask_as}") for w in _equivalent(p)]
    lowest = p.but(mask=FULL, mask_as="rule", bias="bhqk")
    if p.mask != FULL and p.bias == "none" and not has_empty_row(p):
        hidden = ~visibility(p, known.inputs.q.device).expand(lowest.shapes["bias"])
        bias = torch.zeros(hidden.shape, dtype=TORCH_DTYPES[p.dtype], device=device)
        lowest_finite = torch.finfo(bias.dtype).min
        ways.append(
            (
                lowest,
                replace(known.inputs, bias=bias.masked_fill(hidden, lowest_finite)),
                "the lowest finite number",
            )
        )
    ways = [way for way in ways if kernel.unsupported(way[0], device) is None]
    if not ways:
        return Verdict(unsupported="takes no second form of this mask")
    first, bitwise = answer(kernel, known).out, True
    limit = limits(kernel, known)["out"]
    for problem, inputs, name in ways:
        out = call(kernel, problem.but(grads=False), inputs).out
        other = limits(kernel, about(problem, inputs))["out"] if problem is lowest else limit
        compare("out", out, first, both(limit, other), against=f"with {name}; as in the case")
        bitwise &= torch.equal(out, first)
    return Verdict(bitwise=bitwise)


def _equivalent(problem: Problem) -> list[Problem]:
    """The same visibility under other names and in the other forms."""
    window_of = {
        "full": "window(-1,-1)",
        "causal_lower_right": "window(-1,0)",
        "causal_upper_left": "prefix_lm(0)",
    }
    masks = [window_of[str(problem.mask)]] if str(problem.mask) in window_of else []
    if problem.len_q == problem.len_k and problem.mask.names <= {
        "causal_upper_left",
        "causal_lower_right",
    }:
        masks += ["causal_upper_left", "causal_lower_right"]
    everything = hiding([problem.len_k] * problem.batch)
    named = [problem.but(mask=m) for m in (*map(Mask.parse, masks), problem.mask & everything)]
    handed = [problem.but(mask_as=form) for form in HANDED if problem.mask.names != {"full"}]
    calls: dict[object, Problem] = {}
    for way in (problem, *handed):  # of those that come to the same call the first
        calls.setdefault((way.mask_as.partition("_")[0], way.mask_shape), way)
    return [way for way in dict.fromkeys([*named, *calls.values()]) if way != problem]


def _permutation(case: Case, n: int, device: str) -> Tensor:
    return torch.from_numpy(rng(case).permutation(n)).to(device)


def _along(dim: int, pi: Tensor) -> Callable[[Tensor], Tensor]:
    """Undo a permutation of this dimension."""
    return lambda out: out.index_select(dim, torch.argsort(pi))


def _moved(inputs: Inputs, moves: dict[str, tuple[int, Tensor]]) -> Inputs:
    """Inputs permuted along one dimension each; what is broadcast (size 1) or absent stays."""
    present = {
        n: (getattr(inputs, n), dim, pi)
        for n, (dim, pi) in moves.items()
        if getattr(inputs, n) is not None
    }
    return replace(
        inputs,
        **{
            n: t.index_select(dim, pi)
            for n, (t, dim, pi) in present.items()
            if t.shape[dim] == len(pi)
        },
    )


def _same_after(
    kernel: Kernel,
    case: Case,
    device: str,
    moves: dict[str, tuple[int, Tensor]],
    problem: Problem,
    *,
    restore: Callable[[Tensor], Tensor],
    what: str,
) -> Verdict:
    """Both results may be off by the allowance, each its own way: they may differ by twice that."""
    known = truth(case, device)
    before = answer(kernel, known).out
    after = restore(call(kernel, problem, _moved(known.inputs, moves)).out)
    compare("out", after, before, limits(kernel, known)["out"], against=what, times=2)
    return Verdict(bitwise=torch.equal(after, before))
