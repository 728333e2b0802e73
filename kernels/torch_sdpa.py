"""torch.nn.functional.scaled_dot_product_attention: four backends, four registrations of one
function.

What a backend supports is asked of torch itself (`_fused_sdp_choice` on tensors of the problem's
shape), with torch's own reason; nothing about its limits is written down here.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from verify.environment import GRID
from verify.registry import KnownIssue, kernel
from verify.spec.arithmetic import Arithmetic
from verify.spec.case import TORCH_DTYPES, has_empty_row
from verify.spec.layouts import LAYOUTS
from verify.spec.masks import FULL
from verify.spec.problem import DTYPES, Problem

FUSED = Arithmetic(group_sum="input")
CUDNN = Arithmetic(group_sum="input", scaled_dscores=True)
EFFICIENT = Arithmetic(
    group_sum="input", ds_probs="input", scaled_dscores=True, summation="truncated"
)  # FP32 as 3 x TF32
IN_FLOAT32 = Arithmetic(
    probs="fp32", dscores="fp32", normalized_probs=True, delta="probs", summation="nearest"
)


def math_arithmetic(problem: Problem, device: str) -> Arithmetic:
    """All in FP32, but where the mask handed over differs from entry to entry, or from head to
    head, so does the bias with it, and its gradient is stored for each.
    """
    apart = problem.mask != FULL and max(problem.mask_shape[:2]) > 1
    return replace(IN_FLOAT32, batch_sum="input") if apart else IN_FLOAT32


def flash_arithmetic(problem: Problem, device: str) -> Arithmetic:
    """On the CPU the backward adds into dk, dv, dq in the input's dtype, tile by tile, and the
    exponential of 16-bit problems is Malossi's (pytorch pull 151441), off by up to 1e-4; else by up
    to 20 ulp (torch 2.13, FlashAttentionKernel.cpp).
    """
    if device == "cuda":
        return FUSED
    rows = 256 if problem.len_q >= 768 else 64 if problem.len_q >= 192 else 32
    return Arithmetic(spill=(rows, 512), exp_ulp=20 if problem.dtype == "fp32" else 900)


BACKENDS: dict[str, tuple[SDPBackend, Arithmetic | Callable[[Problem, str], Arithmetic]]] = {
    "math": (SDPBackend.MATH, math_arithmetic),
    "flash": (SDPBackend.FLASH_ATTENTION, flash_arithmetic),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, EFFICIENT),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, CUDNN),
}
NO_POSITIVE_SCALE = KnownIssue(
    "a scale <= 0 gives NaN: the -inf of hidden or padded keys is multiplied by it (torch 2.11 and "
    "2.13, cuDNN 9.19)",
    lambda p, device: (
        p.softmax_scale <= 0
        and (device == "cuda" or p.mask.names <= {"causal_upper_left", "causal_lower_right"})
    ),
)
EMPTY_ROW = KnownIssue(
    "a row without a visible key gives a mean of V, not 0 (cuDNN 9.19)",
    lambda p, device: has_empty_row(p),
)
NO_KEYS = KnownIssue(
    "no key at all and a large q give NaN, not 0: the zero is formed from a sum that overflows "
    "(torch 2.13)",
    lambda p, device: p.len_k == 0 and p.dtype == "fp16",
    inputs=("constant",),
)
SCALED_KEYS = KnownIssue(
    "Q and K are each multiplied by the root of the scale: K near the largest number overflows, "
    "and 0 times that is NaN (torch 2.11 and 2.13)",
    lambda p, device: abs(p.softmax_scale) > 1 and p.dtype in ("fp32", "bf16"),
    inputs=("faint",),
)
LOW_LSE = KnownIssue(
    "dq is NaN in rows of low LSE where len_k % 128 = 64 (seen at -25 and -86; pytorch issue "
    "196678; cuDNN 9.19)",
    lambda p, device: p.grads and p.len_k % 128 == 64,
    inputs=("shift", "rising"),
)
SPLIT_KEYS = KnownIssue(
    "out is several times too large where scores exceed 2^24: the keys are split, the LSE of a "
    "part no longer holds the logarithm"
    " of its row sum, and the parts' weights add up to their number (torch 2.11)",
    lambda p, device: device == "cuda" and p.len_k > 64,
    inputs=("constant",),
)
SWALLOWS_NAN = KnownIssue(
    "NaN scores of a row of few keys give 0: the maximum passes over them (torch 2.13, CPU)",
    lambda p, device: device == "cpu",
    properties=("nan",),
)
MANY_ENTRIES = KnownIssue(
    "a batch of more than 65,535 entries raises `CUDA error: invalid argument` (torch 2.11)",
    lambda p, device: device == "cuda" and p.batch > GRID,
    shows_in=0.5,
)
NO_PLAN = KnownIssue(
    "a batch of more than 65,535 entries raises `mha_graph.execute ... is_good()` (cuDNN 9.19)",
    lambda p, device: p.batch > GRID,
    shows_in=0.5,
)
ENTRIES_LEFT_OUT = KnownIssue(
    "the gradient of a bias misses the entries of a batch beyond 65,535, and raises (torch 2.11)",
    lambda p, device: p.batch > GRID and p.grads and p.bias != "none",
)
MORE_VALUES = KnownIssue(
    "takes more values than keys, and leaves the rest out (torch 2.13, CPU)",
    lambda p, device: device == "cpu",
    properties=("reject",),
)
LOW_LSE_SHIFTED = KnownIssue(LOW_LSE.summary, LOW_LSE.applies_to, properties=("shift-gradients",))
FINITE_MASK = KnownIssue(
    "a hidden key of a large score takes part: what hides is a number that is added, not -inf "
    "(cuDNN 9.19)",
    lambda p, device: True,
    properties=("no-leak", "no-leak-gradients", "hidden-keys-appended"),
)
LAST_ROW = KnownIssue(
    "the last row is not always written where it is alone in its block of queries, under a mask, "
    "K or V expanded over the heads (torch 2.11)",
    lambda p, device: device == "cuda" and p.len_q % 128 == 1 and p.mask.names != {"full"},
    layouts=("expanded",),
)
SOME_GRADIENTS = KnownIssue(
    "illegal memory access, or `LSE is not correctly aligned`, in the backward where only some "
    "gradients are asked for and a bias"
    " is given (torch 2.11)",
    lambda p, device: device == "cuda" and p.bias != "none",
    properties=("gradient-subsets",),
    fatal=True,
)
ODD_BIAS = KnownIssue(
    "misaligned address where a bias starts off 16 bytes, as within a packed buffer (cuDNN 9.19)",
    lambda p, device: p.bias in ("qk", "hqk", "bhqk") and p.len_k % 8 > 0,
    layouts=("packed", "bshd", "sbhd"),
    fatal=True,
)
EXPANDED = KnownIssue(
    "Q expanded over the heads where d_v is not d: `the stride for the last dimension ... should "
    "be 1 for output_names::O`, or a"
    " segmentation fault (cuDNN 9.19)",
    lambda p, device: p.dim_v != p.dim_qk,
    layouts=("expanded",),
    fatal=True,
)
NAN_ROW = KnownIssue(
    "NaN in one row of dq, another one each time, not in every call (seen at 1024 queries under a "
    "mask of booleans; cuDNN 9.19)",
    lambda p, device: (
        p.grads and p.len_q >= 1024 and not p.mask.names <= {"full", "causal_upper_left"}
    ),
    shows_in=0.01,
)
NAN_AFTER = KnownIssue(
    "NaN in one row of dq in a call that follows one with another layout of dO (seen at 131 and "
    "182 queries; cuDNN 9.19)",
    lambda p, device: p.grads and p.len_q > 128,
    properties=("layout-gradients", "cotangent-scaling", "call-sequence-gradients"),
    layouts=("packed",),
    shows_in=0.01,
)
KNOWN = {
    "math": (NO_KEYS, SCALED_KEYS),
    "flash": (MANY_ENTRIES, NO_POSITIVE_SCALE, SPLIT_KEYS, SWALLOWS_NAN, MORE_VALUES),
    "efficient": (SOME_GRADIENTS, LAST_ROW, ENTRIES_LEFT_OUT),
    "cudnn": (
        NO_POSITIVE_SCALE,
        EMPTY_ROW,
        LOW_LSE,
        LOW_LSE_SHIFTED,
        FINITE_MASK,
        ODD_BIAS,
        EXPANDED,
        NAN_ROW,
        NAN_AFTER,
        NO_PLAN,
    ),
}
MISALIGNED = ("odd", "gapped")
"""Layouts whose rows start off 16 bytes: flash (q, k, v) and efficient (v) end in `CUDA error:
misaligned address`, which takes the process's GPU along, and so does cuDNN on some shapes;
efficient (q, k) refuses them with an exception (torch 2.11, H200)."""
_HEADERS = {"flash": "flash", "efficient": "memory efficient", "cudnn": "cudnn"}


def sdpa(q, k, v, *, scale, mask, bias, dropout, problem, backend):
    """q [B,H,Q,D], k [B,Hk,K,D], v [B,Hk,K,Dv] -> out [B,H,Q,Dv], through one backend. SDPA does
    not return an LSE.
    """
    with sdpa_kernel([BACKENDS[backend][0]]):
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_attn_mask(mask, bias, problem),
            dropout_p=dropout,
            is_causal=_is_causal(problem),
            scale=scale,
            enable_gqa=problem.group > 1,
        )


def _is_causal(problem: Problem) -> bool:
    causal = (
        ("causal_upper_left", "causal_lower_right")
        if problem.len_q == problem.len_k
        else ("causal_upper_left",)
    )
    return problem.mask_as == "rule" and str(problem.mask) in causal and problem.bias == "none"


def _attn_mask(mask, bias, problem: Problem):
    if _is_causal(problem):
        return None
    return mask if bias is None else bias if mask is None else bias.masked_fill(~mask, -torch.inf)


def layouts(device: str, *, backend: str) -> tuple[str, ...]:
    """Those that do not crash."""
    return tuple(
        name for name in LAYOUTS if device == "cpu" or backend == "math" or name not in MISALIGNED
    )


def supports(problem: Problem, device: str, *, backend: str, dropout: float = 0.0) -> str | None:
    """None, or torch's reason why this backend does not take the problem, or not with this
    dropout.
    """
    if backend in ("efficient", "cudnn") and device == "cpu":
        return f"SDPA {backend} needs a CUDA GPU"
    shapes, dtype = problem.shapes, TORCH_DTYPES[problem.dtype]
    if device == "cpu" and backend == "flash" and problem.grads and (problem.bias != "none"):
        return "SDPA flash on the CPU has no gradient of a float mask"
    q, k, v = (
        torch.empty(shapes[n], dtype=dtype, device=device, requires_grad=problem.grads)
        for n in ("q", "k", "v")
    )
    attn_mask, shape = None, shapes.get("bias", (1, 1, 1, 1))
    if problem.mask.names != {"full"}:
        shape = torch.broadcast_shapes(shape, problem.mask_shape)
    if "bias" in shapes or problem.mask_is_bias:
        attn_mask = torch.empty(shape, dtype=dtype, device=device)
        attn_mask.requires_grad_(problem.grads and problem.bias != "none")
    elif problem.mask.names != {"full"} and not _is_causal(problem):
        attn_mask = torch.empty(shape, dtype=torch.bool, device=device)
    with sdpa_kernel([BACKENDS[backend][0]]), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            torch._fused_sdp_choice(
                q,
                k,
                v,
                attn_mask,
                dropout,
                _is_causal(problem),
                scale=problem.scale,
                enable_gqa=problem.group > 1,
            )
        except RuntimeError as error:
            return (
                _reason(backend, [str(w.message) for w in said])
                or f"torch has no {backend} kernel for it: {error}".splitlines()[0]
            )
    return None


def _reason(backend: str, messages: list[str]) -> str | None:
    """The first sentence that torch gave for this backend: what follows the header `... kernel not
    used because:`.
    """
    ours = False
    for message in messages:
        text = re.sub(r"\s*\(Triggered internally.*", "", message, flags=re.DOTALL).strip()
        if "not used because" in text.lower():
            ours = _HEADERS.get(backend, backend) in text.lower()
        elif ours and text:
            return re.sub(r"[.,]? (Got|got|but got) .*", "", text.splitlines()[0])
    return None


PLANNED = {"cudnn": 1600}
"""cuDNN plans for each shape, which takes its time: so many calls for a property, no fewer than are
made of the others."""


def affordable(device: str, *, backend: str) -> int | None:
    """How many calls a property may make where they are slow."""
    return PLANNED.get(backend) if device == "cuda" else None


for _backend, (_, _arithmetic) in BACKENDS.items():
    kernel(
        functools.partial(sdpa, backend=_backend),
        name=f"sdpa-{_backend}",
        arithmetic=_arithmetic,
        supports=functools.partial(supports, backend=_backend),
        dtypes=DTYPES,
        known_issues=KNOWN.get(_backend, ()),
        vendor="PyTorch",
        layouts=functools.partial(layouts, backend=_backend),
        affordable=functools.partial(affordable, backend=_backend),
    )
