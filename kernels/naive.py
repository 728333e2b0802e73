"""Standard attention in the input's own dtype: S, softmax and P V each written to memory. The
baseline of the FlashAttention papers (arXiv 2205.14135, Algorithm 0), and the error that a fused
kernel should stay below."""

from __future__ import annotations

from dataclasses import replace

import torch

from verify.registry import KnownIssue, kernel
from verify.spec.arithmetic import EAGER, Arithmetic
from verify.spec.problem import DTYPES, Problem


def standard(problem: Problem, device: str) -> Arithmetic:
    """Every step in the input's dtype; on CUDA torch's softmax backward stores P * dP on the way
    (torch 2.11, SoftMax.cu).
    """
    return replace(EAGER, delta="product" if device == "cuda" else "probs")


def _within_a_tile(terms: int) -> bool:
    """Whether a product over so many terms ends within a tile of AMX."""
    return terms % 2 > 0 or (terms > 32 and terms % 32 > 0)


NAN_OF_THE_NEXT_ROW = KnownIssue(
    "NaN reaches the row before it, through a BF16 product whose number of terms is odd, or above "
    "32 and no multiple of it: with"
    " AMX a row's last tile takes the first terms of the next row, times 0 (torch 2.13, CPU)",
    lambda p, device: (
        device == "cpu"
        and p.dtype == "bf16"
        and (_within_a_tile(p.len_k) or _within_a_tile(p.dim_qk))
    ),
    properties=("nan",),
)


@kernel(arithmetic=standard, dtypes=DTYPES, known_issues=(NAN_OF_THE_NEXT_ROW,))
def naive(q, k, v, *, scale, mask, bias, slopes, softcap, dropout):
    """q [B,H,Q,D], k [B,Hk,K,D], v [B,Hk,K,Dv] of any float dtype -> (out [B,H,Q,Dv], lse [B,H,Q]
    float32).
    """
    len_q, len_k = q.shape[2], k.shape[2]
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    s = (q @ k.mT) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = (s + bias).masked_fill(
            bias == -torch.inf, -torch.inf
        )  # inf - inf, of a score that has overflowed, is not a number
    if slopes is not None:
        diagonal = torch.arange(len_q, device=q.device)[:, None] + len_k - len_q
        distance = (diagonal - torch.arange(len_k, device=q.device)).abs()
        s = s - (
            slopes[:, None, None].to(torch.promote_types(s.dtype, torch.float32)) * distance
        ).to(s.dtype)
    visible = s.detach() != -torch.inf  # a float bias hides with -inf
    visible = visible if mask is None else visible & mask
    # the smallest finite score and a zero afterwards, not -inf: a row that sees nothing must not
    # turn into 0/0
    p = torch.softmax(s.masked_fill(~visible, torch.finfo(s.dtype).min), dim=-1).masked_fill(
        ~visible, 0.0
    )
    lse = torch.logsumexp(
        s.to(torch.float32 if s.dtype != torch.float64 else s.dtype).masked_fill(
            ~visible, -torch.inf
        ),
        dim=-1,
    )
    return torch.dropout(p, dropout, train=True) @ v, lse
