"""`verify determinism`: does a kernel repeat its bits, and does what it gives for one batch entry
or head depend on the others.

Verdicts apart from accuracy, yes or no with the first element that differs. A kernel may answer no
and be right, if it does not declare otherwise; serving wants batch invariance, since there the
neighbours are other people's requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from rich.table import Table

from verify.errors import VerifyError
from verify.properties.property import TENSORS, difference
from verify.registry import Kernel
from verify.sandbox.call import Output, call
from verify.sandbox.capabilities import options, plain_problem
from verify.spec.case import Case, Inputs, part
from verify.spec.layouts import laid_out
from verify.spec.masks import Mask
from verify.spec.problem import Problem

SHAPES = {"cpu": (2, 4, 2, 33, 65), "cuda": (8, 16, 4, 1024, 1024)}
"""batch, heads, key heads, queries, keys: on a GPU 1024 blocks of 128 queries, several for each
multiprocessor.
"""
Row = tuple[str, str, str]


def verdicts(kernel: Kernel, device: str, calls: int) -> list[Row]:
    """(problem, question, answer) for each; an answer is `yes`, or `no: ` and the first difference.

    Raises VerifyError where the kernel takes none of the problems.
    """
    if why := options(kernel, device).refusal():
        raise VerifyError(f"{kernel.name} supports nothing here: {why}")
    found = [
        row
        for problem in _problems(kernel, device)
        for row in _answers(kernel, problem, device, calls)
    ]
    if not found:
        raise VerifyError(f"{kernel.name} takes none of the problems that determinism is judged on")
    return found


def _problems(kernel: Kernel, device: str) -> Iterator[Problem]:
    batch, heads, key_heads, len_q, len_k = SHAPES[device]
    dtypes = options(kernel, device).taken["dtype"]
    dtype = next((d for d in ("bf16", "fp16") if d in dtypes), dtypes[0])
    plain = plain_problem(kernel, device).but(
        dtype=dtype, batch=batch, heads_q=heads, heads_kv=heads, len_q=len_q, len_k=len_k
    )
    for grads, mask, kept in product(
        (False, True), ("full", "causal_lower_right"), (heads, key_heads)
    ):
        problem = plain.but(grads=grads, mask=Mask.parse(mask), heads_kv=kept)
        if (mask == "full") == (kept == heads) and kernel.unsupported(problem, device) is None:
            yield problem


def _answers(kernel: Kernel, problem: Problem, device: str, calls: int) -> Iterator[Row]:
    x = Case(problem).inputs(device)
    first, text = call(kernel, problem, x), str(problem)
    different = next(
        (d for n in range(2, calls + 1) if (d := _again(kernel, problem, x, first, n))), ""
    )
    yield text, f"the same bits in {calls} calls", _said(different)
    last, every = slice(problem.batch - 1, None), slice(None)
    alone = _alone(kernel, problem, x, last, every)
    yield (
        text,
        "the last batch entry alone: the same bits",
        _said(difference(_cut(first, last, {}), alone)),
    )
    heads, key_heads = (
        slice(problem.heads_q - problem.group, None),
        slice(problem.heads_kv - 1, None),
    )
    alone = _alone(kernel, problem, x, every, key_heads)
    mine = _cut(
        first,
        every,
        dict.fromkeys(("out", "lse", "dq"), heads) | dict.fromkeys(("dk", "dv"), key_heads),
    )
    yield text, "the last head group alone: the same bits", _said(difference(mine, alone))


def _again(kernel: Kernel, problem: Problem, x: Inputs, first: Output, number: int) -> str:
    different = difference(first, call(kernel, problem, x))
    return f"call {number}: {different}" if different else ""


def _alone(kernel: Kernel, problem: Problem, x: Inputs, entries: slice, key_heads: slice) -> Output:
    smaller, inputs = part(problem, x, entries, key_heads)
    return call(kernel, smaller, inputs.map(laid_out))


def _cut(output: Output, entries: slice, heads: dict[str, slice]) -> Output:
    kept = {
        n: getattr(output, n)[entries, heads.get(n, slice(None))]
        for n in TENSORS
        if getattr(output, n) is not None
    }
    return replace(output, **kept)


def _said(different: str) -> str:
    return f"no: {different}" if different else "yes"


def table(kernel: Kernel, rows: list[Row], device: str) -> Table:
    """The verdicts, and what the kernel declares."""
    declared = (
        "deterministic"
        if kernel.numerics(Problem.parse(rows[0][0]), device).deterministic
        else "nothing"
    )
    found = Table(
        title=f"{kernel.name}: determinism and invariance; declares {declared}",
        title_justify="left",
    )
    for heading in ("problem", "question", "answer"):
        found.add_column(heading, overflow="fold")
    for row in rows:
        found.add_row(*row)
    return found


def broken(kernel: Kernel, rows: list[Row], device: str) -> bool:
    """Whether a kernel that declares that it is deterministic did not repeat its bits."""
    repeats = [
        (Problem.parse(problem), answer)
        for problem, question, answer in rows
        if question.startswith("the same bits")
    ]
    return any(
        kernel.numerics(problem, device).deterministic and answer != "yes"
        for problem, answer in repeats
    )
