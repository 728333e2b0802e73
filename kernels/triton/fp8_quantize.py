"""Q, K and V to 8 bits, before FP8 attention: means, incoherent processing, scales and rounding, by
choice (`Quantisation`).

Two passes over each tensor: the largest magnitude of every block of rows and column, from which the
scales of any granularity follow; then the rounded tensor. The rotation is a product with a matrix
of 1 and -1, exact until its float32 sum.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from verify.kernels.triton.launch import descriptor, loadable
from verify.kernels.triton.tiles import INTERPRET, dot, rounded, wide
from verify.spec.arithmetic import Quantisation
from verify.spec.quantization import FIT, key_count, key_mean, rotation

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
NEAR, FAR = tl.constexpr(1 - FIT), tl.constexpr(1 + FIT)
"""By what a fitted row is multiplied: within these."""
ROWS = 128
"""Rows of a block: the largest tile, so that every tile has one scale."""


@dataclass(frozen=True)
class Quantised:
    """q and k [B,H,n,C] and v transposed [B,Hk,C,n'] in 8 bits, columns C padded; what each stands
    for is it times its scale.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_scale: torch.Tensor
    """float32 [B,H,Q]"""
    k_scale: torch.Tensor
    """float32 [B,Hk,blocks of ROWS, or 1]"""
    v_scale: torch.Tensor
    """float32 [B,Hk,C]"""
    v_mean: torch.Tensor
    """float32 [B,Hk,C], added to the output"""
    shift: torch.Tensor | None
    """float32 [B,H,Q]: q^ times the mean of K, which every score of the row lacks"""


RUNTIME = "matrix mean seen found scale toward units shift lost fitted heads blocks length padded group masked".split()
RUNTIME += [f"scale_{axis}" for axis in "bhrc"]
"""Arguments on whose values Triton must not specialise, for each kind would compile the kernels
anew.
"""


@triton.jit
def _tile(x, matrix, mean, seen, masked, b, h, heads, start, length, ROTATED: tl.constexpr, ROWS: tl.constexpr,
          BLOCK_D: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """x[b, h, start : start + ROWS] as float32 [ROWS, BLOCK_D]: turned, freed of its mean, 0 where
    outside or seen by none.
    """
    rows, columns = (start + tl.arange(0, ROWS))[:, None], tl.arange(0, BLOCK_D)[None, :]
    known = (
        tl.load(seen + b * length + rows, mask=((rows < length) & (masked != 0)) != 0, other=1) != 0
    )
    values = x.load([b, h, start, 0]).reshape(ROWS, BLOCK_D)
    if ROTATED:
        turn = tl.load(matrix + tl.arange(0, BLOCK_D)[:, None] * BLOCK_D + columns)
        turned = dot(values, turn, tl.zeros([ROWS, BLOCK_D], tl.float32), INTERPRET)
    else:
        turned = wide(values, INTERPRET)
    inside = ((rows < length) & known) != 0
    return tl.where(inside, turned - tl.load(mean + (b * heads + h) * BLOCK_D + columns), 0.0)


@triton.jit(do_not_specialize=RUNTIME)
def _largest(
    x, matrix, mean, seen, masked, found, heads, blocks, length,
    ROTATED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """found [B,H,blocks,BLOCK_D]: the largest magnitude in each column of each block of rows."""
    at = tl.program_id(0)
    b, h, start = at // blocks // heads, at // blocks % heads, at % blocks * ROWS
    x_tile = _tile(
        x, matrix, mean, seen, masked, b, h, heads, start, length, ROTATED, ROWS, BLOCK_D, INTERPRET
    )
    tl.store(found + at.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D), tl.max(tl.abs(x_tile), 0))


@triton.jit(do_not_specialize=RUNTIME)
def _narrow(
    x, matrix, mean, seen, masked, scale, scale_b, scale_h, scale_r, scale_c, toward, out, lost, units, shift,
    heads, blocks, length, padded, group, norm, fitted,
    ROTATED: tl.constexpr, TRANSPOSED: tl.constexpr, BALANCED: tl.constexpr, QUERY: tl.constexpr, SHIFTED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """out [B,H,length,BLOCK_D], or TRANSPOSED [B,H,BLOCK_D,padded], is x / scale; lost
    [B,H,blocks,BLOCK_D] sums x - out scale.

    Of a QUERY: units [B,H,length], what its rows are times, fitted or not; shift [B,H,length] =
    (out units) . toward.
    """
    bh, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    b, h, start = (bh // heads).to(tl.int32), (bh % heads).to(tl.int32), block * ROWS
    x_tile = _tile(
        x, matrix, mean, seen, masked, b, h, heads, start, length, ROTATED, ROWS, BLOCK_D, INTERPRET
    )
    rows, columns = (start + tl.arange(0, ROWS))[:, None], tl.arange(0, BLOCK_D)[None, :]
    unit = tl.load(
        scale + b.to(tl.int64) * scale_b + h * scale_h + block * scale_r + columns * scale_c
    )
    divided = tl.div_rn(x_tile, tl.broadcast_to(unit, x_tile.shape))
    square = tl.sum(divided * divided, 1)
    narrow = rounded(divided, out.dtype.element_ty, INTERPRET)
    left = wide(narrow, INTERPRET)
    product = tl.sum(left * divided, 1)
    if BALANCED:
        at = lost + tl.program_id(0).to(tl.int64) * BLOCK_D + columns
        tl.store(at, tl.sum(divided - left, 0)[None, :] * unit)
    if TRANSPOSED:
        tl.store(out + (bh * BLOCK_D + columns) * padded + rows, narrow, mask=rows < padded)
    else:
        tl.store(out + (bh * length + rows) * BLOCK_D + columns, narrow, mask=rows < length)
    if QUERY:
        row = start + tl.arange(0, ROWS)
        at = bh * length + row
        found = ((product > 0) & (fitted != 0)) != 0
        fit = tl.where(found, tl.div_rn(square, tl.where(found, product, 1.0)), 1.0)
        fit = norm * tl.minimum(tl.maximum(fit, NEAR), FAR)
        first = tl.load(scale + b.to(tl.int64) * scale_b + h * scale_h + block * scale_r)
        tl.store(units + at, first * fit, mask=row < length)
        if SHIFTED:
            along = tl.load(toward + (b * (heads // group) + h // group) * BLOCK_D + columns)
            tl.store(shift + at, tl.sum(left * unit * along, 1) * fit * norm, mask=row < length)


@dataclass(frozen=True)
class _Operand:
    """One of q, k, v on its way to 8 bits."""

    x: torch.Tensor
    how: Quantisation
    turn: torch.Tensor | None
    mean: torch.Tensor
    seen: torch.Tensor | None
    width: int

    def _launch(self, function, *arguments, **constants) -> None:
        batch, heads, length, _ = self.x.shape
        seen = (
            self.mean.view(torch.uint8) if self.seen is None else self.seen
        )  # never read where nothing is hidden
        function[(triton.cdiv(length, ROWS) * batch * heads,)](
            descriptor(self.x, ROWS, self.width),
            *(
                self.mean if self.turn is None else self.turn,
                self.mean,
                seen,
                int(self.seen is not None),
                *arguments,
            ),
            ROTATED=self.turn is not None,
            ROWS=ROWS,
            BLOCK_D=self.width,
            INTERPRET=INTERPRET,
            num_warps=16 if self.width == 256 and self.turn is not None else 8,
            **constants,
        )

    def scales(self, over: tuple[int, ...]) -> torch.Tensor:
        """Of groups that span these dimensions of [B,H,blocks,columns]: float32, 1 long there."""
        batch, heads, length, _ = self.x.shape
        blocks = triton.cdiv(length, ROWS)
        found = torch.empty(
            batch, heads, blocks, self.width, dtype=torch.float32, device=self.x.device
        )
        self._launch(_largest, found, heads, blocks, length)
        scale = found.amax(over, keepdim=True) / torch.finfo(FORMATS[self.how.format]).max
        return scale.masked_fill_(scale == 0, 1.0)

    def narrowed(
        self,
        scale: torch.Tensor,
        *,
        transposed: bool = False,
        query: bool = False,
        toward: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """(in 8 bits; V: sums of what blocks lack [B,Hk,blocks,width]; Q: a scale by row, its
        product with `toward`)
        """
        batch, heads, length, dim = self.x.shape
        padded, blocks = (
            -(-length // 16) * 16,
            triton.cdiv(length, ROWS),
        )  # rows of a transposed tensor that TMA can address
        shape = (
            (batch, heads, self.width, padded) if transposed else (batch, heads, length, self.width)
        )
        out = torch.empty(shape, dtype=FORMATS[self.how.format], device=self.x.device)
        fresh = functools.partial(torch.empty, dtype=torch.float32, device=self.x.device)
        lost = fresh(batch, heads, blocks, self.width) if transposed and self.how.balanced else None
        units = fresh(batch, heads, length) if query else scale
        shift = None if toward is None else fresh(batch, heads, length)
        apart = (0 if n == 1 else step for n, step in zip(scale.shape, scale.stride(), strict=True))
        given = [
            scale if t is None else t for t in (toward, out, lost, units, shift)
        ]  # what is not wanted is never touched
        group = 1 if toward is None else heads // toward.shape[1]
        norm = 1.0 if self.turn is None else rotation(dim).shape[0] ** -0.5
        self._launch(
            _narrow, scale, *apart, *given, heads, blocks, length, padded, group, norm, int(self.how.fitted),
            TRANSPOSED=transposed, BALANCED=lost is not None, QUERY=query, SHIFTED=shift is not None,
        )  # fmt: skip
        return out, lost, units, shift


def quantise(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    how: Quantisation,
    width: int,
    seen: torch.Tensor | None,
) -> Quantised:
    """q [B,H,Q,D], k [B,Hk,K,D], v [B,Hk,K,Dv] in fp16 or bf16, any strides, to 8 bits, columns
    padded to `width`.

    seen: bool [B|1,1,K,1], the keys that some query sees; None: all. Their means and largest
    magnitudes are all that counts.
    """
    turn = _turn(q.shape[3], width, q.dtype, q.device) if how.rotated else None
    norm = rotation(q.shape[3]).shape[0] ** -0.5 if how.rotated else 1.0
    pad, flags = torch.nn.functional.pad, None
    if how.centred:
        k_mean, v_mean = (pad(key_mean(t, seen), (0, width - t.shape[3])) for t in (k, v))
        k_mean = k_mean if turn is None else (k_mean.double() @ turn.double()).float()
    else:
        k_mean, v_mean = (torch.zeros(*t.shape[:2], 1, width, device=t.device) for t in (k, v))
    if seen is not None:
        flags = seen.expand(k.shape[0], 1, k.shape[2], 1).contiguous().view(torch.uint8)
    q, k, v = (loadable(t) for t in (q, k, v))
    no_mean = torch.zeros(*q.shape[:2], 1, width, device=q.device)
    over = (0, 1, 2, 3) if how.rows is None else (3,) if how.rows else (2, 3)
    from_q, from_k = (
        _Operand(q, how, turn, no_mean, None, width),
        _Operand(k, how, turn, k_mean, flags, width),
    )
    from_v = _Operand(v, how, None, v_mean, flags, width)
    q_scale, k_scale = from_q.scales(over), from_k.scales(over)
    v_scale = from_v.scales({"rows": over, "head": (2, 3), "columns": (2,)}[how.values])
    q8, _, q_units, shift = from_q.narrowed(
        q_scale, query=True, toward=k_mean if how.centred else None
    )
    k8, (v8, lost, *_) = from_k.narrowed(k_scale)[0], from_v.narrowed(v_scale, transposed=True)
    if lost is not None:
        v_mean = v_mean + lost.sum(2, keepdim=True) / key_count(v.shape[2], seen)
    k_units = (k_scale * norm).expand(*k.shape[:2], -1, 1).squeeze(3).contiguous()
    v_units, v_mean = (
        t.expand(*v.shape[:2], 1, width).squeeze(2).contiguous() for t in (v_scale, v_mean)
    )
    return Quantised(q8, k8, v8, q_units, k_units, v_units, v_mean, shift)


@functools.cache
def _turn(dim: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The rotation [width,width], not normalised, 0 beyond the columns that it mixes."""
    signs = rotation(dim)
    pad = width - signs.shape[0]
    return torch.nn.functional.pad(signs, (0, pad, 0, pad)).to(dtype=dtype, device=device)
