"""The two laws that compare with the exact answer."""

from __future__ import annotations

from verify.properties.property import Verdict, answer, holds
from verify.reference.compare import judge
from verify.reference.reference import truth
from verify.registry import Kernel
from verify.spec.case import Case


@holds(core=True)
def oracle(kernel: Kernel, case: Case, device: str) -> Verdict:
    """|out - exact| and |lse - exact| are within the bound that the kernel's declared arithmetic
    has on these inputs, and as large and as even as an honest kernel's of that arithmetic."""
    known = truth(case, device)
    judged = judge(kernel, answer(kernel, known), known, names=("out", "lse"))
    blind_to = known.blind_to(judged.limits, judged.expected, judged.left)
    return Verdict(blind_to=blind_to, measured=judged.measured)


@holds(core=True, grads=True)
def gradients(kernel: Kernel, case: Case, device: str) -> Verdict:
    """|dq - exact|, |dk - exact|, |dv - exact| and |dbias - exact| for a random cotangent are
    within their bounds, and as large and as even as an honest kernel's."""
    known = truth(case, device)
    output = answer(kernel, known)
    if output.dq is None:
        return Verdict(unsupported="its output carries no autograd graph")
    return Verdict(
        measured=judge(kernel, output, known, names=("dv", "dq", "dk", "dbias")).measured
    )
