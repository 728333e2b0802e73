"""Findings that explain: what is wrong on a failing case and what is right, where it is wrong, and
at which stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from verify.bounds.expected import DIRECTIONS
from verify.diagnosis.derived import Derived, call_of, wrong_call
from verify.diagnosis.hypotheses import stages
from verify.diagnosis.reproducer import script
from verify.diagnosis.trial import CALLS, Trial, ample, memory, strides, tried, unsteady
from verify.reference.reference import about, truth
from verify.registry import Kernel
from verify.sandbox.call import call
from verify.spec.case import Case, Inputs, visibility
from verify.spec.finding import Finding
from verify.spec.problem import Problem

__all__ = ["explain", "script", "show"]
ANOTHER = "this very case is right, another call is not: "
"""What stands before the name of the call that is wrong."""
SMALL = 8
"""Tensors of at most this many rows and columns are shown."""


def explain(kernel: Kernel, device: str, case: Case, law: str) -> list[str]:
    """Facts about a case that breaks this law, one a line: what is wrong and what is right, where,
    and the likely stage.
    """
    try:
        trial, calls = tried(kernel, case, device)
    except Finding as finding:
        return [
            f"the call itself fails: {finding.sentence}",
            *_likely(_failing(kernel, case, device)),
        ]
    right = ", ".join(name for name in trial.names if name not in trial.wrong) or "none"
    lines = [f"wrong: {', '.join(trial.wrong) or 'none'}; right: {right}"]
    lines += _where(trial, trial.wrong[0]) if trial.wrong else ()
    if wavering := list(unsteady(trial, calls)):
        return lines + _likely(wavering)
    return lines + (_told(trial) if trial.wrong else _elsewhere(kernel, device, case, law))


def explain_call(kernel: Kernel, device: str, derived: Derived) -> list[str]:
    """What is wrong with one call that a property makes, a fact a line; nothing where it is right.

    Raises Finding where the call itself fails; VerifyError where the property makes no such call.
    """
    made = call_of(kernel, device, derived)
    known = about(made.problem, made.inputs)
    output = made.output or call(kernel, made.problem, made.inputs, dropout=made.dropout)
    trial = Trial(kernel, replace(derived.case, problem=made.problem), known, output)
    if not trial.wrong:
        return []
    wrong = f"{made.problem}: wrong: {', '.join(trial.wrong)}"
    return [wrong, *_where(trial, trial.wrong[0]), *_told(trial)]


def show(kernel: Kernel, device: str, case: Case) -> list[str]:
    """The mask and the tensors of a small case, the exact output and the kernel's, as text."""
    return list(_shown(kernel, case, device))


def _shown(kernel: Kernel, case: Case, device: str) -> Iterator[str]:
    p, known = case.problem, truth(case, device)
    if max(p.len_q, p.len_k, p.dim_qk, p.dim_v, p.batch * p.heads_q) > SMALL:
        return
    heads = range(p.heads_q if p.mask.per_head else 1)
    pictures = [p.mask.picture(p.len_q, p.len_k, batch=p.batch, head=head) for head in heads]
    yield "\n\n".join([f"scale {p.softmax_scale:g}, {p.mask}:\n{pictures[0]}", *pictures[1:]])
    for name in ("q", "k", "v", "bias"):
        tensor = getattr(known.inputs, name)
        if tensor is not None:
            yield f"{name} = {tensor.tolist()}"
    yield f"exact  out = {known.exact.out.tolist()}"
    try:
        yield f"kernel out = {call(kernel, p, known.inputs).out.tolist()}"
    except Finding as finding:
        yield f"kernel {finding.sentence}"


def _told(trial: Trial) -> list[str]:
    """The likely stages, and the case on which they were told apart where it is another."""
    name = trial.wrong[0]
    if around := strides(trial.case, trial.known.inputs, partial(trial.mended, name)) or memory(
        trial, name
    ):
        return _likely(around)
    larger = ample(trial)
    chosen = larger or trial
    found = _likely(stages(chosen) or _by_elimination(chosen))
    return [*found, f"told on {larger.case}"] if larger else found


def _elsewhere(kernel: Kernel, device: str, case: Case, law: str) -> list[str]:
    """What follows from nothing being wrong on this case: another call that the law makes is."""
    if law in ("oracle", "gradients", "repeat"):
        return _likely(
            [f"state kept between calls, or a race (the same case is right in {CALLS} calls now)"]
        )
    found = wrong_call(kernel, device, case, law)
    if found is None:
        return [f"each call that {law} makes on finite inputs is right by itself"]
    derived, trial = found
    wrong = f"{ANOTHER}{derived}: {trial.known.problem}: wrong: {', '.join(trial.wrong)}"
    return [wrong, *_where(trial, trial.wrong[0]), *_told(trial)]


def _failing(kernel: Kernel, case: Case, device: str) -> list[str]:
    """The layouts without which the call does not fail."""

    def succeeds(inputs: Inputs) -> bool:
        try:
            call(kernel, case.problem, inputs)
        except Finding:
            return False
        return True

    return strides(case, truth(case, device).inputs, succeeds)


def _likely(found: list[str]) -> list[str]:
    return [f"likely stage: {stage}" for stage in found]


def _by_elimination(trial: Trial) -> list[str]:
    """The stage that is left where some tensors are wrong and others, which share the rest of the
    computation, are right.
    """
    wrong, right = set(trial.wrong), set(trial.names) - set(trial.wrong)
    left = (row for row in LEFT if row[0] <= wrong and row[1] <= right)
    return [f"{stage} ({', '.join(sorted(bad))} wrong, {why})" for bad, _, stage, why in left][:1]


LEFT: tuple[tuple[set[str], set[str], str, str], ...] = (
    (
        {"lse"},
        {"out"},
        "the LSE: its base, the maximum, or what is stored",
        "out, of the same weights, right",
    ),
    ({"out"}, {"lse"}, "P V, or the division by the row sum", "lse, of the same scores, right"),
    ({"out"}, set(), "the scores, the softmax or P V", "and all that follows from it"),
    (
        {"dq", "dk", "dv"},
        set(),
        "P recomputed in the backward, or the cotangent that it reads",
        "nothing of the backward right",
    ),
    (
        {"dq", "dk"},
        {"dv"},
        "delta = rowsum(dO * O), or the scale of dS",
        "dv, of the same P, right",
    ),
    (
        {"dk", "dv"},
        {"dq"},
        "the sum over the rows and the heads of a group",
        "dq, of the same dS, right",
    ),
    (
        {"dq"},
        {"dk"},
        "dq = scale dS K: the tail of the keys, or how dq is accumulated",
        "dk, of the same dS, right",
    ),
    (
        {"dk"},
        {"dq"},
        "dk = scale dS^T Q: the tail of the rows, or how dk is accumulated",
        "dq, of the same dS, right",
    ),
    (
        {"dv"},
        {"dq"},
        "dv = P^T dO: the tail of the rows, or how dv is accumulated",
        "dS, of the same P, right in dq",
    ),
    (
        {"dbias"},
        {"dq"},
        "dbias: the sum over what the bias is broadcast in",
        "dq, of the same dS, right",
    ),
)
"""(these wrong, these right, what is left, why): the first that applies."""


def _where(trial: Trial, name: str) -> Iterator[str]:
    """The first wrong element, and what all of them have in common."""
    got, p = trial.got(name), trial.known.problem
    bad = trial.off(name, got)
    if not bad.any():
        assert trial.expected is not None
        (mine, honest), found = trial.expected.rmse(name, got), trial.expected.surprise(name, got)
        what = DIRECTIONS.get(found.what, f"too much {found.what}") if found else "off on the whole"
        yield (
            f"{name}: no element is farther off than allowed, but {what}: RMSE {mine:.2e}, "
            f"expected {honest:.2e}"
        )
        return
    at = tuple(bad.nonzero()[0].tolist())
    value, exact = got[at].item(), trial.want(name)[at].item()
    yield (
        f"{name}: {int(bad.sum())} of {bad.numel()} elements wrong, the first at {list(at)}: "
        f"{value:.6g}, exact {exact:.6g}"
    )
    word, length = ("key", p.len_k) if name in ("dk", "dv") else ("row", p.len_q)
    for tile in (tile for tile in trial.tiles if tile < length):
        number, within = divmod(at[2], tile)
        yield (
            f"{word} {at[2]} is number {within} of tile {number} ({length} {word}s in tiles of "
            f"{tile})"
        )
        last = length - length % tile
        if last < length and not bad[:, :, :last].any():
            yield f"all wrong {word}s lie in the last, partial tile of {tile}: {last}-{length - 1}"
    yield _edge(trial, word, at)
    yield from _common(bad, p, name)


def _edge(trial: Trial, word: str, at: tuple[int, ...]) -> str:
    """What the mask leaves of this row or key."""
    p = trial.known.problem
    rows = slice(at[2], at[2] + 1) if word == "row" else None
    of_entry = visibility(p, torch.device("cpu"), rows).expand(p.batch, p.heads_q, -1, -1)[at[0]]
    if word == "row":
        seen = of_entry[at[1], 0]
    else:
        seen = of_entry[at[1] * p.group : (at[1] + 1) * p.group, :, at[2]].any(0)
    found, other, of = (
        seen.nonzero().flatten().tolist(),
        *(("key", p.len_k) if word == "row" else ("row", p.len_q)),
    )
    verb = "sees" if word == "row" else "is seen by"
    if not found:
        return f"{word} {at[2]} {verb} no {other}"
    gaps = "" if len(found) == found[-1] - found[0] + 1 else f", {len(found)} in all"
    alone = [str(tile) for tile in trial.tiles if found[-1] % tile == 0 and found[-1]]
    edge = f"; the last of them is alone in its tile of {', '.join(alone)}" if alone else ""
    return f"{word} {at[2]} {verb} {other}s {found[0]}-{found[-1]} of {of}{gaps}{edge}"


def _common(bad: Tensor, p: Problem, name: str) -> Iterator[str]:
    """What the heads and batch entries of the wrong elements have in common."""
    entries, heads = (sorted({int(n) for n in bad.nonzero()[:, axis]}) for axis in (0, 1))
    if 0 not in entries:
        yield f"only batch entries > 0 are wrong: {entries}"
    grouped = p.group > 1 and name not in ("dk", "dv") and bad.shape[1] == p.heads_q
    if grouped:
        yield f"query head {heads[0]} uses key head {heads[0] // p.group} (h // {p.group})"
    if grouped and all(head % p.group for head in heads):
        yield f"only heads beyond the first of their group are wrong: {heads}"
    elif 0 not in heads:
        yield f"only heads > 0 are wrong: {heads}"
    for axis, word in ((2, "key" if name in ("dk", "dv") else "row"), (3, "column")):
        places = bad.nonzero()[:, axis] if axis < bad.dim() else bad.new_zeros(0)
        if places.numel() and len(places.unique()) < bad.shape[axis]:
            few = len(places.unique())
            yield f"{few} of {bad.shape[axis]} {word}s are wrong: {places.min()}-{places.max()}"
