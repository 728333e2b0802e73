"""What must hold. A property is a short function whose docstring is the law; it raises a Finding where the law is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from verify.case import Case, Inputs
from verify.finding import Finding
from verify.guard import Output, call
from verify.masks import Mask
from verify.measure import same
from verify.problem import Problem
from verify.properties.truth import Truth, truth
from verify.properties.verdict import compare, judge
from verify.registry import Kernel


@dataclass
class Verdict:
    """The law held. `unsupported` says why nothing was judged; `blind_to` what the case could not have seen;
    `bitwise` whether two results that must agree agreed to the last bit; `measured` errors over what was expected and proved."""

    unsupported: str | None = None
    blind_to: list[str] = field(default_factory=list)
    bitwise: bool | None = None
    measured: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Property:
    """A law, and what its cases must be: without a mask, with gradients."""

    name: str
    law: str
    check: Callable[[Kernel, Case, str], Verdict]
    full_mask: bool = False
    grads: bool = False


PROPERTIES: dict[str, Property] = {}


def holds(*, full_mask: bool = False, grads: bool = False) -> Callable[[Callable[..., Verdict]], Callable[..., Verdict]]:
    """Register a function (kernel, case, device) -> Verdict as a property, by its name."""

    def register(check: Callable[..., Verdict]) -> Callable[..., Verdict]:
        name = check.__name__.replace("_", "-")
        PROPERTIES[name] = Property(name, (check.__doc__ or "").strip(), check, full_mask, grads)
        return check

    return register


@holds()
def oracle(kernel: Kernel, case: Case, device: str) -> Verdict:
    """|out - exact| and |lse - exact| are within the bound that the kernel's declared arithmetic has on these inputs, and as
    large and as even as an honest kernel's of that arithmetic."""
    known = truth(case, device)
    judged = judge(kernel, call(kernel, case.problem, known.inputs), known, names=("out", "lse"))
    return Verdict(blind_to=known.blind_to(judged.limits, judged.expected), measured=judged.measured)


@holds(grads=True)
def gradients(kernel: Kernel, case: Case, device: str) -> Verdict:
    """|dq - exact|, |dk - exact|, |dv - exact| and |dbias - exact| for a random cotangent are within their bounds, and as large
    and as even as an honest kernel's."""
    known = truth(case, device)
    output = call(kernel, case.problem, known.inputs)
    if output.dq is None:
        return Verdict(unsupported="its output carries no autograd graph")
    return Verdict(measured=judge(kernel, output, known, names=("dv", "dq", "dk", "dbias")).measured)


@holds()
def repeat(kernel: Kernel, case: Case, device: str) -> Verdict:
    """f(x) = f(x): where the kernel declares that it is deterministic, a second call gives the same bits, gradients included."""
    known = truth(case, device)
    first, second = (call(kernel, case.problem, known.inputs) for _ in range(2))
    repeats = True
    for name in ("out", "lse", "dq", "dk", "dv", "dbias"):
        one, two = getattr(first, name), getattr(second, name)
        if one is not None and not bool(same(one, two).all()):
            repeats = False
            if kernel.numerics(case.problem, device).deterministic:
                raise Finding(f"{name} differs between two calls in {int((~same(one, two)).sum())} of {one.numel()} elements")
    return Verdict(bitwise=repeats)


@holds(full_mask=True)
def key_permutation(kernel: Kernel, case: Case, device: str) -> Verdict:
    """out(Q, K[pi], V[pi], bias[:, pi]) = out(Q, K, V, bias): attention is a sum over a set of keys."""
    if case.problem.bias == "alibi":
        return Verdict(unsupported="ALiBi depends on the keys' order")
    pi = _permutation(case, case.problem.len_k, device)
    columns = {"k": (2, pi), "v": (2, pi), "bias": (3, pi)}
    return _same_after(kernel, case, device, columns, case.problem, restore=lambda out: out, what="before permuting the keys")


@holds(full_mask=True)
def query_permutation(kernel: Kernel, case: Case, device: str) -> Verdict:
    """out(Q[pi], K, V, bias[pi]) = out(Q, K, V, bias)[pi]: rows do not see each other."""
    if case.problem.bias == "alibi":
        return Verdict(unsupported="ALiBi depends on the queries' order")
    pi = _permutation(case, case.problem.len_q, device)
    return _same_after(
        kernel,
        case,
        device,
        {"q": (2, pi), "bias": (2, pi)},
        case.problem,
        restore=_along(2, pi),
        what="before permuting the queries",
    )


@holds()
def batch_permutation(kernel: Kernel, case: Case, device: str) -> Verdict:
    """Permuting the batch entries of every input (padding lengths too) permutes the output."""
    pi = _permutation(case, case.problem.batch, device)
    moved = {name: (0, pi) for name in ("q", "k", "v", "bias")}
    problem = case.problem.but(mask=case.problem.mask.reordered(pi.tolist()))
    return _same_after(kernel, case, device, moved, problem, restore=_along(0, pi), what="before permuting the batch")


@holds()
def head_permutation(kernel: Kernel, case: Case, device: str) -> Verdict:
    """Permuting key heads together with their groups of query heads (bias and ALiBi slopes too) permutes the output."""
    p = case.problem
    pi = _permutation(case, p.heads_kv, device)
    query_heads = (pi[:, None] * p.group + torch.arange(p.group, device=device)).flatten()
    moved = {"q": (1, query_heads), "k": (1, pi), "v": (1, pi), "bias": (1, query_heads), "slopes": (0, query_heads)}
    return _same_after(kernel, case, device, moved, p, restore=_along(1, query_heads), what="before permuting the heads")


@holds()
def mask_equivalence(kernel: Kernel, case: Case, device: str) -> Verdict:
    """One mask, whatever it is called and however it is handed over (rule, booleans, additive -inf), gives one output."""
    ways = [w for w in _equivalent(case.problem) if kernel.unsupported(w, device) is None]
    if not ways:
        return Verdict(unsupported="takes no second form of this mask")
    known = truth(case, device)
    limit = known.allowances(kernel.numerics(case.problem, device))["out"]
    first, bitwise = call(kernel, case.problem, known.inputs).out, True
    for way in ways:
        out = call(kernel, way, known.inputs).out
        compare("out", out, first, limit, against=f"with the mask {way.mask} as {way.mask_as}; as in the case", times=2)
        bitwise &= torch.equal(out, first)
    return Verdict(bitwise=bitwise)


def _equivalent(problem: Problem) -> list[Problem]:
    """The same visibility under other names and in the other forms."""
    window_of = {"full": "window(-1,-1)", "causal_lower_right": "window(-1,0)", "causal_upper_left": "prefix_lm(0)"}
    masks = [window_of[str(problem.mask)]] if str(problem.mask) in window_of else []
    if problem.len_q == problem.len_k and problem.mask.names <= {"causal_upper_left", "causal_lower_right"}:
        masks += ["causal_upper_left", "causal_lower_right"]
    everything = Mask((("padding", (problem.len_k,) * problem.batch),))
    named = [problem.but(mask=m) for m in (*map(Mask.parse, masks), problem.mask & everything)]
    handed = [problem.but(mask_as=form) for form in ("rule", "bool", "float")] if problem.mask.names != {"full"} else []
    return [way for way in dict.fromkeys(named + handed) if way != problem]


def _permutation(case: Case, n: int, device: str) -> Tensor:
    order = np.random.Generator(np.random.Philox(case.seed)).permutation(n)
    return torch.from_numpy(order).to(device)


def _along(dim: int, pi: Tensor) -> Callable[[Tensor], Tensor]:
    """Undo a permutation of this dimension."""
    return lambda out: out.index_select(dim, torch.argsort(pi))


def _moved(inputs: Inputs, moves: dict[str, tuple[int, Tensor]]) -> Inputs:
    """Inputs permuted along one dimension each; what is broadcast (size 1) or absent stays."""
    present = {n: (getattr(inputs, n), dim, pi) for n, (dim, pi) in moves.items() if getattr(inputs, n) is not None}
    return replace(inputs, **{n: t.index_select(dim, pi) for n, (t, dim, pi) in present.items() if t.shape[dim] == len(pi)})


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
    known: Truth = truth(case, device)
    before: Output = call(kernel, case.problem, known.inputs)
    after = restore(call(kernel, problem, _moved(known.inputs, moves)).out)
    compare("out", after, before.out, known.allowances(kernel.numerics(case.problem, device))["out"], against=what, times=2)
    return Verdict(bitwise=torch.equal(after, before.out))
