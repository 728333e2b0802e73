"""Known-wrong kernels that are more than a switch in the emulated one; all were once blind
(blind.py).
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from verify.kernels.mutants.memory import CHANCE, STATE, Memory
from verify.kernels.mutants.simulator import Program
from verify.spec.masks import KINDS, Mask


class OddColumn(Program):
    """Loads two columns at a time, and not the last of an odd number."""

    def operands(
        self, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Memory, Memory, Memory, Tensor, Tensor]:
        """Q without it."""
        if self.problem.dim_qk % 2 and self.problem.dim_qk > 1:
            q = torch.cat([q[..., :-1], torch.zeros_like(q[..., -1:])], -1)
        return super().operands(q, k, v)


class PaddedLSE(Program):
    """Stores the LSE with rows padded to tiles, in a tensor that has none."""

    def forward(self, *arguments) -> tuple[Tensor, Tensor]:
        """The LSE as its reader finds it."""
        out, lse = super().forward(*arguments)
        room = -(-lse.shape[2] // self.variant.rows) * self.variant.rows
        return out, torch.nn.functional.pad(lse, (0, room - lse.shape[2])).flatten()[
            : lse.numel()
        ].view(lse.shape)


class HalfScale(Program):
    """The scale is handed over in FP16."""

    def scores(self, *arguments) -> tuple[Tensor, Tensor]:
        """By another scale."""
        return Program.scores(
            replace(self, scale=float(torch.tensor(self.scale).half())), *arguments
        )


class GroupByHeads(Program):
    """Key head h // heads_kv for h // group: the same where there are as many groups as heads in
    one.
    """

    @property
    def kv_head(self) -> Tensor:
        """Not beyond the last."""
        return (self.heads // self.problem.heads_kv).clamp(max=self.problem.heads_kv - 1)


class Flushed(Program):
    """Subnormal results are 0."""

    def stored(self, out: Tensor) -> Tensor:
        """In the output's dtype."""
        return super().stored(out.masked_fill(out.abs() < torch.finfo(self.dtype).tiny, 0.0))


class NearOnly(Program):
    """e^x is 0 from -10 down, where it is still 4.5e-5."""

    def exp(self, x: Tensor) -> Tensor:
        """e^x"""
        return super().exp(x).masked_fill(x < -10.0, 0.0)


class ByEight(Program):
    """Reads the mask once for eight keys."""

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """By the first of the eight."""
        if self.mask is None:
            return super().visible(rows, keys)
        eighths = self.mask[..., torch.arange(self.problem.len_k) // 8 * 8]
        return Program.visible(replace(self, mask=eighths), rows, keys)


class FirstTileScale(Program):
    """FP8: a head's scale is from its first 64 rows; what is larger saturates."""

    def largest(self, x: Tensor) -> Tensor:
        """Of what it looks at."""
        return super().largest(x[:, :, :64])


def same_call(kind: type[Program], program: Program) -> Program:
    """The same call, made by another program."""
    return kind(*(getattr(program, field.name) for field in fields(Program)))


def _by_rule(program: Program, mask: Mask, len_k: Any) -> Tensor:
    """This mask [B|1,H|1,Q,K], its diagonals those of `len_k` keys."""
    p, i, j = (
        program.problem,
        torch.arange(program.problem.len_q)[:, None],
        torch.arange(program.problem.len_k),
    )
    heads = program.heads[:, None, None] if mask.per_head else None
    lift = lambda n: torch.tensor(n)[:, None, None, None]  # noqa: E731
    seen = mask.visible(i, j, p.len_q, len_k, batch=p.batch, head=heads, lift=lift)
    return seen.expand(-1, -1, p.len_q, p.len_k)


class StoredBeyond(Program):
    """Stores whole tiles of rows: those past the end (Q is 0 there) land on the next head's first
    rows, stored before.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Not with one tile, as heads come in order."""
        out, lse = super().forward(q, k, v, bias)
        beyond = -self.problem.len_q % self.variant.rows
        if self.problem.len_q > self.variant.rows:
            mean = v.float().mean(2, keepdim=True).nan_to_num()[:, self.kv_head].to(out.dtype)
            out.flatten(0, 1)[1:, :beyond] = mean.flatten(0, 1)[:-1]
        return out, lse


class DiagonalOfPadded(Program):
    """With padding, the lower-right diagonal or window ends at each entry's own last key, and not
    at the tensor's.
    """

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """By another offset for every entry."""
        lengths = [
            torch.tensor(numbers)
            for name, numbers in self.problem.mask.parts
            if KINDS[name].per_batch
        ]
        if self.mask is None or not lengths:
            return super().visible(rows, keys)
        own = torch.stack(lengths).amin(0).clamp(max=self.problem.len_k)[:, None, None, None]
        return Program.visible(
            replace(self, mask=_by_rule(self, self.problem.mask, own)), rows, keys
        )


class ZeroIsAll(Program):
    """A batch entry with 0 keys is taken for one without padding (`length or len_k`)."""

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """With every key of such an entry."""
        p = self.problem
        new = p.mask.of_entries(lambda numbers: [n or p.len_k for n in numbers])
        if self.mask is None or new == p.mask:
            return super().visible(rows, keys)
        return Program.visible(replace(self, mask=_by_rule(self, new, p.len_k)), rows, keys)


class Early(Memory):
    """Of two buffers; now and then what is in one is still the tile before."""

    def load(self, h: Tensor, rows: Tensor, columns: Tensor, **how) -> Tensor:
        """From the third tile on."""
        late = len(rows) > 0 and rows[0] >= 128 and torch.rand((), generator=CHANCE) < 0.03
        return super().load(h, rows - 128 if late else rows, columns, **how)


class MissingBarrier(Program):
    """Reads a tile of V from shared memory before it has arrived, now and then: that of two tiles
    ago is there.
    """

    def memory(self, x: Tensor, name: str, like: Tensor | None = None) -> Memory:
        """V by two buffers."""
        return Early(x, self.faults, name) if name == "v" else super().memory(x, name, like)


class ByQueryHead(Program):
    """Key heads by the query head's number."""

    @property
    def kv_head(self) -> Tensor:
        """Not beyond the last."""
        return self.heads.clamp(max=self.problem.heads_kv - 1)


class ScaleByQueryHead(Program):
    """FP8: the scales of K and V are read at the query head's number; K and V themselves are
    not.
    """

    def operands(
        self, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Memory, Memory, Memory, Tensor, Tensor]:
        """With scales of other heads where these are grouped."""
        return same_call(ByQueryHead, self).operands(q, k, v)


class WrappedExponent(Program):
    """e^x by a polynomial, and an addition to the exponent's 8 bits, which wrap around below 2^-127
    (-88 nats).
    """

    def exp(self, x: Tensor) -> Tensor:
        """e^x; hidden scores are 0 all the same."""
        wrapped = (torch.remainder(x / math.log(2) + 127.0, 256.0) - 127.0) * math.log(2)
        return super().exp(torch.where(torch.isfinite(x) & (x < -127.0 * math.log(2)), wrapped, x))


class PlannedLength(Program):
    """How far to walk was planned by the first call with such queries, and is not planned again
    when there are more keys.
    """

    def bounds(self, low: int, high: int) -> tuple[int, int]:
        """Within the plan."""
        first, last = super().bounds(low, high)
        return first, min(
            last, STATE.setdefault(("plan", self.problem.shapes["q"]), self.problem.len_k)
        )


class EmptyFirstRow(Program):
    """A tile of rows whose first row sees no key is taken for empty as a whole."""

    def attend(
        self, Q: Memory, K: Memory, V: Memory, B: Memory | None, rows: Tensor, s_scale: Tensor
    ) -> list[tuple[Tensor, ...]]:
        """Nothing, of such a tile."""
        blind = ~self.visible(rows[:1], torch.arange(self.problem.len_k)).any(-1, keepdim=True)
        parts = super().attend(Q, K, V, B, rows, s_scale)
        return [
            (a.masked_fill(blind, 0.0), n.masked_fill(blind, 0.0), m.masked_fill(blind, -torch.inf))
            for a, n, m in parts
        ]


class EndsWhereHidden(Program):
    """The walk over the keys ends at the first tile that is hidden as a whole (`break` for
    `continue`): right if causal.
    """

    def walk(
        self, q: Tensor, K: Memory, V: Memory, B: Memory | None, rows: Tensor, starts: list[int]
    ) -> tuple[Tensor, ...]:
        """As far as that."""
        hidden = [
            not self.visible(rows, torch.arange(start, start + self.variant.keys)).any()
            for start in starts
        ]
        return super().walk(
            q, K, V, B, rows, starts[: hidden.index(True)] if any(hidden) else starts
        )


class PackedHeads(Program):
    """The heads of a group are packed into rows, head by head; the causal diagonal takes them for
    packed row by row.
    """

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """[1,H,rows,keys] where it goes wrong."""
        p = self.problem
        if p.mask_as != "rule" or not p.mask.names <= {"causal_lower_right", "causal_upper_left"}:
            return super().visible(rows, keys)
        taken = ((self.heads % p.group)[:, None] * p.len_q + rows) // p.group
        return p.mask.visible(
            taken[None, :, :, None], keys, p.len_q, p.len_k, lift=lambda n: n[0]
        ) & (keys < p.len_k)


class DistanceInBytes(Program):
    """ALiBi's distance is kept in 8 bits with a sign: 128 keys to the left are as far as 128, 129
    as far as 127.
    """

    def scores(
        self, q: Tensor, k: Tensor, bias: Memory | None, rows: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """With the wrapped distance."""
        s, slope = Program.scores(replace(self, slopes=None), q, k, bias, rows, keys)
        if self.slopes is None:
            return s, slope
        far = rows[:, None] + self.problem.len_k - self.problem.len_q - keys
        return s - self.slopes[:, None, None] * ((far + 128) % 256 - 128).abs(), slope


class EarlyLSE(Program):
    """Now and then a tile's LSE is stored before the row sum has been added up over the four
    threads of a row; out is not.
    """

    def normalised(self, acc: Tensor, total: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """With the LSE of a quarter of the sum."""
        out, lse = super().normalised(acc, total, top)
        return out, lse - math.log(4) if torch.rand((), generator=CHANCE) < 0.1 else lse


class HiddenPart(Program):
    """The keys are in two parts; one that a row sees nothing of has the LSE 0 in the merge, unless
    no row of a tile sees any.
    """

    def attend(self, *arguments) -> list[tuple[Tensor, ...]]:
        """In two parts."""
        return Program.attend(replace(self, variant=replace(self.variant, splits=2)), *arguments)

    def merged(self, parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
        """With the weight e^0; rows that see no key at all are right."""
        parts = [part for part in parts if (part[1] != 0).any()] or parts[:1]
        some = torch.stack([total != 0 for _, total, _ in parts]).any(0)
        gaps = [(total == 0) & some for _, total, _ in parts]
        return super().merged(
            [
                (a, n.masked_fill(g, 1.0), m.masked_fill(g, 0.0))
                for (a, n, m), g in zip(parts, gaps, strict=True)
            ]
        )


class LargestSigned(Program):
    """FP8: a head's scale is from its largest value, not its largest magnitude; what is further
    below 0 saturates.
    """

    def largest(self, x: Tensor) -> Tensor:
        """Of each head [B,H,1,1]."""
        return x.amax((2, 3), keepdim=True) if x.numel() else super().largest(x)


class SequenceOfTile(Program):
    """Of packed sequences, a tile of rows is taken for the sequence of its first row: right if they
    begin at tiles.
    """

    def visible(self, rows: Tensor, keys: Tensor) -> Tensor:
        """[1,1,rows,keys] where it goes wrong."""
        p, size = self.problem, self.variant.rows
        if p.mask_as != "rule" or p.mask.names != {"blocks"}:
            return super().visible(rows, keys)
        first = (rows // size * size)[:, None]
        return (
            p.mask.visible(first, keys, p.len_q, p.len_k, lift=lambda n: n[0]) & (keys < p.len_k)
        )[None, None]


class ColumnALiBi(Program):
    """Under a causal rule ALiBi is slope * key for -slope * distance: the same in every row but for
    the LSE, which moves.
    """

    def scores(
        self, q: Tensor, k: Tensor, bias: Memory | None, rows: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """With the softmax that it should have."""
        p = self.problem
        if self.slopes is None or p.mask_as != "rule" or "causal_lower_right" not in p.mask.names:
            return super().scores(q, k, bias, rows, keys)
        s, slope = Program.scores(replace(self, slopes=None), q, k, bias, rows, keys)
        return s + self.slopes[:, None, None] * keys, slope


class ZeroScale(Program):
    """FP8: a head of zeros (or of hidden keys alone) has the scale 0, by which it is divided."""

    def quantised(self, x: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """With 0 / 0 there."""
        narrow, scale = super().quantised(x, seen)
        return narrow.masked_fill(
            (narrow == 0).flatten(2).all(-1)[..., None, None], torch.nan
        ), scale


class UnscaledMaximum(Program):
    """The maximum is of Q K^T before the scale, as if that were never negative: then it is the
    minimum, and e^x overflows.
    """

    def walk(
        self, q: Tensor, K: Memory, V: Memory, B: Memory | None, rows: Tensor, starts: list[int]
    ) -> tuple[Tensor, ...]:
        """With a negative scale and nothing added to the scores; right until P is beyond its
        format.
        """
        if (
            self.scale >= 0
            or self.softcap
            or B is not None
            or self.slopes is not None
            or not starts
        ):
            return super().walk(q, K, V, B, rows, starts)
        keys = torch.cat([torch.arange(start, start + self.variant.keys) for start in starts])
        s, _ = self.scores(
            q, K.load(self.kv_head, keys, torch.arange(self.problem.dim_qk)), B, rows, keys
        )
        s = s.masked_fill(~self.visible(rows, keys), torch.inf)
        base = s.amin(-1, keepdim=True)
        w = self.exp(s - base.masked_fill(base == torch.inf, 0.0)).masked_fill(s == torch.inf, 0.0)
        acc = self.narrow(w) @ V.load(self.kv_head, keys, torch.arange(self.problem.dim_v))
        return acc, w.sum(-1, keepdim=True), base.masked_fill(base == torch.inf, -torch.inf)


class QuotientTanh(Program):
    """The softcap's tanh is (e^2x - 1) / (e^2x + 1): inf / inf from x = 44.4 up, fine as far below
    0 as one likes.
    """

    def scores(
        self, q: Tensor, k: Tensor, bias: Memory | None, rows: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """NaN where the score is more than 44 softcaps."""
        s, slope = super().scores(q, k, bias, rows, keys)
        if not self.softcap:
            return s, slope
        raw, _ = Program.scores(replace(self, softcap=0.0, slopes=None), q, k, None, rows, keys)
        over = torch.exp(2 * raw / self.softcap) == torch.inf
        return s.masked_fill(over, torch.nan), slope.masked_fill(over, torch.nan)


class UnwrittenPart(Program):
    """Four parts of the keys, by a workspace: one with nothing to do is not written, and is merged
    as an earlier call left it.
    """

    def attend(self, *arguments) -> list[tuple[Tensor, ...]]:
        """As the workspace has it."""
        parts = Program.attend(replace(self, variant=replace(self.variant, splits=4)), *arguments)
        keys = [("part", n, int(arguments[4][0]), part[0].shape) for n, part in enumerate(parts)]
        STATE.update(
            {key: part for key, part in zip(keys, parts, strict=True) if (part[1] != 0).any()}
        )
        return [STATE.get(key, part) for key, part in zip(keys, parts, strict=True)]


class SwappedBack(Program):
    """With one query, a group's heads are its rows; the LSE comes back as [group, key head] for
    [key head, group].
    """

    def forward(self, *arguments) -> tuple[Tensor, Tensor]:
        """The LSE of other heads; out is right."""
        p, (out, lse) = self.problem, super().forward(*arguments)
        return out, lse.unflatten(1, (p.heads_kv, p.group)).transpose(1, 2).flatten(
            1, 2
        ) if p.len_q == 1 else lse


PROGRAMS: dict[str, tuple[str, str, type[Program]]] = {
    "last of odd columns": ("B", "oracle", OddColumn),
    "LSE by padded rows": ("G", "oracle", PaddedLSE),
    "scale in FP16": ("J", "oracle", HalfScale),
    "key head h // heads_kv": ("D", "grouped-heads", GroupByHeads),
    "subnormal results flushed": ("K", "oracle", Flushed),
    "small weights dropped": ("K", "oracle", NearOnly),
    "mask read for eight keys": ("C", "one-hot", ByEight),
    "scale of the first tile": ("I", "oracle", FirstTileScale),
    "rows past the end stored": ("B", "oracle", StoredBeyond),
    "diagonal ends at the padded length": ("C", "hidden-keys-appended", DiagonalOfPadded),
    "padded length 0 is all": ("A", "empty-row", ZeroIsAll),
    "V read before it has arrived": ("F", "repeat", MissingBarrier),
    "FP8 scales by query head": ("I", "grouped-heads", ScaleByQueryHead),
    "exponent wraps around": ("K", "oracle", WrappedExponent),
    "number of keys planned once": ("L", "call-sequence", PlannedLength),
    "tile with an empty first row": ("A", "oracle", EmptyFirstRow),
    "walk ends at a hidden tile": ("C", "edges", EndsWhereHidden),
    "causal rows of packed heads": ("D", "grouped-heads", PackedHeads),
    "ALiBi's distance in 8 bits": ("E", "oracle", DistanceInBytes),
    "LSE stored too early": ("F", "repeat", EarlyLSE),
    "hidden part weighs 1": ("G", "oracle", HiddenPart),
    "FP8 scale of the largest value": ("I", "oracle", LargestSigned),
    "sequence of a tile's first row": ("C", "edges", SequenceOfTile),
    "causal ALiBi by column": ("G", "alibi-bias", ColumnALiBi),
    "FP8 scale of zeros": ("I", "uniform", ZeroScale),
    "maximum before a negative scale": ("J", "query-scaling", UnscaledMaximum),
    "tanh by a quotient": ("K", "saturated-softcap", QuotientTanh),
    "part not written": ("L", "call-sequence", UnwrittenPart),
    "LSE of packed heads swapped": ("M", "grouped-heads", SwappedBack),
}
"""Class, the property that must catch it, and how it goes wrong; those of class I are in FP8."""
