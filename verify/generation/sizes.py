"""What a drawn case may cost, and how it is cut down to that."""

from __future__ import annotations

from dataclasses import dataclass, replace

SCORES_AT_MOST = {"cpu": 2**17, "cuda": 2**23}
"""batch * heads_q * len_q * len_k of a case."""
INTERPRETED_TILE = (64, 128)
"""(queries, keys): an interpreted kernel takes as long for a part of a tile as for a whole one."""
TILES_AT_MOST = 4
"""batch * heads_q * tiles of a case of an interpreted kernel: 10 to 70 ms each."""


@dataclass(frozen=True)
class Size:
    """What the cost of a problem depends on most."""

    batch: int
    heads_q: int
    heads_kv: int
    len_q: int
    len_k: int

    def cost(self, tile: tuple[int, int]) -> int:
        """Tiles, of which parts count as whole ones; scores, where a tile is one of them."""
        rows, columns = (max(1, -(-n // t)) for n, t in zip(self.lengths, tile, strict=True))
        return self.batch * self.heads_q * rows * columns

    @property
    def lengths(self) -> tuple[int, int]:
        """(len_q, len_k)"""
        return self.len_q, self.len_k


def affordable(size: Size, device: str, *, interpreted: bool) -> Size:
    """The size, cut down to what a case may cost: the batch first, then heads to the fewest of
    their kind, and for an interpreted kernel the longer of the lengths, both where they are equal.
    """
    tile = INTERPRETED_TILE if interpreted else (1, 1)
    most = TILES_AT_MOST if interpreted else SCORES_AT_MOST[device]
    head = replace(size, batch=1, heads_q=1, heads_kv=1).cost(tile)
    size = replace(size, batch=max(1, min(size.batch, most // head)))
    if size.cost(tile) > most:
        fewest = _fewest(size.heads_q, size.heads_kv)
        size = replace(size, heads_q=fewest[0], heads_kv=fewest[1])
    if not interpreted:
        return size
    entry = replace(size, batch=1).cost(tile)
    size = replace(size, batch=max(1, min(size.batch, most // entry)))
    while size.cost(tile) > most and max(size.lengths) > 1:
        size = _shorter(size, tile)
    return size


def _fewest(heads_q: int, heads_kv: int) -> tuple[int, int]:
    if heads_q == 1:
        return 1, 1
    return (2, 1) if heads_q > heads_kv else (2, 2)


def _shorter(size: Size, tile: tuple[int, int]) -> Size:
    """One tile less of the longer length."""
    if size.len_q == size.len_k:
        n = max(1, size.len_q - min(tile))
        return replace(size, len_q=n, len_k=n)
    if size.len_q > size.len_k:
        return replace(size, len_q=max(1, size.len_q - tile[0]))
    return replace(size, len_k=max(1, size.len_k - tile[1]))
