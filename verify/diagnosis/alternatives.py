"""Other problems that a wrong kernel may have computed instead of the one that it was given."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from verify.diagnosis.trial import Trial
from verify.oracles import float64
from verify.reference.reference import Truth
from verify.spec.case import Inputs, visibility
from verify.spec.layouts import laid_out
from verify.spec.masks import FULL, KINDS, Mask, hiding
from verify.spec.problem import Problem

LN2 = math.log(2.0)
STEPS = 8
"""Newton steps towards the scale that a kernel used."""
PROBES = 64
"""So many calls may be made to see which keys have weight."""
Other = tuple[str, Problem, Inputs]
"""(what is wrong, with a place for the tensor's name; the problem and the inputs in its place)"""


def alternatives(trial: Trial, p: Problem, x: Inputs) -> Iterator[Other]:
    """Every other problem: with another mask, fewer keys, other scores, other heads."""
    yield from _other_masks(p, x)
    yield from _tails(trial, p, x)
    yield from _other_scores(p, x)
    yield from _other_slices(p, x)


def _other_masks(p: Problem, x: Inputs) -> Iterator[Other]:
    parts = p.mask.parts
    exchanged = p.mask.mirrored
    yield f"the mask's alignment ({{}} is that of {exchanged})", p.but(mask=exchanged), x
    same = p.mask.of_entries(lambda args: args[:1] * p.batch)
    yield "the mask's batch entry ({} is that of entry 0's for all)", p.but(mask=same), x
    for n, (name, args) in enumerate(parts):
        rest = Mask(parts[:n] + parts[n + 1 :] or FULL.parts)
        yield f"the mask ({{}} is that without {name})", p.but(mask=rest), x
        moved = (
            (*args[:i], args[i] + by, *args[i + 1 :]) for i in range(len(args)) for by in (-1, 1)
        )
        for other in (Mask(((name, a),)) for a in moved if KINDS[name].legal(a)):
            yield (
                f"the mask's edge ({{}} is that of {other}, not of {Mask(((name, args),))})",
                p.but(mask=rest & other),
                x,
            )


def _tails(trial: Trial, p: Problem, x: Inputs) -> Iterator[Other]:
    for n in trial.ends(p.len_k):
        mask = p.mask & hiding([n] * p.batch)
        yield (
            f"the tail of the keys ({{}} is that of the first {n} of {p.len_k})",
            p.but(mask=mask),
            x,
        )
    for n in {p.len_k + 1, *(-(-p.len_k // tile) * tile for tile in trial.tiles)} - {p.len_k}:
        if p.mask == FULL and p.bias == "none":
            longer = {name: F.pad(getattr(x, name), (0, 0, 0, n - p.len_k)) for name in ("k", "v")}
            yield (
                f"the tail of the keys ({{}} is that of {n}, zeros beyond the {p.len_k})",
                p.but(len_k=n),
                replace(x, **longer),
            )


def _other_scores(p: Problem, x: Inputs) -> Iterator[Other]:
    scale = p.softmax_scale
    scales = {
        "1": 1.0,
        "scale ** 2": scale**2,
        "scale * ln 2": scale * LN2,
        "scale / ln 2": scale / LN2,
        "-scale": -scale,
    }
    scales |= {"1 / sqrt(dim_qk)": p.dim_qk**-0.5, "1 / sqrt(dim_v)": p.dim_v**-0.5}
    for what, other in scales.items():
        yield (
            f"the scale ({{}} is that of {what} = {other:.6g}, not {scale:.6g})",
            p.but(scale=other),
            x,
        )
    if p.softcap:
        yield "softcap ({} is that without it)", p.but(softcap=0.0), x
    if p.bias != "none":
        yield (
            "the bias ({} is that without it)",
            p.but(bias="none"),
            replace(x, bias=None, slopes=None),
        )
    if x.bias is not None:
        yield (
            "the bias ({} is that of scale * bias)",
            p,
            replace(x, bias=x.bias.to(torch.float64) * scale),
        )
    if x.slopes is not None:
        rows, keys = (
            torch.arange(n, device=x.q.device, dtype=torch.float64) for n in (p.len_q, p.len_k)
        )
        bias = (-x.slopes[:, None, None] * (rows[:, None] - keys).abs()).expand(p.batch, -1, -1, -1)
        yield (
            "ALiBi ({} is that of its diagonal in the upper left)",
            p.but(bias="bhqk"),
            replace(x, bias=bias, slopes=None),
        )


def _other_slices(p: Problem, x: Inputs) -> Iterator[Other]:
    """Keys, values, bias of another head or batch entry."""
    for names in (("k",), ("v",), ("k", "v"), *([("bias",)] if x.bias is not None else [])):
        of, tensors = " and ".join(names), {n: getattr(x, n) for n in names}
        first = {n: t[:1].expand_as(t) for n, t in tensors.items()}
        yield f"the batch entry ({{}} is that of {of} of entry 0 for all)", p, replace(x, **first)
        first = {n: t[:, :1].expand_as(t) for n, t in tensors.items()}
        yield f"the head ({{}} is that of {of} of head 0 for all)", p, replace(x, **first)
    yield from _other_heads(p, x)


def _other_heads(p: Problem, x: Inputs) -> Iterator[Other]:
    """Another key head for each query head, by its number."""
    if p.heads_kv == 1:
        return
    number = torch.arange(p.heads_q, device=x.k.device)
    maps = {
        "h % heads_kv": number % p.heads_kv,
        "heads_kv - 1 - h // group": p.heads_kv - 1 - number // p.group,
        "h // group + 1": (number // p.group + 1) % p.heads_kv,
    }
    for what, head in maps.items():
        moved = {n: getattr(x, n)[:, head] for n in ("k", "v")}
        yield (
            f"the key head ({{}} is that of {what}, not h // group)",
            p.but(heads_kv=p.heads_q),
            replace(x, **moved),
        )


def other_weights(trial: Trial, p: Problem, x: Inputs) -> Iterator[str]:
    """Which keys have weight: asked with a V that has the unit vector of another key in each
    column.
    """
    for start in range(0, min(p.len_k, PROBES * p.dim_v), p.dim_v):
        unit, n = (
            torch.zeros(p.shapes["v"], dtype=x.v.dtype, device=x.v.device),
            min(p.dim_v, p.len_k - start),
        )
        unit[:, :, start : start + n, :n] = torch.eye(n)
        inputs = replace(x, v=laid_out(unit))
        got = trial.again("out", inputs)
        if got is None or not got.isfinite().all():
            return
        off = replace(trial, known=Truth(p, inputs, float64.exact(p, inputs))).off("out", got)[
            ..., :n
        ]
        seen, weight = visibility(p, x.q.device)[..., start : start + n], got[..., :n] != 0
        kinds = {
            "gives weight to hidden key": off & ~seen & weight,
            "gives no weight to visible key": off & seen & ~weight,
        }
        for what, where in ((what, where) for what, where in kinds.items() if where.any()):
            row, key = where.nonzero()[0, 2:].tolist()
            yield (
                f"the mask (row {row} {what} {start + key}; rows of that kind: "
                f"{int(where.any(-1).sum())})"
            )
        if (off & (seen != weight)).any():
            return


def fitted_scale(trial: Trial, p: Problem, x: Inputs) -> Iterator[str]:
    """The scale that gives what the kernel gave, if one does."""
    scale = p.softmax_scale
    for _ in range(STEPS):
        near = Truth(p.but(scale=scale), x, float64.exact(p.but(scale=scale), x))
        step = ((trial.got("out") - near.exact.out) * near.tilt).sum() / near.tilt.square().sum()
        if not step.isfinite():
            return
        scale *= math.exp(step.clamp(-1, 1).item())
    if p.batch * p.heads_q * p.len_q > 1 and trial.fits(
        "out", p.but(scale=scale), x
    ):  # one row can always be fitted
        yield f"the scale (out is that of {scale / p.softmax_scale:.6g} times the scale)"
