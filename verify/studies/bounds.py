"""The evidence in verify/bounds/BOUNDS.md, made again: ``python -m verify.studies.bounds --help``.

soundness   judge many drawn cases of every kernel without stopping at an alarm;
            run several at once with different seeds
sharpness   measured/expected and measured/proved from the journals of such runs,
            by kernel, dtype and tensor
power       the smallest defects that the two rules catch, beside what other suites' tolerances
            catch on the same outputs
narrow      measured/expected of kernels in TF32 and FP8
cost        time of the oracle, the proved bound and the emulation on one shape
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from verify import environment, registry
from verify.bounds.constants import ELSEWHERE
from verify.bounds.metrics import distance, measure
from verify.bounds.proved import allowance
from verify.engine.drawing import CHUNK, draw
from verify.engine.evaluate import evaluate, finished
from verify.oracles import float64
from verify.oracles.emulator import emulate
from verify.properties.catalogue import PROPERTIES, Property
from verify.records.events import TESTED, CaseFinished, Outcome
from verify.records.journal import Journal
from verify.records.journal import cases as journal_cases
from verify.reference.reference import Truth, truth
from verify.spec.arithmetic import FLASH
from verify.spec.case import Case
from verify.spec.distribution import drawn_from
from verify.spec.finding import Finding
from verify.spec.inputs import Recipe
from verify.studies.kernels import LOSSES, Draw, at_gpu, narrow_kernels

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(width=190, highlight=False)
LAWS = ("oracle", "gradients")
VALUES = {"sdpa-cudnn": 25, "triton-fa2": 5}
"""Values tried for each problem: a new problem costs cuDNN more than a second of building its
graph, Triton may compile.
"""


@app.command()
def soundness(
    seconds: Annotated[float, typer.Option(help="time for all kernels together")] = 60.0,
    seed: Annotated[int, typer.Option(help="seed of the drawn cases")] = 0,
    kernel: Annotated[
        list[str] | None, typer.Option(help="only this kernel; may be repeated")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for the journal")] = Path("soundness"),
    device: Annotated[str | None, typer.Option()] = None,
    judge_on: Annotated[
        str | None, typer.Option(help="cpu: only the kernels use the GPU; more cases a second")
    ] = None,
) -> None:
    """Judge drawn cases of every kernel, out, LSE and gradients; whatever alarms is printed and
    counted, and the run goes on.
    """
    device = environment.prepare(device)
    torch.set_num_threads(1)
    registry.load_bundled()
    kernels = (
        [k for name in kernel for k in registry.find(name)]
        if kernel
        else list(registry.REGISTRY.values())
    )
    if judge_on == "cpu" and device == "cuda":
        kernels, device = [at_gpu(k) for k in kernels], "cpu"
    pairs = [
        (k, PROPERTIES[n]) for k in kernels for n in LAWS if not PROPERTIES[n].refusal(k, device)
    ]
    journal, start, counts, chunk = Journal(out, str(seed)), time.monotonic(), Counter[Outcome](), 0
    while time.monotonic() - start < seconds:
        for subject, law in pairs:
            if time.monotonic() - start > seconds:
                break
            for case in drawn(subject, law, device, seed=seed * 1_000_003 + chunk):
                event = judged(subject, law, case, device)
                counts[event.outcome] += 1
                journal.append(event)
                if event.outcome is Outcome.FAILED:
                    alarm = f"ALARM {subject.name} {law.name} {case}: {event.reason}"
                    console.print(alarm, markup=False, soft_wrap=True)
        chunk += 1
    judged_cases = sum(counts[outcome] for outcome in TESTED)
    outcomes = {outcome.value: number for outcome, number in counts.items()}
    console.print(f"seed {seed}: {judged_cases} judged on {device}, {outcomes}", markup=False)


def drawn(kernel: registry.Kernel, law: Property, device: str, *, seed: int) -> list[Case]:
    """CHUNK cases as the engine draws them."""
    found: list[Case] = []
    draw(found.append, kernel, law, device, seed=seed)
    values = VALUES.get(kernel.name, 1)
    rng = np.random.default_rng(seed)
    kept = found[: CHUNK // values]
    return kept + [
        replace(c, recipe=Recipe.parse(str(rng.choice(drawn_from()))), seed=n)
        for c in kept
        for n in range(1, values)
    ]


def judged(kernel: registry.Kernel, law: Property, case: Case, device: str) -> CaseFinished:
    """The event of one case, an alarm among them."""
    try:
        return evaluate(kernel, device, law, case)
    except Finding as finding:
        facts = {"reason": finding.sentence, "measured": finding.measured}
        return finished(kernel, law, case, Outcome.FAILED, **facts)


@app.command()
def sharpness(folder: Annotated[Path, typer.Argument(help="folder of journals")]) -> None:
    """Measured/expected RMSE, where the statistics apply: median [5 %, 95 %]; and the largest
    measured/proved of out.
    """
    ratios: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in journal_cases(folder):
        if record.outcome in (Outcome.PASSED, Outcome.INCONCLUSIVE):
            dtype = Case.parse(record.case).problem.dtype
            for name, value in record.measured.items():
                ratios[record.kernel, dtype][name].append(value)
    tensors = ("out", "lse", "dq", "dk", "dv")
    table = Table(
        "kernel", "dtype", "cases", *tensors, "out/proved: median, largest", box=box.MARKDOWN
    )
    for (kernel, dtype), found in sorted(ratios.items()):
        if found["out/expected"]:
            proved = f"{np.median(found['out/proved']):.2f}, {max(found['out/proved']):.2f}"
            table.add_row(
                kernel,
                dtype,
                str(len(found["out/proved"])),
                *(_quantiles(found[f"{t}/expected"]) for t in tensors),
                proved,
            )
    console.print(table)


def _quantiles(values: list[float]) -> str:
    if not values:
        return "-"
    low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
    return f"{middle:.3f} [{low:.2f}, {high:.2f}]"


SCALES = ("softmax scale off by", "output off by a factor 1 +", "noise that raises the RMSE by")
WOLF = "rejects all"
STEPS = [m * 10.0**e for e in range(-5, 1) for m in (1, 2, 5)]


@app.command()
def power(
    length: Annotated[int, typer.Option()] = 512,
    seeds: Annotated[
        int, typer.Option(help="draws of N(0,1); a defect counts as caught where all see it")
    ] = 5,
    device: Annotated[str | None, typer.Option()] = None,
) -> None:
    """The smallest defects of a tiled kernel that each rule rejects in every draw, and which
    precision losses it rejects.
    """
    device = environment.prepare(device)
    rules = ("proved", "proved or expected", *ELSEWHERE)
    table = Table("dtype", "defect", "RMSE / honest", *rules, box=box.MARKDOWN)
    for dtype in ("fp16", "bf16", "fp32"):
        draws = [
            Draw(Case.parse(f"b1.h4.q{length}.k{length}.d128.{dtype}.full/normal#{n}"), device)
            for n in range(seeds)
        ]
        wolf = {rule for rule in rules if all(d.rejects(rule, {}) for d in draws)}
        assert not {"proved", "proved or expected"} & wolf, "the honest kernel is accused"
        for name, kind in zip(SCALES, ("scale_off", "factor", "noise"), strict=True):
            caught = {
                rule: next(
                    (x for x in STEPS if all(d.rejects(rule, {kind: x}) for d in draws)), None
                )
                for rule in rules
            }
            table.add_row(
                dtype,
                name,
                "",
                *(
                    WOLF if r in wolf else f"{100 * x:g} %" if x else "never"
                    for r, x in caught.items()
                ),
            )
        for name, loss in LOSSES.items() if dtype != "fp32" else ():
            ratio = sum(d.rmse(loss) / d.rmse({}) for d in draws) / seeds
            seen = {rule: sum(d.rejects(rule, loss) for d in draws) for rule in rules}
            table.add_row(
                dtype,
                name,
                f"{ratio:.2f}",
                *(WOLF if r in wolf else f"{n}/{seeds}" for r, n in seen.items()),
            )
    console.print(table)


@app.command()
def narrow(
    length: Annotated[int, typer.Option()] = 1024,
    seeds: Annotated[int, typer.Option(help="draws")] = 4,
    device: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Measured/expected of kernels in TF32 and FP8 made of torch's own matrix products; on the CPU
    FP8 multiplies in FP32.
    """
    device = environment.prepare(device)
    table = Table(
        "kernel",
        "inputs",
        "RMSE",
        "measured/expected: lowest",
        "median",
        "highest",
        "measured/proved",
        box=box.MARKDOWN,
    )
    for name, (kernel, dtype, arithmetic) in narrow_kernels(device).items():
        for recipe in ("normal", "outliers(0.001,10)", "one_sign"):
            ratios, errors, proved = [], [], []
            for seed in range(seeds):
                case = Case.parse(f"b1.h8.q{length}.k{length}.d128.{dtype}.full/{recipe}#{seed}")
                known = truth.__wrapped__(case, device)
                out = kernel(
                    known.inputs.q, known.inputs.k, known.inputs.v, known.problem.softmax_scale
                ).double()
                honest = emulate(known.problem, known.inputs, arithmetic).out
                errors.append(measure(out, known.exact.out).rmse)
                ratios.append(errors[-1] / measure(honest, known.exact.out).rmse)
                proved.append(
                    (distance(out, known.exact.out) / known.allowances(arithmetic)["out"].limit)
                    .max()
                    .item()
                )
            low, middle, high = (
                f"{x:.3f}" for x in (min(ratios), float(np.median(ratios)), max(ratios))
            )
            table.add_row(
                name, recipe, f"{np.mean(errors):.2e}", low, middle, high, f"{max(proved):.3f}"
            )
    console.print(table)


@app.command()
def cost(
    length: Annotated[int, typer.Option()] = 4096,
    device: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Milliseconds of the float64 oracle, of the proved bound (its own pass over the softmax
    included) and of one emulation.
    """
    device = environment.prepare(device)
    table = Table(
        "case",
        "oracle",
        "proved bound",
        "bound / oracle",
        "emulation",
        "truncated",
        box=box.MARKDOWN,
    )
    for grads in ("", ".grads"):
        case = Case.parse(f"b1.h16.q{length}.k{length}.d128.bf16.full{grads}/normal#0")
        oracle, bound, *rest = _costs(truth.__wrapped__(case, device), device)
        table.add_row(
            str(case),
            f"{oracle:.1f}",
            f"{bound:.1f}",
            f"{bound / oracle:.2f}",
            *(f"{t:.1f}" for t in rest),
        )
    console.print(table)


def _costs(known: Truth, device: str) -> list[float]:
    problem, inputs = known.problem, known.inputs
    nearest, cut = (replace(FLASH, summation=how) for how in ("nearest", "truncated"))
    work = (
        lambda: float64.exact(problem, inputs),
        lambda: allowance(
            problem, inputs, known.exact, partial(float64.blocks, problem, inputs), FLASH
        ),
        lambda: emulate(problem, inputs, nearest),
        lambda: emulate(problem, inputs, cut),
    )
    return [_milliseconds(w, device) for w in work]


def _milliseconds(work: Callable[[], object], device: str, repeats: int = 5) -> float:
    """The median of a few runs after a first."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times[1:]))


if __name__ == "__main__":
    app()
