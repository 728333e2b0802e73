"""Laws of the backward that need no oracle: sums over keys, subsets, the cotangent's size, the
gradient of the LSE.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from verify.bounds.constants import FLOOR, UNIT, Allowance
from verify.oracles import float64
from verify.properties.property import Verdict, agree, answer, both, doubled, holds, limits, rng
from verify.reference.compare import compare
from verify.reference.reference import about, truth
from verify.registry import Kernel
from verify.sandbox.call import call
from verify.spec.case import Case, visibility

NO_GRAPH = "its output carries no autograd graph"


@holds(grads=True)
def key_sums(kernel: Kernel, case: Case, device: str) -> Verdict:
    """sum_j dv_j = sum_i do_i over the rows and heads of a group that see a key; without a softcap,
    sum_j dk_j = 0.
    """
    known = truth(case, device)
    p, x = known.problem, known.inputs
    output = answer(kernel, known)
    if output.dv is None or output.dk is None:
        return Verdict(unsupported=NO_GRAPH)
    allowed = limits(kernel, known)
    sees = visibility(p, x.q.device).any(-1, keepdim=True)
    do = (x.do.double() * sees).sum(2, keepdim=True).unflatten(1, (p.heads_kv, p.group)).sum(2)
    wanted = {"dv": do, "dk": torch.zeros_like(do[..., :1]).expand(*do.shape[:-1], p.dim_qk)}
    for name, want in wanted.items():
        if name == "dv" or not p.softcap:
            limit = allowed[name].limit.sum(2, keepdim=True)
            got = getattr(output, name).double().sum(2, keepdim=True)
            compare(
                name,
                got,
                want,
                Allowance(limit, {"sum over the keys": limit}),
                against="as a sum over the keys",
            )
    return Verdict()


@holds(grads=True)
def cotangent_scaling(kernel: Kernel, case: Case, device: str) -> Verdict:
    """gradients(2 do) = 2 gradients(do), to the last bit where the kernel repeats its bits and dS
    has no subnormal numbers: they are linear in it.
    """
    known = truth(case, device)
    output = answer(kernel, known)
    if output.dq is None:
        return Verdict(unsupported=NO_GRAPH)
    other = about(known.problem, replace(known.inputs, do=2 * known.inputs.do))
    two, own, theirs, bitwise = (
        answer(kernel, other),
        limits(kernel, other),
        limits(kernel, known),
        True,
    )
    arithmetic = kernel.numerics(known.problem, device)
    exact = arithmetic.deterministic and arithmetic.format("dscores", known.problem.dtype) in (
        "bf16",
        "fp32",
    )
    for name in ("dq", "dk", "dv", "dbias"):
        got, once = getattr(two, name), getattr(output, name)
        if got is not None and once is not None:
            compare(
                name,
                got,
                2 * once.double(),
                both(own[name], 2 * theirs[name].limit),
                against="twice that of do:",
            )
            bitwise &= bool((got.double() == 2 * once.double()).all())
            if exact and name != "dbias":
                fits = own[name].limit.isfinite()
                doubled(name, got * fits, once * fits, 2.0, f"{name} of do")
    return Verdict(bitwise=bitwise)


@holds(grads=True)
def gradient_subsets(kernel: Kernel, case: Case, device: str) -> Verdict:
    """A gradient does not depend on which others are asked for."""
    known, draw = truth(case, device), rng(case)
    names = [n for n in kernel.gradients if getattr(known.inputs, n) is not None]
    chosen = tuple(n for n in names if draw.random() < 0.5) or (names[case.seed % len(names)],)
    whole = answer(kernel, known)
    if whole.dq is None:
        return Verdict(unsupported=NO_GRAPH)
    part = call(kernel, known.problem, known.inputs, wrt=chosen)
    return Verdict(
        bitwise=agree(
            part, whole, limits(kernel, known), f"with all gradients; here of {', '.join(chosen)}"
        )
    )


@holds(grads=True, lse=True)
def lse_gradient(kernel: Kernel, case: Case, device: str) -> Verdict:
    """d lse_i / d q_i = scale sum_j p_ij k_j, d lse_i / d k_j = scale p_ij q_i: attention with V =
    K, and its dv. Or the LSE has no gradient at all.
    """
    known = truth(case, device)
    p, x = known.problem, known.inputs
    if p.softcap or p.scale == 0 or not p.len_k:
        return Verdict(unsupported="a softcap bends it, a scale of 0 or no keys undo it")
    signs = torch.from_numpy(rng(case).choice([-1.0, 1.0], p.shapes["lse"])).to(x.q.device)
    got = call(kernel, p, replace(x, do=torch.zeros_like(x.do)), dlse=signs)
    if got.lse is None or got.dq is None or not got.lse_graph:
        return Verdict(unsupported="its LSE carries no gradient")
    scale, signs = p.softmax_scale, signs.unsqueeze(-1)
    problem = p.but(dim_v=p.dim_qk)
    exact_inputs = replace(x, v=x.k, do=(scale * signs * x.q.double()))
    exact = float64.exact(problem, exact_inputs)
    arithmetic = kernel.numerics(p, device)
    narrow = replace(
        arithmetic,
        probs=arithmetic.dscores,
        normalized_probs=False,
        probs_scale=1.0,
        quantised=None,
    )
    allowed = replace(
        about(problem, replace(x, v=x.k, do=signs.to(x.do) * x.q)), exact=exact
    ).allowances(narrow)
    floor, unit, keys = (
        FLOOR[p.dtype],
        UNIT[p.dtype],
        x.k.abs().double().repeat_interleave(p.group, 1),
    )
    swing = torch.expm1(allowed["lse"].limit).unsqueeze(-1) * keys.amax(
        2, keepdim=True
    )  # P is formed again from the stored LSE
    flushed = (
        2 * FLOOR[arithmetic.format("dscores", p.dtype)] * max(abs(scale), 1.0)
    )  # stored: dS, and scale * dS
    queries = x.q.abs().double().unflatten(1, (p.heads_kv, p.group)).sum((2, 3)).unsqueeze(2)
    limits_of = {
        "dq": abs(scale) * (allowed["out"].limit + swing) + flushed * keys.sum(2, keepdim=True)
    }
    wanted = {"dq": scale * signs * exact.out}
    if exact.dv is not None:
        limits_of["dk"] = max(abs(scale), 1.0) * allowed["dv"].limit + flushed * queries
        wanted["dk"] = exact.dv
    for name, want in wanted.items():
        allowance = Allowance(limits_of[name], {"dS": limits_of[name]})
        rest = unit * want.abs() + floor  # it is stored once more
        compare(name, getattr(got, name), want, both(allowance, rest), against="exact", times=2)
    return Verdict()
