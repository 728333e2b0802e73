"""What the Triton kernels share: tiles in memory, conversions and products that are right in the interpreter too, mask rules."""

import triton
import triton.language as tl

INTERPRET = bool(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter (numpy, CPU) runs the kernels: TRITON_INTERPRET=1 was set before triton was imported."""
RUNTIME = [f"{tensor}_{axis}" for tensor in ("q", "k", "v", "do", "mask", "bias") for axis in "bhrc"]
RUNTIME += ["batch", "heads", "group", "blocks", "len_q", "len_k"]
"""Integers on whose values Triton must not specialise, for each value would compile the kernel anew."""


def padded(dim: int) -> int:
    """The length of a tile's row that holds a head dim."""
    return max(16, triton.next_power_of_2(dim))


@triton.jit
def tile(base, b, stride_b, h, stride_h, rows, stride_r, columns, stride_c, ALIGNED: tl.constexpr):
    """Pointers [rows, columns] into head h of batch entry b; offsets in int64. ALIGNED: stride_c is 1, the others are 8 n."""
    head = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    down, across = rows.to(tl.int64) * stride_r, columns.to(tl.int64)
    if ALIGNED:
        head, down = tl.multiple_of(head, 8), tl.multiple_of(down, 8)
    else:
        across = across * stride_c
    return base + head + down[:, None] + across[None, :]


@triton.jit
def wide(x, INTERPRET: tl.constexpr):
    """x in float32. The interpreter of Triton 3.6 to 3.9 gets subnormal bfloat16 wrong: shift the bits there."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """float32 to dtype, to nearest even. The interpreter of Triton 3.6 to 3.9 truncates to bfloat16: round the bits there."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        bits = tl.where(nan, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(x, y, acc, INTERPRET: tl.constexpr):
    """acc + x y in float32. The interpreter of Triton 3.6 to 3.9 multiplies bfloat16's bit patterns as integers: widen there."""
    if INTERPRET:
        x, y = wide(x, INTERPRET), wide(y, INTERPRET)
    return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def tanh(x):
    """Lambert's continued fraction near 0 (no cancellation), else (1 - t) / (1 + t) with t = exp(-2|x|) (no overflow)."""
    size = tl.abs(x)
    z = tl.minimum(size, 1.0) * tl.minimum(size, 1.0)
    near = x * (945 + z * (105 + z)) / (945 + z * (420 + 15 * z))
    t = tl.exp(-2 * size)
    far = (1 - t) / (1 + t)
    return tl.where(size < 0.6, near, tl.where(x < 0, -far, far))


@triton.jit
def obeys(seen, rows, keys, len_q, len_k, integers, b, batch, rules, counts):
    """seen [rows, keys] and all rules; rule i has counts[i] terms, each with its two integers per batch entry."""
    first = 0
    for i in tl.static_range(len(rules)):
        for term in range(counts[i]):  # Triton takes a count of 1 as a constant: no loop then
            pair = integers + ((first + term) * batch + b) * 2
            visible = rules[i](rows[:, None], keys[None, :], len_q, len_k, tl.load(pair), tl.load(pair + 1))
            seen = seen & (visible != 0)  # != 0: the interpreter of Triton 3.6 to 3.9 can hand back int32 for booleans
        first += counts[i]
    return seen


@triton.jit
def seen_scores(
    s, rows, keys, b, h, mask, mask_b, mask_h, mask_r, mask_c, bias, bias_b, bias_h, bias_r, bias_c, slopes,
    integers, rules, counts, batch, len_q, len_k, INTERPRET: tl.constexpr,
):  # fmt: skip
    """(s [rows, keys] with bias and ALiBi added, which of them are visible)"""
    inside = (rows < len_q)[:, None] & (keys < len_k)[None, :]
    seen = obeys(inside, rows, keys, len_q, len_k, integers, b, batch, rules, counts)
    if mask is not None:
        mask_at = tile(mask, b, mask_b, h, mask_h, rows, mask_r, keys, mask_c, False)
        seen = seen & (tl.load(mask_at, mask=seen, other=0) != 0)
    if bias is not None:
        bias_at = tile(bias, b, bias_b, h, bias_h, rows, bias_r, keys, bias_c, False)
        added = wide(tl.load(bias_at, mask=seen, other=0.0), INTERPRET)
        seen = seen & (added != float("-inf"))
        s += added
    if slopes is not None:
        s -= tl.load(slopes + h) * tl.abs(rows[:, None] + (len_k - len_q) - keys[None, :]).to(tl.float32)
    return s, seen
