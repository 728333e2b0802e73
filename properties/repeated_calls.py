"""Laws of calls after each other, and within each other: the same again, memory that is kept, what
a kernel remembers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import torch

from verify import environment
from verify.bounds.metrics import same
from verify.properties.property import (
    TENSORS,
    Verdict,
    agree,
    answer,
    difference,
    holds,
    limits,
    rng,
    sound,
)
from verify.reference.compare import judge
from verify.reference.reference import Truth, about, truth
from verify.registry import Kernel
from verify.sandbox.call import call
from verify.sandbox.capabilities import options
from verify.spec.case import Case, Inputs
from verify.spec.finding import Finding
from verify.spec.layouts import laid_out
from verify.spec.masks import Mask
from verify.spec.problem import Problem

REPEATS = 20
"""Calls on the same inputs; `verify determinism` makes more."""
WARM, MEASURED = 3, 8
"""Calls before memory is measured, and while it is."""
ROUGHLY = 512
"""Bytes: what torch's allocator on a GPU hands out at least."""


@holds(backward=True, calls=20)
def repeat(kernel: Kernel, case: Case, device: str) -> Verdict:
    """f(x) = f(x) in 20 calls: no farther apart than two right answers may be, and to the last bit
    where the kernel declares that it is deterministic.
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


@holds(backward=True, calls=12)
def memory_growth(kernel: Kernel, case: Case, device: str) -> Verdict:
    """f(x) again and again, its results dropped: not every call leaves more memory in use than the
    one before.
    """
    known = truth(case, device)
    if environment.in_use(device) is None:
        return Verdict(unsupported="this system does not say how much memory is in use")
    for _ in range(WARM):
        answer(kernel, known)
    grown = _growth(kernel, known, gc.isenabled)
    if grown >= ROUGHLY:
        grown = _growth(kernel, known, gc.collect)  # what cycles of objects keep is no leak
    if grown >= ROUGHLY:
        raise Finding(
            f"keeps memory: each of {MEASURED} calls on the same inputs left at least {grown} "
            "bytes more in use"
        )
    return Verdict()


def _growth(kernel: Kernel, known: Truth, settle: Callable[[], object]) -> int:
    """The least that one of a few calls left behind, bytes."""
    used = []
    for _ in range(MEASURED + 1):
        answer(kernel, known)
        settle()
        used.append(environment.in_use(known.device) or 0)
    return min(b - a for a, b in pairwise(used))


@holds(backward=True, calls=6)
def call_sequence(kernel: Kernel, case: Case, device: str) -> Verdict:
    """f(x); f(x) with f(y) and f(z) between its forward and its backward, as layers of a model are
    called; f(x), where y and z differ from x in one argument each: all are right, x's are the same,
    and the first has not changed meanwhile.
    """
    known = truth(case, device)
    neighbours = _neighbours(case, known, options(kernel, device).layouts)
    others = [
        n for n in neighbours if sound(kernel, replace(case, problem=n[1]), device, "call-sequence")
    ]
    first = answer(kernel, known)
    kept = {name: t.clone() for name in TENSORS if (t := getattr(first, name)) is not None}
    chosen = [others[n] for n in rng(case).permutation(len(others))[:2]]

    def between() -> None:
        for what, problem, inputs in chosen:
            judge(kernel, call(kernel, problem, inputs), about(problem, inputs), names=TENSORS)
            for name, tensor in kept.items():
                if not same(tensor, getattr(first, name)).all():
                    raise Finding(
                        f"{name} of the first call changed when the kernel was called again with "
                        f"{what}"
                    )

    said, allowed = " and ".join(what for what, _, _ in chosen), limits(kernel, known)
    around = agree(
        call(kernel, known.problem, known.inputs, between=between),
        first,
        allowed,
        f"alone; here around {said};",
    )
    return Verdict(
        bitwise=around & agree(answer(kernel, known), first, allowed, f"before calls with {said};")
    )


def _neighbours(
    case: Case, known: Truth, layouts: dict[str, tuple[str, ...]]
) -> Iterator[tuple[str, Problem, Inputs]]:
    p, x = known.problem, known.inputs
    yield "other values", p, replace(case, seed=case.seed + 1).inputs(known.device)
    if p.grads:
        yield "another cotangent", p, replace(x, do=laid_out(x.do.flip(2)))
    yield "another scale", p.but(scale=0.75 * p.softmax_scale), x
    ways = [way for way in ("gapped", "packed", "bshd") if way in layouts["k"]]
    if ways:
        yield "another layout", p, replace(x, k=laid_out(x.k, ways[0]))
    for mask in ("causal_lower_right", "window(0,2)") if p.mask_as != "rule" else ("full",):
        if str(p.mask) != mask:
            yield f"the mask {mask}", p.but(mask=Mask.parse(mask)), x
    keys = {"k": x.k, "v": x.v}
    if p.bias == "none" and p.len_k > 1:
        half = {n: t[:, :, : p.len_k // 2] for n, t in keys.items()}
        yield "half the keys", p.but(len_k=p.len_k // 2), replace(x, **half)
        twice = {n: laid_out(torch.cat([t, t], 2)) for n, t in keys.items()}
        yield "twice the keys", p.but(len_k=2 * p.len_k), replace(x, **twice)
