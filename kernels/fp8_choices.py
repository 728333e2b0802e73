"""FP8 attention as FlashAttention-3's Table 3 takes it apart: the bundled kernel with one choice of
quantisation each, and the textbook's attention on FP8 operands. For `verify report`; not among the
kernels of every run.
"""

from dataclasses import replace
from functools import partial

import torch

from verify.kernels.triton.fp8 import BEST, arithmetic, supports, triton_fp8
from verify.kernels.triton.fp8_quantize import ROWS
from verify.registry import kernel
from verify.spec.arithmetic import Arithmetic, Quantisation
from verify.spec.problem import Problem

CHOICES = {
    "fp8-tensor": Quantisation("e4m3"),
    "fp8-head": Quantisation("e4m3", 0),
    "fp8-blocks": Quantisation("e4m3", ROWS, values="head"),
    "fp8-rotated": Quantisation("e4m3", rotated=True),
    "fp8-blocks-rotated": Quantisation("e4m3", ROWS, rotated=True, values="head"),
    "fp8-blocks-rotated-columns": Quantisation("e4m3", ROWS, rotated=True, values="columns"),
    "fp8-e5m2": replace(BEST, format="e5m2"),
}
"""Beside BEST, which is triton-fp8: e4m3, blocks, rotated, a scale for each column of V, K and V
centred.
"""

for _name, _how in CHOICES.items():
    kernel(
        partial(triton_fp8, how=_how), name=_name, arithmetic=arithmetic(_how), supports=supports
    )


def _supports_naive(problem: Problem, device: str) -> str | None:
    return "forward only" if problem.grads else None


@kernel(
    name="naive-fp8",
    arithmetic=Arithmetic(
        quantised=CHOICES["fp8-tensor"], probs="e4m3", probs_scale=256.0, normalized_probs=True
    ),
    supports=_supports_naive,
    dtypes=("fp16", "bf16"),
)
def naive_fp8(q, k, v, *, scale, mask):
    """softmax(q k^T scale) v, each of q, k, v and P in e4m3 with a scale for the tensor, sums in
    FP32.
    """
    (q8, q_unit), (k8, k_unit), (v8, v_unit) = (_narrow(t) for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    s = q8 @ k8.repeat_interleave(group, 1).mT * (scale * q_unit * k_unit)
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    p = (torch.softmax(s, -1).nan_to_num() * 256).to(torch.float8_e4m3fn).float()
    return (p @ v8.repeat_interleave(group, 1) * (v_unit / 256)).to(q.dtype)


def _narrow(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 values as float32, what one of them stands for)"""
    unit = (
        x.abs().amax().float() / torch.finfo(torch.float8_e4m3fn).max
        if x.numel()
        else torch.ones((), device=x.device)
    )
    unit = torch.where(unit == 0, 1.0, unit)
    return (x.float() / unit).to(torch.float8_e4m3fn).float(), unit
