"""Right kernels, as different from each other as declarations allow: none may be accused. Judge
them by ``verify fuzz properties/tests/kernels/honest.py``, or by the same file as ``--kernel`` of
``python -m verify.studies.bounds soundness``, which goes on after an alarm.

All but one are forward only. Products and sums are in FP32 unless a declaration says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from verify import Arithmetic, Quantisation, kernel
from verify.spec.arithmetic import EAGER

Function = Callable[[Tensor], Tensor]
Product = Callable[[Tensor, Tensor], Tensor]
LOG2E = 1 / math.log(2)
SHORT = ("fp16", "bf16")


def scores(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """[B,H,n,K] in FP32, -inf where hidden; k [B,H,K,D]."""
    s = q.float() @ k.float().mT * scale
    return s if mask is None else s.masked_fill(~mask, -torch.inf)


def repeated(q: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Keys and values of each query head."""
    return [t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in tensors]


def product(p: Tensor, v: Tensor) -> Tensor:
    """In FP32."""
    return p.float() @ v.float()


def online(
    s: Tensor,
    v: Tensor,
    *,
    tile: int = 64,
    exp: Function = torch.exp,
    store: Function | None = None,
    times: Product = product,
    late: float = 0.0,
    above: float = 0.0,
    rounded_sum: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out in FP32, LSE) of scores, tile by tile.

    store: P as the operand; default: in v's dtype. late: the maximum is followed once it is
    exceeded by more than this. above: exponents are relative to so much more than the maximum.
    """
    store = store or (lambda p: p.to(v.dtype))
    top = s.new_full((*s.shape[:-1], 1), -torch.inf)
    total, out = torch.zeros_like(top), s.new_zeros((*s.shape[:-1], v.shape[-1]))
    for start in range(0, s.shape[-1], tile):
        part = s[..., start : start + tile]
        new = torch.maximum(top, part.amax(-1, keepdim=True) + above)
        if late:
            new = torch.where((new - top > late) | (top == -torch.inf), new, top)
        held = new.masked_fill(new == -torch.inf, 0.0)
        weights, before = exp(part - held), exp(top - held)
        p = store(weights)
        total = total * before + (p.float() if rounded_sum else weights).sum(-1, keepdim=True)
        out = out * before + times(p, v[..., start : start + tile, :])
        top = new
    held = top.masked_fill(top == -torch.inf, 0.0)
    return out / total.masked_fill(total == 0, 1.0), (held + total.log()).squeeze(-1)


def registered(name: str, attend: Product, dtypes: tuple[str, ...], **declared: object) -> None:
    """Register a kernel of scores and V."""

    def run(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
        k, v = repeated(q, k, v)
        return attend(scores(q, k, scale, mask), v).to(q.dtype).detach()

    kernel(run, name=name, dtypes=dtypes, arithmetic=Arithmetic(**declared))  # type: ignore[arg-type]


def cubic(x: Tensor) -> Tensor:
    """exp(x) by a polynomial of degree 3 on FMA units, as FlashAttention-4's."""
    t = x * LOG2E
    whole = t.floor()
    f = t - whole
    found = ((0.0771190896 * f + 0.2275643945) * f + 0.6951461434) * f + 1.0
    return torch.where(x == -torch.inf, 0.0, found * torch.exp2(whole.clamp(min=-149.0)))


def backwards(s: Tensor, v: Tensor) -> Tensor:
    """Keys from the last to the first."""
    return online(s.flip(-1), v.flip(-2), tile=32)[0]


def compensated(s: Tensor, v: Tensor) -> Tensor:
    """Sums with Kahan's compensation, one key at a time."""
    top = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_zeros((*s.shape[:-1], 1))
    weights = torch.exp(s - top.masked_fill(top == -torch.inf, 0.0))
    p, v = weights.to(v.dtype).float(), v.float()
    out, lost = (s.new_zeros((*s.shape[:-1], v.shape[-1])) for _ in range(2))
    for key in range(s.shape[-1]):
        term = p[..., key : key + 1] * v[..., key : key + 1, :] - lost
        total = out + term
        out, lost = total, (total - out) - term
    whole = weights.double().sum(-1, keepdim=True).float()
    return out / whole.masked_fill(whole == 0, 1.0)


def two_passes(s: Tensor, v: Tensor) -> Tensor:
    """Maximum and row sum first, then P, normalised, in the input's dtype."""
    top = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_zeros((*s.shape[:-1], 1))
    weights = torch.exp(s - top.masked_fill(top == -torch.inf, 0.0))
    total = weights.sum(-1, keepdim=True)
    return product((weights / total.masked_fill(total == 0, 1.0)).to(v.dtype), v)


def pairwise(p: Tensor, v: Tensor) -> Tensor:
    """A sum of halves of the keys, and so on."""
    if p.shape[-1] <= 4:
        return product(p, v)
    half = p.shape[-1] // 2
    return pairwise(p[..., :half], v[..., :half, :]) + pairwise(p[..., half:], v[..., half:, :])


def in_steps(fmt: torch.dtype) -> Product:
    """Sixteen products at a time, added to an accumulator of this format."""

    def times(p: Tensor, v: Tensor) -> Tensor:
        out = p.new_zeros((*p.shape[:-1], v.shape[-1]), dtype=fmt)
        for start in range(0, p.shape[-1], 16):
            part = slice(start, start + 16)
            out = (out.float() + product(p[..., part], v[..., part, :])).to(fmt)
        return out.float()

    return times


def short_sums(fmt: torch.dtype) -> Product:
    """One tile of all keys, P V in such an accumulator."""
    return lambda s, v: online(s, v, tile=1 << 30, times=in_steps(fmt))[0]


def split(s: Tensor, v: Tensor, partial: Function) -> Tensor:
    """Four parts of the keys, each divided by its row sum, merged through their LSE."""
    step = max(1, -(-s.shape[-1] // 4))
    parts = [
        online(s[..., start : start + step], v[..., start : start + step, :])
        for start in range(0, max(1, s.shape[-1]), step)
    ]
    lse = torch.stack([part for _, part in parts])
    whole = torch.logsumexp(lse, 0)
    weights = torch.exp(lse - whole.masked_fill(whole == -torch.inf, 0.0))
    outs = torch.stack([partial(out).float() for out, _ in parts])
    return (weights.unsqueeze(-1) * outs).sum(0)


def towards_zero(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of x in FP32, the nearest number of 16 bits that is no larger."""
    near = x.to(dtype)
    code = near.view(torch.int16)
    return torch.where(near.float().abs() > x.abs(), code - 1, code).view(dtype)


def in_input(s: Tensor, v: Tensor) -> Tensor:
    """Splits whose outputs are stored in the input's dtype."""
    return split(s, v, lambda out: out.to(v.dtype))


def reordered(s: Tensor, v: Tensor) -> Tensor:
    """Even keys, then odd ones."""
    order = torch.cat([torch.arange(n, s.shape[-1], 2, device=s.device) for n in (0, 1)])
    return online(s[..., order], v[..., order, :], tile=24)[0]


registered("backwards", backwards, (*SHORT, "fp32"))
registered("odd-tiles", lambda s, v: online(s, v, tile=37)[0], (*SHORT, "fp32"))
registered("one-key-tiles", lambda s, v: online(s, v, tile=1)[0], (*SHORT, "fp32"), tile=1)
registered("even-then-odd", reordered, (*SHORT, "fp32"))
registered("kahan", compensated, (*SHORT, "fp32"))
registered("pairwise", lambda s, v: online(s, v, tile=1 << 30, times=pairwise)[0], (*SHORT, "fp32"))
registered("two-passes", two_passes, SHORT, normalized_probs=True)
registered(
    "fa4",
    lambda s, v: online(s, v, exp=cubic, late=8 / LOG2E)[0],
    SHORT,
    exp_ulp=900.0,
    maximum=8 / LOG2E,
)
registered(
    "late-maximum",
    lambda s, v: online(s, v, late=4.0, tile=16)[0],
    (*SHORT, "fp32"),
    maximum=4.0,
)
registered(
    "above-maximum",
    lambda s, v: online(s, v, above=0.7)[0],
    (*SHORT, "fp32"),
    maximum=0.7,
)
registered(
    "a-third-above-maximum",
    lambda s, v: online(s, v, above=0.3)[0],
    (*SHORT, "fp32"),
    maximum=0.3,
)
registered("splits", lambda s, v: split(s, v, lambda out: out), (*SHORT, "fp32"), splits=4)
registered("splits-16", in_input, SHORT, splits=4, partials="input")
registered("rounded-sum", lambda s, v: online(s, v, rounded_sum=True)[0], SHORT, rowsum="rounded")
registered("fp32-probs", lambda s, v: online(s, v, store=Tensor.float)[0], SHORT, probs="fp32")
registered("fp16-sums", short_sums(torch.float16), ("fp16",), accumulate="fp16")
registered("bf16-sums", short_sums(torch.bfloat16), ("bf16",), accumulate="bf16")


@kernel(name="towards-zero", dtypes=SHORT, arithmetic=Arithmetic(rounding="zero"))
def cut(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    """P and out are cut."""
    k, v = repeated(q, k, v)
    s = scores(q, k, scale, mask)
    out, _ = online(s, v, store=lambda p: towards_zero(p, v.dtype))
    return towards_zero(out, q.dtype).detach()


@kernel(name="stochastic", dtypes=SHORT, arithmetic=Arithmetic(rounding="stochastic"))
def dithered(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    """P and out are rounded up or down by chance, from a fixed seed."""
    k, v = repeated(q, k, v)
    draws = torch.Generator(q.device).manual_seed(7)

    def by_chance(x: Tensor) -> Tensor:
        below = towards_zero(x, q.dtype)
        beyond = (below.view(torch.int16) + 1).view(q.dtype)
        beyond = torch.where(x < 0, -beyond.abs(), beyond.abs())
        part = (x - below.float()) / (beyond.float() - below.float())
        up = torch.rand(x.shape, generator=draws, device=x.device) < part
        return torch.where(up & x.isfinite(), beyond, below)

    return by_chance(online(scores(q, k, scale, mask), v, store=by_chance)[0]).detach()


@kernel(name="binary", dtypes=(*SHORT, "fp32"), arithmetic=Arithmetic(exp="binary"))
def binary(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    """Exponentials of base 2, the scale and log2(e) one factor."""
    k, v = repeated(q, k, v)
    return online(scores(q, k, scale * LOG2E, mask), v, exp=torch.exp2)[0].to(q.dtype).detach()


@kernel(name="scaled-query", dtypes=SHORT, arithmetic=Arithmetic(scaled_query=True))
def scaled_query(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    """Scale * Q is stored."""
    k, v = repeated(q, k, v)
    return online(scores((q.float() * scale).to(q.dtype), k, 1.0, mask), v)[0].to(q.dtype).detach()


@kernel(name="tanh-approx", dtypes=SHORT, arithmetic=Arithmetic(tanh_ulp=4096.0))
def capped(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, softcap: float
) -> Tensor:
    """A tanh of eleven bits, cut towards zero."""
    k, v = repeated(q, k, v)
    s = scores(q, k, scale, None)
    if softcap:
        bent = torch.tanh(s / softcap)
        s = softcap * (bent.view(torch.int32) & ~0xFFF).view(torch.float32)
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    return online(s, v)[0].to(q.dtype).detach()


def narrowed(x: Tensor, rows: int, largest: float, code: Function) -> Tensor:
    """x [B,H,n,D] coded with a scale for so many rows of a head, and multiplied out again."""
    parts = []
    for part in x.float().split(rows, 2):
        scale = part.abs().amax((2, 3), keepdim=True) / largest
        scale = scale.masked_fill(scale == 0, 1.0)
        parts.append(code(part / scale).float() * scale)
    return torch.cat(parts, 2) if parts else x.float()


SAGE = Quantisation("int8", 32, values="given", centred=True)


@kernel(name="int8-smoothed", dtypes=SHORT, arithmetic=Arithmetic(quantised=SAGE))
def smoothed(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Q and K, less its mean, in INT8 with a scale for 32 rows; V as it comes (SageAttention)."""
    k, v = repeated(q, k, v)
    centred = k.float() - k.float().mean(2, keepdim=True) if k.shape[2] else k.float()
    q8, k8 = (narrowed(t, 32, 127.0, torch.round) for t in (q, centred))
    return online(scores(q8, k8, scale, None), v)[0].to(q.dtype).detach()


TOKENS = Quantisation("e4m3", 1, values="rows")


@kernel(name="fp8-tokens", dtypes=SHORT, arithmetic=Arithmetic(quantised=TOKENS))
def by_token(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Q, K and V in FP8 with a scale for each token."""

    def code(x: Tensor) -> Tensor:
        return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)

    q8, k8, v8 = (narrowed(t, 1, 448.0, code) for t in (q, k, v))
    k8, v8 = repeated(q, k8, v8)
    s = scores(q8, k8, scale, None)
    return online(s, v8, store=lambda p: p.to(q.dtype))[0].to(q.dtype).detach()


@kernel(name="stored-steps", dtypes=SHORT, arithmetic=EAGER)
def stored(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    """Every step in the input's dtype."""
    k, v = repeated(q, k, v)
    s = ((q.float() @ k.float().mT).to(q.dtype).float() * scale).to(q.dtype)
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    p = torch.softmax(s.float(), -1).to(q.dtype).nan_to_num()
    return product(p, v).to(q.dtype).detach()


def parts(x: Tensor, n: int) -> list[Tensor]:
    """x in FP32 as a sum of n numbers in BF16."""
    found: list[Tensor] = []
    for _ in range(n):
        found.append((x - sum(found)).bfloat16().float())
    return found


def split_product(n: int) -> Product:
    """Of FP32 by BF16 tensor cores: the parts i + j < n, small ones first."""

    def times(a: Tensor, b: Tensor) -> Tensor:
        left, right = parts(a.float(), n), parts(b.float(), n)
        out = 0.0 * (left[0] @ right[0])
        for order in reversed(range(n)):
            for i in range(order + 1):
                out = out + left[i] @ right[order - i]
        return out

    return times


def in_parts(n: int, name: str) -> None:
    """Register a kernel of FP32 whose products are split."""
    times = split_product(n)

    @kernel(name=name, dtypes=("fp32",), arithmetic=Arithmetic(scores=name, accumulate=name))
    def run(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
        k, v = repeated(q, k, v)
        s = times(q, k.mT) * scale
        s = s if mask is None else s.masked_fill(~mask, -torch.inf)
        return online(s, v, times=times)[0].detach()


in_parts(2, "bf16x3")
in_parts(3, "bf16x6")


def promoted(p: Tensor, v: Tensor) -> Tensor:
    """Sixty-four products at a time in an accumulator of FP16, their sums in FP32."""
    steps = range(0, p.shape[-1], 64)
    sums = (in_steps(torch.float16)(p[..., n : n + 64], v[..., n : n + 64, :]) for n in steps)
    return sum(sums, p.new_zeros((*p.shape[:-1], v.shape[-1])))


registered(
    "promoted-fp16-sums",
    lambda s, v: online(s, v, tile=1 << 30, times=promoted)[0],
    ("fp16",),
    accumulate="fp16",
    promoted=64,
)


def powers(x: Tensor, block: int, largest: float, *, up: bool) -> Tensor:
    """A scale for so many columns, a power of two, of the shape of x."""
    wide = torch.nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    amax = wide.abs().amax(-1, keepdim=True).double()
    if up:
        scale = torch.exp2((amax / largest).log2().ceil())
    else:
        scale = torch.exp2(amax.log2().floor() - math.floor(math.log2(largest)))
    return scale.masked_fill(amax == 0, 1.0).expand(wide.shape).flatten(-2)[..., : x.shape[-1]]


def e4m3(x: Tensor) -> Tensor:
    """Saturates."""
    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()


def mxfp8(x: Tensor, *, up: bool) -> Tensor:
    """x through E4M3, 32 columns to a scale."""
    scale = powers(x.float(), 32, 448.0, up=up).float()
    return e4m3(x.float() / scale) * scale if x.shape[-1] else x.float()


def nvfp4(x: Tensor) -> Tensor:
    """x through E2M1: 16 columns to a scale in E4M3, and one of the tensor."""
    if not x.numel():
        return x.float()
    whole = x.float().abs().amax() / (6.0 * 448.0)
    whole = whole if whole > 0 else whole.new_ones(())
    wide = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % 16)).unflatten(-1, (-1, 16))
    scale = e4m3(wide.abs().amax(-1, keepdim=True) / 6.0 / whole) * whole
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=x.device)
    apart = (wide.abs() / scale.masked_fill(scale == 0, torch.inf)).unsqueeze(-1) - numbers
    near = numbers[apart.abs().argmin(-1)]
    return (near * wide.sign() * scale).flatten(-2)[..., : x.shape[-1]]


def blocked(name: str, how: Quantisation, code: Function) -> None:
    """Register a kernel of FP32 sums that codes the rows of Q and K, and the columns of V."""

    @kernel(name=name, dtypes=SHORT, arithmetic=Arithmetic(quantised=how))
    def run(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        q8, k8, v8 = code(q), code(k), code(v.mT).mT
        k8, v8 = repeated(q, k8, v8)
        s = scores(q8, k8, scale, None)
        return online(s, v8, store=lambda p: p.to(q.dtype))[0].to(q.dtype).detach()


blocked(
    "mxfp8",
    Quantisation("e4m3", block=32, scales="ue8m0", values="blocks"),
    lambda x: mxfp8(x, up=True),
)
blocked(
    "mxfp8-ocp",
    Quantisation("e4m3", block=32, scales="ue8m0_floor", values="blocks"),
    lambda x: mxfp8(x, up=False),
)
blocked("nvfp4", Quantisation("e2m1", block=16, scales="e4m3", values="blocks"), nvfp4)

CACHE = Quantisation("e4m3", 1, queries="given")


@kernel(name="fp8-cache", dtypes=SHORT, arithmetic=Arithmetic(quantised=CACHE))
def cached(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """K and V in FP8 with a scale for each token, Q as it comes."""
    k8, v8 = repeated(q, *(narrowed(t, 1, 448.0, e4m3) for t in (k, v)))
    s = scores(q, k8, scale, None)
    return online(s, v8, store=lambda p: p.to(q.dtype))[0].to(q.dtype).detach()


class Atomic(torch.autograd.Function):
    """dq, dk and dv by atomics of 16 bits: the last tiles arrive first."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """And keep what the backward recomputes P from."""
        s = scores(q, k, scale, mask)
        out, lse = online(s, v)
        ctx.save_for_backward(q, k, v, out.to(q.dtype), lse)
        ctx.scale, ctx.mask = scale, mask
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple[Tensor | None, ...]:
        """Tiles of 32 rows and 32 keys."""
        q, k, v, out, lse = ctx.saved_tensors
        s = scores(q, k, ctx.scale, ctx.mask)
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
        p = torch.exp(s - lse.unsqueeze(-1))
        delta = (do.float() * out.float()).sum(-1, keepdim=True)
        ds = (p * (do.float() @ v.float().mT - delta)).to(q.dtype).float()
        p = p.to(q.dtype).float()
        dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
        for n in reversed(range(0, k.shape[2], 32)):
            dq += (ctx.scale * (ds[..., n : n + 32] @ k[:, :, n : n + 32].float())).to(q.dtype)
        for n in reversed(range(0, q.shape[2], 32)):
            rows = slice(n, n + 32)
            dk += (ctx.scale * (ds[:, :, rows].mT @ q[:, :, rows].float())).to(q.dtype)
            dv += (p[:, :, rows].mT @ do[:, :, rows].float()).to(q.dtype)
        return dq, dk, dv, None, None


@kernel(
    name="atomics-16",
    dtypes=SHORT,
    arithmetic=Arithmetic(spill=(32, 32), atomic=True, group_sum="input"),
)
def atomics(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    """Gradients by 16-bit atomics."""
    k, v = repeated(q, k, v)
    return Atomic.apply(q, k, v, scale, mask)
