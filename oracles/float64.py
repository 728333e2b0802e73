"""Exact attention in float64, on the CPU or the GPU: forward, LSE and closed-form gradients.

Works through the query rows a block at a time, each with all its keys, so memory is O(len) and a
block can show its whole softmax to whoever needs it (error bounds, emulations). Heads are grouped:
query heads [B, Hk, G, ...] over key heads [B, Hk].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from verify.bounds.exact import (
    Block,
    Exact,
    by_group,
    by_key,
    from_keys,
    grouped,
    to_keys,
    ungrouped,
)
from verify.bounds.metrics import finite
from verify.errors import VerifyError
from verify.spec.case import Inputs, visibility
from verify.spec.problem import Problem

BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""Scores held at a time: about ten float64 tensors of this size are alive together."""


def exact(problem: Problem, inputs: Inputs) -> Exact:
    """Attention of these very values (any dtype, taken as they are), on their device. Gradients
    where problem.grads.

    Raises VerifyError where an input is not finite: then the answer is a matter of convention, not
    of arithmetic.
    """
    shapes, device = problem.shapes, inputs.q.device
    out, lse = (
        torch.zeros(shapes[name], dtype=torch.float64, device=device) for name in ("out", "lse")
    )
    grads = {
        "d" + name: torch.zeros(shapes[name], dtype=torch.float64, device=device)
        for name in ("q", "k", "v")
    }
    if "bias" in shapes:
        grads["dbias"] = torch.zeros(shapes["bias"], dtype=torch.float64, device=device)
    for block in blocks(problem, inputs):
        out[:, :, block.rows] = ungrouped(block.out)
        lse[:, :, block.rows] = ungrouped(block.lse).squeeze(-1)
        if problem.grads:
            _add_gradients(problem, block, grads)
    if not problem.grads:
        return Exact(out, lse)
    return Exact(out, lse, grads["dq"], grads["dk"], grads["dv"], grads.get("dbias"))


def blocks(problem: Problem, inputs: Inputs) -> Iterator[Block]:
    """The exact softmax, a block of query rows at a time. Raises VerifyError where an input is not
    finite.
    """
    x = inputs.exact(inputs.q.device)
    for name in ("q", "k", "v", "do", "bias"):
        tensor = getattr(x, name)
        if tensor is not None and not finite(tensor):
            raise VerifyError(f"{name}: holds NaN or Inf; the float64 oracle takes finite inputs")
    per_row = max(1, problem.batch * problem.heads_q * problem.len_k)
    size = max(1, BLOCK_ELEMENTS[x.q.device.type] // per_row)
    for start in range(0, problem.len_q, size):
        yield _block(problem, x, slice(start, min(start + size, problem.len_q)))


def _block(problem: Problem, x: Inputs, rows: slice) -> Block:
    q, do = grouped(x.q[:, :, rows], problem), grouped(x.do[:, :, rows], problem)
    visible = by_group(visibility(problem, x.q.device, rows), problem)
    raw = problem.softmax_scale * by_key(q, x.k)  # [B,Hk,G,n,K]
    capped = problem.softcap * torch.tanh(raw / problem.softcap) if problem.softcap else raw
    bias = additive(problem, x, rows)
    s = capped if bias is None else capped + bias
    hidden = s.masked_fill(~visible, -torch.inf)
    row_max = (
        hidden.amax(-1, keepdim=True)
        if problem.len_k
        else hidden.new_full((*s.shape[:-1], 1), -torch.inf)
    )
    row_max = row_max.masked_fill(row_max == -torch.inf, 0.0)
    weights = torch.exp(hidden - row_max)
    total = weights.sum(-1, keepdim=True)
    p = weights / total.masked_fill(total == 0, 1.0)
    lse = row_max + torch.log(total)
    return Block(
        rows, q, x.k, x.v, do, visible, raw, capped, bias, s, row_max, lse, p, from_keys(p, x.v)
    )


def _add_gradients(problem: Problem, b: Block, grads: dict[str, torch.Tensor]) -> None:
    dp = by_key(b.do, b.v)
    ds = b.p * (dp - (b.p * dp).sum(-1, keepdim=True))
    if "dbias" in grads:
        _add_bias_gradient(problem, grads["dbias"], b.rows, ds)
    if problem.softcap:
        ds = ds * (1 - (b.capped / problem.softcap) ** 2)
    grads["dq"][:, :, b.rows] = ungrouped(problem.softmax_scale * from_keys(ds, b.k))
    grads["dk"] += problem.softmax_scale * to_keys(ds, b.q)
    grads["dv"] += to_keys(b.p, b.do)


def additive(problem: Problem, x: Inputs, rows: slice) -> torch.Tensor | None:
    """The float bias or ALiBi's -slope |i + len_k - len_q - j| over these rows, broadcastable to
    [B,Hk,G,n,K]; None without.
    """
    if x.slopes is not None:
        q = torch.arange(rows.start, rows.stop, device=x.q.device)[:, None]
        k = torch.arange(problem.len_k, device=x.q.device)[None, :]
        distance = (q + problem.len_k - problem.len_q - k).abs().to(torch.float64)
        return -x.slopes.view(1, problem.heads_kv, problem.group, 1, 1) * distance
    if x.bias is None:
        return None
    return by_group(x.bias[:, :, rows], problem)


def _add_bias_gradient(
    problem: Problem, total: torch.Tensor, rows: slice, ds: torch.Tensor
) -> None:
    """Add dS [B,Hk,G,n,K], summed over the dimensions that the bias is broadcast in, to its rows of
    `total`.
    """
    per_head = ungrouped(ds)
    summed = [n for n in (0, 1) if total.shape[n] == 1 and per_head.shape[n] != 1]
    total[:, :, rows] += per_head.sum(summed, keepdim=True) if summed else per_head
