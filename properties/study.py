"""The evidence in verify/BOUNDS.md, made again: ``python -m verify.properties.study --help``.

soundness   judge many drawn cases of every kernel without stopping at an alarm; run several at once with different seeds
sharpness   measured/expected and measured/proved from the journals of such runs, by kernel, dtype and tensor
power       the smallest defects that the two rules catch, beside what other suites' tolerances catch on the same outputs
cost        time of the oracle, the proved bound and the emulation on one shape
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from rich.console import Console
from rich.table import Table

from verify import environment, registry
from verify.case import Case
from verify.engine import judge
from verify.finding import Finding
from verify.properties.laws import PROPERTIES, Property
from verify.properties.strategies import cases, options
from verify.records import JUDGED, Journal, Record, read

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(width=170, highlight=False)
LAWS = ("oracle", "gradients")
CHUNK = 100


@app.command()
def soundness(
    seconds: Annotated[float, typer.Option(help="time for all kernels together")] = 60.0,
    seed: Annotated[int, typer.Option(help="seed of the drawn cases")] = 0,
    kernel: Annotated[list[str] | None, typer.Option(help="only this kernel; may be repeated")] = None,
    out: Annotated[Path, typer.Option(help="folder for the journal")] = Path("soundness"),
    device: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Judge drawn cases of every kernel, out, LSE and gradients; whatever alarms is printed and counted, and the run goes on."""
    device = environment.prepare(device)
    torch.set_num_threads(1)
    registry.load_bundled()
    kernels = [k for name in kernel for k in registry.find(name)] if kernel else list(registry.REGISTRY.values())
    pairs = [(k, PROPERTIES[n]) for k in kernels for n in LAWS if not options(k, device).refusal(grads=PROPERTIES[n].grads)]
    journal, start, counts, chunk = Journal(out / f"{seed}.jsonl"), time.monotonic(), Counter[str](), 0
    while time.monotonic() - start < seconds:
        for subject, law in pairs:
            for case in drawn(subject, law, device, seed=seed * 1_000_003 + chunk):
                record = judged(subject, law, case, device)
                counts[record.verdict] += 1
                journal.append(record)
                if record.verdict == "failed":
                    console.print(f"ALARM {subject.name} {law.name} {case}: {record.reason}", markup=False, soft_wrap=True)
        chunk += 1
    console.print(f"seed {seed}: {sum(counts[v] for v in JUDGED)} judged on {device}, {dict(counts)}", markup=False)


def drawn(kernel: registry.Kernel, law: Property, device: str, *, seed: int) -> list[Case]:
    """CHUNK cases as the engine draws them."""
    found: list[Case] = []

    @seeded(seed)
    @settings(max_examples=CHUNK, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(cases(kernel, device, full_mask=law.full_mask, grads=law.grads))
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


def judged(kernel: registry.Kernel, law: Property, case: Case, device: str) -> Record:
    """The record of one case, an alarm among them."""
    try:
        return judge(kernel, law, case, device)
    except Finding as finding:
        return Record(kernel.name, law.name, str(case), "failed", finding.sentence, measured=finding.measured)


@app.command()
def sharpness(folder: Annotated[Path, typer.Argument(help="folder of journals")]) -> None:
    """Quantiles of measured/expected RMSE and of the largest measured/proved, where the statistics apply."""
    ratios: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in read(folder):
        if record.verdict in ("held", "uninformative"):
            dtype = Case.parse(record.case).problem.dtype
            for name, value in record.measured.items():
                tensor, against = name.split("/")
                ratios[record.kernel, dtype, tensor][against].append(value)
    headings = [
        "kernel",
        "dtype",
        "tensor",
        "cases",
        "measured/expected: 5 %",
        "median",
        "95 %",
        "measured/proved: median",
        "max",
    ]
    table = Table(*headings, box=None)
    for key, found in sorted(ratios.items()):
        expected, proved = found["expected"], found["proved"]
        low, middle, high = (f"{x:.3f}" for x in np.quantile(expected, (0.05, 0.5, 0.95))) if expected else ("-",) * 3
        table.add_row(*key, str(len(proved)), low, middle, high, f"{np.median(proved):.3f}", f"{max(proved):.3f}")
    console.print(table)


if __name__ == "__main__":
    app()
