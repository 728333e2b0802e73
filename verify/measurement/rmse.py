"""`verify report`: measure every kernel's RMSE on the same draws, split into input rounding,
quantisation and own arithmetic.

total              kernel's result against exact attention of the unrounded inputs
                   (what FlashAttention-3's Table 3 prints)
input              exact attention of the values that the kernel multiplies (rounded, quantised)
                   against that of the unrounded
kernel arithmetic  kernel's result against exact attention of the values that it multiplies
expected           the emulation of the kernel's declared arithmetic against the same
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from verify import environment, registry
from verify.bounds.exact import Exact
from verify.bounds.metrics import measure
from verify.errors import VerifyError
from verify.oracles import emulator, float64
from verify.oracles.quantised import dequantised
from verify.registry import Kernel
from verify.reports import rmse_pages, rmse_table, stored
from verify.sandbox.call import call
from verify.spec.arithmetic import Arithmetic, Quantisation
from verify.spec.case import Case, Inputs
from verify.spec.finding import Finding
from verify.spec.inputs import Recipe
from verify.spec.problem import Problem

DTYPES = ("fp16", "bf16")
ALSO = ("fp8_choices", "fa3_wheel")
"""Kernels of the report beside the bundled ones: each choice of quantisation by itself, other
people's.
"""
CHOICE = "fp8-"
"""How the names of kernels/fp8_choices.py begin: they are of interest in two tables."""
EMULATED = 1
"""Draws of which the expected error is worked out: an emulation costs ten times as much as all
else.
"""
SPLIT = 4
"""Draws in which the error of a kernel that quantises is split: each quantisation has an exact
answer of its own.
"""
AHEAD = 12
"""Draws that are made while the GPU measures others."""
Figures = dict[str, float]


@dataclass(frozen=True)
class Section:
    """One table: problems (in each of these dtypes) and recipes, crossed; with each choice of FP8
    quantisation in the dtypes of `choices`."""

    name: str
    title: str
    problems: tuple[str, ...]
    recipes: tuple[str, ...] = ("outliers(0.001,10)",)
    draws: int = 4
    dtypes: tuple[str, ...] = DTYPES
    choices: tuple[str, ...] = ()


def _sections(heads: int, length: int, draws: int, few: int) -> tuple[Section, ...]:
    """The report of so many heads and such a length: FlashAttention-3's Table 3, and what it does
    not show.
    """
    half = length // 4
    shape = f"b1.h{heads}.q{{0}}.k{{0}}.d{{1}}.fp16.{{2}}".format
    lengths, whole = [length >> n for n in range(4, 0, -1)], shape(length, 128, "full")
    inputs = ("normal", "uniform", "one_sign", "sink", "hot_channel", "shift(90)", "rising")
    return (
        Section(
            "table3",
            "FlashAttention-3's Table 3: RMSE of out",
            (whole,),
            draws=draws,
            choices=("fp16",),
        ),
        Section(
            "lengths",
            "RMSE of out by length",
            tuple(shape(n, 128, "full") for n in lengths),
            draws=few,
        ),
        Section(
            "shapes",
            "RMSE of out by head dim and mask",
            (
                shape(half, 64, "full"),
                shape(half, 256, "full"),
                shape(half, 128, "causal_lower_right"),
            ),
            draws=few,
        ),
        Section(
            "inputs",
            "RMSE of out by inputs",
            (shape(half, 128, "full"),),
            inputs,
            few,
            ("fp16",),
            choices=("fp16",),
        ),
        Section(
            "gradients",
            "RMSE of dq, dk, dv",
            (shape(half, 128, "full.grads"),),
            ("normal", "outliers(0.001,10)"),
            draws=few,
        ),
    )


SECTIONS = {"cuda": _sections(16, 8192, 32, 2), "cpu": _sections(1, 512, 2, 1)}


def run_report(
    device: str,
    *,
    problem: str | None,
    recipe: str,
    targets: list[str],
    dtypes: list[str],
    sections: list[str],
    draws: int | None,
    out: Path,
    console: Console,
) -> None:
    """Measure, print the tables and write table.md, .tex, .csv, .json and plots below `out`.

    Raises VerifyError for a bad id, an unknown kernel or section or a folder that cannot be
    written, before anything is measured.
    """
    found = _chosen(SECTIONS[device], problem, recipe, sections)
    wanted = [
        replace(
            s,
            draws=draws or s.draws,
            dtypes=tuple(dtypes) or s.dtypes,
            choices=DTYPES if targets else s.choices,
        )
        for s in found
    ]
    registry.load_bundled(*ALSO)
    kernels = [k for t in targets for k in registry.find(t)] or list(registry.REGISTRY.values())
    path = writable(out / "table.json")
    report: dict[str, Any] = {
        "schema": rmse_table.SCHEMA,
        "reduced": problem is None and device == "cpu",
        "environment": environment.describe(device),
        "unsupported": [
            {"kernel": name, "dtype": "", "reason": reason}
            for name, reason in registry.UNAVAILABLE.items()
            if not targets
        ],
        "sections": [{"name": s.name, "title": s.title, "rows": []} for s in wanted],
    }
    start = time.monotonic()
    with Progress(console=console, transient=True) as progress:
        steps = [len(s.problems) * len(s.recipes) * s.draws for s in wanted]
        task = progress.add_task("measuring", total=sum(steps))
        for section, place in zip(wanted, report["sections"], strict=True):
            for label in _fill(report, place["rows"], section, kernels, device):
                progress.update(task, advance=1, description=f"{section.name}: {label}")
                stored.save(report, path)
    console.print(f"measured in {time.monotonic() - start:.0f} s")
    rmse_pages.show(report, out, console)


def _chosen(
    sections: tuple[Section, ...], problem: str | None, recipe: str, names: list[str]
) -> list[Section]:
    """The one problem that was asked for, or the sections of these names, or all."""
    if problem is not None:
        shape, family = Problem.parse(problem), Recipe.parse(recipe)
        return [
            Section(
                "problem",
                f"RMSE of {shape}",
                (str(shape),),
                (str(family),),
                dtypes=(shape.dtype,),
                choices=(shape.dtype,),
            )
        ]
    known = {s.name: s for s in sections}
    if wrong := [name for name in names if name not in known]:
        raise VerifyError(f"section {wrong[0]!r} is unknown: one of {', '.join(known)}")
    return [known[name] for name in names] or list(sections)


def _fill(
    report: dict[str, Any],
    rows: list[dict[str, Any]],
    section: Section,
    kernels: list[Kernel],
    device: str,
) -> Iterator[str]:
    """Append the figures of a section to its rows, a draw at a time; what was just measured is
    given back.
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    of = {
        dtype: [k for k in kernels if dtype in section.choices or not k.name.startswith(CHOICE)]
        for dtype in section.dtypes
    }
    shapes = [
        (Problem.parse(p), Recipe.parse(r)) for p in section.problems for r in section.recipes
    ]
    for shape, recipe in shapes:
        problems = [shape.but(dtype=dtype) for dtype in section.dtypes]
        for seed, drawn in enumerate(_drawn(shape, recipe, section.draws)):
            inputs = drawn.map(lambda t: t.to(device))
            for kernel, problem, tensor, figures in _measured(inputs, problems, of, device, seed):
                if isinstance(figures, str):
                    reason = {"kernel": kernel, "dtype": problem.dtype, "reason": figures}
                    report["unsupported"] += [reason] if reason not in report["unsupported"] else []
                    continue
                key = (kernel, str(problem), str(recipe), tensor)
                if key not in found:
                    names = ("kernel", "problem", "recipe", "tensor")
                    found[key] = dict(zip(names, key, strict=True)) | {
                        "dtype": problem.dtype,
                        "draws": [],
                    }
                    rows.append(found[key])
                found[key]["draws"].append(figures)
            yield f"{shape}/{recipe}, draw {seed + 1} of {section.draws}"
    rows.sort(key=lambda row: section.dtypes.index(row["dtype"]))


def _drawn(shape: Problem, recipe: Recipe, draws: int) -> Iterator[Inputs]:
    """The unrounded inputs of each draw; a few are made ahead, by threads (NumPy's generators let
    go of the interpreter).
    """
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting = [pool.submit(Case(shape, recipe, seed).draw) for seed in range(min(AHEAD, draws))]
        for seed in range(draws):
            if seed + AHEAD < draws:
                waiting.append(pool.submit(Case(shape, recipe, seed + AHEAD).draw))
            yield waiting.pop(0).result()


def _measured(
    drawn: Inputs, problems: list[Problem], kernels: dict[str, list[Kernel]], device: str, seed: int
) -> Iterator[tuple[str, Problem, str, Figures | str]]:
    """(kernel, problem, tensor, its figures on this draw; or why there are none)"""
    unrounded = float64.exact(problems[0].but(dtype="fp64"), drawn)
    for problem in problems:
        inputs = drawn.rounded(problem.dtype)
        exact: dict[Quantisation | None, tuple[Exact, Figures]] = {}
        honest: dict[Arithmetic, Exact] = {}
        for kernel in kernels[problem.dtype]:
            if reason := kernel.unsupported(problem, device):
                yield kernel.name, problem, "", reason
                continue
            arithmetic = replace(
                kernel.numerics(problem, device), summation="nearest"
            )  # ten times as fast, the same RMSE
            how, emulated = arithmetic.quantised, seed < EMULATED
            split = how is None or seed < SPLIT
            if split and how not in exact:
                multiplied = dequantised(problem, inputs, how) if how else inputs
                answer = float64.exact(problem, multiplied)
                exact[how] = (
                    answer,
                    {
                        n: measure(t, getattr(unrounded, n)).rmse
                        for n, t in _tensors(problem, answer).items()
                    },
                )
            if emulated and arithmetic not in honest:
                honest[arithmetic] = emulator.emulate(problem, inputs, arithmetic)
            try:
                result = call(kernel, problem, inputs)
            except Finding as finding:
                yield kernel.name, problem, "", finding.sentence
                continue
            for name, got in _tensors(problem, result).items():
                if not split:
                    yield (
                        kernel.name,
                        problem,
                        name,
                        {"total": measure(got, getattr(unrounded, name)).rmse},
                    )
                    continue
                reference, rounding = exact[how]
                figures = _figures(got, getattr(unrounded, name), getattr(reference, name)) | {
                    "input": rounding[name]
                }
                if emulated:
                    figures["expected"] = measure(
                        getattr(honest[arithmetic], name), getattr(reference, name)
                    ).rmse
                yield kernel.name, problem, name, figures


def _tensors(problem: Problem, result: Any) -> dict[str, Tensor]:
    """What a problem is reported by."""
    names = ("dq", "dk", "dv") if problem.grads else ("out",)
    return {name: getattr(result, name) for name in names if getattr(result, name) is not None}


def _figures(got: Tensor, unrounded: Tensor, reference: Tensor) -> Figures:
    own = measure(got, reference)
    return {
        "total": measure(got, unrounded).rmse,
        "arithmetic": own.rmse,
        "alpha": own.alpha,
        "bias": own.bias,
        "max": own.max_abs,
        "size": own.size,
    }


def writable(path: Path) -> Path:
    """The path of a file that exists and can be written. Raises VerifyError, naming its folder,
    where it can't.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise VerifyError(
            f"out={path.parent}: {error.strerror}; name a folder that can be written"
        ) from error
    return path
