"""torch.nn.attention.flex_attention, compiled (arXiv 2412.05496): PyTorch's template in Triton,
scores changed by tensors that it reads. Loaded where it is asked for by name: every head dim and
number of heads is compiled apart, which takes its time.

Where it rounds is read off torch/_inductor/kernel/flex (torch 2.13: flex_attention.py and
templates/flex_*.jinja).
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import torch._dynamo
from torch.nn.attention import flex_attention as flex

from verify.environment import GRID
from verify.registry import KnownIssue, kernel
from verify.spec.arithmetic import Arithmetic
from verify.spec.problem import Problem

DIMS = (16, 64, 128)
"""Head dims that are judged: each is compiled apart, in some ten seconds. tl.dot multiplies none
below 16.
"""
SHAPES = {"fp32": (16, 2, 2), "fp16": (64, 4, 2), "bf16": (128, 6, 2)}
"""Head dim and heads that are drawn in each dtype: every other pair would be compiled apart,
too.
"""
GRAPHS = 2**16
"""Graphs that torch may compile; beyond its own limit it would fall back to attention that is not
compiled, or raise.
"""
LIMITS = (
    "recompile_limit",
    "accumulated_recompile_limit",
    "cache_size_limit",
    "accumulated_cache_size_limit",
)
"""What the limits are called, in this version of torch or that."""
FUSED = Arithmetic(exp="fused", batch_sum="input", deterministic=True)
"""2^(s log2(e) - maximum), P and dS rounded to the input's dtype for the products, all sums in
FP32, dk and dv of a group in one running sum, delta = rowsum(dO * out), scale after the products.
The gradient of a bias is stored for every head and batch entry.
"""


MORE_VALUES = KnownIssue(
    "takes more values than keys, and leaves the rest out (torch 2.11)",
    lambda p, device: True,
    properties=("reject",),
)


MANY_HEADS = KnownIssue(
    "more than 65,535 heads of all entries raise `CUDA driver error: invalid argument`, or need "
    "more memory than there is (torch 2.11)",
    lambda p, device: p.batch * p.heads_q > GRID or p.batch > GRID // 2,
    shows_in=0.5,
    fatal=True,
)


def arithmetic(problem: Problem, device: str) -> Arithmetic:
    """FP32 problems are multiplied in TF32 where torch's setting for matrix products allows it."""
    narrow = problem.dtype == "fp32" and torch.get_float32_matmul_precision() != "highest"
    return replace(FUSED, scores="tf32", accumulate="tf32") if narrow else FUSED


def supports(problem: Problem, device: str) -> str | None:
    """None, or in one sentence why not."""
    checks = [
        (device != "cuda", "needs a GPU: FlexAttention compiled"),
        (
            problem.dim_qk not in DIMS or problem.dim_v != problem.dim_qk,
            f"dim_qk={problem.dim_qk}, dim_v={problem.dim_v}: equal, {' or '.join(map(str, DIMS))}",
        ),
        (
            min(problem.len_q, problem.len_k) < 1,
            f"len_q={problem.len_q}, len_k={problem.len_k}: at least 1",
        ),
    ]
    return next((sentence for wrong, sentence in checks if wrong), None)


def bucket(problem: Problem) -> Problem:
    """The same lengths, mask and options in one of few shapes: a head dim and a number of heads for
    each dtype, no batch of 1.
    """
    (dim, heads_q, heads_kv), mask = SHAPES[problem.dtype], problem.mask
    if problem.batch == 1:
        mask = mask.of_entries(lambda numbers: numbers * 2)
    batch = max(2, problem.batch)
    return problem.but(
        dim_qk=dim, dim_v=dim, heads_q=heads_q, heads_kv=heads_kv, batch=batch, mask=mask
    )


@functools.cache
def _compiled():
    """Lengths are values at run time; without a whole graph it raises rather than run
    uncompiled.
    """
    return torch.compile(flex.flex_attention, dynamic=True, fullgraph=True)


COMPILES = 6
"""Calls for each property in a plain run: most compile, for 3 to 30 s."""


@kernel(
    name="flex-attention",
    arithmetic=arithmetic,
    supports=supports,
    known_issues=(MORE_VALUES, MANY_HEADS),
    layouts=lambda device: ("bhsd", "bshd"),
    bucket=bucket,
    vendor="PyTorch",
    affordable=lambda device: COMPILES,
)
def flex_attention(q, k, v, *, scale, mask, bias, slopes, softcap):
    """q [B,H,Q,D], k [B,Hk,K,D], v [B,Hk,K,Dv] of FP32, FP16 or BF16 on a GPU -> (out [B,H,Q,Dv],
    lse [B,H,Q] float32). Raises what torch raises where it has no kernel (a tile that does not fit
    into shared memory).
    """
    with torch._dynamo.config.patch(_limits()):
        return _attention(
            q, k, v, scale, _block_mask(q, k, mask), _score_mod(q, k, bias, slopes, softcap)
        )


def _attention(q, k, v, scale, block_mask, score_mod):
    group = q.shape[1] // k.shape[1]
    options = (
        {"FORCE_USE_FLEX_ATTENTION": True} if group & (group - 1) else None
    )  # its decoding takes groups of a power of two
    given = {
        "block_mask": block_mask,
        "score_mod": score_mod,
        "scale": scale,
        "enable_gqa": group > 1,
        "kernel_options": options,
    }
    if not hasattr(flex, "AuxRequest"):  # before torch 2.9
        return _compiled()(q, k, v, return_lse=True, **given)
    out, beside = _compiled()(q, k, v, return_aux=flex.AuxRequest(lse=True), **given)
    return out, beside.lse


def _limits() -> dict[str, int]:
    return {name: GRAPHS for name in LIMITS if hasattr(torch._dynamo.config, name)}


def _block_mask(q, k, mask):
    """One rule that reads the booleans [B,H|1,Q,K], whatever the mask; None without one."""
    if mask is None:
        return None
    batch, heads, len_q, len_k = q.shape[0], mask.shape[1], q.shape[2], k.shape[2]
    seen = mask.expand(batch, -1, len_q, len_k).contiguous()

    def alike(b, h, i, j):
        return seen[b, 0, i, j]

    def of_head(b, h, i, j):
        return seen[b, h, i, j]

    rule, apart = (alike, None) if heads == 1 else (of_head, heads)
    return flex.create_block_mask(rule, batch, apart, len_q, len_k, device=q.device)


def _score_mod(q, k, bias, slopes, softcap):
    """One rule for bias, ALiBi and softcap, so that one graph serves them all: what is absent is
    read as 0. None without any.
    """
    if bias is None and slopes is None and not softcap:
        return None
    (batch, heads, len_q, _), len_k = q.shape, k.shape[2]
    added = (q.new_zeros(1, 1, 1, 1) if bias is None else bias).expand(batch, heads, len_q, len_k)
    added = added.clone(
        memory_format=torch.contiguous_format
    )  # what is read through a view gets no gradient (torch 2.13)
    slope = torch.zeros(heads, device=q.device) if slopes is None else slopes
    cap = torch.full((heads,), softcap, device=q.device)
    diagonal = torch.arange(len_q, device=q.device) + (len_k - len_q)

    def changed(score, b, h, i, j):
        capped = torch.where(
            cap[h] > 0, cap[h] * torch.tanh(score / torch.where(cap[h] > 0, cap[h], 1.0)), score
        )
        return capped + added[b, h, i, j] - slope[h] * torch.abs(diagonal[i] - j)

    return changed
