"""FlashAttention-2's backward in Triton: Algorithm 2 of Dao 2023 (arXiv 2307.08691), without
atomics: a second call gives the same bits.

P is recomputed from the LSE; delta = rowsum(dO * O), less the gradient of the LSE, enters dS = P *
(dP - delta). One kernel goes over blocks of keys and adds up dK and dV over the rows and query
heads of the group that see them; another goes over blocks of rows and adds up dQ and, where asked
for, writes dS as the bias's gradient. P and dS are rounded to the input's dtype for their products.
Seven products instead of five, for no sum is shared between programs.
"""

import torch
import triton
import triton.language as tl

from verify.kernels.triton.launch import RUNTIME, Launch, descriptor, loadable, strides
from verify.kernels.triton.tiles import (
    DBIAS,
    GENERAL,
    INTERPRET,
    LOG2E,
    WHOLE,
    dot,
    load,
    nth,
    power,
    rounded,
    scores,
    store,
    walk,
    wide,
)

BLOCK_ROWS = (64, 64)
"""Rows of one program of `_rows`, and columns at a time."""


@triton.jit(do_not_specialize=RUNTIME)
def _rows(
    do, do_b, do_h, do_r, do_c, out, out_b, out_h, out_r, out_c, lse, dlse, delta, lse2, heads, blocks, len_q, dim_v,
    KIND: tl.constexpr, INTERPRET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dO and out [B,H,Q,Dv], lse and dlse [B,H,Q] -> delta = rowsum(dO * out) - dlse, lse2 = lse
    log2(e), +inf in empty rows.
    """
    bh, start = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_M
    b, h = bh // heads, bh % heads
    rows = start + tl.arange(0, BLOCK_M)
    at, inside = bh.to(tl.int64) * len_q + rows, rows < len_q
    product = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    do_at, out_at = (do_b, do_h, do_r, do_c), (out_b, out_h, out_r, out_c)
    for column in range(0, dim_v, BLOCK_D):
        do_block = load(do, do_at, b, h, start, len_q, dim_v, BLOCK_M, BLOCK_D, KIND, column)
        product += wide(do_block, INTERPRET) * wide(
            load(out, out_at, b, h, start, len_q, dim_v, BLOCK_M, BLOCK_D, KIND, column), INTERPRET
        )
    tl.store(
        delta + at, tl.sum(product, 1) - tl.load(dlse + at, mask=inside, other=0.0), mask=inside
    )
    row_lse = tl.load(lse + at, mask=inside, other=0.0)
    tl.store(
        lse2 + at, tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2E), mask=inside
    )


@triton.jit(do_not_specialize=RUNTIME)
def _by_keys(
    q, q_b, q_h, q_r, q_c, do, do_b, do_h, do_r, do_c, k, k_b, k_h, k_r, k_c, v, v_b, v_h, v_r, v_c,
    mask, mask_b, mask_h, mask_r, mask_c, bias, bias_b, bias_h, bias_r, bias_c, slopes, integers, terms, rules,
    plan, plan_b, lse2, delta, dk, dv,
    batch, heads, group, blocks, len_q, len_k, dim_qk, dim_v, flags, before, factor, softcap, scale,
    KIND: tl.constexpr, INTERPRET: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk [B,Hk,K,D], dv [B,Hk,K,Dv], contiguous: a block of keys of one key head, the rows of its
    query heads.
    """
    bg, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, g = bg // (heads // group), bg % (heads // group)
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
    q_at, do_at = (q_b, q_h, q_r, q_c), (do_b, do_h, do_r, do_c)
    k_at, v_at = (k_b, k_h, k_r, k_c), (v_b, v_h, v_r, v_c)
    keys = (block * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    k_block = load(k, k_at, b, g, block * BLOCK_N, len_k, dim_qk, BLOCK_N, BLOCK_D, KIND)
    v_block = (
        load(v, v_at, b, g, block * BLOCK_N, len_k, dim_v, BLOCK_N, BLOCK_D, KIND)
        if DK
        else k_block
    )
    dk_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32) if DK else 0.0
    dv_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32) if DV else 0.0
    zero = tl.zeros(
        [BLOCK_N, BLOCK_M], tl.float32
    )  # all is transposed, so that P and dS are left operands
    way = walk(plan, plan_b, b, block)
    for member in range(group):
        h = g * group + member
        for j in tl.range(0, way[0], num_stages=STAGES):
            number = nth(j, way)
            rows = number * BLOCK_M + tl.arange(0, BLOCK_M)
            inside, at = rows < len_q, (b * heads + h).to(tl.int64) * len_q + rows
            q_block = load(q, q_at, b, h, number * BLOCK_M, len_q, dim_qk, BLOCK_M, BLOCK_D, KIND)
            s = dot(k_block, tl.trans(q_block), zero, INTERPRET)
            s, slope = scores(
                s, rows[None, :], keys, b, h, number, way, extras, rules, KIND, INTERPRET
            )
            p = power(s, factor, tl.load(lse2 + at, mask=inside, other=float("inf"))[None, :])
            do_block = load(do, do_at, b, h, number * BLOCK_M, len_q, dim_v, BLOCK_M, BLOCK_D, KIND)
            if DV:
                dv_sum = dot(rounded(p, do_block.dtype, INTERPRET), do_block, dv_sum, INTERPRET)
            if DK:
                dp = dot(v_block, tl.trans(do_block), zero, INTERPRET)
                ds = p * (dp - tl.load(delta + at, mask=inside, other=0.0)[None, :])
                if KIND == GENERAL:
                    ds *= slope
                dk_sum = dot(rounded(ds, q_block.dtype, INTERPRET), q_block, dk_sum, INTERPRET)
    if DK:
        store(
            dk,
            b,
            g,
            heads // group,
            block * BLOCK_N,
            len_k,
            dim_qk,
            dk_sum * scale,
            KIND,
            INTERPRET,
        )
    if DV:
        store(dv, b, g, heads // group, block * BLOCK_N, len_k, dim_v, dv_sum, KIND, INTERPRET)


@triton.jit(do_not_specialize=RUNTIME)
def _by_rows(
    q, q_b, q_h, q_r, q_c, do, do_b, do_h, do_r, do_c, k, k_b, k_h, k_r, k_c, v, v_b, v_h, v_r, v_c,
    mask, mask_b, mask_h, mask_r, mask_c, bias, bias_b, bias_h, bias_r, bias_c, slopes, integers, terms, rules,
    plan, plan_b, lse2, delta, dq, dbias,
    batch, heads, group, blocks, len_q, len_k, dim_qk, dim_v, flags, before, factor, softcap, scale,
    KIND: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq [B,H,Q,D] and dbias [B,H,Q,K] (zeros before), contiguous: a block of rows of one query
    head, the keys it sees.
    """
    bh, block = tl.program_id(0) // blocks, blocks - 1 - tl.program_id(0) % blocks
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
    q_at, do_at = (q_b, q_h, q_r, q_c), (do_b, do_h, do_r, do_c)
    k_at, v_at = (k_b, k_h, k_r, k_c), (v_b, v_h, v_r, v_c)
    rows = (block * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    inside, at = rows < len_q, bh.to(tl.int64) * len_q + rows
    row_lse2 = tl.load(lse2 + at, mask=inside, other=float("inf"))
    row_delta = tl.load(delta + at, mask=inside, other=0.0)
    q_block = load(q, q_at, b, h, block * BLOCK_M, len_q, dim_qk, BLOCK_M, BLOCK_D, KIND)
    do_block = load(do, do_at, b, h, block * BLOCK_M, len_q, dim_v, BLOCK_M, BLOCK_D, KIND)
    dq_sum, zero = (
        tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
    )
    way = walk(plan, plan_b, b, block)
    for j in tl.range(0, way[0], num_stages=STAGES):
        number = nth(j, way)
        keys = (number * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        k_block = load(
            k, k_at, b, h // group, number * BLOCK_N, len_k, dim_qk, BLOCK_N, BLOCK_D, KIND
        )
        v_block = load(
            v, v_at, b, h // group, number * BLOCK_N, len_k, dim_v, BLOCK_N, BLOCK_D, KIND
        )
        s = dot(q_block, tl.trans(k_block), zero, INTERPRET)
        s, slope = scores(s, rows, keys, b, h, number, way, extras, rules, KIND, INTERPRET)
        ds = power(s, factor, row_lse2) * (
            dot(do_block, tl.trans(v_block), zero, INTERPRET) - row_delta
        )
        if KIND == GENERAL and flags & DBIAS:
            tl.store(
                dbias + at * len_k + keys,
                rounded(ds, dbias.dtype.element_ty, INTERPRET),
                mask=inside & (keys < len_k),
            )
        if KIND == GENERAL:
            ds *= slope
        dq_sum = dot(rounded(ds, k_block.dtype, INTERPRET), k_block, dq_sum, INTERPRET)
    store(dq, b, h, heads, block * BLOCK_M, len_q, dim_qk, dq_sum * scale, KIND, INTERPRET)


def gradients(
    launch: Launch,
    do: torch.Tensor,
    dlse: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    wanted: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """(dq, dk, dv, dbias in the bias's shape), None where not wanted, of cotangents do [B,H,Q,Dv]
    and dlse [B,H,Q].

    saved: q, k, v, out, lse.
    """
    q, k, v, out, lse = saved
    (batch, heads, _, len_q, len_k, _, dim_v), bias = launch.shape, launch.bias
    made = [launch.room(t.shape) for t in (q, k, v)]
    full = q.new_zeros((batch, heads, len_q, len_k) if wanted[3] else (0, 0, 0, 0))
    if q.numel() and v.numel():
        delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
        loads = {name: launch.operand(t) for name, t in (("q", q), ("do", do), ("k", k), ("v", v))}
        sums = {
            name: loadable(t) if launch.tma else t
            for name, t in (("do", loads["do"]), ("out", out))
        }
        blocks = triton.cdiv(len_q, BLOCK_ROWS[0])
        _rows[(blocks * batch * heads,)](
            **{name: descriptor(t, *BLOCK_ROWS) if launch.tma else t for name, t in sums.items()},
            **strides(sums),
            **{"lse": lse, "dlse": dlse.contiguous(), "delta": delta, "lse2": lse2},
            **{"heads": heads, "blocks": blocks, "len_q": len_q, "dim_v": dim_v},
            KIND=(WHOLE if launch.tma else GENERAL).value,
            INTERPRET=INTERPRET,
            BLOCK_M=BLOCK_ROWS[0],
            BLOCK_D=BLOCK_ROWS[1],
        )
        others: dict[str, torch.Tensor | float] = {
            "lse2": lse2,
            "delta": delta,
            "scale": launch.scale,
        }
        if wanted[1] or wanted[2]:
            stores = {"dk": made[1], "dv": made[2]}
            for name, chosen in launch.passes():
                launch.run(_by_keys, name, loads, stores, others, **chosen)
        if wanted[0] or wanted[3]:
            launch.run(
                _by_rows,
                "rows",
                loads,
                {"dq": made[0]},
                others | {"dbias": full},
                flags=DBIAS.value if wanted[3] else 0,
            )
    else:
        made = [t.zero_() for t in made]
    over = [n for n in range(4) if bias is not None and bias.shape[n] == 1 and full.shape[n] != 1]
    dbias = full.sum(over, keepdim=True) if over else full
    return tuple(
        t.contiguous() if want else None for t, want in zip((*made, dbias), wanted, strict=True)
    )
