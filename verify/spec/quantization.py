"""What a kernel that quantises and those who judge it must agree on to the bit: which keys count,
their means, the rotation.
"""

from __future__ import annotations

import functools
import random

import torch
from torch import Tensor

from verify.spec.arithmetic import Quantisation
from verify.spec.case import Inputs, visibility
from verify.spec.problem import Problem

VISIBILITIES = 2**26
"""Visibilities in memory at a time."""
FIT = 2.0**-6
"""A fitted row is moved by at most this share of itself. Along a row of 128 Gaussian columns e4m3
errs by sqrt(3/128) of 2.7 %, as each column errs in proportion to itself: a quarter of FIT."""


@functools.cache
def rotation(dim: int) -> Tensor:
    """Signs times Sylvester's Hadamard matrix: float64 [n, n] of 1 and -1 with n = 2^ceil(log2
    dim); over sqrt(n) orthogonal.

    Q and K multiplied by it have the same Q K^T, and an outlier is spread over all columns before
    it is rounded to 8 bits (incoherent processing: FlashAttention-3, arXiv 2407.08608, section 3.3;
    QuIP, arXiv 2307.13304).
    """
    n = 1 << max(0, dim - 1).bit_length()
    at = torch.arange(n)
    odd = (
        sum(
            (((at[:, None] & at) >> bit) & 1 for bit in range(n.bit_length())),
            torch.zeros(n, n, dtype=torch.long),
        )
        % 2
    )
    signs = torch.tensor(random.Random(n).choices((-1.0, 1.0), k=n), dtype=torch.float64)  # noqa: S311 - no secret
    return signs[:, None] * (1 - 2 * odd)


@functools.lru_cache(maxsize=64)
def seen_keys(problem: Problem, device: torch.device) -> Tensor:
    """Which keys some query of some head sees: bool [B|1,1,K,1]. What hides a key from all hides it
    from scales and means, too.
    """
    seen = torch.zeros(1, 1, problem.len_k, 1, dtype=torch.bool, device=device)
    heads = problem.heads_q if problem.mask.per_head else 1
    step = max(1, VISIBILITIES // max(1, problem.batch * heads * problem.len_k))
    for start in range(0, problem.len_q, step):
        rows = slice(start, min(start + step, problem.len_q))
        here = visibility(problem, device, rows).any(2)  # [B|1,H|1,K]
        seen = seen | here.any(1)[:, None, :, None]
    return seen


def centres(problem: Problem, x: Inputs, how: Quantisation) -> tuple[Tensor, Tensor, Tensor]:
    """(keys that some query sees [B|1,1,K,1]; what K and V, float64, are freed of [B,Hk,1,D]: 0
    where they are not centred)
    """
    seen = seen_keys(problem, x.k.device)
    k, v = (t.new_zeros((*t.shape[:2], 1, t.shape[3])) for t in (x.k, x.v))
    if how.centred:
        k = key_mean(x.k, seen).double()
        v = v if how.values == "given" else key_mean(x.v, seen).double()
    return seen, k, v


def fit(x: Tensor, rounded: Tensor) -> Tensor:
    """Factor of each rounded row [B,H,n,1] after which its product with the row x is the square of
    x; 1 where there is none.
    """
    product = (rounded * x).sum(-1, keepdim=True)
    factor = x.square().sum(-1, keepdim=True) / torch.where(product > 0, product, 1.0)
    return torch.where(product > 0, factor, 1.0).clamp(1 - FIT, 1 + FIT)


def key_mean(x: Tensor, seen: Tensor | None) -> Tensor:
    """Mean of x [B,H,K,D] over the keys that are seen [B|1,1,K,1], None: all: float32 [B,H,1,D], 0
    without any.
    """
    total = (x if seen is None else x.masked_fill(~seen, 0.0)).sum(
        2, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    return (total / key_count(x.shape[2], seen)).float()


def key_count(length: int, seen: Tensor | None) -> Tensor | int:
    """Of how many keys a mean is: [B|1,1,1,1], at least 1."""
    return max(1, length) if seen is None else seen.sum(2, keepdim=True).clamp(min=1)
