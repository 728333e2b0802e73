"""A failing case as a Python script: its tensors, a few lines of float64 attention, the kernel's
call, what differs.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from verify.bounds.metrics import distance
from verify.diagnosis.derived import Derived, call_of
from verify.kernels import torch_sdpa
from verify.properties.property import TENSORS
from verify.reference.reference import Truth, about, truth
from verify.registry import Kernel
from verify.sandbox.call import call, keywords
from verify.spec.case import ARRANGED, Case, Inputs, visibility
from verify.spec.finding import Finding
from verify.spec.problem import Problem

LITERAL = 64
"""Tensors of at most so many elements are written as numbers, larger ones as compressed bytes."""


def script(kernel: Kernel, device: str, case: Case | Derived, deadly: bool = False) -> str:  # noqa: FBT001, FBT002 (a task's arguments)
    """A Python script that shows this case, or this call of a property, with torch and the kernel
    alone; it exits 1 where an element is farther off than the kernel's declared arithmetic may be,
    else 0. `deadly`: the kernel does not survive the case, and is not called.
    """
    if isinstance(case, Derived):
        made = call_of(kernel, device, case)
        known = about(made.problem, made.inputs)
    else:
        known = truth(case, device)
    p, x = known.problem, known.inputs
    there = [
        name for name in ARRANGED if getattr(x, name) is not None and (p.grads or name != "do")
    ]
    tensors = [f"{name} = {_laid_out(getattr(x, name))}" for name in there]
    tensors += [f"slopes = {_values(x.slopes)}.to(device)"] if x.slopes is not None else []
    bundled_sdpa = getattr(kernel.fn, "func", None) is torch_sdpa.sdpa
    imports, called = (_sdpa if bundled_sdpa else _registered)(kernel, p, x)
    return Template(SCRIPT).substitute(
        title=f"{kernel.name} on {case}",
        imports=imports,
        device=repr(device),
        tensors="\n".join(tensors),
        visible=_values(visibility(p, torch.device("cpu"))),
        scale=repr(p.softmax_scale),
        scores="".join(f"    {line}\n" for line in _scores(p, x)),
        call=called,
        inputs=", ".join(name for name in there if name != "do"),
        names=tuple("d" + name for name in there if name != "do"),
        grads=p.grads,
        empty='want["out"] = want["out"].masked_fill(~visible.any(-1, keepdim=True), nan)\n'
        if kernel.empty_row == "nan"
        else "",
        allowed="".join(f"    {line},\n" for line in _allowed(kernel, known, deadly=deadly)),
    )


def _values(x: Tensor) -> str:
    """An expression for the values of a tensor, contiguous, on the CPU."""
    flat = x.detach().cpu().flatten()
    data = repr(flat.tolist())
    if flat.numel() > LITERAL:
        packed = base64.encodebytes(
            zlib.compress(flat.view(torch.uint8).numpy().tobytes(), 9)
        ).decode()
        data = f'"""\n{packed}"""'
    return f"values({x.dtype}, {tuple(x.shape)}, {data})"


def _laid_out(x: Tensor) -> str:
    """The same in all of the memory that it lies in."""
    size = x.untyped_storage().nbytes() // x.element_size()
    return f"laid_out({_values(x)}, {x.stride()}, {x.storage_offset()}, {size})"


def _scores(p: Problem, x: Inputs) -> Iterator[str]:
    """What is done to the scaled scores of this problem."""
    if p.softcap:
        yield f"s = {p.softcap!r} * torch.tanh(s / {p.softcap!r})"
    if x.bias is not None:
        yield "s = s + bias"
    if x.slopes is not None:
        yield "i, j = (torch.arange(n, device=device) for n in s.shape[2:])"
        yield "s = s - slopes.double()[:, None, None] * (i[:, None] + len(j) - len(i) - j).abs()"


def _expressions(p: Problem, x: Inputs, handed: dict[str, Any]) -> dict[str, str]:
    """How the script writes what the kernel is handed beside q, k, v."""
    added = "torch.zeros((), dtype=q.dtype, device=device)" if x.bias is None else "bias"
    mask = _handed_over(p)
    bias = "bias" if handed.get("bias") is x.bias else f"{added}.masked_fill(~{mask}, -inf)"
    tensors = {"mask": mask, "bias": bias, "slopes": "slopes"}
    values = {
        n: tensors[n] if isinstance(value, Tensor) else repr(value) for n, value in handed.items()
    }
    return values | ({"problem": f"Problem.parse({str(p)!r})"} if "problem" in handed else {})


def _handed_over(p: Problem) -> str:
    """How the script writes the mask in the shape that the kernel is given: of `visible`, which has
    all queries.
    """
    wanted, plain = p.mask_shape, p.but(mask_as="bool").mask_shape
    if wanted == plain:
        return "visible"
    if wanted[2] < p.len_q:
        return f"visible[:, :, :{wanted[2]}].contiguous()"
    return f"visible.expand{wanted}.contiguous()"


def _registered(kernel: Kernel, p: Problem, x: Inputs) -> tuple[str, str]:
    """(imports, the call) of a kernel found by its file, or by its name. A user's file is loaded
    without this project, but where its kernel is handed what this project makes.
    """
    path = Path(kernel.origin.rpartition(":")[0])
    ours = path.suffix != ".py" or path.parent == Path(torch_sdpa.__file__).parent
    target = kernel.name if ours else f"{path}::{kernel.name}"
    keyword = "".join(
        f", {name}={text}"
        for name, text in sorted(_expressions(p, x, keywords(kernel, p, x)).items())
    )
    interpreted = x.q.device.type == "cpu" and _has_triton(kernel)
    if not (ours or "problem" in kernel.takes or kernel.lacks or interpreted):
        return LOAD, f"    return load({str(path)!r}, {kernel.name!r})(q, k, v{keyword})"
    names = "Problem, find" if "problem" in kernel.takes else "find"
    triton = f'os.environ["TRITON_INTERPRET"] = "{int(x.q.device.type == "cpu")}"'
    imports = (
        f"import os\n\n{triton}\nfrom verify.registry import {names}\n"
        "from verify.sandbox.interpreter import mend_interpreter"
    )
    found = f"    fn = find({target!r})[0].fn\n    mend_interpreter()\n"
    return imports, f"{found}    return fn(q, k, v{keyword})"


def _has_triton(kernel: Kernel) -> bool:
    """Whether the file of the kernel's function names Triton."""
    held = getattr(getattr(kernel.fn, "func", kernel.fn), "__globals__", {}).values()
    return any(getattr(value, "__name__", "") == "triton" for value in held)


def _sdpa(kernel: Kernel, p: Problem, x: Inputs) -> tuple[str, str]:
    """(imports, the call) of torch's attention, with the arguments that kernels/torch_sdpa.py hands
    it.
    """
    handed = keywords(kernel, p, x)
    with mock.patch.object(F, "scaled_dot_product_attention") as attention:
        kernel.fn(x.q, x.k, x.v, **handed)
    arguments, text = attention.call_args.kwargs, _expressions(p, x, handed)
    added = arguments["attn_mask"]
    as_text = {name: repr(value) for name, value in arguments.items()}
    if added is not None:
        of = next(
            (text[name] for name in ("mask", "bias") if handed[name] is added),
            f"bias.masked_fill(~{_handed_over(p)}, -inf)",
        )
        as_text["attn_mask"] = of
    backend = torch_sdpa.BACKENDS[kernel.name.removeprefix("sdpa-")][0].name
    keyword = "".join(f", {name}={value}" for name, value in as_text.items())
    body = f"    with sdpa_kernel([SDPBackend.{backend}]):\n        return F.scaled_dot_product_attention(q, k, v{keyword})"
    return (
        "import torch.nn.functional as F\nfrom torch.nn.attention import SDPBackend, sdpa_kernel",
        body,
    )


def _allowed(kernel: Kernel, known: Truth, *, deadly: bool) -> Iterator[str]:
    """For each tensor: the element that is worst for its allowance, the allowance, and the RMSE of
    an honest kernel.
    """
    arithmetic = kernel.numerics(known.problem, known.device)
    limits, expected = known.allowances(arithmetic), known.expectation(arithmetic)
    try:
        output = None if deadly else call(kernel, known.problem, known.inputs)
    except Finding:  # the script shows it
        output = None
    for name in (n for n in TENSORS if n in limits and limits[n].limit.numel()):
        limit, got, want = (
            limits[name].limit,
            getattr(output, name, None),
            getattr(known.exact, name),
        )
        ratio = (
            torch.zeros_like(limit)
            if got is None
            else distance(got, want) / limit.clamp(min=torch.finfo(limit.dtype).tiny)
        )
        at = tuple(
            int(n)
            for n in torch.unravel_index(
                ratio.nan_to_num(nan=0.0, posinf=torch.inf).argmax(), ratio.shape
            )
        )
        honest = float("nan") if got is None or expected is None else expected.rmse(name, got)[1]
        yield f"{name!r}: ({at}, {limit[at].item()!r}, {honest:.3g})"


LOAD = '''import importlib.util
import types
from pathlib import Path


def load(path, name):
    """A function that a file registers, without the tool that it registers it with."""
    found, stand_in = {}, types.ModuleType("verify")

    def kernel(fn=None, /, *, name=None, **declared):
        if fn is None:
            return lambda fn: kernel(fn, name=name, **declared)
        found[name or getattr(fn, "__name__", "kernel").replace("_", "-")] = fn
        return fn

    stand_in.kernel, stand_in.__getattr__ = kernel, lambda name: lambda *given, **named: None
    sys.modules["verify"] = stand_in
    sys.path.append(str(Path(path).parent))
    spec = importlib.util.spec_from_file_location("kernels_of_the_user", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return found[name]
'''

SCRIPT = '''"""$title

Prints each tensor of the kernel beside float64 attention of the same values; exits 1 where one is farther off than allowed.
"""

import base64
import sys
import zlib
from math import inf, nan

import torch
$imports

device = $device


def values(dtype, shape, data):
    """From numbers, or from compressed bytes in base64."""
    if isinstance(data, list):
        return torch.tensor(data, dtype=dtype).reshape(shape)
    return torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(data))), dtype=dtype).reshape(shape)


def laid_out(x, stride, start, size):
    """x as the kernel gets it: in memory of so many elements, with NaN beside its own."""
    view = torch.as_strided(torch.full((size,), nan, dtype=x.dtype, device=device), x.shape, stride, start)
    heads = slice(1 if stride[1] == 0 else None)  # one for all
    view[:, heads].copy_(x[:, heads])
    return view


$tensors
visible = $visible.to(device)


def reference(q, k, v, bias=None):
    """softmax(scale Q K^T) V and its LSE; a row that sees no key gives 0 and -inf."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = $scale * (q @ k.mT)
$scores    p = torch.softmax(s.masked_fill(~visible, torch.finfo(s.dtype).min), -1).masked_fill(~visible, 0.0)
    return p @ v, torch.logsumexp(s.masked_fill(~visible, -inf), -1)


def kernel(q, k, v, bias=None):
$call


grads, inputs = $grads, ($inputs)
exact = [t.detach().double().requires_grad_() for t in inputs]
out, lse = reference(*exact)
want = {"out": out.detach(), "lse": lse.detach()}
if grads:
    want |= zip($names, torch.autograd.grad(out, exact, do.double(), materialize_grads=True))
${empty}leaves = [t.detach().requires_grad_(grads) for t in inputs]
returned = kernel(*leaves)
out, lse = returned if isinstance(returned, tuple) else (returned, None)
got = {"out": out, "lse": lse}
if grads and out.requires_grad:
    got |= zip($names, torch.autograd.grad(out, leaves, do, materialize_grads=True))

# the element that was worst for its allowance, that allowance, and the RMSE of an honest kernel
allowed = {
$allowed}
wrong = False
for name, (at, limit, honest) in allowed.items():
    if got.get(name) is not None:
        a, b = got[name].detach().double(), want[name]
        off = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs().nan_to_num(nan=inf, posinf=inf))
        largest = tuple(int(n) for n in torch.unravel_index(off.argmax(), off.shape))
        print(f"{name}\\ngot\\n{a}\\nwant\\n{b}")
        print(f"largest difference {off[largest]:.3g} at {largest}; RMSE {off.square().mean().sqrt():.3g}, honest {honest}")
        print(f"at {at}: got {a[at]:.9g}, want {b[at]:.9g}, difference {off[at]:.3g}, allowed {limit:.3g}")
        wrong |= off[at].item() > limit
sys.exit(int(wrong))
'''
