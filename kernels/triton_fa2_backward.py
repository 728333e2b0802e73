"""FlashAttention-2's backward in Triton: Algorithm 2 of Dao 2023 (arXiv 2307.08691), without atomics: a second call gives the
same bits.

P is recomputed from the LSE; delta = rowsum(dO * O), less the gradient of the LSE, enters dS = P * (dP - delta). One kernel goes
over blocks of keys and adds up dK and dV over all rows and all query heads of the group; another goes over blocks of rows and
adds up dQ and, where asked for, writes dS as the bias's gradient. P and dS are rounded to the input's dtype for their products.
"""

import torch
import triton
import triton.language as tl

from verify.kernels.triton_tiles import INTERPRET, RUNTIME, dot, padded, rounded, seen_scores, tanh, tile

BLOCK_M, BLOCK_N = 64, 32


@triton.jit
def _weights(
    q_block, k_block, v_block, do_block, rows, keys, b, h, mask, mask_b, mask_h, mask_r, mask_c,
    bias, bias_b, bias_h, bias_r, bias_c, slopes, integers, rules, counts, lse, delta,
    batch, heads, len_q, len_k, scale, softcap, SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """(P, dS before the softcap's slope, dS after it), float32 [rows, keys], 0 where hidden."""
    in_q, zero = rows < len_q, tl.zeros([q_block.shape[0], k_block.shape[0]], tl.float32)
    s = dot(q_block, tl.trans(k_block), zero, INTERPRET) * scale
    slope = zero + 1.0
    if SOFTCAP:
        bend = tanh(s / softcap)
        s, slope = softcap * bend, 1.0 - bend * bend
    s, seen = seen_scores(
        s, rows, keys, b, h, mask, mask_b, mask_h, mask_r, mask_c, bias, bias_b, bias_h, bias_r, bias_c, slopes,
        integers, rules, counts, batch, len_q, len_k, INTERPRET,
    )  # fmt: skip
    at = (b * heads + h).to(tl.int64) * len_q + rows
    row_lse, row_delta = tl.load(lse + at, mask=in_q, other=0.0), tl.load(delta + at, mask=in_q, other=0.0)
    row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)  # nothing visible: P is 0 below
    p = tl.where(seen, tl.exp(tl.where(seen, s - row_lse[:, None], 0.0)), 0.0)
    ds = p * (dot(do_block, tl.trans(v_block), zero, INTERPRET) - row_delta[:, None])
    return p, ds, ds * slope


@triton.jit(do_not_specialize=RUNTIME)
def _by_keys(
    q, q_b, q_h, q_r, q_c, k, k_b, k_h, k_r, k_c, v, v_b, v_h, v_r, v_c, do, do_b, do_h, do_r, do_c,
    mask, mask_b, mask_h, mask_r, mask_c, bias, bias_b, bias_h, bias_r, bias_c, slopes, integers, rules, counts,
    lse, delta, dk, dv, batch, heads, group, blocks, len_q, len_k, dim_qk, dim_v, scale, softcap,
    SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dk [B,Hk,K,D], dv [B,Hk,K,Dv], contiguous: a block of keys of one key head, all rows of its query heads."""
    bg = tl.program_id(0) // blocks
    b, g = bg // (heads // group), bg % (heads // group)
    keys = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns, values = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    in_k, in_d, in_v = (keys < len_k)[:, None], (columns < dim_qk)[None, :], (values < dim_v)[None, :]
    k_block = tl.load(tile(k, b, k_b, g, k_h, keys, k_r, columns, k_c, False), mask=in_k & in_d, other=0.0)
    v_block = tl.load(tile(v, b, v_b, g, v_h, keys, v_r, values, v_c, False), mask=in_k & in_v, other=0.0)
    dk_sum, dv_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for member in range(group):
        h = g * group + member
        for start in range(0, len_q, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            in_q = (rows < len_q)[:, None]
            q_block = tl.load(tile(q, b, q_b, h, q_h, rows, q_r, columns, q_c, False), mask=in_q & in_d, other=0.0)
            do_block = tl.load(tile(do, b, do_b, h, do_h, rows, do_r, values, do_c, False), mask=in_q & in_v, other=0.0)
            p, _, ds = _weights(
                q_block, k_block, v_block, do_block, rows, keys, b, h, mask, mask_b, mask_h, mask_r, mask_c,
                bias, bias_b, bias_h, bias_r, bias_c, slopes, integers, rules, counts, lse, delta,
                batch, heads, len_q, len_k, scale, softcap, SOFTCAP, INTERPRET,
            )  # fmt: skip
            dv_sum = dot(tl.trans(rounded(p, do_block.dtype, INTERPRET)), do_block, dv_sum, INTERPRET)
            dk_sum = dot(tl.trans(rounded(ds, q_block.dtype, INTERPRET)), q_block, dk_sum, INTERPRET)
    at = (bg.to(tl.int64) * len_k + keys)[:, None]
    tl.store(dk + at * dim_qk + columns[None, :], rounded(dk_sum * scale, dk.dtype.element_ty, INTERPRET), mask=in_k & in_d)
    tl.store(dv + at * dim_v + values[None, :], rounded(dv_sum, dv.dtype.element_ty, INTERPRET), mask=in_k & in_v)


@triton.jit(do_not_specialize=RUNTIME)
def _by_rows(
    q, q_b, q_h, q_r, q_c, k, k_b, k_h, k_r, k_c, v, v_b, v_h, v_r, v_c, do, do_b, do_h, do_r, do_c,
    mask, mask_b, mask_h, mask_r, mask_c, bias, bias_b, bias_h, bias_r, bias_c, slopes, integers, rules, counts,
    lse, delta, dq, dbias, batch, heads, group, blocks, len_q, len_k, dim_qk, dim_v, scale, softcap,
    SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dq [B,H,Q,D] and dbias [B,H,Q,K] or None, contiguous: a block of rows of one query head, all keys."""
    bh = tl.program_id(0) // blocks
    b, h = bh // heads, bh % heads
    rows = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns, values = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    in_q, in_d, in_v = (rows < len_q)[:, None], (columns < dim_qk)[None, :], (values < dim_v)[None, :]
    q_block = tl.load(tile(q, b, q_b, h, q_h, rows, q_r, columns, q_c, False), mask=in_q & in_d, other=0.0)
    do_block = tl.load(tile(do, b, do_b, h, do_h, rows, do_r, values, do_c, False), mask=in_q & in_v, other=0.0)
    at, dq_sum = (bh.to(tl.int64) * len_q + rows)[:, None], tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, len_k, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        in_k = keys < len_k
        k_at = tile(k, b, k_b, h // group, k_h, keys, k_r, columns, k_c, False)
        v_at = tile(v, b, v_b, h // group, v_h, keys, v_r, values, v_c, False)
        k_block = tl.load(k_at, mask=in_k[:, None] & in_d, other=0.0)
        v_block = tl.load(v_at, mask=in_k[:, None] & in_v, other=0.0)
        _, unbent, ds = _weights(
            q_block, k_block, v_block, do_block, rows, keys, b, h, mask, mask_b, mask_h, mask_r, mask_c,
            bias, bias_b, bias_h, bias_r, bias_c, slopes, integers, rules, counts, lse, delta,
            batch, heads, len_q, len_k, scale, softcap, SOFTCAP, INTERPRET,
        )  # fmt: skip
        if dbias is not None:
            tl.store(
                dbias + at * len_k + keys[None, :], rounded(unbent, dbias.dtype.element_ty, INTERPRET), mask=in_q & in_k[None, :]
            )
        dq_sum = dot(rounded(ds, k_block.dtype, INTERPRET), k_block, dq_sum, INTERPRET)
    tl.store(dq + at * dim_qk + columns[None, :], rounded(dq_sum * scale, dq.dtype.element_ty, INTERPRET), mask=in_q & in_d)


def gradients(
    do: torch.Tensor, dlse: torch.Tensor | None, saved: tuple[torch.Tensor, ...], arguments: tuple, options: tuple
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dq, dk, dv, dbias in the bias's shape or None) of cotangents do [B,H,Q,Dv] and dlse [B,H,Q] or None.

    saved: q, k, v, out, lse; arguments: mask, bias and their strides, slopes, integers, rules, counts, as the forward's kernel
    takes them; options: scale, softcap, bias to be differentiated or None.
    """
    (q, k, v, out, lse), (scale, softcap, bias) = saved, options
    (batch, heads, len_q, dim_qk), (_, heads_kv, len_k, dim_v) = q.shape, v.shape
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    full = q.new_zeros((batch, heads, len_q, len_k)) if bias is not None else None
    if q.numel() and k.numel():
        delta = (do.float() * out.float()).sum(-1)
        delta = (delta if dlse is None else delta - dlse).contiguous()
        tensors = (q, *q.stride(), k, *k.stride(), v, *v.stride(), do, *do.stride(), *arguments, lse, delta)
        sizes = (len_q, len_k, dim_qk, dim_v, scale, softcap)
        dims = {"BLOCK_D": padded(dim_qk), "BLOCK_V": padded(dim_v)}
        flags = {"SOFTCAP": softcap != 0, "INTERPRET": INTERPRET, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N} | dims
        by_keys, by_rows = triton.cdiv(len_k, BLOCK_N), triton.cdiv(len_q, BLOCK_M)
        group = heads // heads_kv
        _by_keys[(by_keys * batch * heads_kv,)](*tensors, dk, dv, batch, heads, group, by_keys, *sizes, **flags)
        _by_rows[(by_rows * batch * heads,)](*tensors, dq, full, batch, heads, group, by_rows, *sizes, **flags)
    if full is None or bias is None:
        return dq, dk, dv, None
    over = [n for n in range(4) if bias.shape[n] == 1 and full.shape[n] != 1]
    return dq, dk, dv, full.sum(over, keepdim=True) if over else full
