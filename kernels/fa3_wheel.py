"""FlashAttention-3's own kernels (the wheel fa3-fwd: forward only, Hopper), in BF16 and in FP8. No
dependency: judged if there.

In FP8 it takes one scale for each head of K; the rotation is ours (`triton_fp8_quantise`), as the
paper leaves it to the caller.
"""

import fa3_fwd_interface
import torch

from verify.kernels.triton.fp8_quantize import quantise
from verify.registry import kernel
from verify.spec.arithmetic import Arithmetic, Quantisation
from verify.spec.problem import Problem

HEADS = Quantisation("e4m3", 0, rotated=True)
ALIGNED = ("bhsd", "bshd", "sbhd", "packed", "columns", "expanded")
"""Layouts with rows at multiples of 16 bytes; others end in `CUDA error: an illegal instruction was
encountered`, which takes the process's GPU along (fa3-fwd 0.0.3, H200)."""
SUMS = "fp22"
"""Hopper's FP8 products keep 14 bits of their sums."""


def _supports(problem: Problem, device: str) -> str | None:
    """None, or in one sentence why not."""
    checks = [
        (device != "cuda", "needs a Hopper GPU"),
        (problem.grads, "the wheel has the forward only"),
        (problem.dtype != "bf16", f"dtype={problem.dtype}: this build takes bf16"),
        (
            problem.mask_as != "rule" or not problem.mask.names <= {"full", "causal_lower_right"},
            "full or causal, lower right",
        ),
        (problem.dim_qk != problem.dim_v, f"dim_qk={problem.dim_qk}, dim_v={problem.dim_v}: equal"),
    ]
    return next((sentence for wrong, sentence in checks if wrong), None)


def _supports_fp8(problem: Problem, device: str) -> str | None:
    checks = [
        (problem.dim_qk not in (64, 128, 256), f"dim_qk={problem.dim_qk}: 64, 128 or 256"),
        (
            problem.heads_q != problem.heads_kv,
            f"heads_q={problem.heads_q}, heads_kv={problem.heads_kv}: a scale for each head of Q",
        ),
    ]
    return _supports(problem, device) or next(
        (sentence for wrong, sentence in checks if wrong), None
    )


def _attention(q, k, v, *, scale, problem, **scales):
    causal = "causal_lower_right" in problem.mask.names
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = fa3_fwd_interface.flash_attn_func(q, k, v, softmax_scale=scale, causal=causal, **scales)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


@kernel(
    name="fa3",
    supports=_supports,
    dtypes=("bf16",),
    layouts=lambda device: ALIGNED,
    vendor="FlashAttention-3",
)
def fa3(q, k, v, *, scale, problem):
    """BF16."""
    return _attention(q, k, v, scale=scale, problem=problem)


@kernel(
    name="fa3-fp8",
    arithmetic=Arithmetic(
        quantised=HEADS, exp="fused", probs="e4m3", probs_scale=256.0, scores=SUMS, accumulate=SUMS
    ),
    supports=_supports_fp8,
    dtypes=("bf16",),
    layouts=lambda device: ALIGNED,
    vendor="FlashAttention-3",
)
def fa3_fp8(q, k, v, *, scale, problem):
    """e4m3, a scale for each head, Q and K rotated."""
    x = quantise(q, k, v, HEADS, problem.dim_qk, None)
    columns = x.v[..., : problem.len_k].mT.contiguous()
    scales = {
        name: t[:, :, 0].contiguous()
        for name, t in (
            ("q_descale", x.q_scale),
            ("k_descale", x.k_scale),
            ("v_descale", x.v_scale),
        )
    }
    return _attention(x.q, x.k, columns, scale=scale, problem=problem, **scales).to(torch.bfloat16)
