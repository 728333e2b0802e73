"""What the host does before a Triton kernel is launched: mask rules and their integers, who sees
whom, tile sizes, TMA.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from verify.kernels.triton.tiles import (
    BIAS,
    GENERAL,
    INTERPRET,
    LOG2E,
    MASK,
    RULES,
    SLOPES,
    SOFTCAP,
    WHOLE,
)
from verify.spec.masks import KINDS, Mask, full
from verify.spec.problem import Problem

RUNTIME = [
    f"{tensor}_{axis}" for tensor in ("q", "k", "v", "do", "out", "mask", "bias") for axis in "bhrc"
]
RUNTIME += "q k v do out dq dk dv dbias mask bias slopes integers terms plan plan_b lse lse2 dlse delta".split()
RUNTIME += "batch heads group blocks len_q len_k dim_qk dim_v flags".split()
"""Arguments on whose values (1, a multiple of 16) Triton must not specialise, for each kind would
compile the kernel anew.
"""
_RULES = tuple(kind.rule for kind in KINDS.values() if not kind.matrix and kind.rule is not full)
FAR = 2**30
"""An integer of a mask beyond it says no more than it does, and its sum with a position stays
within int32.
"""


class Tiles(NamedTuple):
    """BLOCK_M query rows by BLOCK_N keys, and how Triton runs them."""

    rows: int
    keys: int
    warps: int = 4
    stages: int = 2


TMA = {
    "forward": {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 3), 256: Tiles(128, 64, 8, 2)},
    "keys": {64: Tiles(128, 64, 4, 2), 128: Tiles(64, 64, 4, 2)},
    "dk": {256: Tiles(64, 128, 8, 1)},
    "dv": {256: Tiles(64, 128, 8, 2)},
    "rows": {64: Tiles(64, 64, 4, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(128, 64, 8, 1)},
}
"""16-bit formats through TMA, by the padded head dim; chosen on an H200. dK and dV share a pass
(`keys`) where the registers hold both sums.
"""
TMA_WHOLE = {"forward": {64: Tiles(64, 128, 4, 2), 128: TMA["forward"][128]}}
"""Where nothing is hidden, for the passes that are faster with a kernel of their own for it."""
LARGEST = 128
"""Rows or keys of the largest tile."""
POINTERS = {
    "forward": {128: Tiles(128, 32, 8, 2), 256: Tiles(64, 16, 4, 2)},
    "keys": {128: Tiles(32, 128, 8, 2), 256: Tiles(16, 64, 8, 2)},
    "rows": {128: Tiles(128, 32, 8, 2), 256: Tiles(64, 16, 4, 2)},
}
"""16-bit formats otherwise, within 99 KiB of shared memory; chosen for few spilled registers."""
SINGLE = {
    "forward": {64: Tiles(64, 32, 8, 1), 256: Tiles(32, 16, 8, 1)},
    "keys": {64: Tiles(32, 32, 8, 1), 256: Tiles(16, 16, 8, 1)},
    "rows": {64: Tiles(64, 32, 8, 1), 256: Tiles(32, 16, 8, 1)},
}
"""FP32: products become single FMAs, all unrolled, so small tiles; none spills."""
INTERPRETED = Tiles(128, 64)
"""Large, for numpy, but several along the keys."""


@functools.cache
def has_tma(device: torch.device) -> bool:
    """Whether this is a Hopper or a larger GPU: the sizes in TMA need its shared memory too. The
    interpreter has both.
    """
    if INTERPRET:
        return True
    shared = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)[
        "max_shared_mem"
    ]
    return torch.cuda.get_device_capability(device) >= (9, 0) and shared >= 227 * 1024


@functools.cache
def _rules() -> tuple[Any, ...]:
    """_RULES for Triton. The interpreter calls them as they are: its jit wants `tl` among the
    globals of every function.
    """
    return _RULES if INTERPRET else tuple(triton.jit(rule) for rule in _RULES)


@functools.lru_cache(maxsize=256)
def _integers(mask: Mask, batch: int, device: torch.device) -> torch.Tensor:
    """(which of _RULES, x, y) of each term and batch entry: int32 [terms, batch, 3]."""
    terms = [
        [(_RULES.index(term.rule), *(min(n, FAR) for n in pair)) for pair in term.integers]
        for term in mask.terms(batch)
    ]
    return torch.tensor(terms, dtype=torch.int32, device=device).view(-1, batch, 3)


@functools.lru_cache(maxsize=256)
def plan(
    mask: Mask,
    batch: int,
    len_q: int,
    len_k: int,
    tile: tuple[int, int],
    device: torch.device,
    *,
    by_keys: bool,
) -> torch.Tensor:
    """Which blocks of keys each block of rows walks over (or of rows, each block of keys): int32
    [batch or 1, blocks, 4].

    The four: the first block with anything visible, the longest run of wholly visible blocks
    (first, last + 1), the last + 1 with anything visible. From the mask's own rule at every
    position, the way of FlexAttention's create_block_mask.
    """
    entries = batch if mask.per_batch else 1
    across, down = triton.cdiv(len_k, tile[1]), triton.cdiv(len_q, tile[0])
    k = torch.arange(across * tile[1], device=device, dtype=torch.int32)
    some, every = [], []
    step = max(1, 2**24 // (entries * tile[0] * k.numel()))
    for first in range(0, down, step):
        q = torch.arange(
            first * tile[0], min(first + step, down) * tile[0], device=device, dtype=torch.int32
        )[:, None]
        lift = lambda integers: torch.tensor(integers, device=device).clamp(max=FAR).view(-1, 1, 1)  # noqa: E731
        seen = mask.visible(q, k, len_q, len_k, batch=entries, lift=lift) & (k < len_k)
        seen = seen.expand(entries, *seen.shape[-2:]).view(entries, -1, tile[0], across, tile[1])
        beyond = (q >= len_q).view(-1, tile[0], 1, 1)
        some.append((seen & ~beyond).any(4).any(2))
        every.append((seen | beyond).all(4).all(2))
    found, whole = torch.cat(some, 1), torch.cat(every, 1)
    if by_keys:
        found, whole = found.mT, whole.mT
    at = torch.arange(found.shape[2], device=device).expand(found.shape)
    high = torch.where(found, at + 1, 0).amax(2)
    low = torch.where(found, at, high[..., None]).amin(2)
    run = at - torch.where(whole, -1, at).cummax(2).values
    length, last = run.max(2)
    full_low = torch.where(length > 0, last - length + 1, low)
    table = torch.stack([low, full_low, full_low + length, high], 2).int().contiguous()
    if table.is_cuda:
        torch.cuda.current_stream(
            device
        ).synchronize()  # the next call may come from another stream
    return table


@functools.cache
def _no_slopes(device: torch.device) -> torch.Tensor:
    return torch.zeros(1, device=device)


def descriptor(t: torch.Tensor, rows: int, dim: int) -> TensorDescriptor:
    """What TMA needs to move [rows, dim] of a tensor [B,H,n,D]."""
    shape = list(t.shape)
    apart = [16 if n == 1 else stride for n, stride in zip(shape[:3], t.stride()[:3], strict=True)]
    return TensorDescriptor(t, shape, [*apart, 1], [1, 1, rows, dim])


def strides(tensors: Mapping[str, torch.Tensor | None]) -> dict[str, int]:
    """One by one: Triton specialises on what is in a tuple."""
    four = {name: (0, 0, 0, 0) if t is None else t.stride() for name, t in tensors.items()}
    return {
        f"{name}_{axis}": stride
        for name, strides in four.items()
        for axis, stride in zip("bhrc", strides, strict=True)
    }


def _describable(t: torch.Tensor) -> bool:
    """Whether TMA can load it: rows of contiguous elements, every address a multiple of 16 bytes,
    nothing repeated.
    """
    shape, strides, size = t.shape, t.stride(), t.itemsize
    dense = strides[3] == 1 or shape[3] == 1
    apart = [stride * size for n, stride in zip(shape[:3], strides[:3], strict=True) if n > 1]
    return (
        dense
        and t.data_ptr() % 16 == 0
        and all(stride > 0 and stride % 16 == 0 and stride < 2**40 for stride in apart)
    )


def loadable(t: torch.Tensor) -> torch.Tensor:
    """The tensor [B,H,n,D] as TMA can load it: a copy where it cannot."""
    return t if _describable(t) else _room(t, t.shape).copy_(t)


def _room(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """With rows that TMA can address."""
    return like.new_empty((*shape[:3], -(-shape[3] // 8) * 8))[..., : shape[3]]


class Shape(NamedTuple):
    """The sizes of a call, `group` query heads to a key head, by the names of the kernels'
    arguments.
    """

    batch: int
    heads: int
    group: int
    len_q: int
    len_k: int
    dim_qk: int
    dim_v: int


@dataclass
class Launch:
    """One call of attention: all that its kernels are told beside q, k, v and dO."""

    q: torch.Tensor
    shape: Shape
    rules: Mask
    seen: torch.Tensor | None
    """Boolean mask [B|1,H|1,Q|1,K|1], True = take part."""
    bias: torch.Tensor | None
    slopes: torch.Tensor | None
    scale: float
    softcap: float

    @classmethod
    def of(
        cls,
        problem: Problem,
        q: torch.Tensor,
        mask: Mask | torch.Tensor | None,
        bias: torch.Tensor | None,
        slopes: torch.Tensor | None,
        scale: float,
        softcap: float,
    ) -> Self:
        """The launch of a problem that was `checked`."""
        p = problem
        return cls(
            q=q.detach(),
            shape=Shape(p.batch, p.heads_q, p.group, p.len_q, p.len_k, p.dim_qk, p.dim_v),
            rules=p.mask,
            seen=mask if isinstance(mask, torch.Tensor) else None,
            bias=None if bias is None else bias.detach(),
            slopes=None if slopes is None else slopes.contiguous(),
            scale=float(scale),
            softcap=float(softcap),
        )

    @functools.cached_property
    def flags(self) -> int:
        """SOFTCAP | MASK | BIAS | SLOPES"""
        given = (
            (SOFTCAP, self.softcap or None),
            (MASK, self.seen),
            (BIAS, self.bias),
            (SLOPES, self.slopes),
        )
        return sum(bit.value for bit, value in given if value is not None)

    whole_tiles: ClassVar[dict[str, dict[int, Tiles]]] = TMA_WHOLE
    """Those where nothing is hidden, for passes that have a kernel of their own for it."""

    @property
    def tiles(self) -> dict[str, dict[int, Tiles]]:
        """Tile sizes by pass and head dim: they depend on neither batch nor lengths nor layouts."""
        return TMA if self.plain else SINGLE if self.q.dtype == torch.float32 else POINTERS

    def kernel(self, name: str) -> tuple[int, Tiles]:
        """The kind of kernel of a pass, and its tile."""
        nothing_hidden = (
            self.plain and self.rules.names == {"full"} and self.shape.len_k % LARGEST == 0
        )
        whole = self.whole_tiles.get(name, {}).get(self.dim) if nothing_hidden else None
        kind = WHOLE if whole else RULES if self.plain else GENERAL
        return kind.value, INTERPRETED if INTERPRET else whole or self.tiles[name][self.dim]

    @functools.cached_property
    def dim(self) -> int:
        """The padded head dim: one of few, so that few kernels are compiled."""
        return next(
            size
            for size in sorted(self.tiles["forward"])
            if max(self.shape.dim_qk, self.shape.dim_v) <= size
        )

    @functools.cached_property
    def tma(self) -> bool:
        """Whether tensors of this dtype are moved by TMA where they can be."""
        return has_tma(self.q.device) and self.q.dtype != torch.float32

    @functools.cached_property
    def plain(self) -> bool:
        """Whether nothing but rules and a positive scale changes a score, and TMA loads and stores
        the tensors.
        """
        return self.tma and self.flags == 0 and self.scale > 0

    def operand(self, t: torch.Tensor) -> torch.Tensor:
        """The tensor as the kernels load it: a copy where TMA is used and cannot load it."""
        return loadable(t) if self.plain else t

    def room(self, shape: Sequence[int]) -> torch.Tensor:
        """Where a kernel can store: contiguous, or with rows that TMA can address."""
        return _room(self.q, shape) if self.plain else self.q.new_empty(shape)

    def results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for out [B,H,Q,Dv] and for lse [B,H,Q], float32."""
        rows = (self.shape.batch, self.shape.heads, self.shape.len_q)
        return self.room((*rows, self.shape.dim_v)), self.q.new_empty(rows, dtype=torch.float32)

    def passes(self) -> list[tuple[str, dict[str, bool]]]:
        """The passes over the keys that give dK and dV, and which of the two each gives."""
        if self.dim in self.tiles["keys"] or INTERPRET:
            return [("keys", {"DK": True, "DV": True})]
        return [("dk", {"DK": True, "DV": False}), ("dv", {"DK": False, "DV": True})]

    def common(
        self, kind: int, tile: Tiles, *, by_keys: bool, flags: int = 0
    ) -> tuple[int, dict[str, Any]]:
        """(how many programs: one per block of rows, or of keys; the arguments that all kernels of
        this tile take)
        """
        batch, heads, group, len_q, len_k, *_ = self.shape
        device = self.q.device
        table = plan(self.rules, batch, len_q, len_k, tile[:2], device, by_keys=by_keys)
        mask, bias = (
            None if t is None else t.expand(batch, heads, len_q, len_k)
            for t in (self.seen, self.bias)
        )
        linear = self.flags & ~MASK.value != 0 or self.scale == 0
        integers = _integers(self.rules, batch, device)
        entries, blocks, _ = table.shape
        return blocks * batch * (heads // group if by_keys else heads), {
            **strides({"mask": mask, "bias": bias}),
            "mask": (table if mask is None else mask).view(torch.uint8),
            "bias": self.q if bias is None else bias,
            "slopes": _no_slopes(device) if self.slopes is None else self.slopes,
            "integers": integers,
            "terms": integers.shape[0],
            "rules": _rules(),
            "plan": table,
            "plan_b": table.stride(0) if entries > 1 else 0,
            **self.shape._asdict(),
            "blocks": blocks,
            "flags": self.flags | flags,
            "before": self.scale if linear else math.copysign(1.0, self.scale),
            "factor": LOG2E.value if linear else abs(self.scale) * LOG2E.value,
            "softcap": self.softcap,
            "KIND": kind,
            "INTERPRET": INTERPRET,
            "BLOCK_M": tile.rows,
            "BLOCK_N": tile.keys,
            "BLOCK_D": self.dim,
            "STAGES": tile.stages,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "enable_fp_fusion": True,  # said aloud: Triton 3.9 warns that its default will change
        }

    def run(
        self,
        function: Any,
        name: str,
        loads: dict[str, torch.Tensor],
        stores: dict[str, torch.Tensor],
        others: dict[str, torch.Tensor | float],
        flags: int = 0,
        **constants: bool,
    ) -> None:
        """Launch the pass `name`, a program per block of rows or of keys. loads: `operand`s;
        stores: `room`.
        """
        kind, tile = self.kernel(name)
        programs, arguments = self.common(
            kind, tile, by_keys=name in ("keys", "dk", "dv"), flags=flags
        )
        rows = {
            tensor: tile.keys if tensor in ("k", "v", "dk", "dv") else tile.rows
            for tensor in loads | stores
        }
        function[(programs,)](
            **{
                n: descriptor(t, rows[n], self.dim) if self.plain else t
                for n, t in (loads | stores).items()
            },
            **strides(loads),
            **others,
            **arguments,
            **constants,
        )


@contextlib.contextmanager
def quiet(q: torch.Tensor) -> Iterator[None]:
    """On the tensor's GPU; numpy warns where a GPU gives Inf or NaN in silence."""
    with torch.cuda.device_of(q), warnings.catch_warnings():
        if INTERPRET:
            warnings.simplefilter("ignore", RuntimeWarning)
        yield
