"""The exact answer as a value, the exact softmax a block of rows at a time, and the products
between rows and keys under GQA.

Query heads are grouped [B, Hk, G, ...] over their key heads [B, Hk, ...]: head h = hk * G + g.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from verify.spec.problem import Problem


@dataclass(frozen=True)
class Exact:
    """out [B,H,Q,Dv], lse [B,H,Q] and, where asked for, dq, dk, dv, dbias (shapes of q, k, v,
    bias): float64, and who says so.
    """

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None
    dbias: torch.Tensor | None = None
    provenance: str = "float64, blockwise"


@dataclass(frozen=True)
class Block:
    """Some query rows and all their keys; n rows, tensors in float64, G query heads per key head.

    q [B,Hk,G,n,D], k [B,Hk,K,D], v [B,Hk,K,Dv], visible [B|1,Hk|1,G|1,n,K], scores before softcap `raw`,
    after softcap `capped` and after bias `s`, p, bias (broadcastable) or None: [B,Hk,G,n,K];
    row_max, lse [B,Hk,G,n,1]; out, do [B,Hk,G,n,Dv].
    """

    rows: slice
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    do: torch.Tensor
    visible: torch.Tensor
    raw: torch.Tensor
    capped: torch.Tensor
    bias: torch.Tensor | None
    s: torch.Tensor
    row_max: torch.Tensor
    lse: torch.Tensor
    p: torch.Tensor
    out: torch.Tensor


def grouped(x: torch.Tensor, problem: Problem) -> torch.Tensor:
    """[B, H, ...] -> [B, Hk, G, ...]"""
    return x.unflatten(1, (problem.heads_kv, problem.group))


def by_group(x: torch.Tensor, problem: Problem) -> torch.Tensor:
    """[., H|1, ...] -> [., Hk|1, G|1, ...]: what may be the same for all heads."""
    return grouped(x, problem) if x.shape[1] == problem.heads_q else x.unsqueeze(2)


def ungrouped(x: torch.Tensor) -> torch.Tensor:
    """[B, Hk, G, ...] -> [B, H, ...]"""
    return x.flatten(1, 2)


def by_key(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """One product per (row, key): [B,Hk,G,n,D] x [B,Hk,K,D] -> [B,Hk,G,n,K]"""
    flat = rows.flatten(2, 3) @ keys.transpose(-1, -2)  # [B,Hk,G*n,K]
    return flat.unflatten(2, rows.shape[2:4])


def from_keys(weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Sum over the keys: [B,Hk,G,n,K] x [B,Hk,K,D] -> [B,Hk,G,n,D]"""
    return (weights.flatten(2, 3) @ keys).unflatten(2, weights.shape[2:4])


def to_keys(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sum over the rows and the heads of the group: [B,Hk,G,n,K] x [B,Hk,G,n,D] -> [B,Hk,K,D]"""
    return weights.flatten(2, 3).transpose(-1, -2) @ rows.flatten(2, 3)
