"""FlashAttention-2's forward in Triton: Algorithm 1 of Dao 2023 (arXiv 2307.08691), for GPUs and for Triton's interpreter.

One program per block of queries and (batch, query head). It walks over the keys in blocks with a running maximum m, a running
row sum l and an accumulator that is divided by l once, at the end; LSE = m + ln l. The exponential is the natural one, of scores
that are nowhere multiplied by log2(e), so that a score of 1e4 keeps its error of a few u(float32) |s|.
"""

import functools
import warnings
from typing import Any

import torch
import triton
import triton.language as tl

from verify.arithmetic import Arithmetic
from verify.errors import VerifyError
from verify.masks import Mask
from verify.problem import Problem
from verify.registry import kernel

INTERPRET = bool(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter (numpy, CPU) runs the kernels: TRITON_INTERPRET=1 was set before triton was imported."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LARGEST_DIM = 256
TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
FAR = 2**30
"""A mask's integers beyond it say the same as itself, and sums of it and a position stay within int32."""
_RUNTIME = [f"{tensor}_{axis}" for tensor in ("q", "k", "v", "mask", "bias") for axis in "bhrc"]
_RUNTIME += ["batch", "heads", "group", "row_blocks", "len_q", "len_k"]
"""Integers on whose values Triton must not specialise, for each value would compile the kernel anew."""


@triton.jit
def _tile(base, b, stride_b, h, stride_h, rows, stride_r, columns, stride_c, ALIGNED: tl.constexpr):
    """Pointers [rows, columns] into head h of batch entry b; offsets in int64. ALIGNED: stride_c is 1, the others are 8 n."""
    head = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    down, across = rows.to(tl.int64) * stride_r, columns.to(tl.int64)
    if ALIGNED:
        head, down = tl.multiple_of(head, 8), tl.multiple_of(down, 8)
    else:
        across = across * stride_c
    return base + head + down[:, None] + across[None, :]


@triton.jit
def _wide(x, INTERPRET: tl.constexpr):
    """x in float32. The interpreter of Triton 3.6 to 3.9 gets subnormal bfloat16 wrong: shift the bits there."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _rounded(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """float32 to dtype, to nearest even. The interpreter of Triton 3.6 to 3.9 truncates to bfloat16: round the bits there."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _dot(x, y, acc, INTERPRET: tl.constexpr):
    """acc + x y in float32. The interpreter of Triton 3.6 to 3.9 multiplies bfloat16's bit patterns as integers: widen there."""
    if INTERPRET:
        x, y = _wide(x, INTERPRET), _wide(y, INTERPRET)
    return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def _tanh(x):
    """Lambert's continued fraction near 0 (no cancellation), else (1 - t) / (1 + t) with t = exp(-2|x|) (no overflow)."""
    size = tl.abs(x)
    z = tl.minimum(size, 1.0) * tl.minimum(size, 1.0)
    near = x * (945 + z * (105 + z)) / (945 + z * (420 + 15 * z))
    t = tl.exp(-2 * size)
    far = (1 - t) / (1 + t)
    return tl.where(size < 0.6, near, tl.where(x < 0, -far, far))


@triton.jit
def _obeys(seen, rows, keys, len_q, len_k, integers, b, batch, rules, counts):
    """seen [rows, keys] and all rules; rule i has counts[i] terms, each with its two integers per batch entry."""
    first = 0
    for i in tl.static_range(len(rules)):
        for term in range(counts[i]):  # Triton takes a count of 1 as a constant: no loop then
            pair = integers + ((first + term) * batch + b) * 2
            seen = seen & rules[i](rows[:, None], keys[None, :], len_q, len_k, tl.load(pair), tl.load(pair + 1))
        first += counts[i]
    return seen


@triton.jit(do_not_specialize=_RUNTIME)
def _forward(
    q, q_b, q_h, q_r, q_c, k, k_b, k_h, k_r, k_c, v, v_b, v_h, v_r, v_c, mask, mask_b, mask_h, mask_r, mask_c,
    bias, bias_b, bias_h, bias_r, bias_c, slopes, integers, rules, counts, out, lse,
    batch, heads, group, row_blocks, len_q, len_k, dim_qk, dim_v, scale, softcap,
    SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """q [B,H,Q,D], k [B,Hk,K,D], v [B,Hk,K,Dv], mask and bias [B,H,Q,K] or None -> out [B,H,Q,Dv], lse [B,H,Q], contiguous.

    A NaN or Inf of V at a key hidden from a row makes 0 * NaN there. So where acc holds a NaN after the first pass, a second one
    multiplies with the finite part of V, and gathers in `extra` what the rest does to the rows that see it: +Inf, -Inf or NaN.
    """
    bh = tl.program_id(0) // row_blocks
    b, h = bh // heads, bh % heads
    rows = (tl.program_id(0) % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    block, columns, values = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    in_q, in_d, in_v = (rows < len_q)[:, None], (columns < dim_qk)[None, :], (values < dim_v)[None, :]
    k_at = _tile(k, b, k_b, h // group, k_h, block, k_r, columns, k_c, ALIGNED)  # [BLOCK_N, BLOCK_D], the first keys
    v_at = _tile(v, b, v_b, h // group, v_h, block, v_r, values, v_c, ALIGNED)  # [BLOCK_N, BLOCK_V]
    q_block = tl.load(_tile(q, b, q_b, h, q_h, rows, q_r, columns, q_c, ALIGNED), mask=in_q & in_d, other=0.0)
    k_step, v_step = k_r.to(tl.int64), v_r.to(tl.int64)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741 (the paper's letter)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    extra = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    wanted = tl.full([], 1, tl.int1)
    for CAREFUL in tl.static_range(2):
        if wanted:
            m = tl.full([BLOCK_M], float("-inf"), tl.float32)
            l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
            acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            for start in tl.range(0, len_k, BLOCK_N, num_stages=1 if CAREFUL else STAGES):
                keys = start + block
                in_k = keys < len_k
                k_block = tl.load(k_at + start * k_step, mask=in_k[:, None] & in_d, other=0.0)
                s = _dot(q_block, tl.trans(k_block), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), INTERPRET) * scale
                if SOFTCAP:
                    s = softcap * _tanh(s / softcap)
                seen = _obeys(in_q & in_k[None, :], rows, keys, len_q, len_k, integers, b, batch, rules, counts)
                if mask is not None:
                    mask_at = _tile(mask, b, mask_b, h, mask_h, rows, mask_r, keys, mask_c, False)
                    seen = seen & (tl.load(mask_at, mask=seen, other=0) != 0)
                if bias is not None:
                    bias_at = _tile(bias, b, bias_b, h, bias_h, rows, bias_r, keys, bias_c, False)
                    shift = _wide(tl.load(bias_at, mask=seen, other=0.0), INTERPRET)
                    seen = seen & (shift != float("-inf"))
                    s += shift
                if slopes is not None:
                    s -= tl.load(slopes + h) * tl.abs(rows[:, None] + (len_k - len_q) - keys[None, :]).to(tl.float32)
                s = tl.where(seen, s, float("-inf"))
                top = tl.maximum(m, tl.max(s, 1))
                base = tl.where(top == float("-inf"), 0.0, top)  # nothing visible yet: keep -inf - -inf out
                p = tl.exp(s - base[:, None])
                alpha = tl.exp(m - base)
                l = l * alpha + tl.sum(p, 1)  # noqa: E741
                m = top
                v_block = tl.load(v_at + start * v_step, mask=in_k[:, None] & in_v, other=0.0)
                if CAREFUL:
                    wide = _wide(v_block, INTERPRET)
                    up, down = (wide == float("inf")) | (wide != wide), (wide == float("-inf")) | (wide != wide)
                    code = (up.to(tl.int32) + 256 * down.to(tl.int32)).to(tl.float16)
                    hits = _dot(seen.to(tl.float16), code, tl.zeros([BLOCK_M, BLOCK_V], tl.float32), INTERPRET).to(tl.int32)
                    extra += tl.where(hits % 256 > 0, float("inf"), 0.0) - tl.where(hits >= 256, float("inf"), 0.0)
                    v_block = tl.where(up | down, 0.0, v_block)
                acc = _dot(_rounded(p, v_block.dtype, INTERPRET), v_block, acc * alpha[:, None], INTERPRET)
            wanted = tl.max((acc != acc).to(tl.int32)) > 0
    empty = l == 0
    l = tl.where(empty, 1.0, l)  # noqa: E741
    result = _rounded(tl.div_rn(acc, l[:, None]) + extra, out.dtype.element_ty, INTERPRET)
    at = bh.to(tl.int64) * len_q + rows  # [BLOCK_M]
    tl.store(out + (at * dim_v)[:, None] + values[None, :], result, mask=in_q & in_v)
    tl.store(lse + at, tl.where(empty, float("-inf"), m + tl.log(l)), mask=rows < len_q)


@functools.lru_cache(maxsize=256)
def _bound(mask: Mask, batch: int, device: torch.device) -> tuple[tuple[Any, ...], tuple[int, ...], torch.Tensor | None]:
    """The mask's distinct rules, how many terms each has, and the terms' integers as int32 [terms, batch, 2] on the device.

    Terms of one rule stand together, the order is canonical and a conjunction does not mind: few compiled variants.
    """
    groups: dict[Any, list[Any]] = {}
    for term in mask.terms(batch):
        groups.setdefault(term.rule, []).append([[min(n, FAR) for n in pair] for pair in term.integers])
    order = sorted(groups, key=lambda rule: (len(groups[rule]) > 1, rule.__name__))
    integers = (
        torch.tensor([term for rule in order for term in groups[rule]], dtype=torch.int32, device=device) if order else None
    )
    return tuple(map(_compiled, order)), tuple(len(groups[rule]) for rule in order), integers


@functools.cache
def _compiled(rule: Any) -> Any:
    """The rule for Triton. The interpreter calls it as it is: its jit wants `tl` among the globals of every function."""
    return rule if INTERPRET else triton.jit(rule)


TILES = ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (32, 16, 4, 1), (16, 16, 4, 1))
"""(BLOCK_M, BLOCK_N, num_warps, STAGES), the best first."""


def _tiles(dtype: torch.dtype, block_d: int, block_v: int, shared: int) -> tuple[int, int, int, int]:
    """The first of TILES whose blocks of Q, K and V fit into so many bytes of shared memory.

    It depends on nothing else, so that no row depends on its batch. float32 products are unrolled into single FMAs: small tiles.
    """
    for rows, keys, warps, stages in TILES:
        held = dtype.itemsize * (rows * block_d + stages * keys * (block_d + block_v)) + 8 * rows * keys
        fits = dtype != torch.float32 or rows * keys * max(block_d, block_v) <= 2**17
        if held <= shared and fits:
            break
    return rows, keys, warps, stages


def _power(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _geometry(q: torch.Tensor, dim_v: int) -> dict[str, int]:
    """The constants of the launch. The interpreter is quickest with large tiles; its key tiles are small, to have several."""
    block_d, block_v = _power(q.shape[3]), _power(dim_v)
    rows, keys, warps, stages = 128, 64, 4, 1
    if not INTERPRET:
        shared = triton.runtime.driver.active.utils.get_device_properties(q.device.index)["max_shared_mem"]
        rows, keys, warps, stages = _tiles(q.dtype, block_d, block_v, shared)
    return dict(BLOCK_M=rows, BLOCK_N=keys, BLOCK_D=block_d, BLOCK_V=block_v, STAGES=stages, num_warps=warps, num_stages=stages)


def _aligned(*tensors: torch.Tensor) -> bool:
    """Whether rows are dense and start at multiples of 8 elements: then loads are wide (see _tile)."""
    return all(t.stride(3) == 1 and all(stride % 8 == 0 for stride in t.stride()[:3]) for t in tensors)


def _spread(tensor: torch.Tensor | None, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """The tensor and its strides once broadcast to the shape (0 along what is repeated)."""
    return (tensor, *tensor.expand(shape).stride()) if tensor is not None else (None, 0, 0, 0, 0)


def _launch(q, k, v, mask, bias, slopes, scale, softcap, out, lse) -> None:
    (batch, heads, len_q, dim_qk), (_, heads_kv, len_k, dim_v) = q.shape, v.shape
    rules, counts, integers = _bound(mask, batch, q.device) if isinstance(mask, Mask) else ((), (), None)
    visible = mask.view(torch.uint8) if isinstance(mask, torch.Tensor) else None
    geometry, scores = _geometry(q, dim_v), (batch, heads, len_q, len_k)
    row_blocks = triton.cdiv(len_q, geometry["BLOCK_M"])
    with torch.cuda.device_of(q), warnings.catch_warnings():
        if INTERPRET:  # numpy warns where a GPU gives Inf or NaN in silence
            warnings.simplefilter("ignore", RuntimeWarning)
        _forward[(row_blocks * batch * heads,)](
            *(q, *q.stride(), k, *k.stride(), v, *v.stride(), *_spread(visible, scores), *_spread(bias, scores)),
            *(slopes, integers, rules, counts, out, lse),
            *(batch, heads, heads // heads_kv, row_blocks, len_q, len_k, dim_qk, dim_v, float(scale), float(softcap)),
            SOFTCAP=softcap != 0,
            ALIGNED=_aligned(q, k, v),
            INTERPRET=INTERPRET,
            enable_fp_fusion=False,  # each operation rounds by itself: the two passes of _forward agree bit for bit
            **geometry,
        )


def _range(scale: float, softcap: float) -> list[tuple[bool, str]]:
    return [
        (not abs(scale) <= HUGE, f"scale={scale}: beyond float32; a magnitude of at most {HUGE:.3g}"),
        (
            softcap != 0 and not TINY <= softcap <= HUGE,
            f"softcap={softcap}: beyond float32; 0 = none, or {TINY:.3g} to {HUGE:.3g}",
        ),
    ]


def _unusable(device: str) -> list[tuple[bool, str]]:
    return [
        (device not in ("cpu", "cuda"), f"device={device}: runs on cuda, or on cpu in Triton's interpreter"),
        (
            device == "cpu" and not INTERPRET,
            "device=cpu: needs Triton's interpreter; set TRITON_INTERPRET=1 before triton is imported",
        ),
        (
            device == "cuda" and INTERPRET,
            "device=cuda: Triton's interpreter is on; unset TRITON_INTERPRET before triton is imported",
        ),
    ]


def _refuse(checks: list[tuple[bool, str]]) -> None:
    for wrong, sentence in checks:
        if wrong:
            raise VerifyError(f"triton-fa2: {sentence}")


def _check(q, k, v, mask, bias, slopes, scale, softcap) -> None:
    """Raises VerifyError, naming the value, for what the kernel cannot compute."""
    given = {"q": q, "k": k, "v": v, "mask": mask, "bias": bias, "slopes": slopes}
    given = {name: tensor for name, tensor in given.items() if isinstance(tensor, torch.Tensor)}
    rank = {name: 1 if name == "slopes" else 4 for name in given}
    _refuse([(t.dim() != rank[n], f"{n}.shape={[*t.shape]}: {rank[n]} dimensions, not {t.dim()}") for n, t in given.items()])
    (batch, heads, len_q, dim_qk), (_, heads_kv, len_k, dim_v) = q.shape, v.shape
    _refuse(_unusable(q.device.type) + _range(scale, softcap) + [
        (q.dtype not in DTYPES.values(), f"q.dtype={q.dtype}: takes {', '.join(DTYPES)}"),
        (not 0 < dim_qk <= LARGEST_DIM or not 0 < dim_v <= LARGEST_DIM, f"dim_qk={dim_qk}, dim_v={dim_v}: 1 to {LARGEST_DIM}"),
        (heads_kv < 1 or heads % heads_kv != 0, f"heads_q={heads}, heads_kv={heads_kv}: heads_q must be a multiple of heads_kv"),
        (isinstance(mask, Mask) and "dense" in mask.names, f"mask={mask}: hand dense over as a boolean tensor"),
        (isinstance(mask, Mask) and bool(mask.batch_sizes() - {batch}), f"mask={mask}, batch={batch}: one length per batch entry"),
    ])  # fmt: skip
    scores = (batch, heads, len_q, len_k)
    shapes = {"k": (batch, heads_kv, len_k, dim_qk), "v": (batch, heads_kv, len_k, dim_v), "mask": scores, "bias": scores}
    shapes |= {"q": tuple(q.shape), "slopes": (heads,)}
    dtypes = {"mask": torch.bool, "slopes": torch.float32}
    for name, t in given.items():
        pairs, wanted = zip(t.shape, shapes[name], strict=True), dtypes.get(name, q.dtype)
        broadcast = name in ("mask", "bias")
        _refuse([
            (not all(n == m or (broadcast and n == 1) for n, m in pairs),
             f"{name}.shape={[*t.shape]}: {'broadcasts to ' if broadcast else ''}{[*shapes[name]]}"),
            (t.dtype != wanted, f"{name}.dtype={t.dtype}: {wanted}"),
            (t.device != q.device, f"{name}.device={t.device}: all on one device, q on {q.device}"),
            (t.requires_grad and torch.is_grad_enabled(), f"{name}.requires_grad=True: forward only; detach it or use torch.no_grad()"),
        ])  # fmt: skip


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
    """q [B,H,Q,D], k [B,Hk,K,D], v [B,Hk,K,Dv] in fp16, bf16 or fp32, any strides -> out [B,H,Q,Dv], lse float32 [B,H,Q].

    The meaning of all of it is verify/problem.py's. mask: rules, or bool [B|1,H|1,Q|1,K|1] (True = take part); bias: the same shape,
    dtype of q, -inf hides; slopes: float32 [H], ALiBi. Raises VerifyError for what it cannot compute.
    """
    _check(q, k, v, mask, bias, slopes, scale, softcap)
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if k.shape[2] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    if out.numel():
        _launch(q, k, v, mask, bias, slopes, scale, softcap, out, lse)
    return out, lse


def _supports(problem: Problem, device: str) -> str | None:
    """None, or in one sentence why not."""
    largest = max(problem.dim_qk, problem.dim_v)
    checks = [
        (problem.grads, "forward only, no gradients yet"),
        (problem.dtype not in DTYPES, f"dtype={problem.dtype}: takes {', '.join(DTYPES)}"),
        (largest > LARGEST_DIM, f"dim_qk={problem.dim_qk}, dim_v={problem.dim_v}: takes 1 to {LARGEST_DIM}"),
        *_range(problem.softmax_scale, problem.softcap),
        *_unusable(device),
    ]
    return next((sentence for wrong, sentence in checks if wrong), None)


@kernel(name="triton-fa2", supports=_supports, arithmetic=Arithmetic())
def triton_fa2(q, k, v, *, problem: Problem, mask, bias, slopes):
    """Masks as rules where the problem leaves the choice and all of them are rules for Triton; `dense` comes as a tensor."""
    rules = problem.mask_as == "rule" and "dense" not in problem.mask.names
    return attention(
        q,
        k,
        v,
        mask=problem.mask if rules else mask,
        bias=bias,
        slopes=slopes,
        scale=problem.softmax_scale,
        softcap=problem.softcap,
    )
