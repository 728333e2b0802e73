"""FlashAttention-2 in Triton: Algorithm 1 of Dao 2023 (arXiv 2307.08691); the backward is triton_fa2_backward.py's.

One program per block of queries and (batch, query head). It walks over the keys in blocks with a running maximum, a running row
sum and an accumulator that is divided by the sum once, at the end; LSE = maximum + ln sum. The exponential is the natural one, of
scores that are nowhere multiplied by log2(e), so that a score of 1e4 keeps its error of a few u(float32) |s|.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from verify.arithmetic import Arithmetic
from verify.errors import VerifyError
from verify.kernels.triton_fa2_backward import gradients
from verify.kernels.triton_tiles import INTERPRET, RUNTIME, dot, padded, rounded, seen_scores, tanh, tile
from verify.masks import Mask
from verify.problem import Problem
from verify.registry import kernel

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TILES = ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (32, 16, 4, 1), (16, 16, 4, 1))
"""(BLOCK_M, BLOCK_N, num_warps, STAGES), the best first."""
LARGEST_DIM = 256
FAR = 2**30
"""An integer of a mask beyond it says no more than it does, and its sum with a position stays within int32."""


@triton.jit(do_not_specialize=RUNTIME)
def _forward(
    q, q_b, q_h, q_r, q_c, k, k_b, k_h, k_r, k_c, v, v_b, v_h, v_r, v_c, mask, mask_b, mask_h, mask_r, mask_c,
    bias, bias_b, bias_h, bias_r, bias_c, slopes, integers, rules, counts, out, lse,
    batch, heads, group, blocks, len_q, len_k, dim_qk, dim_v, scale, softcap,
    SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """q [B,H,Q,D], k [B,Hk,K,D], v [B,Hk,K,Dv], mask and bias [B,H,Q,K] or None -> out [B,H,Q,Dv], lse [B,H,Q], contiguous."""
    bh = tl.program_id(0) // blocks
    b, h = bh // heads, bh % heads
    rows = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    block, columns, values = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    in_q, in_d, in_v = (rows < len_q)[:, None], (columns < dim_qk)[None, :], (values < dim_v)[None, :]
    k_at = tile(k, b, k_b, h // group, k_h, block, k_r, columns, k_c, ALIGNED)  # [BLOCK_N, BLOCK_D], the first keys
    v_at = tile(v, b, v_b, h // group, v_h, block, v_r, values, v_c, ALIGNED)  # [BLOCK_N, BLOCK_V]
    q_block = tl.load(tile(q, b, q_b, h, q_h, rows, q_r, columns, q_c, ALIGNED), mask=in_q & in_d, other=0.0)
    k_step, v_step = k_r.to(tl.int64), v_r.to(tl.int64)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in tl.range(0, len_k, BLOCK_N, num_stages=STAGES):
        keys = start + block
        in_k = keys < len_k
        k_block = tl.load(k_at + start * k_step, mask=in_k[:, None] & in_d, other=0.0)
        s = dot(q_block, tl.trans(k_block), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), INTERPRET) * scale
        if SOFTCAP:
            s = softcap * tanh(s / softcap)
        s, seen = seen_scores(
            s, rows, keys, b, h, mask, mask_b, mask_h, mask_r, mask_c, bias, bias_b, bias_h, bias_r, bias_c, slopes,
            integers, rules, counts, batch, len_q, len_k, INTERPRET,
        )  # fmt: skip
        s = tl.where(seen, s, float("-inf"))
        old, top = top, tl.maximum(top, tl.max(s, 1))
        base = tl.where(top == float("-inf"), 0.0, top)  # nothing visible yet: no -inf - -inf
        p = tl.exp(s - base[:, None])
        decay = tl.exp(old - base)
        total = total * decay + tl.sum(p, 1)
        v_block = tl.load(v_at + start * v_step, mask=in_k[:, None] & in_v, other=0.0)
        acc = dot(rounded(p, v_block.dtype, INTERPRET), v_block, acc * decay[:, None], INTERPRET)
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    at = bh.to(tl.int64) * len_q + rows  # [BLOCK_M]
    result = rounded(tl.div_rn(acc, total[:, None]), out.dtype.element_ty, INTERPRET)
    tl.store(out + (at * dim_v)[:, None] + values[None, :], result, mask=in_q & in_v)
    tl.store(lse + at, tl.where(empty, float("-inf"), top + tl.log(total)), mask=rows < len_q)


@functools.cache
def _compiled(rule: Any) -> Any:
    """A rule for Triton. The interpreter calls it as it is: its jit wants `tl` among the globals of every function."""
    return rule if INTERPRET else triton.jit(rule)


@functools.lru_cache(maxsize=256)
def _bound(mask: Mask, batch: int, device: torch.device) -> tuple[Any, ...]:
    """The distinct rules, how many terms each has, and all integers as int32 [terms, batch, 2], in an order that is canonical."""
    terms = [(_compiled(term.rule), [[min(n, FAR) for n in pair] for pair in term.integers]) for term in mask.terms(batch)]
    groups = {rule: [integers for other, integers in terms if other is rule] for rule, _ in terms}
    order = sorted(groups, key=lambda rule: (len(groups[rule]) > 1, rule.__name__))
    integers = torch.tensor([term for rule in order for term in groups[rule]] or [0], dtype=torch.int32, device=device)
    return tuple(order), tuple(len(groups[rule]) for rule in order), integers


def _geometry(q: torch.Tensor, dim_v: int) -> dict[str, int]:
    """The first of TILES that fits into shared memory; it depends on dtype and dims only, so that no row depends on its batch.

    float32 products become single FMAs, all unrolled: small tiles. The interpreter has large ones, but several along the keys.
    """
    block_d, block_v = map(padded, (q.shape[3], dim_v))
    shared = 0 if INTERPRET else triton.runtime.driver.active.utils.get_device_properties(q.device.index)["max_shared_mem"]

    def fits(rows: int, keys: int, _warps: int, stages: int) -> bool:
        held = q.dtype.itemsize * (rows * block_d + stages * keys * (block_d + block_v)) + 8 * rows * keys
        return held <= shared and (q.dtype != torch.float32 or rows * keys * max(block_d, block_v) <= 2**17)

    rows, keys, warps, stages = TILES[0] if INTERPRET else next((tile for tile in TILES if fits(*tile)), TILES[-1])
    sizes = {"BLOCK_M": rows, "BLOCK_N": keys, "BLOCK_D": block_d, "BLOCK_V": block_v}
    return sizes | {"STAGES": stages, "num_stages": stages, "num_warps": warps}


def _aligned(*tensors: torch.Tensor) -> bool:
    """Whether loads may be wide (see tile): rows are dense, start at multiples of 8 elements, are all as long, a multiple of 16.

    The last, for Triton 3.6 on sm_90 gives wrong keys from the second tile on where the hints of tile meet masks of unknown
    alignment (D 40 and Dv 24), and also for D 192 and Dv 16; there the loads are not hinted.
    """
    dense = all(t.stride(3) == 1 and all(stride % 8 == 0 for stride in t.stride()[:3]) for t in tensors)
    lengths = {t.shape[3] for t in tensors}
    return dense and len(lengths) == 1 and lengths.pop() % 16 == 0


def _spread(tensor: torch.Tensor | None, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """The tensor and its strides once broadcast to the shape (0 along what is repeated)."""
    return (tensor, *tensor.expand(shape).stride()) if tensor is not None else (None, 0, 0, 0, 0)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raises VerifyError, naming the value, for tensors that do not belong together."""
    named = {"q": q, "k": k, "v": v} | {name: t for name, t in others.items() if t is not None}
    for name, t in named.items():
        rank, dtype = (1 if name == "slopes" else 4), {"mask": torch.bool, "slopes": torch.float32}.get(name, q.dtype)
        checks = [
            (t.dim() != rank, f"{name}.shape={[*t.shape]}: {rank} dimensions, not {t.dim()}"),
            (t.dtype != dtype, f"{name}.dtype={t.dtype}: {dtype}, as q is {q.dtype}"),
            (t.device != q.device, f"{name}.device={t.device}: all on one device, q is on {q.device}"),
        ]
        if sentence := next((sentence for wrong, sentence in checks if wrong), None):
            raise VerifyError(f"triton-fa2: {sentence}")
    (batch, heads, len_q, dim_qk), (_, heads_kv, len_k, dim_v) = q.shape, v.shape
    wanted = {"k": (batch, heads_kv, len_k, dim_qk), "v": (batch, heads_kv, len_k, dim_v), "slopes": (heads,)}
    for name, t in named.items():
        shape = wanted.get(name, (batch, heads, len_q, dim_qk if name == "q" else len_k))
        if not all(n == m or (n == 1 and name in ("mask", "bias")) for n, m in zip(t.shape, shape, strict=True)):
            raise VerifyError(f"triton-fa2: {name}.shape={[*t.shape]}: {[*shape]}, or 1 where a mask or bias is broadcast")
    name = next((name for name, dtype in DTYPES.items() if dtype == q.dtype), str(q.dtype))
    problem = Problem(heads_q=heads, heads_kv=heads_kv, len_q=len_q, len_k=len_k, dim_qk=dim_qk, dim_v=dim_v, dtype=name)
    if sentence := supports(problem, q.device.type):
        raise VerifyError(f"triton-fa2: {sentence}")


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

    The meaning of all of it is verify/problem.py's. mask: a Mask without `dense`, or bool [B|1,H|1,Q|1,K|1], True = take part;
    bias: that shape, dtype of q, -inf hides; slopes: float32 [H], ALiBi. Raises VerifyError for what it cannot compute.
    """
    if isinstance(mask, Mask) and "dense" in mask.names:
        raise VerifyError(f"triton-fa2: mask={mask}: dense is not a rule for Triton; hand it over as a boolean tensor")
    if isinstance(mask, Mask) and mask.batch_sizes() - {q.shape[0]}:
        raise VerifyError(f"triton-fa2: mask={mask}, batch={q.shape[0]}: padding takes one length per batch entry")
    boolean = mask if isinstance(mask, torch.Tensor) else None
    _check(q, k, v, mask=boolean, bias=bias, slopes=slopes)
    rules, counts, integers = _bound(mask, q.shape[0], q.device) if isinstance(mask, Mask) else ((), (), None)
    seen, scores = boolean.view(torch.uint8) if boolean is not None else None, (*q.shape[:3], k.shape[2])
    slopes = None if slopes is None else slopes.contiguous()
    arguments = (*_spread(seen, scores), *_spread(bias, scores), slopes, integers, rules, counts)
    return _Attention.apply(q, k, v, bias, arguments, float(scale), float(softcap))


class _Attention(torch.autograd.Function):
    """out and LSE, differentiable in q, k, v, bias."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> Any:
        arguments, scale, softcap = rest
        out = q.new_zeros((*q.shape[:3], v.shape[3]))
        lse = q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)
        if out.numel() and k.shape[2]:
            with _quiet(q):
                _launch(q, k, v, arguments, scale, softcap, out, lse)
        ctx.save_for_backward(q, k, v, out, lse, bias)
        ctx.arguments, ctx.options = arguments, (scale, softcap)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        *saved, bias = ctx.saved_tensors
        wanted = bias if ctx.needs_input_grad[3] else None
        with _quiet(saved[0]):
            found = gradients(cotangents[0], cotangents[1], tuple(saved), ctx.arguments, (*ctx.options, wanted))
        return (*found, None, None, None)


@contextlib.contextmanager
def _quiet(q: torch.Tensor) -> Iterator[None]:
    """On the tensor's GPU; numpy warns where a GPU gives Inf or NaN in silence."""
    with torch.cuda.device_of(q), warnings.catch_warnings():
        if INTERPRET:
            warnings.simplefilter("ignore", RuntimeWarning)
        yield


def _launch(q, k, v, arguments, scale, softcap, out, lse):
    """Write out and lse, contiguous."""
    (batch, heads, len_q, dim_qk), (_, heads_kv, len_k, dim_v) = q.shape, v.shape
    geometry = _geometry(q, dim_v)
    blocks = triton.cdiv(len_q, geometry["BLOCK_M"])
    _forward[(blocks * batch * heads,)](
        *(q, *q.stride(), k, *k.stride(), v, *v.stride(), *arguments, out, lse),
        *(batch, heads, heads // heads_kv, blocks, len_q, len_k, dim_qk, dim_v, scale, softcap),
        SOFTCAP=softcap != 0,
        ALIGNED=_aligned(q, k, v),
        INTERPRET=INTERPRET,
        enable_fp_fusion=True,  # said aloud: Triton 3.9 warns that its default will change
        **geometry,
    )


def supports(problem: Problem, device: str) -> str | None:
    """None, or in one sentence why not."""
    checks = [
        (problem.grads and device == "cuda", "its gradients are not yet verified on a GPU"),
        (problem.dtype not in DTYPES, f"dtype={problem.dtype}: takes {', '.join(DTYPES)}"),
        (
            max(problem.dim_qk, problem.dim_v) > LARGEST_DIM,
            f"dim_qk={problem.dim_qk}, dim_v={problem.dim_v}: at most {LARGEST_DIM}",
        ),
        (
            device == "cpu" and not INTERPRET,
            "needs Triton's interpreter on the CPU: set TRITON_INTERPRET=1 before importing triton",
        ),
        (device == "cuda" and INTERPRET, "Triton's interpreter is on: unset TRITON_INTERPRET before importing triton"),
    ]
    return next((sentence for wrong, sentence in checks if wrong), None)


@kernel(name="triton-fa2", arithmetic=Arithmetic(deterministic=True), supports=supports)
def triton_fa2(q, k, v, *, problem, mask, bias, slopes, scale, softcap):
    """Masks as rules where the problem leaves the choice and all of them are rules for Triton; `dense` comes as a tensor."""
    rules = problem.mask_as == "rule" and "dense" not in problem.mask.names
    mask = problem.mask if rules else mask
    return attention(q, k, v, mask=mask, bias=bias, slopes=slopes, scale=scale, softcap=softcap)
