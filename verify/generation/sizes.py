"""What a drawn case may cost, and how it is cut down to that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

from verify.spec.problem import Problem

SCORES_AT_MOST = {"cpu": 2**16, "cuda": 2**23}
"""batch * heads_q * len_q * len_k of a case."""
ELEMENTS_AT_MOST = {"cpu": 5 * 2**17, "cuda": 17 * 2**20}
"""Of Q, K and V, which are drawn one by one, and JUDGED times those of what a kernel returns."""
JUDGED = 4
"""So many times as long as drawing it takes it to bound and compare an element."""
INTERPRETED_TILE = (64, 128)
"""(queries, keys): an interpreted kernel takes as long for a part of a tile as for a whole one."""
TILES_AT_MOST = 4
"""batch * heads_q * tiles of a case of an interpreted kernel: 10 to 70 ms each."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What the cost of a problem depends on most."""

    batch: int
    heads_q: int
    heads_kv: int
    len_q: int
    len_k: int
    dim_qk: int
    dim_v: int

    @classmethod
    def of(cls, problem: Problem) -> Size:
        """That of a problem."""
        return cls(**{name: getattr(problem, name) for name in cls.__annotations__})

    def but(self, **changes: int) -> Size:
        """The size with some of it changed."""
        return replace(self, **changes)

    @property
    def fields(self) -> dict[str, Any]:
        """As fields of a problem."""
        return dict(self.__dict__)

    @property
    def lengths(self) -> tuple[int, int]:
        """(len_q, len_k)"""
        return self.len_q, self.len_k

    def elements(self, *, grads: bool) -> int:
        """Of Q, K and V and, so many times as they count, of what is returned."""
        of_out, rows = self.heads_q * self.len_q * self.dim_v, self.heads_q * self.len_q
        of_inputs = rows * self.dim_qk + self.heads_kv * self.len_k * (self.dim_qk + self.dim_v)
        return self.batch * (JUDGED * of_out + (JUDGED if grads else 1) * of_inputs)

    def cost(self, tile: tuple[int, int]) -> int:
        """Tiles, of which parts count as whole ones; scores, where a tile is one of them."""
        rows, columns = (max(1, -(-n // t)) for n, t in zip(self.lengths, tile, strict=True))
        return self.batch * self.heads_q * rows * columns


@dataclass(frozen=True)
class Cost:
    """What a case may cost on a device; twice as many scores where two heads are the fewest."""

    device: str
    interpreted: bool = False
    grads: bool = False
    times: int = 1
    """So many times as many elements as usual."""

    def affords(self, size: Size) -> bool:
        """Whether it costs no more than that."""
        twice = 2 if size.heads_q == 2 and not self.interpreted else 1
        return size.cost(self._tile) <= twice * self._most and self._few(size)

    def cut(self, size: Size, *, lengths: bool = False) -> Size:
        """The size, cut down to it: the batch first, then heads to the fewest of their kind, the
        batch again, the lengths at last; first of all if that is asked for and can be enough.
        """
        if self.affords(size):
            return size
        if lengths:
            size = size if self._can(size) else _fewest(size)
            size = self._shortened(self._fewer(size, size.but(batch=1, len_q=1, len_k=1)))
        size = self._fewer(size, size.but(batch=1, heads_q=1, heads_kv=1))
        size = size if self.affords(size) else _fewest(size)
        if not self.affords(size):
            size = self._fewer(size, size.but(batch=1))
        return self._shortened(size)

    def thinner(self, size: Size) -> Size:
        """The size with the longer length alone cut down, as far as the scores ask for it."""
        most = max(1, self._most // (size.batch * size.heads_q * max(1, min(size.lengths))))
        if size.len_q > size.len_k:
            return size.but(len_q=min(size.len_q, most))
        return size.but(len_k=min(size.len_k, most))

    def _can(self, size: Size) -> bool:
        """Whether it is affordable if it is short."""
        return self.affords(size.but(len_q=1, len_k=1))

    @property
    def _tile(self) -> tuple[int, int]:
        return INTERPRETED_TILE if self.interpreted else (1, 1)

    @property
    def _most(self) -> int:
        return TILES_AT_MOST if self.interpreted else SCORES_AT_MOST[self.device]

    @property
    def _elements(self) -> int:
        return self.times * ELEMENTS_AT_MOST[self.device]

    def _few(self, size: Size) -> bool:
        return size.elements(grads=self.grads) <= self._elements

    def _fewer(self, size: Size, one: Size) -> Size:
        """With no more batch entries than are affordable of this one; one at least."""
        by_elements = self._elements // max(1, one.elements(grads=self.grads))
        most = min(size.batch, self._most // one.cost(self._tile), by_elements)
        return size.but(batch=max(1, most))

    def _shortened(self, size: Size) -> Size:
        """Shorter lengths that stand to each other as they did: as few tiles less as need be; of
        scores, both by the same factor.
        """
        if not self.interpreted and not self.affords(size):
            most = max(1, self._most // (size.batch * size.heads_q))
            scores = max(1, size.len_q * size.len_k)
            q = min(size.len_q, max(1, isqrt(most * size.len_q * size.len_q // scores)))
            k = q if size.len_q == size.len_k else min(size.len_k, max(1, most // max(1, q)))
            size = size.but(len_q=q, len_k=k)
        while not self.affords(size) and max(size.lengths) > 1:
            parts = tuple(-(-n // 8) for n in size.lengths)
            size = _shorter(size, INTERPRETED_TILE if self.interpreted else parts)
        return size


def _fewest(size: Size) -> Size:
    """With the fewest heads of their kind."""
    heads_q = min(2, size.heads_q)
    return size.but(heads_q=heads_q, heads_kv=1 if size.heads_q > size.heads_kv else heads_q)


def _shorter(size: Size, by: tuple[int, ...]) -> Size:
    """The longer length less by so much; both where they are equal."""
    if size.len_q == size.len_k:
        n = _less(size.len_q, min(by))
        return size.but(len_q=n, len_k=n)
    if size.len_q > size.len_k:
        return size.but(len_q=_less(size.len_q, by[0]))
    return size.but(len_k=_less(size.len_k, by[1]))


def _less(n: int, by: int) -> int:
    """Less by a tile, or where next to nothing is left, one less than a tile."""
    return n - by if n - by > by // 8 else max(1, min(n, by) - 1)
