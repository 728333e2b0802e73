"""`verify identify`: which Arithmetic explains a kernel's errors, found from outside, with a line
to paste.

Rounding is no noise: on few keys, where no tile order matters, an emulation with the right
roundings agrees with the kernel to the last bit in all but a few per cent of elements; each wrong
candidate leaves a residual in every row. The candidate with the smallest residual is compared with
the best that differs in one field: if the rows' differences were as likely to have the other sign,
P(score > t) <= exp(-t^2 / 2), the bound of verify/bounds/expected.py; that is the confidence.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from verify.bounds.constants import ALIKE, CERTAIN, PROMOTED
from verify.bounds.exact import Exact
from verify.errors import VerifyError
from verify.inspection.questions import COARSE, OBSERVED, QUESTIONS, Question
from verify.oracles.emulator import emulate
from verify.oracles.formats import Jittered
from verify.reference.reference import Truth, truth
from verify.registry import Kernel
from verify.sandbox.call import Output, call
from verify.sandbox.capabilities import anchors, fitted, options
from verify.spec.arithmetic import Arithmetic
from verify.spec.case import Case
from verify.spec.finding import Finding
from verify.spec.problem import Problem
from verify.spec.requirements import Requirements

ORDINARY = "b1.h2.q64.k64.d64.{dtype}.full/normal#0"


@dataclass(frozen=True)
class Answer:
    """What a field was found to be; the nearest other value; the probability that the order of the
    two is chance.
    """

    field: str
    found: Any
    other: Any
    chance: float
    agree: float
    """Part of the elements that agree with the emulation to the last bit."""

    @property
    def certain(self) -> bool:
        """Whether chance is ruled out; if not, the default stands."""
        return self.chance < CERTAIN


@dataclass(frozen=True)
class Identity:
    """What was found out about a kernel, what could not be asked and why, and the arithmetic that
    follows.
    """

    kernel: Kernel
    answers: list[Answer]
    unasked: dict[str, str]
    arithmetic: Arithmetic

    def table(self, declared: Arithmetic) -> Table:
        """Field by field, beside what the kernel declares."""
        headings = ("field", "found", "next best", "chance", "equal bits", "declared")
        table = Table(
            *headings,
            title=f"{self.kernel.name}: arithmetic found from outside",
            title_justify="left",
        )
        for a in self.answers:
            given = getattr(declared, a.field)
            verdict = (
                ""
                if not a.certain or a.field in OBSERVED
                else ", confirmed"
                if given == a.found
                else ", DIFFERS"
            )
            found = str(a.found) if a.certain else f"{a.found}? (not told apart)"
            table.add_row(
                a.field,
                found,
                str(a.other),
                f"{a.chance:.0e}",
                f"{100 * a.agree:.1f} %",
                f"{given}{verdict}",
            )
        for field, reason in self.unasked.items():
            table.add_row(field, "not asked", "", "", "", reason)
        return table


def identify(kernel: Kernel, device: str) -> Identity:
    """Ask every question that the kernel's support allows, each with what earlier ones found."""
    narrow = _dtype(kernel, device, "bf16", "fp16")  # roundings stand out from what FP32 does
    fine = _dtype(kernel, device, "fp16", "bf16")  # what FP32 does shows
    found, answers = Arithmetic(), list[Answer]()
    unasked: dict[str, str] = {}
    for question in QUESTIONS:
        case = Case.parse(question.case.format(narrow=narrow, fine=fine))
        case, reason = _taken(kernel, device, case)
        if "tile" in question.candidates and (
            found.normalized_probs or found.format("probs", narrow) == "fp32"
        ):
            reason = "P is not rounded tile by tile"
        known = truth(case, device) if reason is None else None
        if known is not None:
            try:
                output = call(kernel, case.problem, known.inputs)
                reason = (
                    None
                    if output.dq is not None or not case.problem.grads
                    else "its output carries no autograd graph"
                )
            except Finding as finding:
                reason = finding.sentence
        if known is None or reason is not None:
            unasked |= dict.fromkeys(question.candidates, reason or "")
            continue
        if coarse := next((name for name in COARSE if name in question.candidates), ""):
            new = [_function(coarse, question, known, output, found)]
        else:
            seen = {a.field: a.found for a in answers if a.certain and a.field in OBSERVED}
            base = replace(found, **seen) if "partials" in question.candidates else found
            new = list(_answers(question, known, output, base))
        answers += new
        found = replace(
            found, **{a.field: a.found for a in new if a.certain and a.field not in OBSERVED}
        )
    return Identity(kernel, answers, unasked, found)


def _dtype(kernel: Kernel, device: str, *wanted: str) -> str:
    """The first of these that the kernel takes, or fp32."""
    taken = options(kernel, device).taken.get("dtype", ())
    return next((dtype for dtype in wanted if dtype in taken), "fp32")


def _taken(kernel: Kernel, device: str, case: Case) -> tuple[Case, str | None]:
    """(the case that is most like this one and that the kernel takes, why not if there is none)"""
    asked = case.problem
    needs = Requirements(grads=asked.grads)
    if not anchors(kernel, device, needs):
        return case, kernel.unsupported(asked, device) or "takes no such problem"
    groups = [(q, k) for q, k in options(kernel, device).taken["heads"] if q > k]
    widest = max(groups, key=lambda pair: pair[0] / pair[1], default=None)
    if asked.group > 1 and widest and kernel.unsupported(asked, device):
        asked = asked.but(heads_q=widest[0], heads_kv=widest[1])
    problem = fitted(kernel, device, asked, needs)
    same = problem.dtype == asked.dtype and problem.len_k <= 2 * asked.len_k
    same = same and problem.softcap == asked.softcap
    grouped = asked.group == 1 or problem.group > 1
    if not (same and grouped):
        return case, kernel.unsupported(asked, device) or "takes no such problem"
    return replace(case, problem=problem), None


def ordinary(kernel: Kernel, device: str) -> Case | None:
    """The case most like an ordinary one that the kernel takes: an arithmetic that is not its own
    may explain a small case, but not this one. None where it takes none of the kind.
    """
    dtype = _dtype(kernel, device, "fp16", "bf16")
    case, reason = _taken(kernel, device, Case.parse(ORDINARY.format(dtype=dtype)))
    return None if reason else case


def identified(kernel: Kernel, device: str) -> Arithmetic | None:
    """The arithmetic that explains the kernel's errors, if it is another than it declares."""
    if not isinstance(kernel.arithmetic, Arithmetic):
        return None
    found = identify(kernel, device)
    sure = {a.field: a.found for a in found.answers if a.certain and a.field not in OBSERVED}
    other = replace(kernel.arithmetic, **sure)
    return None if other == kernel.arithmetic else other


def _answers(
    question: Question, known: Truth, output: Output, base: Arithmetic
) -> Iterator[Answer]:
    """The best candidate's value of each field, against the best candidate that differs there."""
    names = list(question.candidates)
    candidates = _distinct(known.problem, known.device, base, question.candidates)
    emulated = (emulate(known.problem, known.inputs, c) for c in candidates)
    residuals, agreements = zip(
        *(_residual(known, output, output, e, question.tensors) for e in emulated), strict=True
    )
    best = min(range(len(candidates)), key=lambda n: residuals[n].sum().item())
    for name in names:
        mine = getattr(candidates[best], name)
        rivals = [n for n, c in enumerate(candidates) if getattr(c, name) != mine]
        if rivals:
            rival = min(rivals, key=lambda n: residuals[n].sum().item())
            chance = _chance(residuals[rival] - residuals[best])
            yield Answer(name, mine, getattr(candidates[rival], name), chance, agreements[best])


def _function(
    name: str, question: Question, known: Truth, output: Output, base: Arithmetic
) -> Answer:
    """The error of a function has no pattern to match: the smallest whose random emulations are as
    far apart as the kernel is.
    """
    sizes = question.candidates[name]
    honest = emulate(known.problem, known.inputs, base)
    mine, agree = _residual(known, output, output, honest, question.tensors)
    excess = []
    for ulp in sizes:
        blurred = emulate(known.problem, known.inputs, replace(base, **{name: ulp}), Jittered())
        spread, _ = _residual(known, output, blurred, honest, question.tensors)
        excess.append(mine - ALIKE * spread)
    found = next((n for n, e in enumerate(excess) if e.sum() <= 0), len(sizes) - 1)
    return Answer(
        name,
        sizes[found],
        sizes[found - 1] if found else sizes[1],
        _chance(excess[max(0, found - 1)] * (1 if found else -1)),
        agree,
    )


def _distinct(
    problem: Problem, device: str, base: Arithmetic, asked: dict[str, tuple[Any, ...]]
) -> list[Arithmetic]:
    """All combinations, without those that say the same in this problem's dtype; defaults first, so
    that they win ties.
    """
    result: dict[tuple[Any, ...], Arithmetic] = {}
    for values in itertools.product(*asked.values()):
        try:
            candidate = replace(base, **dict(zip(asked, values, strict=True)))
        except VerifyError:  # what no kernel can be
            continue
        exact_p = candidate.format("probs", problem.dtype) == "fp32"
        meaning = {f.name: getattr(candidate, f.name) for f in fields(candidate)}
        meaning["summation"] = candidate.truncates("accumulate", problem.dtype, device)
        meaning |= {
            n: candidate.format(n, problem.dtype)
            for n in ("probs", "dscores", "ds_probs", "stored_scores", "group_sum", "partials")
        }
        if candidate.normalized_probs or exact_p:
            meaning["rowsum"] = ""
        if candidate.normalized_probs and meaning["probs"] == meaning["ds_probs"]:
            meaning["ds_probs"] = "fp32"  # it is already rounded
        if not {candidate.format(n, problem.dtype) for n in ("scores", "accumulate")} & {*PROMOTED}:
            meaning["promoted"] = 0
        if meaning["stored_scores"] == "fp32":
            meaning["stored_exponents"] = False
        if candidate.splits == 1:
            meaning["partials"] = ""
        if meaning["dscores"] == "fp32":
            meaning["scaled_dscores"] = ""
        result.setdefault(tuple(meaning.values()), candidate)
    return list(result.values())


def _residual(
    known: Truth, output: Output, one: Output | Exact, other: Exact, tensors: tuple[str, ...]
) -> tuple[Tensor, float]:
    """(squared distance of one from the other in each row of [B,H,n], of all tensors, each in units
    of the kernel's error; part of the elements that are equal)
    """
    rows, equal, count = [], 0, 0
    for name in tensors:
        measured = getattr(output, name)
        if measured is None:
            continue
        unit = (measured.double() - getattr(known.exact, name)).square().mean()
        left, right = getattr(one, name).double(), getattr(other, name)
        distance = (left - right).square() / (unit if unit else 1.0)
        rows.append((distance.sum(-1) if distance.dim() > 3 else distance).flatten())
        equal, count = equal + int((left == right).sum()), count + left.numel()
    return torch.cat(rows), equal / max(1, count)


def _chance(difference: Tensor) -> float:
    """P(the rows' differences sum to this much | each is as likely to have the other sign)"""
    squares = difference.square().sum().item()
    return math.exp(-0.5 * max(0.0, difference.sum().item()) ** 2 / squares) if squares else 1.0
