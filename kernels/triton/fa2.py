"""FlashAttention-2 in Triton: Algorithm 1 of Dao 2023 (arXiv 2307.08691); the backward is
triton_fa2_backward.py's.

One program per block of queries and (batch, query head). It walks over the blocks of keys that its
rows may see, with a running maximum, a running row sum and an accumulator that is divided by the
sum once, at the end; LSE = maximum + ln sum. A block that is wholly visible pays for no mask. The
exponential is 2^(s factor - maximum), product and difference in one fused step; factor is scale
log2(e), or log2(e) where more than the scale is done to a score.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from verify.kernels.triton.checks import DTYPES, affordable, as_rules, checked, refusal
from verify.kernels.triton.fa2_backward import gradients
from verify.kernels.triton.launch import RUNTIME, Launch, quiet
from verify.kernels.triton.tiles import LN2, dot, load, nth, power, rounded, scores, store, walk
from verify.registry import kernel
from verify.spec.arithmetic import Arithmetic
from verify.spec.masks import Mask
from verify.spec.problem import Problem


@triton.jit(do_not_specialize=RUNTIME)
def _forward(
    q, q_b, q_h, q_r, q_c, k, k_b, k_h, k_r, k_c, v, v_b, v_h, v_r, v_c, mask, mask_b, mask_h, mask_r, mask_c,
    bias, bias_b, bias_h, bias_r, bias_c, slopes, integers, terms, rules, plan, plan_b, out, lse,
    batch, heads, group, blocks, len_q, len_k, dim_qk, dim_v, flags, before, factor, softcap,
    KIND: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """q [B,H,Q,D], k [B,Hk,K,D], v [B,Hk,K,Dv], mask and bias [B,H,Q,K] -> out [B,H,Q,Dv], lse
    [B,H,Q], contiguous.
    """
    bh, block = (
        tl.program_id(0) // blocks,
        blocks - 1 - tl.program_id(0) % blocks,
    )  # causal: the longest first
    b, h = bh // heads, bh % heads
    mask_at, bias_at = (mask_b, mask_h, mask_r, mask_c), (bias_b, bias_h, bias_r, bias_c)
    extras = (
        batch,
        len_q,
        len_k,
        integers,
        terms,
        flags,
        before,
        softcap,
        slopes,
        mask,
        mask_at,
        bias,
        bias_at,
    )
    q_at, k_at, v_at = (q_b, q_h, q_r, q_c), (k_b, k_h, k_r, k_c), (v_b, v_h, v_r, v_c)
    way = walk(plan, plan_b, b, block)
    rows, keys = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    q_block = load(q, q_at, b, h, block * BLOCK_M, len_q, dim_qk, BLOCK_M, BLOCK_D, KIND)
    top, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in tl.range(0, way[0], num_stages=STAGES):
        number = nth(j, way)
        start = number * BLOCK_N
        k_block = load(k, k_at, b, h // group, start, len_k, dim_qk, BLOCK_N, BLOCK_D, KIND)
        s = dot(q_block, tl.trans(k_block), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), INTERPRET)
        s, _ = scores(
            s,
            rows[:, None],
            start + keys[None, :],
            b,
            h,
            number,
            way,
            extras,
            rules,
            KIND,
            INTERPRET,
        )
        old, top = top, tl.maximum(top, tl.max(s, 1) * factor)
        base = tl.where(top == float("-inf"), 0.0, top)  # nothing visible yet: no -inf - -inf
        p = power(s, factor, base[:, None])
        decay = tl.exp2(old - base)
        total = total * decay + tl.sum(p, 1)
        v_block = load(v, v_at, b, h // group, start, len_k, dim_v, BLOCK_N, BLOCK_D, KIND)
        acc = dot(rounded(p, v_block.dtype, INTERPRET), v_block, acc * decay[:, None], INTERPRET)
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    if q_block.dtype == tl.float32:
        acc = tl.div_rn(acc, tl.broadcast_to(total[:, None], acc.shape))
    else:
        acc *= tl.div_rn(1.0, total)[:, None]
    store(out, b, h, heads, block * BLOCK_M, len_q, dim_v, acc, KIND, INTERPRET)
    row_lse = tl.where(empty, float("-inf"), top * LN2 + tl.log(total))
    tl.store(lse + bh.to(tl.int64) * len_q + rows, row_lse, mask=rows < len_q)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: Mask | torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    scale: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,H,Q,D], k [B,Hk,K,D], v [B,Hk,K,Dv] in fp16, bf16 or fp32, any strides -> out
    [B,H,Q,Dv], lse float32 [B,H,Q].

    The meaning of all of it is verify/spec/problem.py's. mask: a Mask without `dense`, or bool
    [B|1,H|1,Q|1,K|1], True = take part; bias: that shape, dtype of q, -inf hides; slopes: float32
    [H], ALiBi. Raises VerifyError for what it cannot compute.
    """
    problem = checked("triton-fa2", supports, q, k, v, mask=mask, bias=bias, slopes=slopes)
    return _Attention.apply(
        q, k, v, bias, Launch.of(problem, q, mask, bias, slopes, scale, softcap)
    )


class _Attention(torch.autograd.Function):
    """out and LSE, differentiable in q, k, v, bias."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        launch: Launch,
    ) -> Any:
        out, lse = launch.results()
        if out.numel() and k.shape[2]:
            with quiet(q):
                loads = {"q": launch.operand(q), "k": launch.operand(k), "v": launch.operand(v)}
                launch.run(_forward, "forward", loads, {"out": out}, {"lse": lse})
        else:
            out, lse = out.zero_(), lse.fill_(float("-inf"))
        out = out.contiguous()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.launch = launch
        return out, lse

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor, dlse: torch.Tensor) -> Any:
        with quiet(do):
            return *gradients(
                ctx.launch, do, dlse, ctx.saved_tensors, ctx.needs_input_grad[:4]
            ), None


def supports(problem: Problem, device: str) -> str | None:
    """None, or in one sentence why not."""
    return refusal(problem, device, tuple(DTYPES))


@kernel(
    name="triton-fa2",
    arithmetic=Arithmetic(exp="fused", deterministic=True),
    supports=supports,
    tiles=(64, 128),
    affordable=functools.partial(affordable, calls=18),
)
def triton_fa2(q, k, v, *, problem, mask, bias, slopes, scale, softcap):
    """Masks as rules where the problem leaves the choice and all of them are rules for Triton;
    `dense` comes as a tensor.
    """
    return attention(
        q,
        k,
        v,
        mask=as_rules(problem, mask),
        bias=bias,
        slopes=slopes,
        scale=scale,
        softcap=softcap,
    )
