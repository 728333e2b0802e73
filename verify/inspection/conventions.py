"""What a kernel was found to do where kernels differ: probes with an exact answer, read off its
output. Printed, never judged.

With Q = 0 a row is the mean of the visible V and lse = ln(count), so V = one-hot rows reads off
which keys were seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from rich.table import Table
from torch import Tensor

from verify.registry import CONVENTIONS, Kernel
from verify.sandbox.call import Output, call
from verify.sandbox.capabilities import fitted, options, plain_problem, variant
from verify.spec.case import Case, Inputs, has_empty_row, visibility
from verify.spec.finding import Finding
from verify.spec.inputs import Recipe
from verify.spec.layouts import laid_out
from verify.spec.masks import FULL, Mask
from verify.spec.problem import Problem


def table(kernel: Kernel, found: list[tuple[str, str]]) -> Table:
    """The conventions found, as a table."""
    table = Table(
        title=f"{kernel.name} ({kernel.origin}): conventions found",
        title_justify="left",
        show_header=False,
    )
    for row in found:
        table.add_row(*row)
    return table


def rows(kernel: Kernel, device: str) -> list[tuple[str, str]]:
    """(convention, what was found) for each."""
    if why := options(kernel, device).refusal():
        return [("supports", f"nothing here: {why}")]
    if options(kernel, device).crawls:
        return [("calls", "take seconds each: nothing is read off")]
    return list(conventions(kernel, plain_problem(kernel, device), device))


Probe = Callable[[Kernel, Problem, str], str]


def conventions(kernel: Kernel, plain: Problem, device: str) -> Iterator[tuple[str, str]]:
    """(convention, what was found) for each; `plain` is a small problem that the kernel takes, with
    head dims >= 8.
    """
    for name, probe in PROBES.items():
        try:
            found = probe(kernel, plain, device)
        except Finding as finding:
            found = str(finding)
        except (ArithmeticError, ValueError) as error:  # an output that no kernel should give
            found = f"not readable: {error}"
        yield name, found


def _run(kernel: Kernel, problem: Problem, device: str, **tensors: Tensor) -> Output | None:
    """The kernel's output on zeros, with some inputs replaced; None where it does not take the
    problem.
    """
    if kernel.unsupported(problem, device):
        return None
    zeros = Case(problem, Recipe("constant", (0.0,))).inputs(device)
    like = {name: laid_out(t.to(getattr(zeros, name))) for name, t in tensors.items()}
    return call(kernel, problem, Inputs(**{**vars(zeros), **like}))


def _one_hot(problem: Problem) -> Tensor:
    """V with row j = e_j: the output of a row lists the keys that it saw."""
    eye = torch.eye(problem.len_k, problem.dim_v)
    return eye.expand(problem.batch, problem.heads_kv, -1, -1)


def _seen(kernel: Kernel, plain: Problem, device: str, mask: str) -> str:
    problem = plain.but(len_q=2, len_k=5, mask=Mask.parse(mask))
    output = _run(kernel, problem, device, v=_one_hot(problem))
    if output is None:
        return kernel.unsupported(problem, device) or ""
    rows = [
        "".join("#" if x else "." for x in (output.out[0, 0, q, :5] > 0).tolist()) for q in range(2)
    ]
    wanted = problem.mask.picture(2, 5).replace(" ", "").split("\n")
    return "as asked" if rows == wanted else f"sees {' '.join(rows)}, asked {' '.join(wanted)}"


def _lse(kernel: Kernel, plain: Problem, device: str) -> str:
    output = _run(kernel, plain.but(len_k=8), device)
    if output is None or output.lse is None:
        return "not returned"
    value = output.lse[0, 0, -1].item()
    named = {"natural logarithm": math.log(8), "base 2": 3.0}
    return (
        min(named, key=lambda name: abs(value - named[name])) + f" (ln 8 is given as {value:.4g})"
    )


def _empty_row(kernel: Kernel, plain: Problem, device: str) -> str:
    problem = plain.but(len_q=2, len_k=1, mask=Mask.parse("causal_lower_right"))
    output = _run(kernel, problem, device, v=torch.ones(problem.shapes["v"]))
    if output is None:
        return "not reached: " + (kernel.unsupported(problem, device) or "")
    lse = "" if output.lse is None else f", lse {output.lse[0, 0, 0].item():g}"
    return f"out {output.out[0, 0, 0, 0].item():g}{lse}"


def detected(kernel: Kernel, device: str) -> dict[str, str]:
    """Conventions of the kernel that it does not declare: field of Kernel -> value."""
    taken = options(kernel, device)
    if taken.refusal() or taken.crawls:
        return {}
    plain, found = plain_problem(kernel, device), dict[str, str]()
    ours = tuple((name, values[0]) for name, values in CONVENTIONS.items() if name != "own_mask")
    bare = variant(kernel, device, ours)  # not translated by what it declares
    for name, reads in DETECTED.items():
        try:
            value = reads(bare, plain, device)
        except (Finding, ArithmeticError, ValueError):
            continue
        if value and value != getattr(kernel, name):
            found[name] = value
    return found


def grouped(kernel: Kernel, device: str) -> bool:
    """Whether each query head has the mean of its key head's values, for other heads and lengths
    than _group asks about.
    """
    plain = plain_problem(kernel, device)
    problem = fitted(kernel, device, plain.but(heads_q=6, heads_kv=2, len_q=3, len_k=5))
    if problem.group == 1 or not (problem.mask == FULL and problem.len_k):
        return True
    values = torch.arange(float(problem.heads_kv * problem.len_k))
    v = values.view(1, problem.heads_kv, problem.len_k, 1).expand(problem.shapes["v"])
    output = _run(kernel, problem, device, v=v)
    if output is None:
        return True
    mean = v.mean(2, keepdim=True).repeat_interleave(problem.group, 1)
    return bool(((output.out.float() - mean).abs() < problem.len_k / 4).all())


def _read_empty_row(kernel: Kernel, plain: Problem, device: str) -> str:
    """By a rule, and by a bias of -inf."""
    ways = ("rule", "float") if "float" in options(kernel, device).taken["mask_as"] else ("rule",)
    found = [_empty_row_of(kernel, plain.but(mask_as=way), device) for way in ways]
    both = {"": "nan from a bias", "zero": "nan from a bias", "mean": "mean, nan from a bias"}
    return both.get(found[0], found[0]) if found[1:] == ["nan"] else found[0]


def _empty_row_of(kernel: Kernel, plain: Problem, device: str) -> str:
    """V = 0, 1, 2, 3, of which the mean is no key's."""
    mask = Mask.parse("padding(0)")
    wanted = plain.but(len_q=1, len_k=4, mask=mask, batch=1, mask_as="rule")
    handed = wanted.but(mask_as=plain.mask_as)
    problem = fitted(kernel, device, handed)
    if not (len(problem.mask.parts) == 1 and has_empty_row(problem)):
        return ""
    if problem.mask_as != handed.mask_as:
        return ""
    v = torch.arange(problem.len_k, dtype=torch.float32)[:, None].expand(problem.shapes["v"])
    output = _run(kernel, problem, device, v=v)
    if output is None:
        return ""
    seen = visibility(problem, output.out.device).any(-1).expand(output.out.shape[:3])
    rows, mean = output.out[~seen], v.mean().item()
    kinds = {"zero": rows == 0, "nan": rows.isnan(), "mean": (rows - mean).abs() < mean / 4}
    return next((name for name, is_so in kinds.items() if bool(is_so.all())), "")


def _read_head_map(kernel: Kernel, plain: Problem, device: str) -> str:
    return {"h % heads_kv (repeat)": "cycle"}.get(_group(kernel, plain, device), "")


def _read_lse_base(kernel: Kernel, plain: Problem, device: str) -> str:
    return "2" if _lse(kernel, plain, device).startswith("base 2") else ""


def _read_own_mask(kernel: Kernel, plain: Problem, device: str) -> str:
    """Of a kernel that cannot be asked for any: which keys its queries see."""
    if options(kernel, device).taken["mask"] != (FULL,):
        return ""
    problem = fitted(kernel, device, plain.but(len_q=3, len_k=5))
    output = _run(kernel, problem, device, v=_one_hot(problem))
    if output is None or min(problem.len_q, problem.len_k, problem.dim_v) < 2:
        return ""
    read = min(problem.len_k, problem.dim_v)
    seen = output.out[0, 0, :, :read] > 0
    for name in CONVENTIONS["own_mask"]:
        asked = visibility(problem.but(mask=Mask.parse(name)), seen.device)
        if bool((seen == asked[0, 0, :, :read]).all()):
            return name
    return ""


DETECTED: dict[str, Probe] = {
    "own_mask": _read_own_mask,
    "empty_row": _read_empty_row,
    "head_map": _read_head_map,
    "lse_base": _read_lse_base,
}
"""By the field of Kernel that declares it."""


def _group(kernel: Kernel, plain: Problem, device: str) -> str:
    problem = plain.but(heads_q=4, heads_kv=2)
    heads = torch.arange(2.0).view(1, 2, 1, 1).expand(problem.shapes["v"])
    output = _run(kernel, problem, device, v=heads)
    if output is None:
        return kernel.unsupported(problem, device) or ""
    means = output.out[0, :, 0, 0]
    if not means.isfinite().all():
        return f"not readable: out is {means.tolist()} for V of 0 and 1"
    found = [int(x) for x in means.round().tolist()]
    named: dict[tuple[int, ...], str] = {
        (0, 0, 1, 1): "h // group (repeat_interleave)",
        (0, 1, 0, 1): "h % heads_kv (repeat)",
    }
    return named.get(tuple(found), "") or f"query heads 0-3 use key heads {found}"


def _scale(kernel: Kernel, plain: Problem, device: str) -> str:
    """Two keys, scores 0 and scale: out = sigmoid(scale) for V = 0, 1."""
    problem = plain.but(len_k=2, scale=None)
    first = torch.eye(1, problem.dim_qk)
    k = torch.cat([torch.zeros_like(first), first * math.sqrt(problem.dim_qk)])
    v = torch.tensor([[0.0], [1.0]]).expand(2, problem.dim_v)
    shapes = problem.shapes
    output = _run(
        kernel,
        problem,
        device,
        q=first.expand(shapes["q"]),
        k=k.expand(shapes["k"]),
        v=v.expand(shapes["v"]),
    )
    if output is None:
        return kernel.unsupported(problem, device) or ""
    p = output.out[0, 0, -1, 0].item()
    return (
        f"{math.log(p / (1 - p)):.3g} / sqrt(dim_qk)"
        if 0 < p < 1
        else f"not readable: two keys give the second a weight of {p:g}"
    )


def _hidden_nan(kernel: Kernel, plain: Problem, device: str) -> str:
    problem = plain.but(len_q=2, len_k=2, mask=Mask.parse("causal_upper_left"))
    v = torch.ones(problem.shapes["v"])
    v[:, :, 1] = torch.nan
    output = _run(kernel, problem, device, v=v)
    if output is None:
        return "not reached: " + (kernel.unsupported(problem, device) or "")
    return "leaks (0 * NaN)" if output.out[0, 0, 0].isnan().any() else "does not leak"


def _gradient(kernel: Kernel, plain: Problem, device: str) -> str:
    output = _run(kernel, plain.but(grads=True), device)
    if output is None:
        return kernel.unsupported(plain.but(grads=True), device) or ""
    return "by autograd" if output.dq is not None else "none: its output carries no graph"


PROBES: dict[str, Probe] = {
    "causal, upper-left": lambda k, p, d: _seen(k, p, d, "causal_upper_left"),
    "causal, lower-right": lambda k, p, d: _seen(k, p, d, "causal_lower_right"),
    "window (1, 0)": lambda k, p, d: _seen(k, p, d, "window(1,0)"),
    "row without a visible key": _empty_row,
    "NaN in a hidden V": _hidden_nan,
    "LSE": _lse,
    "default scale": _scale,
    "key head of query head h": _group,
    "gradients": _gradient,
}
