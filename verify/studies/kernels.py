"""Kernels of the study: a tiled forward with switches for defects, and TF32 and FP8 ones made of
torch's own matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from verify.bounds.constants import ELSEWHERE
from verify.bounds.metrics import distance, measure
from verify.reference.reference import truth
from verify.registry import Kernel
from verify.spec.arithmetic import FLASH, Arithmetic, Quantisation
from verify.spec.case import Case
from verify.spec.problem import Problem

LOSSES = {
    "one tile's accumulator in BF16": {"bf16_tile": 1.0},
    "P truncated instead of rounded": {"cut_p": 1.0},
    "exp off by 1e-3 at random": {"exp_noise": 1e-3},
    "Q scaled in the input's dtype": {"scaled_q": 1.0},
}


class Draw:
    """One draw: what is true, what honest kernels give, and whether a rule rejects a kernel with
    some defect.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.known = truth.__wrapped__(case, device)
        self.limit = self.known.allowances(FLASH)["out"].limit
        self.expected = self.known.expectation(FLASH)
        q, k, v = (
            t.double() for t in (self.known.inputs.q, self.known.inputs.k, self.known.inputs.v)
        )
        self.same_dtype = _plain(*(t.to(self.known.inputs.q.dtype) for t in (q, k, v)))
        self.upcast = _plain(q.float(), k.float(), v.float())
        self.outs: dict[tuple[tuple[str, float], ...], torch.Tensor] = {}

    def out(self, defect: dict[str, float]) -> torch.Tensor:
        """The kernel's output with this defect."""
        key = tuple(defect.items())
        if key not in self.outs:
            x = self.known.inputs
            self.outs[key] = tiled(x.q, x.k, x.v, self.known.problem.softmax_scale, **defect)
        return self.outs[key]

    def rmse(self, defect: dict[str, float]) -> float:
        """Against the exact answer."""
        return measure(self.out(defect), self.known.exact.out).rmse

    def rejects(self, rule: str, defect: dict[str, float]) -> bool:
        """Whether the rule says no."""
        if defect.get("noise"):
            defect = {"noise": self.rmse({}) * math.sqrt((1 + defect["noise"]) ** 2 - 1)}
        out = self.out(defect)
        if rule in ELSEWHERE:
            return not ELSEWHERE[rule](out, self.upcast, self.same_dtype)
        beyond = bool((distance(out, self.known.exact.out) > self.limit).any())
        return beyond or (
            rule != "proved"
            and self.expected is not None
            and self.expected.surprise("out", out) is not None
        )


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def tiled(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    scale_off: float = 0.0,
    factor: float = 0.0,
    noise: float = 0.0,
    bf16_tile: float = 0.0,
    cut_p: float = 0.0,
    exp_noise: float = 0.0,
    scaled_q: float = 0.0,
) -> torch.Tensor:
    """FlashAttention-2's forward in torch, tiles of 64 keys, FP32 sums, switches for defects;
    written apart from the oracles.
    """
    generator = torch.Generator(q.device).manual_seed(0)

    def normal(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator, device=x.device)

    scale = scale * (1 + scale_off)
    rows = (q.float() * scale).to(q.dtype).float() if scaled_q else q.float()
    top, total, acc = (
        torch.full(q.shape[:3], -torch.inf, device=q.device),
        torch.zeros(q.shape[:3], device=q.device),
        0.0,
    )
    for n, (keys, values) in enumerate(zip(k.split(64, 2), v.split(64, 2), strict=True)):
        s = rows @ keys.float().mT * (1.0 if scaled_q else scale)
        old, top = top, torch.maximum(top, s.amax(-1))
        p, decay = torch.exp(s - top[..., None]), torch.exp(old - top)
        p = p * (1 + exp_noise * normal(p)) if exp_noise else p
        held = _cut(p, q.dtype) if cut_p else p.to(q.dtype).float()
        total, acc = total * decay + p.sum(-1), acc * decay[..., None] + held @ values.float()
        acc = acc.bfloat16().float() if bf16_tile and n == 3 else acc
    out = acc / total[..., None]
    return ((out + noise * normal(out)) * (1 + factor)).to(q.dtype)


def _cut(p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """P towards zero in this format."""
    bits = {torch.float16: 13, torch.bfloat16: 16}.get(dtype, 0)
    return ((p.view(torch.int32) >> bits) << bits).view(torch.float32)


def narrow_kernels(device: str) -> dict[str, tuple[Callable[..., torch.Tensor], str, Arithmetic]]:
    """name -> (kernel, dtype of its inputs, its arithmetic). On a GPU the products are the tensor
    cores' own.
    """
    fp8 = Arithmetic(quantised=Quantisation("e4m3", 0), probs="e4m3", probs_scale=256.0)
    tf32 = Arithmetic(scores="tf32", accumulate="tf32", probs="fp32", normalized_probs=True)
    if device == "cpu":
        return {"FP8 operands, FP32 products": (_fp8, "bf16", fp8)}
    return {
        "TF32": (_tf32, "fp32", tf32),
        "FP8, FP32 sums (use_fast_accum=False)": (_fp8, "bf16", fp8),
        "FP8, tensor-core sums (use_fast_accum=True)": (
            _fp8_fast,
            "bf16",
            replace(fp8, scores="fp22", accumulate="fp22"),
        ),
    }


def _tf32(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return torch.softmax(q @ k.mT * scale, dim=-1) @ v
    finally:
        torch.set_float32_matmul_precision(before)


def _fp8(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, fast: bool = False
) -> torch.Tensor:
    """A scale for each head, P times 256 in e4m3, the row sum of the unrounded P."""
    heads = []
    for q_h, k_h, v_h in zip(
        q.flatten(0, 1).float(), k.flatten(0, 1).float(), v.flatten(0, 1).float(), strict=True
    ):
        (q8, s_q), (k8, s_k), (v8, s_v) = (_e4m3(t) for t in (q_h, k_h, v_h))
        s = _product(q8, k8.T, fast=fast) * (s_q * s_k * scale)
        p = torch.exp(s - s.amax(-1, keepdim=True))
        p8 = (p * 256).to(torch.float8_e4m3fn)
        heads.append(
            _product(p8, v8.T.contiguous().T, fast=fast) * (s_v / 256) / p.sum(-1, keepdim=True)
        )
    return torch.stack(heads).unflatten(0, q.shape[:2]).to(q.dtype)


def _fp8_fast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return _fp8(q, k, v, scale, fast=True)


def _e4m3(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    step = x.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
    return (x / step).to(torch.float8_e4m3fn), step


def _product(a: torch.Tensor, b: torch.Tensor, *, fast: bool) -> torch.Tensor:
    """[n,K] times [K,m] (column-major) in FP8, as FP32."""
    if a.device.type == "cpu":
        return a.float() @ b.float()
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(a, b, one, one, out_dtype=torch.float32, use_fast_accum=fast)


def at_gpu(kernel: Kernel) -> Kernel:
    """The kernel as it runs on the GPU, taking and giving tensors on the CPU, so that its truth can
    be worked out there.
    """

    def there(x: object) -> object:
        return x.cuda() if isinstance(x, torch.Tensor) else x

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: object) -> object:
        given = kernel.fn(
            q.cuda(), k.cuda(), v.cuda(), **{name: there(x) for name, x in rest.items()}
        )
        return tuple(t.cpu() for t in given) if isinstance(given, tuple) else given.cpu()

    def arithmetic(problem: Problem, device: str) -> Arithmetic:
        found = kernel.numerics(problem, "cuda")
        return replace(
            found,
            summation="truncated"
            if found.truncates("accumulate", problem.dtype, "cuda")
            else "nearest",
        )

    def there_too(where: Callable[[Problem, str], bool]) -> Callable[[Problem, str], bool]:
        return lambda problem, device: where(problem, "cuda")

    known = tuple(
        replace(issue, applies_to=there_too(issue.applies_to)) for issue in kernel.known_issues
    )
    return replace(
        kernel,
        fn=run,
        arithmetic=arithmetic,
        known_issues=known,
        supports=lambda p, device: kernel.unsupported(p, "cuda"),
    )
