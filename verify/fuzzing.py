"""`verify fuzz` and `verify replay`: the pytest runner on one kernel with a progress display and a summary of findings."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from verify import properties, pytest_plugin
from verify.case import Case
from verify.engine import replay_command
from verify.errors import VerifyError
from verify.finding import Finding
from verify.guard import call
from verify.masks import FULL
from verify.properties.explain import explain, script
from verify.properties.laws import PROPERTIES, Property
from verify.properties.truth import Truth, truth
from verify.records import JUDGED, Journal, Record, read
from verify.registry import Kernel
from verify.reports.terminal import show_run

SMALL = 8
"""Tensors of at most this many rows and columns are printed by replay."""


class _Display:
    """A pytest plugin: gives the run a progress bar in place of pytest's own output."""

    def __init__(self, console: Console, seconds: float) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[counts]}"))
        self.progress = Progress(*columns, console=console, transient=True)
        self.task = self.progress.add_task("fuzzing", total=seconds, counts="")
        self.start, self.judged, self.findings = time.monotonic(), 0, 0
        self.broken: list[str] = []
        self.hunted = 0.0
        self.covered: Callable[[list[Record]], Iterator[str]] = lambda records: iter(())
        self.interrupted = False

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        run = pytest_plugin.run_of(session.config)
        run.progress, self.covered = self.show, functools.partial(pytest_plugin.covered, run)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A failure that is no finding is a defect of this project or of its installation: shown, never swallowed."""
        self.hunted += report.duration if report.passed and report.when == "call" else 0.0
        if report.failed and ("verdict", "finding") not in report.user_properties:
            self.broken.append(report.longreprtext)

    def interrupt(self, *signal_and_frame: object) -> None:
        """Ctrl-C. Remembered as well as raised: one that arrives inside a garbage collector's callback is swallowed there."""
        self.interrupted = True
        raise KeyboardInterrupt

    def show(self, record: Record) -> None:
        """A case was judged."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.judged += record.verdict in JUDGED
        self.findings += record.verdict == "finding"
        counts = f"{record.kernel} {record.property}: {self.judged} judged, {self.findings} findings"
        self.progress.update(self.task, completed=time.monotonic() - self.start, counts=counts)


def run_fuzz(
    target: str,
    kernels: Sequence[Kernel],
    device: str,
    *,
    seconds: float,
    seed: int,
    laws: list[str],
    folder: Path,
    console: Console,
) -> int:
    """Fuzz through pytest; print the summary whatever ended the run. Returns the exit code: 0, or 1 with findings.

    Raises VerifyError for an unknown property or a folder that cannot be written.
    """
    for law in laws:
        _property(law)
    Journal(folder / "main.jsonl")
    matrix_test = Path(properties.__file__).parent / "test_kernels.py"
    display = _Display(console, seconds)
    arguments = [f"{matrix_test}::test_kernel_holds", "-p", "verify.pytest_plugin", "-p", "no:terminal", "-p", "no:cacheprovider"]
    arguments += ["--import-mode=importlib", "--noconftest", "-c", os.devnull, f"--rootdir={folder}", "--kernel", target]
    arguments += [f"--seconds={seconds}", f"--draw-seed={seed}", f"--records={folder}", f"--device={device}"]
    arguments += [f"--corpus={Path('.verify') / 'corpus.tsv'}"]
    arguments += [f"--property={law}" for law in laws]
    start = time.monotonic()
    handler = signal.signal(signal.SIGINT, display.interrupt)
    try:
        with display.progress:
            code = pytest.main(arguments, plugins=[display])
    finally:
        signal.signal(signal.SIGINT, handler)
    records = list(read(folder))
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        raise VerifyError(f"the run broke off (pytest: {pytest.ExitCode(code).name}); what was measured is in {folder}")
    if display.broken:
        raise VerifyError(
            f"the run broke off by itself, which is a defect of attention-verify; please report it:\n{display.broken[0]}"
        )
    if code == pytest.ExitCode.INTERRUPTED:
        console.print("interrupted; what follows was measured before")
    _summary(records, target, kernels, device, time.monotonic() - start, folder, console)
    for line in (_throughput(records, display.hunted), *display.covered(records)):
        console.print(line, markup=False)
    judged = any(r.verdict in JUDGED for r in records)
    return int(not judged or any(r.verdict in ("failed", "finding") for r in records))


def _throughput(records: list[Record], hunted: float) -> str:
    """Of the properties without a finding: shrinking is not part of it. `hunted`: seconds that they took in all."""
    found = {(r.kernel, r.property) for r in records if r.verdict in ("failed", "finding")}
    mine = [r for r in records if (r.kernel, r.property) not in found]
    judged, judging = sum(r.verdict in JUDGED for r in mine), sum(r.seconds or 0.0 for r in mine)
    if not judged or not hunted:
        return "throughput: nothing was judged"
    rest = max(0.0, 1 - judging / hunted)
    return f"throughput: {judged / hunted:.1f} cases a second; {100 * rest:.0f} % of the time went into drawing and bookkeeping"


def _summary(
    records: list[Record], target: str, kernels: Sequence[Kernel], device: str, spent: float, folder: Path, console: Console
) -> None:
    judged = sum(r.verdict in JUDGED for r in records)
    show_run(records, write=functools.partial(console.print, markup=False, soft_wrap=True), width=console.width)
    shown = {(r.kernel, r.property): r for r in records if r.verdict in ("failed", "finding")}  # the shrunk one comes last
    path = target.partition("::")[0]
    for number, record in enumerate(shown.values(), 1):
        name = f"{path}::{record.kernel}" if path.endswith(".py") else record.kernel
        law, case = PROPERTIES[record.property], Case.parse(record.case)
        stage = "" if record.verdict == "finding" else " (not shrunk: interrupted)"
        console.print(f"\n[bold]finding {number}[/bold]: {record.kernel} breaks {record.property}{stage}")
        console.print(f"  law     {' '.join(law.law.split())}", markup=False)
        console.print(f"  case    {case}", markup=False)
        console.print(f"  what    {record.reason}", markup=False, soft_wrap=True)
        kernel = next(k for k in kernels if k.name == record.kernel)
        if path.endswith(".py"):  # what registers it, wherever its function is defined
            kernel = replace(kernel, origin=f"{Path(path).resolve()}:1")
        _why(kernel, case, law.name, device, console)
        written = _write_script(kernel, case, device, folder / f"finding-{number}.py")
        console.print(f"  script  {written}", markup=False, soft_wrap=True)
        console.print(f"  replay  {replay_command(name, law, case)}", markup=False, soft_wrap=True)
    verdict = f"{len(shown)} findings" if shown else "no finding" if judged else "NOTHING JUDGED"
    console.print(
        f"\n{', '.join(k.name for k in kernels)}: {verdict} in {judged} judged cases, {spent:.0f} s; records in {folder}"
    )


def _why(kernel: Kernel, case: Case, law: str, device: str, console: Console) -> None:
    """Print what explains a finding; it must not hide the finding, whatever it runs into itself."""
    try:
        lines = explain(kernel, case, law, device)
    except Exception as error:
        lines = [f"not explained: {type(error).__name__}: {error}"]
    for number, line in enumerate(lines):
        console.print(f"  {'' if number else 'why':7} {line}", markup=False, soft_wrap=True)


def _write_script(kernel: Kernel, case: Case, device: str, path: Path) -> str:
    """Write the script that shows a finding. Returns its path, or why there is none."""
    try:
        path.write_text(script(kernel, case, device), encoding="utf-8")
    except Exception as error:
        return f"none: {type(error).__name__}: {error}"
    return str(path)


def run_replay(kernel: Kernel, case: Case, law: str, device: str, console: Console) -> int:
    """Judge one case; print its tensors where they are small. Returns 0 where the law holds, 1 where it is broken.

    Raises VerifyError for an unknown property, or a case that the kernel does not support.
    """
    prop = _property(law)
    if prop.grads and not case.problem.grads:
        case = replace(case, problem=case.problem.but(grads=True))
    if prop.full_mask and case.problem.mask != FULL:
        raise VerifyError(f"property {law!r} holds without a mask only; the case has {case.problem.mask}")
    if reason := kernel.unsupported(case.problem, device):
        raise VerifyError(f"{kernel.name} does not support {case.problem}: {reason}")
    _show(kernel, case, truth(case, device), console)
    try:
        verdict = prop.check(kernel, case, device)
    except Finding as finding:
        console.print(f"{kernel.name} breaks {law}: {finding.sentence}", markup=False, soft_wrap=True)
        _why(kernel, case, law, device, console)
        return 1
    blind = f"; it could not have told: {', '.join(verdict.blind_to)}" if verdict.blind_to else ""
    console.print(
        f"{law} is not judged: {verdict.unsupported}" if verdict.unsupported else f"{kernel.name}: {law} holds{blind}",
        markup=False,
    )
    return 0


def _show(kernel: Kernel, case: Case, known: Truth, console: Console) -> None:
    p = case.problem
    if max(p.len_q, p.len_k, p.dim_qk, p.dim_v, p.batch * p.heads_q) > SMALL:
        return
    console.print(f"scale {p.softmax_scale:g}, {p.mask}:\n{p.mask.picture(p.len_q, p.len_k, batch=p.batch)}", markup=False)
    for name in ("q", "k", "v", "bias"):
        tensor = getattr(known.inputs, name)
        if tensor is not None:
            console.print(f"{name} = {tensor.tolist()}", markup=False)
    try:
        console.print(f"exact  out = {known.exact.out.tolist()}", markup=False)
        console.print(f"kernel out = {call(kernel, p, known.inputs).out.tolist()}", markup=False)
    except Finding as finding:
        console.print(f"kernel {finding.sentence}", markup=False)


def _property(name: str) -> Property:
    if name not in PROPERTIES:
        raise VerifyError(f"property {name!r} is unknown: one of {', '.join(PROPERTIES)}")
    return PROPERTIES[name]
