"""What the Triton kernels share: tiles in memory, conversions and products that are right in the
interpreter too, mask rules.

One compiled kernel serves every problem of a dtype and a size of head: strides, lengths, the mask's
rules and integers, softcap, bias and slopes are values at run time.
"""

import triton
import triton.language as tl

INTERPRET = bool(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter (numpy, CPU) runs the kernels: TRITON_INTERPRET=1 was set before
triton was imported.
"""
SOFTCAP, MASK, BIAS, SLOPES, DBIAS = (tl.constexpr(bit) for bit in (1, 2, 4, 8, 16))
"""Bits of `flags`: what changes a score beyond the mask's rules; DBIAS: the bias's gradient is
wanted.
"""
GENERAL, RULES, WHOLE = (tl.constexpr(kind) for kind in (0, 1, 2))
"""What a compiled kernel (`KIND`) can do: all, through pointers; what only rules change, through
TMA; that, nothing hidden.
"""
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def pointers(x, strides, b, h, rows, columns):
    """Pointers to x[b, h, rows, columns]; rows and columns broadcast; offsets in int64."""
    head = b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]
    return x + head + rows.to(tl.int64) * strides[2] + columns.to(tl.int64) * strides[3]


@triton.jit
def load(
    x,
    strides,
    b,
    h,
    start,
    length,
    dim,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    column=0,
):
    """x[b, h, start : start + ROWS, column : column + COLUMNS], 0 outside. x is a pointer for
    GENERAL, else a tensor descriptor (TMA).
    """
    if KIND != GENERAL:
        values = x.load([b, h, start, column]).reshape(ROWS, COLUMNS)
    else:
        rows, columns = (
            (start + tl.arange(0, ROWS))[:, None],
            (column + tl.arange(0, COLUMNS))[None, :],
        )
        at = pointers(x, strides, b, h, rows, columns)
        values = tl.load(at, mask=(rows < length) & (columns < dim), other=0.0)
    return values


@triton.jit
def store(x, b, h, heads, start, length, dim, values, KIND: tl.constexpr, INTERPRET: tl.constexpr):
    """Write values [ROWS, COLUMNS], rounded, to x[b, h, start : start + ROWS] of a contiguous x
    [batch, heads, length, dim].
    """
    if KIND != GENERAL:
        x.store(
            [b, h, start, 0],
            rounded(values, x.dtype, INTERPRET).reshape(1, 1, values.shape[0], values.shape[1]),
        )
    else:
        rows, columns = (
            start + tl.arange(0, values.shape[0])[:, None],
            tl.arange(0, values.shape[1])[None, :],
        )
        at = x + ((b * heads + h).to(tl.int64) * length + rows) * dim + columns
        tl.store(
            at,
            rounded(values, x.dtype.element_ty, INTERPRET),
            mask=(rows < length) & (columns < dim),
        )


@triton.jit
def wide(x, INTERPRET: tl.constexpr):
    """x in float32. The interpreter of Triton 3.6 to 3.9 gets subnormal bfloat16 and NaN in 8 bits
    wrong: mended there.
    """
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if INTERPRET and x.dtype.is_fp8():
        y = x.to(tl.float32)
        return tl.where(
            tl.abs(y) > (448.0 if x.dtype == tl.float8e4nv else 57344.0), float("nan"), y
        )
    return x.to(tl.float32)


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """float32 to dtype, to nearest even, 8 bits saturating. The interpreter of Triton 3.6 to 3.9
    truncates to bfloat16 and to subnormal numbers of 8 bits: round there before.
    """
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        bits = tl.where(nan, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    if INTERPRET and dtype.is_fp8():
        normal, largest = (2.0**-6, 448.0) if dtype == tl.float8e4nv else (2.0**-14, 57344.0)
        near = tl.maximum(tl.minimum(x, largest), -largest)
        binade = (near.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        magic = (
            tl.maximum(binade, normal)
            * (2.0**-3 if dtype == tl.float8e4nv else 2.0**-2)
            * (1.5 * 2.0**23)
        )
        near = (near + magic) - magic  # the sum's last place is the spacing of the format
        beyond = largest * (15 / 14 if dtype == tl.float8e4nv else 2.0)
        return tl.where(x == x, near, beyond).to(dtype)  # noqa: PLR0124 - NaN
    return x.to(dtype)


@triton.jit
def dot(x, y, acc, INTERPRET: tl.constexpr):
    """acc + x y in float32. The interpreter of Triton 3.6 to 3.9 multiplies bfloat16's bit patterns
    as integers: widen there.
    """
    if INTERPRET and (x.dtype == tl.bfloat16 or x.dtype.is_fp8()):
        x, y = wide(x, INTERPRET), wide(y, INTERPRET)
    return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def power(s, factor, base):
    """2^(s factor - base), base broadcast; product and difference are one step."""
    return tl.exp2(tl.fma(s, tl.full(s.shape, factor, tl.float32), tl.broadcast_to(-base, s.shape)))


@triton.jit
def tanh(x):
    """Lambert's continued fraction near 0 (no cancellation), else (1 - t) / (1 + t) with t =
    exp(-2|x|) (no overflow).
    """
    size = tl.abs(x)
    z = tl.minimum(size, 1.0) * tl.minimum(size, 1.0)
    near = x * (945 + z * (105 + z)) / (945 + z * (420 + 15 * z))
    t = tl.exp(-2 * size)
    far = (1 - t) / (1 + t)
    return tl.where(size < 0.6, near, tl.where(x < 0, -far, far))


@triton.jit
def hide(s, rows, keys, b, extras, rules):
    """s, -inf where (row, key) is outside or breaks a term of the mask: (rule, x, y) for every term
    and batch entry.
    """
    batch, len_q, len_k, integers, terms = extras[0], extras[1], extras[2], extras[3], extras[4]
    s = tl.where((rows < len_q) & (keys < len_k), s, float("-inf"))
    for term in range(terms):
        at = integers + (term * batch + b) * 3
        rule, x, y = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        for i in tl.static_range(len(rules)):
            if rule == i:
                obeyed = rules[i](rows, keys, len_q, len_k, x, y)
                s = tl.where(
                    obeyed != 0, s, float("-inf")
                )  # != 0: the interpreter of Triton 3.6 to 3.9 can hand back int32
    return s


@triton.jit
def scores(
    s, rows, keys, b, h, number, way, extras, rules, KIND: tl.constexpr, INTERPRET: tl.constexpr
):
    """(s with all that changes a score, -inf where hidden; the slope of the softcap). rows and keys
    broadcast to s.

    number: which counterpart this is on the block's way. extras: batch, len_q, len_k, the mask's
    integers and number of terms, flags, before (what s is multiplied by), softcap, slopes, mask and
    its strides, bias and its strides.
    """
    slope = tl.full(s.shape, 1.0, tl.float32)
    if KIND == GENERAL:
        len_q, len_k, flags, softcap = extras[1], extras[2], extras[5], extras[7]
        s *= extras[6]
        if flags & SOFTCAP:
            bend = tanh(s / softcap)
            s, slope = softcap * bend, 1.0 - bend * bend
        # Masked loads and no branch: Triton 3.6 cannot compile another one for sm_90. What is not
        # given changes nothing.
        inside = (rows < len_q) & (keys < len_k)
        biased, masked = (
            (inside & ((flags & BIAS) != 0)) != 0,
            (inside & ((flags & MASK) != 0)) != 0,
        )
        added = wide(
            tl.load(pointers(extras[11], extras[12], b, h, rows, keys), mask=biased, other=0.0),
            INTERPRET,
        )
        s = tl.where(added == float("-inf"), float("-inf"), s + added)
        distance = tl.abs(rows + (len_k - len_q) - keys).to(tl.float32)
        s -= tl.load(extras[8] + h, mask=(flags & SLOPES) != 0, other=0.0) * distance
        taken = tl.load(pointers(extras[9], extras[10], b, h, rows, keys), mask=masked, other=1)
        s = tl.where(taken != 0, s, float("-inf"))
    if KIND != WHOLE:
        if (number < way[2]) | (number >= way[3]):
            s = hide(s, rows, keys, b, extras, rules)
    return s, slope


@triton.jit
def walk(plan, plan_b, b, block):
    """This block's way through its counterparts: how many, the first, first and last + 1 of the
    wholly visible, where it enters.

    It enters at another place for each block, so that programs that start together do not all read
    the same tile.
    """
    at = plan + b.to(tl.int64) * plan_b + block * 4
    low, full_low, full_high, high = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    return high - low, low, full_low, full_high, block % tl.maximum(high - low, 1)


@triton.jit
def nth(j, way):
    """The number of the j-th counterpart."""
    turned = j + way[4]
    return way[1] + tl.where(turned >= way[0], turned - way[0], turned)
