"""What the Triton kernels can be asked for, checked before any launch: one sentence that names the
value where they cannot.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton

from verify.errors import VerifyError
from verify.kernels.triton.tiles import INTERPRET
from verify.spec.masks import FULL, Mask
from verify.spec.problem import Problem

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LARGEST_DIM = 256


def refusal(problem: Problem, device: str, dtypes: tuple[str, ...]) -> str | None:
    """Why a Triton kernel of these dtypes cannot do a problem on "cpu" or "cuda", in one sentence;
    None where it can.
    """
    version = triton.__version__
    checks = [
        (problem.dtype not in dtypes, f"dtype={problem.dtype}: takes {', '.join(dtypes)}"),
        (
            max(problem.dim_qk, problem.dim_v) > LARGEST_DIM,
            f"dim_qk={problem.dim_qk}, dim_v={problem.dim_v}: at most {LARGEST_DIM}",
        ),
        (
            device == "cpu" and not INTERPRET,
            "needs Triton's interpreter on the CPU: set TRITON_INTERPRET=1 before importing triton",
        ),
        (
            device == "cpu" and version.startswith("3.6."),
            f"the interpreter of Triton {version} cannot count to a number it has loaded: take 3.7 "
            "or later, or a GPU",
        ),
        (
            device == "cuda" and INTERPRET,
            "Triton's interpreter is on: unset TRITON_INTERPRET before importing triton",
        ),
    ]
    return next((sentence for wrong, sentence in checks if wrong), None)


def affordable(device: str, *, calls: int) -> int | None:
    """So many calls are affordable where Triton's interpreter runs a kernel."""
    return calls if device == "cpu" else None


def as_rules(problem: Problem, mask: torch.Tensor | None) -> Mask | torch.Tensor | None:
    """The rules where the problem leaves the choice and Triton has all of them (not `dense`), else
    the boolean tensor.
    """
    return problem.mask if problem.mask_as == "rule" and not problem.mask.matrix else mask


def checked(
    name: str,
    supports: Callable[[Problem, str], str | None],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: Mask | torch.Tensor | None,
    bias: torch.Tensor | None,
    slopes: torch.Tensor | None,
) -> Problem:
    """The problem of these tensors, its mask the rules. Raises VerifyError, naming the value, where
    they do not belong together or kernel `name` does not support it.
    """
    rules = mask if isinstance(mask, Mask) else FULL
    if rules.matrix:
        raise VerifyError(
            f"{name}: mask={mask}: dense is not a rule for Triton; hand it over as a boolean tensor"
        )
    named = {
        "q": q,
        "k": k,
        "v": v,
        "mask": None if isinstance(mask, Mask) else mask,
        "bias": bias,
        "slopes": slopes,
    }
    tensors = {tensor: t for tensor, t in named.items() if t is not None}
    shapes, kinds, device = (
        {n: t.shape for n, t in tensors.items()},
        {n: t.dtype for n, t in tensors.items()},
        q.device,
    )
    for tensor, kind in kinds.items():
        rank, right = (
            (1 if tensor == "slopes" else 4),
            {"mask": torch.bool, "slopes": torch.float32}.get(tensor, kinds["q"]),
        )
        if len(shapes[tensor]) != rank:
            raise VerifyError(
                f"{name}: {tensor}.shape={[*shapes[tensor]]}: {rank} dimensions, not "
                f"{len(shapes[tensor])}"
            )
        if kind != right:
            raise VerifyError(f"{name}: {tensor}.dtype={kind}: {right}, as q is {kinds['q']}")
        if (other := tensors[tensor].device) != device:
            raise VerifyError(
                f"{name}: {tensor}.device={other}: all on one device, q is on {device}"
            )
    (batch, heads, len_q, dim_qk), (_, heads_kv, len_k, dim_v) = shapes["q"], shapes["v"]
    wanted = {
        "k": (batch, heads_kv, len_k, dim_qk),
        "v": (batch, heads_kv, len_k, dim_v),
        "slopes": (heads,),
    }
    for tensor, shape in shapes.items():
        sizes = wanted.get(tensor, (batch, heads, len_q, dim_qk if tensor == "q" else len_k))
        if not all(
            n == m or (n == 1 and tensor in ("mask", "bias"))
            for n, m in zip(shape, sizes, strict=True)
        ):
            raise VerifyError(
                f"{name}: {tensor}.shape={[*shape]}: {[*sizes]}, or 1 where a mask or bias is "
                "broadcast"
            )
    dtype = next((label for label, kind in DTYPES.items() if kind == kinds["q"]), str(kinds["q"]))
    lengths: dict[str, Any] = {
        "heads_q": heads,
        "heads_kv": heads_kv,
        "len_q": len_q,
        "len_k": len_k,
    }
    problem = Problem(batch=batch, **lengths, dim_qk=dim_qk, dim_v=dim_v, dtype=dtype, mask=rules)
    if sentence := supports(problem, device.type):
        raise VerifyError(f"{name}: {sentence}")
    return problem
