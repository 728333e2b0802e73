"""FlashAttention-2 in torch, as a Triton kernel would be written: programs, tiles, addresses, a
running maximum; forward, backward (Dao 2023, arXiv 2307.08691, Algorithms 1 and 2) and an FP8
forward. `faults` switch known defects on (mutants.py). Slow, but where a kernel breaks, it breaks
here in the same way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verify.kernels.mutants.memory import CHANCE, FP8, P_SCALE, STATE, Memory, Variant
from verify.spec.problem import Problem
from verify.spec.quantization import seen_keys


class Attention(torch.autograd.Function):
    """out and LSE, differentiable in q, k, v and bias."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, program: Program
    ) -> Any:
        """(out, lse)"""
        out, lse = program.forward(q, k, v, bias)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.bias, ctx.program = bias, program
        return out, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> Any:
        """(dq, dk, dv, dbias, None)"""
        q, k, v, out, lse = ctx.saved_tensors
        return (
            *ctx.program.backward(q, k, v, ctx.bias, out, lse, do, dlse, ctx.needs_input_grad[:4]),
            None,
        )


@dataclass(frozen=True)
class Program:
    """One call: what is to be computed, how, and what is wrong with it."""

    problem: Problem
    scale: float
    mask: Tensor | None
    slopes: Tensor | None
    softcap: float
    variant: Variant
    faults: frozenset[str]

    def has(self, fault: str) -> bool:
        """Whether it is switched on."""
        return fault in self.faults

    @functools.cached_property
    def kv_head(self) -> Tensor:
        """The key head of every query head."""
        h, p = torch.arange(self.problem.heads_q), self.problem
        return h % p.heads_kv if self.has("key head h % heads_kv") else h // p.group

    def memory(self, x: Tensor, name: str, like: Tensor | None = None) -> Memory:
        """A tensor as the kernel addresses it."""
        return Memory(x, self.faults, name, None if like is None else like.stride())

    def bounds(self, low: int, high: int) -> tuple[int, int]:
        """The keys [first, last) that rows [low, high) walk over."""
        p, offset = self.problem, self.problem.len_k - self.problem.len_q
        first, last = 0, p.len_k
        if self.has("keys in whole tiles only"):
            last = max(
                p.len_k // self.variant.keys * self.variant.keys, min(p.len_k, self.variant.keys)
            )
        if p.mask_as == "rule" and str(p.mask) == "causal_lower_right":
            shift = 0 if self.has("causal bound without the offset") else offset
            last = max(0, min(last, high + shift))
        if p.mask_as == "rule" and str(p.mask).startswith("window") and len(p.mask.parts) == 1:
            left = p.mask.parts[0][1][0]
            extra = self.variant.keys // 2 if self.has("window's first tile skipped") else 0
            first = 0 if left < 0 else max(0, min(low + offset - left + extra, p.len_k))
        return first, last

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """[B|1,H|1,rows,keys]"""
        rows = rows % 128 if self.has("rows counted in 7 bits") else rows
        p, i, j = self.problem, rows[:, None], keys[None, :]
        offset = p.len_k - p.len_q
        inside = (j < p.len_k + int(self.has("one key too many"))) | self.has(
            "keys beyond the end count"
        )
        if self.has("no mask for a single query") and p.len_q == 1:
            return inside[None, None]
        if p.mask_as == "rule" and str(p.mask) == "causal_lower_right":
            if self.has("upper left for lower right"):
                offset = 0
            if (
                self.has("diagonal tile of full blocks unmasked")
                and int(rows[-1]) - int(rows[0]) + 1 == self.variant.rows
            ):
                return inside[None, None].expand(1, 1, len(rows), len(keys)) & (
                    j <= int(rows[-1]) + offset
                )
            return (inside & (j <= i + offset - int(self.has("causal: strictly below"))))[
                None, None
            ]
        if p.mask_as == "rule" and str(p.mask).startswith("window") and len(p.mask.parts) == 1:
            left, right = p.mask.parts[0][1]
            left = left + 1 if left >= 0 and self.has("window one too wide") else left
            right = -1 if self.has("window's right edge ignored") else right
            return (
                inside
                & ((left < 0) | (j >= i + offset - left))
                & ((right < 0) | (j <= i + offset + right))
            )[None, None]
        if self.mask is None:
            return inside.expand(len(rows), len(keys))[None, None]
        mask = self.mask.expand(-1, -1, p.len_q, p.len_k)
        if self.has("mask remembered by shape"):
            mask = STATE.setdefault(("mask", mask.shape), mask)
        if self.has("mask of entry 0"):
            mask = mask[:1]
        known = torch.nn.functional.pad(
            mask, (0, self.variant.keys + 1, 0, self.variant.rows), value=True
        )
        return known[:, :, rows][:, :, :, keys] & inside

    def scores(
        self, q: Tensor, k: Tensor, bias: Memory | None, rows: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(S [B,H,rows,keys] with all but the mask, in nats; the softcap's slope)"""
        p, scale = self.problem, self.scale
        if self.has("scale remembered by shape"):
            scale = STATE.setdefault(("scale", p.shapes["q"], p.shapes["k"]), scale)
        if self.has("scale of the padded head dim") and p.scale is None:
            scale = 2.0 ** (-0.5 * math.ceil(math.log2(max(p.dim_qk, 16))))
        if self.has("always the default scale"):
            scale = p.dim_qk**-0.5
        scale = scale * scale if self.softcap and self.has("scale twice under a softcap") else scale
        if self.has("Q scaled in the input's dtype"):
            q, scale = (q * scale).to(self.dtype).float(), 1.0
        s = (q @ k.mT) * (scale * (2.0 / math.e if self.has("scale without log2(e)") else 1.0))
        s = s.nan_to_num() if self.has("NaN scores become 0") else s
        if self.has("S in the input's dtype"):
            s = s.to(self.dtype).float()
        slope = torch.ones(())
        if self.softcap and not self.has("softcap after the bias"):
            bend = torch.tanh(s / self.softcap)
            s, slope = self.softcap * bend, 1 - bend * bend
        if bias is not None:
            h = (
                torch.zeros(p.heads_q, dtype=torch.int64)
                if bias.shape[1] == 1 or self.has("bias of head 0")
                else self.heads
            )
            turned = self.has("bias transposed") and p.len_q == p.len_k
            added = bias.load(h, keys, rows).mT if turned else bias.load(h, rows, keys)
            s = s + added * (scale if self.has("bias scaled") else 1.0)
        if self.slopes is not None:
            offset = 0 if self.has("ALiBi from the upper left") else p.len_k - p.len_q
            slopes = self.slopes[self.kv_head] if self.has("ALiBi by key head") else self.slopes
            slopes = slopes.half().float() if self.has("slopes in FP16") else slopes
            s = s - slopes[:, None, None] * (rows[:, None] + offset - keys[None, :]).abs()
        if self.softcap and self.has("softcap after the bias"):
            s = self.softcap * torch.tanh(s / self.softcap)
        return s, slope

    @property
    def dtype(self) -> torch.dtype:
        """The inputs'."""
        return {
            "fp64": torch.float64,
            "fp32": torch.float32,
            "fp16": torch.float16,
            "bf16": torch.bfloat16,
        }[self.problem.dtype]

    @functools.cached_property
    def heads(self) -> Tensor:
        """0, 1, ..."""
        return torch.arange(self.problem.heads_q)

    def exp(self, x: Tensor) -> Tensor:
        """e^x"""
        if self.has("exponential off by 1e-3"):
            return torch.exp(x) * (1 + 1e-3 * torch.sin(1e3 * x))
        return torch.exp2(x * math.log2(math.e)) if self.variant.binary else torch.exp(x)

    def narrow(self, p: Tensor) -> Tensor:
        """P as the operand of P V."""
        if self.variant.fp8:
            scale = (
                1 / 16
                if self.has("P scaled by 1/16")
                else 2 * P_SCALE
                if self.has("P scaled beyond its range")
                else P_SCALE
            )
            return (p * scale).clamp(max=448.0).to(FP8).float() / scale
        if self.variant.exact_probs:
            return p
        if self.has("P truncated"):
            bits = {torch.float16: 13, torch.bfloat16: 16}.get(self.dtype, 0)
            return ((p.contiguous().view(torch.int32) >> bits) << bits).view(torch.float32)
        return p.to(self.dtype).float()

    def operands(
        self, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Memory, Memory, Memory, Tensor, Tensor]:
        """Q, K, V, and what S and P V are multiplied by [B,H,1,1]."""
        p, one = self.problem, torch.ones(())
        if not self.variant.fp8:
            like = q if self.has("k by q's strides") else None
            return (
                self.memory(q, "q"),
                self.memory(k, "k", like),
                self.memory(v, "v", k if self.has("v by k's strides") else None),
                one,
                one,
            )
        seen = None if self.has("scales of hidden keys") else seen_keys(p, q.device)
        q8, q_scale = self.quantised(q, None)
        (k8, k_scale), (v8, v_scale) = self.quantised(k, seen), self.quantised(v, seen)
        s_scale = q_scale * k_scale[:, self.kv_head]
        if self.has("K's scale twice"):
            s_scale = s_scale * k_scale[:, self.kv_head]
        o_scale = one if self.has("V's scale forgotten") else v_scale[:, self.kv_head]
        return self.memory(q8, "q"), self.memory(k8, "k"), self.memory(v8, "v"), s_scale, o_scale

    def quantised(self, x: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """x in e4m3 (as float32) by head, and the scales [B,H,1,1]."""
        x = x.float() if seen is None else torch.where(seen, x.float(), 0.0)
        largest = self.largest(x)
        if self.has("scale of head 0"):
            largest = largest[:, :1].expand_as(largest)
        scale = torch.where(largest == 0, 1.0, largest / 448.0)
        narrow = (x / scale).clamp(-448.0, 448.0)
        if self.has("quantised towards zero"):
            narrow = narrow * (1 - 2.0**-4)
        return narrow.to(torch.float8_e5m2 if self.has("e5m2 for e4m3") else FP8).float(), scale

    def largest(self, x: Tensor) -> Tensor:
        """Of each head [B,H,1,1]."""
        return x.abs().amax((2, 3), keepdim=True) if x.numel() else x.new_ones(*x.shape[:2], 1, 1)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """out [B,H,Q,Dv], lse [B,H,Q]"""
        p = self.problem
        if self.has("raises without queries") and not p.len_q:
            q.new_empty(0).view(1)  # fails as a launch with a grid of 0 does: not of its own accord
        key = (p.shapes["q"], p.shapes["k"], p.dtype)
        if self.has("result remembered by shape") and key in STATE:
            return STATE[key]
        out, lse = q.new_empty(p.shapes["out"]), torch.empty(p.shapes["lse"], dtype=torch.float32)
        if self.has("one output buffer for all calls"):
            out = STATE.setdefault(("out", key), out)
        Q, K, V, s_scale, o_scale = self.operands(q, k, v)
        B = None if bias is None else self.memory(bias, "bias")
        for low in range(0, p.len_q, self.variant.rows):
            rows = torch.arange(low, min(low + self.variant.rows, p.len_q))
            if self.has("last rows not stored") and len(rows) < self.variant.rows and low:
                continue
            parts = self.attend(Q, K, V, B, rows, s_scale)
            mine, row_lse = self.merged(parts)
            mine = mine * o_scale
            if (
                self.has("exchanged rows, one call in 20")
                and torch.rand((), generator=CHANCE) < 0.05
                and len(rows) > 1
            ):
                mine = mine.roll(1, 2)
            out[:, :, rows] = self.stored(mine)
            lse[:, :, rows] = row_lse.bfloat16().float() if self.has("LSE in BF16") else row_lse
        self.spoil(out, lse)
        if self.has("result remembered by shape"):
            STATE[key] = out, lse
        return out, lse

    def stored(self, out: Tensor) -> Tensor:
        """In the output's dtype."""
        if self.has("out 0.1 % too large"):
            out = out * 1.001
        if self.has("out rounded towards zero") and self.dtype in (torch.float16, torch.bfloat16):
            bits = 13 if self.dtype == torch.float16 else 16
            out = ((out.contiguous().view(torch.int32) >> bits) << bits).view(torch.float32)
        return out.to(self.dtype)

    def spoil(self, out: Tensor, lse: Tensor) -> None:
        """Faults of what is written, and where."""
        p = self.problem
        if self.has("grid of 8 heads") and p.batch * p.heads_q > 8:
            out.view(-1, *out.shape[2:])[8:] = torch.nan
        if self.has("values beyond dim_qk not stored") and p.dim_v > p.dim_qk:
            out[..., p.dim_qk :] = torch.nan
        if self.has("last bit wavers"):
            out.copy_(
                torch.where(
                    torch.rand(out.shape, generator=CHANCE) < 0.01,
                    torch.nextafter(out.float(), torch.tensor(9e9)).to(out.dtype)
                    * (1 + torch.finfo(out.dtype).eps),
                    out,
                )
            )
        if self.has("nothing stored without keys") and not p.len_k:
            out.fill_(torch.nan)
        if self.has("LSE of an empty row is 0"):
            lse.masked_fill_(lse == -torch.inf, 0.0)

    def attend(
        self, Q: Memory, K: Memory, V: Memory, B: Memory | None, rows: Tensor, s_scale: Tensor
    ) -> list[tuple[Tensor, ...]]:
        """(acc, row sum, maximum) of each part of the keys."""
        p, size = self.problem, self.variant.keys
        q = Q.load(self.heads, rows, torch.arange(p.dim_qk)) * s_scale
        first, last = self.bounds(int(rows[0]), int(rows[-1]) + 1)
        starts = list(range(first // size * size, last, size))
        starts = starts[::-1] if self.variant.reverse else starts
        starts = starts[:1] + starts if self.has("first tile twice") and first % size else starts
        share = -(-len(starts) // self.variant.splits) or 1
        return [
            self.walk(q, K, V, B, rows, starts[n * share : (n + 1) * share])
            for n in range(self.variant.splits)
        ]

    def walk(
        self, q: Tensor, K: Memory, V: Memory, B: Memory | None, rows: Tensor, starts: list[int]
    ) -> tuple[Tensor, ...]:
        """Online softmax over these tiles of keys."""
        p, shape = self.problem, (self.problem.batch, self.problem.heads_q, len(rows), 1)
        hidden = (
            -1e4
            if self.has("hidden scores are -1e4")
            else -1e30
            if self.has("hidden scores are finite")
            else -torch.inf
        )
        top = torch.full(shape, 0.0 if self.has("maximum starts at 0") else -torch.inf)
        total, acc = torch.zeros(shape), torch.zeros(*shape[:3], p.dim_v)
        for n, start in enumerate(starts):
            keys = torch.arange(start, start + self.variant.keys)
            wide = torch.arange(
                -(-p.dim_qk // 16) * 16 if self.has("head dim not masked") else p.dim_qk
            )
            k = K.load(self.kv_head, keys, wide, width=len(wide))
            v = V.load(
                self.kv_head,
                keys,
                torch.arange(p.dim_v),
                rows_below=2**40 if self.has("tail of V not masked") else None,
            )
            v = v.bfloat16().float() if self.has("V in BF16") else v
            left = torch.nn.functional.pad(q, (0, len(wide) - q.shape[-1]), value=1.0)
            s, _ = self.scores(left, k, B, rows, keys)
            seen = self.visible(rows, keys)
            late = self.has("hidden after the softmax")
            s = (
                s.masked_fill(~seen, hidden)
                if not late
                else s.masked_fill(keys >= p.len_k, -torch.inf)
            )
            old, top = top, torch.maximum(top, s.amax(-1, keepdim=True))
            if self.has("no maximum"):
                top = torch.zeros_like(top)
            base = top if self.has("first tile hidden") else top.masked_fill(top == -torch.inf, 0.0)
            w, decay = self.exp(s - base), self.exp(old - base)
            total = total * (1.0 if self.has("row sum not rescaled") else decay) + w.sum(
                -1, keepdim=True
            )
            if self.has("row sum in 16 bits"):
                total = total.bfloat16().float()
            w = w.masked_fill(~seen, 0.0) if late else w
            acc = acc * (1.0 if self.has("sum not rescaled") else decay) + self.narrow(w) @ v
            if self.has("one tile's sum in BF16") and n == 1:
                acc = acc.bfloat16().float()
        return acc, total, top

    def merged(self, parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
        """(out, lse) of the parts of the keys, each normalised, weighted by its LSE."""
        outs, lses = zip(*(self.normalised(*part) for part in parts), strict=True)
        if len(parts) == 1:
            return outs[0], lses[0]
        lse = (
            torch.stack(lses).amax(0)
            if self.has("merged LSE is the larger")
            else torch.logsumexp(torch.stack(lses), 0)
        )
        weights = [
            torch.exp(part - lse).masked_fill(lse == -torch.inf, 0.0)[..., None] for part in lses
        ]
        if self.has("parts averaged"):
            weights = [torch.full_like(w, 1 / len(parts)) for w in weights]
        return sum(w * o for w, o in zip(weights, outs, strict=True)), lse

    def normalised(self, acc: Tensor, total: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """acc / total, 0 where nothing was seen, and the LSE."""
        empty = total == 0
        out = (
            acc / total
            if self.has("division by an empty sum")
            else acc / total.masked_fill(empty, 1.0)
        )
        lse = (top + total.log()) if not self.has("LSE without the maximum") else total.log()
        lse = lse.masked_fill(empty, -torch.inf).squeeze(-1)
        return out, lse / math.log(2) if self.has("LSE in base 2") else lse

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        out: Tensor,
        lse: Tensor,
        do: Tensor,
        dlse: Tensor,
        needs: Any,
    ) -> tuple[Tensor | None, ...]:
        """dq, dk, dv, dbias: P recomputed from the LSE, delta = rowsum(do * out), one pass over
        tiles of keys.
        """
        p, rows = self.problem, torch.arange(self.problem.len_q)
        B = None if bias is None else self.memory(bias, "bias")
        columns, values = torch.arange(p.dim_qk), torch.arange(p.dim_v)
        qf, dof = (
            self.memory(q, "q").load(self.heads, rows, columns),
            self.memory(do, "do").load(self.heads, rows, values),
        )
        K, V = self.memory(k, "k"), self.memory(v, "v")
        delta = (dof * out.float()).sum(-1, keepdim=True)
        if self.has("delta forgotten"):
            delta = torch.zeros_like(delta)
        delta = delta.to(self.dtype).float() if self.has("delta in the input's dtype") else delta
        if not self.has("LSE's gradient dropped"):
            delta = delta - dlse.float()[..., None]
        empty = (lse == -torch.inf)[..., None]
        finite = (
            lse[..., None].float()
            if self.has("empty rows in the backward")
            else lse[..., None].float().masked_fill(empty, 0.0)
        )
        dq = torch.zeros(qf.shape)
        dk, dv = (
            torch.zeros(p.batch, p.heads_q, p.len_k, p.dim_qk),
            torch.zeros(p.batch, p.heads_q, p.len_k, p.dim_v),
        )
        dbias = torch.zeros(p.batch, p.heads_q, p.len_q, p.len_k) if bias is not None else None
        for start in range(0, p.len_k, self.variant.keys):
            keys = torch.arange(start, min(start + self.variant.keys, p.len_k))
            kf, vf = K.load(self.kv_head, keys, columns), V.load(self.kv_head, keys, values)
            s, slope = self.scores(qf, kf, B, rows, keys)
            w = self.exp(s - finite).masked_fill(~self.visible(rows, keys), 0.0)
            ds = (
                w
                * (dof @ vf.mT - delta)
                * (1.0 if self.has("softcap's slope forgotten") else slope)
            )
            if dbias is not None:
                dbias[..., keys] = (
                    ds
                    if not self.softcap or self.has("dbias after the softcap")
                    else w * (dof @ vf.mT - delta)
                )
            half, held = (
                ds.to(self.dtype).float(),
                w if self.variant.exact_probs else w.to(self.dtype).float(),
            )
            tail = len(keys) < self.variant.keys and start
            if not (tail and self.has("dq without the last keys")) and not (
                self.has("lost update") and torch.rand((), generator=CHANCE) < 0.1
            ):
                dq += half @ kf
            some = (
                slice(0, p.len_q // 64 * 64 or p.len_q)
                if self.has("dv without the last rows")
                else slice(None)
            )
            dv[:, :, keys] = held[:, :, some].mT @ dof[:, :, some]
            dk[:, :, keys] = (half.mT @ qf).roll(int(self.has("dk one key further")), 2)
        dq, dk = (
            dq * (1.0 if self.has("dq not scaled") else self.scale),
            dk * self.scale ** (2 if self.has("dk scaled twice") else 1),
        )
        if self.has("dv only with dq") and not needs[0]:
            dv = torch.zeros_like(dv)
        grouped = [t.unflatten(1, (p.heads_kv, p.group)) for t in (dk, dv)]
        if self.has("last head of the group"):
            dk, dv = (t[:, :, -1] for t in grouped)
        else:
            dk, dv = (t.sum(2) for t in grouped)
        if self.has("group sum in BF16"):
            dk = dk.bfloat16().float()
        gradients = [t.to(self.dtype) for t in (dq, dk, dv)]
        if dbias is None or bias is None:
            return *gradients, None
        over = [n for n in (0, 1) if bias.shape[n] == 1]
        if self.has("dbias of the first entry"):
            return *gradients, dbias[:1, : bias.shape[1]].expand(bias.shape).to(self.dtype)
        return *gradients, (dbias.sum(over, keepdim=True) if over else dbias).to(self.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, problem: Problem, mask: Tensor | None, bias: Tensor | None, slopes: Tensor | None,
    scale: float, softcap: float, variant: Variant, faults: frozenset[str], program: Callable[..., Program] = Program,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [B,H,Q,D], k [B,Hk,K,D], v [B,Hk,K,Dv] -> out [B,H,Q,Dv], lse [B,H,Q] float32; CPU.
    ValueError for other shapes.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tuple(tensor.shape) != problem.shapes[name] or tensor.dtype != q.dtype:
            raise ValueError(
                f"{name} is {list(tensor.shape)} in {tensor.dtype}, not "
                f"{list(problem.shapes[name])} in {q.dtype}"
            )
    if bias is not None:  # its rows are addressed one by one
        bias = bias.expand(-1, -1, problem.len_q, problem.len_k)
    return Attention.apply(
        q, k, v, bias, program(problem, scale, mask, slopes, softcap, variant, faults)
    )
