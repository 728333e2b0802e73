"""How a kernel is called: the keywords that it takes, checked shapes of what it returns, gradients
by autograd.
"""

from __future__ import annotations

import math
import sysconfig
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verify.registry import DIFFERENTIABLE, Kernel
from verify.sandbox.allocations import Allocations, leave
from verify.sandbox.conventions import translated
from verify.sandbox.interpreter import mend_interpreter
from verify.sandbox.torch_state import Settings
from verify.spec.case import TORCH_DTYPES, Inputs, handed_over
from verify.spec.finding import Finding
from verify.spec.layouts import memory, moved, touched
from verify.spec.problem import Problem

GRADIENTS = DIFFERENTIABLE
CHANGED = "changed torch's "
"""How the finding of a call begins after which torch is not as it was."""
since: Any = [0.0]
"""When the present call began, time.monotonic(), 0 between calls. In a worker process this is
memory that its watchdog reads.
"""


@contextmanager
def watched() -> Iterator[None]:
    """Around what runs a kernel's code."""
    mend_interpreter()  # where the kernel, loaded by now, will run in Triton's interpreter
    since[0] = time.monotonic()
    try:
        yield
    finally:
        since[0] = 0.0


@contextmanager
def _running() -> Iterator[None]:
    """Around a kernel's forward or backward: what it raises becomes a Finding, what it warns of is
    none, even where pytest turns warnings into errors.
    """
    with watched(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Finding:
            raise
        except (Exception, SystemExit) as error:
            said = str(error).strip().splitlines()[0] if str(error) else ""
            sentence = f"raised {type(error).__name__}: {said}{_last_line(error)}"
            raise Finding(sentence, refused=_own_accord(error)) from error


@dataclass(frozen=True)
class Output:
    """What a kernel returned: out in the problem's dtype, lse or None, gradients where they were
    asked for.
    """

    out: Tensor
    lse: Tensor | None = None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dbias: Tensor | None = None
    lse_graph: bool = False
    """Whether the LSE can be backpropagated through."""


@dataclass
class Called:
    """A call that was made, and what it returned; None where it raised."""

    problem: Problem
    inputs: Inputs
    dropout: float
    output: Output | None = None


_RECORDS: list[list[Called]] = []


@contextmanager
def recorded() -> Iterator[list[Called]]:
    """Every call made within the block, in order."""
    _RECORDS.append([])
    try:
        yield _RECORDS[-1]
    finally:
        _RECORDS.pop()


def call(
    kernel: Kernel,
    problem: Problem,
    inputs: Inputs,
    *,
    dropout: float = 0.0,
    wrt: tuple[str, ...] = GRADIENTS,
    dlse: Tensor | None = None,
    between: Callable[[], object] | None = None,
) -> Output:
    """Run a kernel on these inputs (already rounded, on its device) and check the form of its
    answer.

    Raises Finding where it raises, returns something of another shape, dtype or device or that
    shares memory, changes an input, writes beside one or beside what it allocates, or changes
    torch's settings or random state. With problem.grads, backpropagates inputs.do through out, and
    dlse [B,H,Q] through the LSE, to the inputs of `wrt`; a kernel whose out carries no graph gives
    no gradients. `between` is called after the forward and before the backward.
    """
    made = Called(problem, inputs, dropout)
    for record in _RECORDS:
        record.append(made)
    made.output = _call(kernel, problem, inputs, dropout, wrt, dlse, between)
    return made.output


def _call(
    kernel: Kernel,
    problem: Problem,
    inputs: Inputs,
    dropout: float,
    wrt: tuple[str, ...],
    dlse: Tensor | None,
    between: Callable[[], object] | None,
) -> Output:
    before = {
        f.name: memory(t) for f in fields(Inputs) if (t := getattr(inputs, f.name)) is not None
    }
    after = {name: held.clone() for name, held in before.items()}
    leaves = Inputs(**{name: moved(getattr(inputs, name), to) for name, to in after.items()})
    for tensor in (getattr(leaves, n) for n in wrt if problem.grads and n in kernel.gradients):
        if tensor is not None:
            tensor.requires_grad_()
    others = keywords(kernel, problem, leaves, dropout=dropout)
    mask = others.get("mask")
    handed = None if mask is None else mask.clone()
    settings, allocations = Settings(inputs.q.device.type, draws=dropout > 0), Allocations()
    try:
        _dirty(problem, inputs)
        with _running():
            with allocations:
                returned = translated(kernel, problem)(leaves.q, leaves.k, leaves.v, **others)
            out, lse = returned if isinstance(returned, tuple) else (returned, None)
            _check_form(
                problem,
                out,
                lse,
                leaves.q,
                {held.data_ptr(): name for name, held in after.items() if len(held)},
            )
        if between:
            between()
        with _running():
            with allocations:
                gradients = (
                    _backward(out, lse, leaves, dlse) if problem.grads and out.requires_grad else {}
                )
            if out.is_cuda:
                torch.cuda.synchronize()  # what a launch does wrong shows in its own call
    finally:
        changed = settings.restore()
    if changed and changed not in kernel.excused:
        raise Finding(f"{CHANGED}{changed}")
    if mask is not None and handed is not None and not torch.equal(mask, handed):
        raise Finding("changed its input mask")
    wanted, found = allocations.bands()
    if (at := touched([*before.values(), *wanted], [*after.values(), *found])) is not None:
        raise (
            _changed([*before][at], inputs, leaves)
            if at < len(before)
            else allocations.finding(at - len(before))
        )
    graph = lse is not None and lse.requires_grad
    return Output(out.detach(), None if lse is None else lse.detach(), **gradients, lse_graph=graph)


def keywords(
    kernel: Kernel, problem: Problem, x: Inputs, *, dropout: float = 0.0
) -> dict[str, Any]:
    """What a kernel is handed beside q, k, v: of all that the problem offers, the keywords that it
    takes.
    """
    visible = None if problem.mask.names == {"full"} else handed_over(problem, x.q.device)
    as_bias = visible is not None and problem.mask_is_bias
    added = (
        torch.zeros((), dtype=TORCH_DTYPES[problem.dtype], device=x.q.device)
        if x.bias is None
        else x.bias
    )
    offered = {
        "scale": problem.softmax_scale,
        "mask": None if as_bias else visible,
        "bias": added.masked_fill(~visible, -torch.inf)
        if as_bias and visible is not None
        else x.bias,
        "slopes": x.slopes,
        "softcap": problem.softcap,
        "dropout": dropout,
        "problem": problem,
    }
    return {name: offered[name] for name in kernel.takes}


def _check_form(problem: Problem, out: Any, lse: Any, q: Tensor, taken: dict[int, str]) -> None:
    """taken: the addresses of its inputs' memory."""
    for name, tensor in (("out", out), ("lse", lse)):
        if name == "lse" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise Finding(
                f"{name} is a {type(tensor).__name__}; a kernel returns a tensor, or the pair "
                "(out, lse)"
            )
        wanted = problem.shapes[name]
        if tuple(tensor.shape) != wanted:
            raise Finding(f"{name} has shape {list(tensor.shape)}, not {list(wanted)}")
        if tensor.device != q.device:
            raise Finding(f"{name} is on {tensor.device}, its inputs on {q.device}")
        if name == "out" and tensor.dtype != q.dtype:
            raise Finding(f"{name} is {tensor.dtype}, its inputs {q.dtype}")
        if not tensor.numel():
            continue
        if any(
            step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            raise Finding(
                f"elements of {name} share memory: shape {list(tensor.shape)}, strides "
                f"{list(tensor.stride())}"
            )
        if owner := taken.get(tensor.untyped_storage().data_ptr()):
            raise Finding(f"{name} lies in the memory of its input {owner}")


def _backward(
    out: Tensor, lse: Tensor | None, leaves: Inputs, dlse: Tensor | None
) -> dict[str, Tensor]:
    names = [
        n for n in GRADIENTS if getattr(leaves, n) is not None and getattr(leaves, n).requires_grad
    ]
    ends, cotangents = [out], [leaves.do]
    if lse is not None and lse.requires_grad and dlse is not None:
        ends, cotangents = [out, lse], [leaves.do, dlse.to(lse)]
    inputs = [getattr(leaves, n) for n in names]
    try:
        gradients = torch.autograd.grad(ends, inputs, cotangents, materialize_grads=True)
    except RuntimeError as error:
        if ".backward()" not in str(error):
            raise
        torch.autograd.backward(ends, cotangents)  # as reentrant checkpointing asks for
        gradients = tuple(torch.zeros_like(x) for x in inputs)
    found = zip(names, inputs, gradients, strict=True)
    return {"d" + n: g if x.grad is None else g + x.grad for n, x, g in found}


def _changed(name: str, inputs: Inputs, leaves: Inputs) -> Finding:
    given, now = (getattr(those, name).nan_to_num() for those in (inputs, leaves))
    return Finding(
        f"changed {'memory beside its input' if torch.equal(given, now) else 'its input'} {name}"
    )


def _dirty(problem: Problem, inputs: Inputs) -> None:
    """For results that are allocated out of Python's sight."""
    elements = {
        math.prod(problem.shapes[name])
        for name in (("out", "lse", "q", "k", "v") if problem.grads else ("out", "lse"))
    }
    leave({n * size for n in elements for size in (inputs.q.element_size(), 4)}, inputs.q.device)


def _own_accord(error: BaseException) -> bool:
    """Whether Python code said so, by `raise` or `assert`, and did not run into it: that is how
    kernels refuse what they do not take.
    """
    frames = traceback.extract_tb(error.__traceback__)
    line = (frames[-1].line or "").strip() if frames else ""
    return isinstance(error, NotImplementedError) or line.startswith(("raise ", "assert "))


LIBRARIES = (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), str(Path(__file__).parent))
"""Where no line of a kernel's author is; this folder is between the kernel and whoever calls it."""


def _last_line(error: BaseException) -> str:
    """Where it was raised: the innermost line of the kernel's author."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)] or frames
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
