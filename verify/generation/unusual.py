"""Unusual sizes, drawn now and then: past usual thresholds, or two that coincide.

Each carries how often it is drawn, what it changes and which problems are of it, and is added here
and nowhere else. All are cut down to what a case may cost (sizes.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

from verify.environment import GRID
from verify.generation.choices import Choices
from verify.generation.shapes import LENGTHS, LONG
from verify.generation.sizes import Size
from verify.sandbox.domain import LARGE_DIMS
from verify.spec.problem import Problem

MANY = {"cpu": (2048, 2049, 2176), "cuda": (33_000, 33_025, 65_537)}
"""Lengths beyond any usual one."""
VAST = 33_001
"""Keys whose 64 columns are more than 2**21 numbers."""
ENTRIES = (9, 64)
"""Large batches."""
GROUP, HEADS = 12, 34
"""Large ones."""
SHORT = (1, 1, 1, 2, 3, 5)
EMPTY = ((1, 0), (0, 1), (3, 0), (0, 0))
"""(len_q, len_k) where nothing is seen or nobody looks."""
OUT_OF = 200
Taken: TypeAlias = "dict[str, tuple[Any, ...]]"
Change: TypeAlias = "Callable[[Choices, Size, Taken, str], Size]"


@dataclass(frozen=True)
class Unusual:
    """An unusual size: drawn `often` times in OUT_OF cases of a device."""

    change: Change
    """(choices, a usual size, what the kernel takes, device) -> the unusual one"""
    often: dict[str, int]
    of: Callable[[Problem, str], bool]
    """Whether a problem on a device has it."""
    shorter: bool
    """Where it is too large, lengths are cut before anything else."""
    padded: bool
    """A mask of single batch entries is put beside it."""
    quantised: bool
    """It is drawn for kernels that quantise, and for no others."""
    times: int
    """So many times as many elements as else a case may have."""


UNUSUAL: dict[str, Unusual] = {}


def unusual(
    of: Callable[[Problem, str], bool],
    *,
    cpu: int,
    cuda: int,
    shorter: bool = False,
    padded: bool = False,
    quantised: bool = False,
    times: int = 1,
) -> Callable[[Change], Change]:
    """Register one by its function's name. Arguments: Unusual's fields; how often on each
    device.
    """

    def register(change: Change) -> Change:
        flags = shorter, padded, quantised, times
        UNUSUAL[change.__name__] = Unusual(change, {"cpu": cpu, "cuda": cuda}, of, *flags)
        return change

    return register


@cache
def turns(device: str, *, quantised: bool) -> tuple[Unusual | None, ...]:
    """What the size of a case is of, each as often as it is drawn; None: usual."""
    drawn = [u for u in UNUSUAL.values() if quantised or not u.quantised]
    some = [u for u in drawn for _ in range(u.often[device])]
    return (*(None,) * (OUT_OF - len(some)), *some)


@unusual(lambda p, device: p.len_k >= min(MANY[device]) > 8 >= p.len_q, cpu=8, cuda=10)
def many_keys(choose: Choices, size: Size, taken: Taken, device: str) -> Size:
    """Far more keys than usual, a few queries."""
    return size.but(len_q=choose.of(SHORT), len_k=choose.of(MANY[device]))


@unusual(lambda p, device: p.len_q >= min(MANY[device]) > 8 >= p.len_k, cpu=4, cuda=6)
def many_queries(choose: Choices, size: Size, taken: Taken, device: str) -> Size:
    """Far more queries than usual, a few keys."""
    narrow = [d for d in taken["dims"] if max(d) <= 64] or taken["dims"]
    dim_qk, dim_v = choose.of(narrow)
    thin = size.but(dim_qk=dim_qk, dim_v=dim_v)
    return thin.but(len_q=choose.of(MANY[device]), len_k=choose.of((1, 2, 3, 5, 8)))


@unusual(
    lambda p, device: p.batch * p.heads_kv * p.len_k * p.dim_qk > 2**21, cpu=1, cuda=4, times=7
)
def vast(choose: Choices, size: Size, taken: Taken, device: str) -> Size:
    """A tensor of more than 2**21 elements."""
    dims = [d for d in taken["dims"] if d[0] == 64] or [(size.dim_qk, size.dim_v)]
    size = size.but(batch=1, heads_q=min(2, size.heads_q), heads_kv=1, dim_qk=dims[0][0])
    return size.but(dim_v=dims[0][1], len_q=1, len_k=VAST)


@unusual(lambda p, device: p.batch * p.heads_q > GRID, cpu=0, cuda=5, shorter=True)
def many_rows(choose: Choices, size: Size, taken: Taken, device: str) -> Size:
    """More heads of all entries than a GPU's grid has blocks along one axis."""
    narrow = size.but(len_q=choose.of(SHORT), len_k=choose.of((1, 2, 3, 8, 17)))
    dims = min(taken["dims"], key=lambda d: abs(d[0] - 16) + abs(d[1] - 16))
    return narrow.but(batch=GRID // size.heads_q + 1, dim_qk=dims[0], dim_v=dims[1])


@unusual(lambda p, device: p.batch >= min(ENTRIES), cpu=10, cuda=8, shorter=True)
def many_entries(choose: Choices, size: Size, taken: Taken, device: str) -> Size:
    """A large batch."""
    return size.but(batch=choose.of(ENTRIES))


@unusual(lambda p, device: p.heads_q >= HEADS or p.group >= GROUP, cpu=12, cuda=8, shorter=True)
def many_heads(choose: Choices, size: Size, taken: Taken, device: str) -> Size:
    """Many heads, or a large group."""
    return _with_heads(choose, size, taken, lambda q, kv: q >= HEADS or q // kv >= GROUP)


@unusual(
    lambda p, device: p.dim_qk >= 256 and p.group > 1 and p.len_k > max(LENGTHS),
    cpu=8,
    cuda=8,
    shorter=True,
)
def wide(choose: Choices, size: Size, taken: Taken, device: str) -> Size:
    """The largest usual head dim, groups and many keys."""
    size = _with_heads(choose, size, taken, lambda q, kv: 1 < q // kv < GROUP)
    usual = [d for d in taken["dims"] if max(d) <= 256] or taken["dims"]
    dim_qk, dim_v = max(usual, key=sum)
    len_q, len_k = choose.of((1, 2, 5, 16, 33)), choose.of(LONG)
    return size.but(dim_qk=dim_qk, dim_v=dim_v, len_q=len_q, len_k=len_k)


@unusual(lambda p, device: p.batch == p.heads_kv > 1, cpu=8, cuda=8, shorter=True, padded=True)
def entries_as_heads(choose: Choices, size: Size, taken: Taken, device: str) -> Size:
    """As many batch entries as key heads, of different lengths."""
    size = _with_heads(choose, size, taken, lambda q, kv: 1 < kv <= min(ENTRIES))
    return size.but(batch=size.heads_kv)


@unusual(lambda p, device: p.len_k == p.dim_qk > 1, cpu=8, cuda=8)
def length_as_dim(choose: Choices, size: Size, taken: Taken, device: str) -> Size:
    """As many keys as columns, now and then as many queries."""
    return size.but(len_q=choose.of((size.len_q, size.dim_qk)), len_k=size.dim_qk)


@unusual(lambda p, device: p.heads_kv == p.group > 1, cpu=4, cuda=4, shorter=True)
def heads_as_group(choose: Choices, size: Size, taken: Taken, device: str) -> Size:
    """As many key heads as query heads for each."""
    return _with_heads(choose, size, taken, lambda q, kv: q == kv * kv > 1)


@unusual(lambda p, device: p.len_k == 1, cpu=10, cuda=10)
def one_key(choose: Choices, size: Size, taken: Taken, device: str) -> Size:
    """A single key."""
    return size.but(len_q=choose.of((size.len_q, size.len_q, size.len_q, 1)), len_k=1)


@unusual(lambda p, device: min(p.len_q, p.len_k) == 0, cpu=8, cuda=8)
def nothing(choose: Choices, size: Size, taken: Taken, device: str) -> Size:
    """No keys, no queries, or neither."""
    without = {(q == 0, k == 0) for q, k in taken["lengths"]}
    lengths = [(q, k) for q, k in EMPTY if (q == 0, k == 0) in without]
    len_q, len_k = choose.of(lengths or [size.lengths])
    return size.but(len_q=len_q, len_k=len_k)


@unusual(
    lambda p, device: p.dim_qk > 50 and p.dim_qk & (p.dim_qk - 1) > 0 and p.len_q > 64 < p.len_k,
    cpu=16,
    cuda=16,
    quantised=True,
)
def beyond_a_tile(choose: Choices, size: Size, taken: Taken, device: str) -> Size:
    """Columns that fill no block, and enough of them to tell honest errors; rows and keys of more
    than one tile.
    """
    odd = [d for d in taken["dims"] if min(d) > 50 and d[0] & (d[0] - 1)] or taken["dims"]
    dim_qk, dim_v = choose.of([d for d in odd if not {*d} & {*LARGE_DIMS}] or odd)
    lengths = [n for n in LENGTHS if n > 128]
    return size.but(
        dim_qk=dim_qk, dim_v=dim_v, len_q=choose.of((65, 113)), len_k=choose.of(lengths)
    )


def _with_heads(
    choose: Choices, size: Size, taken: Taken, wanted: Callable[[int, int], bool]
) -> Size:
    """With heads of a kind, where the kernel takes some."""
    some = [heads for heads in taken["heads"] if wanted(*heads)]
    heads_q, heads_kv = choose.of(some or [(size.heads_q, size.heads_kv)])
    return size.but(heads_q=heads_q, heads_kv=heads_kv)
