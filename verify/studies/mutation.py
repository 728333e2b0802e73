"""`verify power`: known-wrong kernels under the suite until each is caught; what other suites'
rules say of the same kernels, on inputs of those suites' own kind; correct variants, which nobody
may accuse.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track

from verify import environment
from verify.bounds.constants import ELSEWHERE
from verify.engine.search import Budget, search
from verify.errors import VerifyError
from verify.kernels.mutants.catalogue import CONTROLS, MUTANTS, control, honest, mutant
from verify.kernels.mutants.held_out import BLIND
from verify.kernels.mutants.memory import CHANCE
from verify.properties.catalogue import PROPERTIES
from verify.records.summary import Result
from verify.registry import Kernel, find
from verify.reports.pages import markdown
from verify.reports.stored import replace as write
from verify.sandbox.call import Output, call
from verify.sandbox.capabilities import known, learn, options
from verify.spec.case import Case
from verify.spec.finding import Finding

MOST = 400
"""Cases after which a mutant has escaped."""
IN_MATRIX = 15
"""Cases for each mutant and property of the matrix."""
FLASH_CASES = (
    "b2.h6:2.q113.k203.d64.fp16.causal_lower_right.grads/normal#0",
    "b2.h6.q128.k217.d128.bf16.full.grads/normal#1",
    "b2.h6:2.q108.k256.d64.bf16.window(64,0).grads/normal#2",
    "b2.h6.q113.k211.d64.fp16.causal_lower_right.bias=alibi.grads/normal#3",
    "b2.h6:1.q113.k211.d40.fp16.full.softcap=15.0.grads/normal#4",
)
TUTORIAL_CASES = tuple(
    f"b1.h2.q128.k128.d64.fp16.{m}.grads/normal(0.5)#0" for m in ("full", "causal_lower_right")
)
BENCH_CASES = tuple(f"b4.h4.q128.k128.d64.fp32.full/uniform#{n}" for n in range(5))
USUAL = dict(zip(ELSEWHERE, (FLASH_CASES, FLASH_CASES, TUTORIAL_CASES, BENCH_CASES), strict=True))
"""What each rule's own suite runs it on, in kind: tests/test_flash_attn.py (also for torch's
defaults); the tutorial's test_op; KernelBench's five draws of torch.rand (smaller)."""
Job = tuple[str, str, int]
"""Mutant or variant, property, and the seed, or how many cases."""
T = TypeVar("T")


def run_power(
    faults: list[str], *, seeds: range, matrix: bool, controls: int, out: Path, console: Console
) -> int:
    """Measure, print and write power.md and power.json: a hunt for each mutant with each of the
    seeds, so many cases for each correct variant by the first seed. Returns 1 where a mutant
    escapes or a correct variant is accused.

    Raises VerifyError for an unknown mutant or a folder that cannot be written, before anything is
    measured.
    """
    if unknown := [f for f in faults if f not in MUTANTS]:
        raise VerifyError(f"mutant {unknown[0]!r} is unknown: one of {', '.join(MUTANTS)}")
    if not seeds and (faults or not controls):
        raise VerifyError("seeds=0: nothing is hunted; at least 1, or no mutant and some controls")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VerifyError(
            f"out={out}: {error.strerror}; name a folder that can be written"
        ) from error
    chosen = (faults or list(MUTANTS)) if seeds else []
    own = [(fault, MUTANTS[fault].law, seed) for fault in chosen for seed in seeds]
    grid = [(fault, law, 0) for fault in chosen for law in PROPERTIES] if matrix else []
    variants = [] if faults else list(CONTROLS)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), _start) as pool:
        each = partial(_each, pool, console)
        hunts = dict(zip(own, each("mutants", _detect, own, len(seeds) or 1), strict=True))
        cells = dict(zip(grid, each("matrix", _cell, grid, len(PROPERTIES)), strict=True))
        names = [*chosen, *CONTROLS] if chosen else []
        rules = dict(zip(names, pool.map(_caught_elsewhere, names), strict=True))
        shares = [(name, law, share) for name in variants for law, share in _shares(name, controls)]
        accused = dict(
            zip(shares, each("controls", partial(_accused, seeds.start), shares, 1), strict=True)
        )
    page = "\n".join(_pages(chosen, hunts, cells, rules, accused))
    write(out / "power.md", page)
    write(
        out / "power.json",
        json.dumps(
            {
                "hunts": [(*k, *v) for k, v in hunts.items()],
                "matrix": [(*k, v) for k, v in cells.items()],
            }
        ),
    )
    console.print(page, markup=False, soft_wrap=True)
    wrong = any(sentence for _, sentence in accused.values())
    return int(wrong or any(cases is None for cases, _, _ in hunts.values()))


def _each(
    pool: ProcessPoolExecutor,
    console: Console,
    what: str,
    work: Callable[[Job], T],
    jobs: list[Job],
    share: int,
) -> Iterable[T]:
    """The work on every job, in order, with a progress bar; a worker takes `share` jobs at a
    time.
    """
    return track(
        pool.map(work, jobs, chunksize=share), what, len(jobs), console=console, transient=True
    )


def _start() -> None:
    environment.prepare("cpu")
    torch.set_num_threads(1)


def hunted(fault: str) -> Kernel:
    """A known-wrong kernel, which takes what its correct variant takes: that is asked once for all
    of a kind.
    """
    wrong, right = mutant(fault), control(honest(fault))
    if not known(wrong, "cpu"):
        learn(wrong, "cpu", options(right, "cpu"))
    return wrong


def _detect(job: Job) -> tuple[int | None, float, str]:
    """(judged cases to the first that breaks the law, None where it escapes; seconds; the
    finding)
    """
    fault, law, seed = job
    start = time.perf_counter()
    CHANCE.manual_seed(seed)
    budget = Budget(judged=MOST, shrink_seconds=0.0)
    found = Result.of(search(hunted(fault), PROPERTIES[law], "cpu", budget=budget, seed=seed))
    spent = time.perf_counter() - start
    if found.finding is None:
        return None, spent, ""
    return found.judged + 1, spent, found.finding.reason


def _cell(job: Job) -> int | None:
    fault, name, seed = job
    kernel, law = hunted(fault), PROPERTIES[name]
    if law.refusal(kernel, "cpu"):
        return None
    budget = Budget(judged=IN_MATRIX, shrink_seconds=0.0)
    found = Result.of(search(kernel, law, "cpu", budget=budget, seed=seed))
    return found.judged + 1 if found.finding else None


def _shares(name: str, cases: int) -> list[tuple[str, int]]:
    """So many cases of a correct variant, shared among the properties that it is judged by."""
    laws = (
        [law for law in PROPERTIES if not PROPERTIES[law].refusal(control(name), "cpu")]
        if cases
        else []
    )
    return [(law, -(-cases // len(laws))) for law in laws]


def _accused(seed: int, job: Job) -> tuple[int, str]:
    """(cases judged, the accusation) of a correct variant under one property."""
    name, law, share = job
    budget = Budget(judged=share)
    found = Result.of(search(control(name), PROPERTIES[law], "cpu", budget=budget, seed=seed))
    if found.finding is None:
        return found.judged, ""
    return found.judged, f"{name}: {law}: {found.finding.case}: {found.finding.reason}"


def _caught_elsewhere(name: str) -> list[str]:
    """The rules of other suites that reject this kernel on the inputs of their own suites."""
    return [
        rule
        for rule, accepts in ELSEWHERE.items()
        if any(not accepts(*trio) for trio in _compared(name, USUAL[rule]))
    ]


def _compared(
    name: str, cases: Iterable[str]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    kernel = mutant(name) if name in MUTANTS else control(name)
    for text in cases:
        case = Case.parse(text)
        if kernel.unsupported(case.problem, "cpu"):
            case = replace(case, problem=case.problem.but(grads=False))
        upcast, same = _references(case)
        try:
            got = call(kernel, case.problem, case.inputs())
        except Finding:
            got = Output(torch.full_like(same.out, torch.nan))
        for tensor in ("out", "dq", "dk", "dv"):
            mine, up, plain = (getattr(o, tensor) for o in (got, upcast, same))
            if mine is not None and up is not None and plain is not None:
                yield mine, up, plain


@lru_cache
def _references(case: Case) -> tuple[Output, Output]:
    """Standard attention of the same inputs in FP32, and in their own dtype."""
    naive: Kernel = find("naive")[0]
    inputs = case.inputs()
    wide = call(naive, case.problem.but(dtype="fp32"), inputs.map(lambda t: t.float()))
    return wide, call(naive, case.problem, inputs)


def _said(rules: dict[str, list[str]], fault: str, rule: str) -> str:
    return "-" if rule in rules[honest(fault)] else "caught" if rule in rules[fault] else ""


def _row(
    fault: str, found: list[tuple[int | None, float, str]], rules: dict[str, list[str]]
) -> list[str]:
    caught = [cases for cases, _, _ in found if cases is not None]
    cases = f"{median(caught):g}" if len(caught) == len(found) else "-"
    figures = [f"{len(caught)}/{len(found)}", cases, f"{median(s for _, s, _ in found):.2f}"]
    return [
        MUTANTS[fault].kind,
        fault,
        MUTANTS[fault].law,
        *figures,
        *(_said(rules, fault, rule) for rule in ELSEWHERE),
    ]


def _notes(table: list[list[str]], rules: dict[str, list[str]]) -> Iterator[str]:
    chosen, medians = [row[1] for row in table], [float(row[4]) for row in table if row[4] != "-"]
    yield (
        f"{len(medians)} of {len(chosen)} are caught with every seed; cases to a finding: median "
        f"{median(medians or [0]):g}"
    )
    for rule in ELSEWHERE:
        fair = [f for f in chosen if rule not in rules[honest(f)]]
        caught, blamed = (sum(rule in rules[x] for x in names) for names in (fair, CONTROLS))
        yield (
            f"{rule}: catches {caught} of {len(fair)}; accuses {blamed} of {len(CONTROLS)} correct "
            "variants (-: that one)"
        )


def _pages(
    chosen: list[str],
    hunts: dict[Job, tuple[int | None, float, str]],
    cells: dict[Job, int | None],
    rules: dict[str, list[str]],
    accused: dict[Job, tuple[int, str]],
) -> Iterator[str]:
    headings = ["class", "mutant", "property", "caught", "cases", "s", *ELSEWHERE]
    for title, blind in (
        ("Known-wrong kernels", False),
        ("Blind, written by somebody who did not know the suite", True),
    ):
        if names := [fault for fault in chosen if (fault in BLIND) is blind]:
            table = [
                _row(fault, [h for (name, _, _), h in hunts.items() if name == fault], rules)
                for fault in names
            ]
            yield markdown(
                f"{title}: judged cases to the first finding",
                headings,
                table,
                list(_notes(table, rules)),
            )
    if accused:
        judged = [
            sum(n for (name, _, _), (n, _) in accused.items() if name == variant)
            for variant in CONTROLS
        ]
        wrong = [sentence for _, sentence in accused.values() if sentence]
        each = f"{sum(judged)} cases judged ({min(judged)} to {max(judged)} each)"
        yield "\n".join(
            f"- {line}"
            for line in (f"correct variants: {len(CONTROLS)}, {each}, {len(wrong)} accused", *wrong)
        )
    if cells:
        seen = {
            fault: sorted((n, law) for (name, law, _), n in cells.items() if name == fault and n)
            for fault in chosen
        }
        lines = (
            f"- {fault}: {', '.join(f'{law} {n}' for n, law in by) or '-'}\n"
            for fault, by in seen.items()
        )
        yield (
            f"## Which properties see which mutant within {IN_MATRIX} cases, and in "
            f"which\n\n{''.join(lines)}"
        )
