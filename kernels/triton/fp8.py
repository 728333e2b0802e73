"""FlashAttention in FP8, in Triton, forward: FlashAttention-3, section 3.3 (arXiv 2407.08608), and
what has helped since.

Q, K and V are narrowed first (triton_fp8_quantise.py). The loop is triton_fa2.py's, on 8-bit
operands: the scales of Q and K are in the one factor of the exponential; P is 2^(s factor - maximum
+ 8), so that a format of few exponents holds it; the scales of V enter once, at the end, and so
does its mean, which P's rounding therefore does not touch: V = 1 gives 1.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl

from verify.errors import VerifyError
from verify.kernels.triton.checks import affordable, as_rules, checked, refusal
from verify.kernels.triton.fp8_quantize import FORMATS, ROWS, Quantised, quantise
from verify.kernels.triton.launch import (
    INTERPRETED,
    RUNTIME,
    Launch,
    Tiles,
    descriptor,
    has_tma,
    quiet,
)
from verify.kernels.triton.tiles import (
    GENERAL,
    INTERPRET,
    LN2,
    WHOLE,
    dot,
    load,
    nth,
    rounded,
    scores,
    store,
    walk,
)
from verify.registry import kernel
from verify.spec.arithmetic import Arithmetic, Quantisation
from verify.spec.masks import Mask
from verify.spec.problem import Problem
from verify.spec.quantization import seen_keys

OFFSET = tl.constexpr(8)
"""P is stored times 2^OFFSET: below e4m3's largest, and 2^-14 of the largest P is still a normal
number.
"""
BEST = Quantisation(
    "e4m3", ROWS, rotated=True, values="columns", centred=True, fitted=True, balanced=True
)
"""What the bundled kernel declares; what each choice is worth: FP8.md."""
TILES = {64: Tiles(64, 128, 4, 3), 128: Tiles(64, 128, 4, 3), 256: Tiles(128, 128, 8, 2)}
"""By the padded head dim; chosen on an H200."""
GENERAL_TILES = {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(64, 32, 8, 2)}
"""Where more than a rule changes a score; none spills, but the assembler serialises their products
(its warning C7515).
"""


@triton.jit(do_not_specialize=[*RUNTIME, "k_groups", "shifted"])
def _forward(
    q, k, v, q_scale, k_scale, k_groups, v_scale, v_mean, shift, shifted, scale,
    mask, mask_b, mask_h, mask_r, mask_c, bias, bias_b, bias_h, bias_r, bias_c, slopes, integers, terms, rules, plan, plan_b,
    out, lse, batch, heads, group, blocks, len_q, len_k, dim_qk, dim_v, flags, before, factor, softcap,
    KIND: tl.constexpr, INTERPRET: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """q [B,H,Q,C], k [B,Hk,K,C], v [B,Hk,C,K'] in 8 bits, scales as in `Quantised` -> out
    [B,H,Q,Dv], lse [B,H,Q], contiguous.
    """
    bh, block = (
        tl.program_id(0) // blocks,
        blocks - 1 - tl.program_id(0) % blocks,
    )  # causal: the longest first
    b, h = bh // heads, bh % heads
    g = h // group
    bg = b * (heads // group) + g
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
    way = walk(plan, plan_b, b, block)
    rows, keys = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    q_block = load(q, (0, 0, 0, 0), b, h, block * BLOCK_M, len_q, BLOCK_D, BLOCK_M, BLOCK_D, WHOLE)
    at, inside = bh.to(tl.int64) * len_q + rows, rows < len_q
    q_units = tl.load(q_scale + at, mask=inside, other=1.0)
    top, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in tl.range(0, way[0], num_stages=STAGES):
        number = nth(j, way)
        start = number * BLOCK_N
        k_block = load(k, (0, 0, 0, 0), b, g, start, len_k, BLOCK_D, BLOCK_N, BLOCK_D, WHOLE)
        units = q_units * tl.load(k_scale + bg * k_groups + tl.minimum(start // ROWS, k_groups - 1))
        s = dot(q_block, tl.trans(k_block), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), INTERPRET)
        if KIND == GENERAL:
            s, units = s * units[:, None], tl.full([BLOCK_M], 1.0, tl.float32)
        s, _ = scores(
            s,
            rows[:, None],
            start + keys[None, :],
            b,
            h,
            number,
            way,
            extras,
            rules,
            KIND,
            INTERPRET,
        )
        old, top = top, tl.maximum(top, tl.max(s, 1) * (factor * units))
        base = tl.where(top == float("-inf"), 0.0, top)  # nothing visible yet: no -inf - -inf
        weight = tl.broadcast_to((factor * units)[:, None], s.shape)
        p = tl.exp2(
            tl.fma(s, weight, tl.broadcast_to(-(base - OFFSET)[:, None], s.shape))
        )  # product and difference: one step
        decay = tl.exp2(old - base)
        total = total * decay + tl.sum(p, 1)
        v_block = v.load([b, g, 0, start]).reshape(BLOCK_D, BLOCK_N)
        acc = dot(
            rounded(p, k_block.dtype, INTERPRET), tl.trans(v_block), acc * decay[:, None], INTERPRET
        )
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    columns = tl.arange(0, BLOCK_D)
    acc = acc * tl.div_rn(1.0, total)[:, None] * tl.load(v_scale + bg * BLOCK_D + columns)[None, :]
    acc = tl.where(empty[:, None], 0.0, acc + tl.load(v_mean + bg * BLOCK_D + columns)[None, :])
    store(out, b, h, heads, block * BLOCK_M, len_q, dim_v, acc, KIND, INTERPRET)
    moved = tl.load(shift + at, mask=(inside & (shifted != 0)) != 0, other=0.0) * scale
    tl.store(
        lse + at,
        tl.where(empty, float("-inf"), (top - OFFSET) * LN2 + tl.log(total) + moved),
        mask=inside,
    )


class Fp8Launch(Launch):
    """A launch with tiles of its own. The operands are made here, so TMA always loads them."""

    whole_tiles: ClassVar[dict[str, dict[int, Tiles]]] = {"forward": TILES}

    @property
    def tiles(self) -> dict[str, dict[int, Tiles]]:
        """By pass and head dim."""
        return {"forward": TILES if self.plain else GENERAL_TILES}


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    how: Quantisation = BEST,
    mask: Mask | torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    scale: float,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B,H,Q,D], k [B,Hk,K,D], v [B,Hk,K,Dv] in fp16 or bf16, any strides -> out [B,H,Q,Dv], lse
    float32 [B,H,Q].

    how: what is quantised how; rows: None, 0 or 128, and with 128 a scale of V for its head or
    columns. An infinite or NaN value reaches whoever shares its scale. All else as
    triton_fa2.attention has it. Raises VerifyError for what it cannot compute.
    """
    launch, narrow = _ready(q, k, v, how, mask, bias, slopes, scale, softcap)
    out, lse = launch.results()
    if not (out.numel() and k.shape[2]):
        return out.zero_(), lse.fill_(float("-inf"))
    with quiet(q):
        attend(launch, narrow(), out, lse)
    return out.contiguous(), lse


def _ready(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    how: Quantisation,
    mask: Mask | torch.Tensor | None,
    bias: torch.Tensor | None,
    slopes: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Launch, Callable[[], Quantised]]:
    """What was asked for, checked, and what narrows the operands."""
    if how.rows not in (None, 0, ROWS) or (how.rows and how.values == "rows"):
        raise VerifyError(
            f"triton-fp8: rows={how.rows}, values={how.values!r}: rows None, 0 or {ROWS}; with "
            f"{ROWS} head or columns"
        )
    plain = how.scales == "fp32" and how.queries == "rows" and not how.block
    if how.format not in FORMATS or how.values == "given" or not plain:
        raise VerifyError(
            f"triton-fp8: {how}: takes formats {', '.join(FORMATS)}, FP32 scales of rows, and "
            "quantises Q, K and V"
        )
    problem = checked("triton-fp8", supports, q, k, v, mask=mask, bias=bias, slopes=slopes)
    launch = Fp8Launch.of(problem, q, mask, bias, slopes, scale, softcap)
    q, k, v = q.detach(), k.detach(), v.detach()
    return launch, lambda: quantise(
        q, k, v, chosen(how, softcap), launch.dim, _seen(problem, launch)
    )


def _seen(problem: Problem, launch: Launch) -> torch.Tensor | None:
    """Keys that some query sees, bool [B|1,1,K,1]; None where that is all of them."""
    seen = None
    if problem.mask.names != {"full"}:
        seen = seen_keys(problem, launch.q.device)
    if launch.seen is not None:
        seen = launch.seen.any(2).any(1)[:, None, :, None].expand(-1, -1, problem.len_k, -1)
    if launch.bias is not None:
        not_hidden = (launch.bias != float("-inf")).any(2).any(1)[:, None, :, None]
        seen = not_hidden if seen is None else seen & not_hidden
    return None if seen is None else seen.expand(-1, -1, problem.len_k, -1)


def attend(launch: Launch, x: Quantised, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Fill out [B,H,Q,Dv] and lse [B,H,Q] from operands in 8 bits."""
    kind, tile = launch.kernel("forward")
    programs, arguments = launch.common(kind, tile, by_keys=False)
    _forward[(programs,)](
        q=descriptor(x.q, tile.rows, launch.dim),
        k=descriptor(x.k, tile.keys, launch.dim),
        v=descriptor(x.v, launch.dim, tile.keys),
        q_scale=x.q_scale,
        k_scale=x.k_scale,
        k_groups=x.k_scale.shape[2],
        v_scale=x.v_scale,
        v_mean=x.v_mean,
        shift=lse if x.shift is None else x.shift,
        shifted=int(x.shift is not None),
        scale=launch.scale,
        out=descriptor(out, tile.rows, launch.dim) if launch.plain else out,
        lse=lse,
        ROWS=ROWS,
        **arguments,
    )


def chosen(how: Quantisation, softcap: float) -> Quantisation:
    """What is done for a problem: under a softcap, K's mean cannot be left out of the scores."""
    return replace(how, centred=how.centred and not softcap)


def supports(problem: Problem, device: str) -> str | None:
    """None, or in one sentence why not."""
    if problem.grads:
        return "forward only"
    if sentence := refusal(problem, device, ("fp16", "bf16")):
        return sentence
    return (
        None
        if device == "cpu" or has_tma(torch.device(device))
        else "needs a Hopper GPU: TMA, tensor cores for FP8"
    )


def arithmetic(how: Quantisation) -> Any:
    """The arithmetic of this choice: a function of (problem, device). Hopper's FP8 products keep 14
    bits of their sums.
    """

    def declared(problem: Problem, device: str) -> Arithmetic:
        sums = "fp22" if device == "cuda" else "fp32"
        tile = (
            INTERPRETED
            if INTERPRET
            else next(t for n, t in TILES.items() if max(problem.dim_qk, problem.dim_v) <= n)
        )
        return Arithmetic(
            quantised=chosen(how, problem.softcap),
            exp="fused",
            probs=how.format,
            probs_scale=2.0**OFFSET.value,
            tile=tile.keys,
            scores=sums,
            accumulate=sums,
            deterministic=True,
        )

    return declared


def stages(q, k, v, *, problem, mask, bias, slopes, scale, softcap):
    """`verify bench` times them apart: operands that stay, a cache of K and V, are narrowed
    once.
    """
    launch, narrow = _ready(q, k, v, BEST, as_rules(problem, mask), bias, slopes, scale, softcap)
    operands, (out, lse) = narrow(), launch.results()
    return {"quantise": narrow, "attention": lambda: attend(launch, operands, out, lse)}


@kernel(
    name="triton-fp8",
    arithmetic=arithmetic(BEST),
    supports=supports,
    stages=stages,
    affordable=functools.partial(affordable, calls=16),
)
def triton_fp8(q, k, v, *, problem, mask, bias, slopes, scale, softcap, how=BEST):
    """Masks as rules where the problem leaves the choice and all of them are rules for Triton;
    `dense` comes as a tensor.
    """
    mask = as_rules(problem, mask)
    return attention(
        q, k, v, how=how, mask=mask, bias=bias, slopes=slopes, scale=scale, softcap=softcap
    )
