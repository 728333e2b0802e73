"""`verify fuzz` and `verify resume`: the pytest runner on one kernel with a progress display and a
summary of findings.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from verify import environment, properties, pytest_plugin
from verify.engine.evaluate import replay_command
from verify.engine.replay import named_law, why
from verify.engine.search import SEED_STEP
from verify.errors import VerifyError
from verify.inspection import conventions
from verify.properties.catalogue import PROPERTIES
from verify.records.journal import JUDGED, Record, done, interrupted, read, writable
from verify.registry import Kernel, find, named
from verify.reports.terminal import show_run
from verify.sandbox.process import CALL_SECONDS, Isolated, Limits, isolated
from verify.spec.case import Case
from verify.spec.finding import Finding


class _Display:
    """A pytest plugin: gives the run a progress bar in place of pytest's own output."""

    def __init__(self, console: Console, seconds: float | None) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[counts]}"),
        )
        self.progress = Progress(*columns, console=console, transient=True)
        self.task = self.progress.add_task("fuzzing", total=seconds, counts="")
        self.start, self.judged, self.findings = time.monotonic(), 0, 0
        self.broken: list[str] = []
        self.hunted = 0.0
        self.covered: Callable[[list[Record]], Iterator[str]] = lambda records: iter(())
        self.interrupted = False
        self.run: pytest_plugin.Run | None = None

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.run = pytest_plugin.run_of(session.config)
        self.run.progress, self.covered = (
            self.show,
            functools.partial(pytest_plugin.covered, self.run),
        )

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """A run that came to its end is not resumed."""
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            pytest_plugin.run_of(session.config).journal.ended()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A failure that is no finding is a defect of this project or of its installation: shown,
        never swallowed.
        """
        self.hunted += report.duration if report.passed and report.when == "call" else 0.0
        if report.failed and ("verdict", "finding") not in report.user_properties:
            self.broken.append(report.longreprtext)

    def interrupt(self, *signal_and_frame: object) -> None:
        """Ctrl-C. Remembered as well as raised: one that arrives inside a garbage collector's
        callback is swallowed there.
        """
        self.interrupted = True
        raise KeyboardInterrupt

    def show(self, record: Record) -> None:
        """A case was judged."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.judged += record.verdict in JUDGED
        self.findings += record.verdict == "finding"
        counts = (
            f"{record.kernel} {record.property}: {self.judged} judged, {self.findings} findings"
        )
        self.progress.update(self.task, completed=time.monotonic() - self.start, counts=counts)


def run_fuzz(
    target: str,
    kernels: Sequence[Kernel],
    device: str,
    *,
    seconds: float | None,
    cases: int | None = None,
    seed: int,
    laws: list[str],
    folder: Path,
    console: Console,
    call_seconds: float = CALL_SECONDS,
    resumed: bool = False,
) -> int:
    """Fuzz through pytest; print the summary whatever ended the run. Returns the exit code: 0, or 1
    with findings.

    seconds, for all properties together, or cases for each. resumed: what is on record in the
    folder is not judged again. Raises VerifyError for an unknown property or a folder that cannot
    be written.
    """
    for law in laws:
        named_law(law)
    writable(folder)
    asked: dict[str, Any] = {
        "target": str(Path(target).resolve()) if ".py" in target else target,
        "device": device,
        "seconds": seconds,
        "cases": cases,
        "seed": seed,
        "laws": laws,
        "call_seconds": call_seconds,
    }
    left = (
        None if seconds is None else max(1.0, seconds - (_spent(folder, seed) if resumed else 0.0))
    )
    for name, kernel in named(target, kernels).items():
        with isolated(name, kernel, device, Limits(call_seconds)) as worker:
            console.print(conventions.table(kernel, _conventions(worker)))
    display = _Display(console, left)
    how = [f"--run={json.dumps(asked)}", *["--resume"] * resumed]
    arguments = [*_arguments(folder, **asked | {"target": target, "seconds": left}), *how]
    start = time.monotonic()
    if _pytest(display, arguments, folder) == pytest.ExitCode.INTERRUPTED:
        console.print(
            "interrupted; what follows was measured before; verify resume "
            f"{shlex.quote(str(folder))} goes on"
        )
    names = {kernel.name for kernel in kernels}
    records = [record for record in read(folder) if record.kernel in names]
    _summary(
        records,
        target,
        kernels,
        device,
        time.monotonic() - start,
        folder,
        console,
        Limits(call_seconds),
    )
    speed = (
        [] if resumed else [_throughput(records, display.hunted)]
    )  # the records are of several runs, the time of the last
    for line in (*speed, *display.covered(records)):
        console.print(line, markup=False)
    judged = any(r.verdict in JUDGED for r in records)
    return int(not judged or any(r.verdict in ("failed", "finding") for r in records))


def _pytest(display: _Display, arguments: list[str], folder: Path) -> int:
    """Its exit code: of a run that ended, with findings or without, or was interrupted. Raises
    VerifyError for any other end.
    """
    handler = signal.signal(signal.SIGINT, display.interrupt)
    try:
        with display.progress:
            code = pytest.main(arguments, plugins=[display])
    finally:
        signal.signal(signal.SIGINT, handler)
    if display.run and display.run.full:
        raise display.run.full
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        raise VerifyError(
            f"the run broke off (pytest: {pytest.ExitCode(code).name}); what was measured is in "
            f"{folder}"
        )
    if display.broken:
        ours = (
            "the run broke off by itself, which is a defect of attention-verify; please report it"
        )
        raise VerifyError(f"{ours}:\n{display.broken[0]}")
    return code


def _arguments(
    folder: Path,
    *,
    target: str,
    device: str,
    seconds: float | None,
    cases: int | None,
    seed: int,
    laws: list[str],
    call_seconds: float,
) -> list[str]:
    """Pytest's, for what `verify resume` would be told of a run."""
    matrix_test = Path(properties.__file__).parent / "test_conformance.py"
    arguments = [
        f"{matrix_test}::test_kernel_holds",
        "-p",
        "verify.pytest_plugin",
        "-p",
        "no:terminal",
        "-p",
        "no:cacheprovider",
    ]
    arguments += [
        "--import-mode=importlib",
        "--noconftest",
        "-c",
        os.devnull,
        f"--rootdir={folder}",
        "--kernel",
        target,
    ]
    arguments += [
        f"--draw-seed={seed}",
        f"--records={folder}",
        f"--device={device}",
        f"--call-seconds={call_seconds}",
    ]
    arguments += [
        f"--corpus={Path('.verify') / 'corpus.tsv'}",
        f"--seconds={seconds}" if seconds else f"--cases={cases}",
    ]
    return arguments + [f"--property={law}" for law in laws]


def run_resume(folder: Path, console: Console) -> int:
    """Go on with the interrupted runs of a folder, one after another, each as it was asked for.
    Returns as run_fuzz.

    Raises VerifyError where there is none, one is still going on, or a kernel is no longer found.
    """
    codes = [0]
    for run in interrupted(folder):
        environment.prepare(run["device"])
        kernels = find(run["target"])
        console.print(f"resumed: {run['target']}, seed {run['seed']}, {run['device']}")
        codes.append(run_fuzz(kernels=kernels, folder=folder, console=console, resumed=True, **run))
    return max(codes)


def _spent(folder: Path, seed: int) -> float:
    """Seconds that the runs of a folder with this seed have hunted."""
    _, ended = done(folder)
    mine = (r for r in read(folder) if r.seed is not None and (r.seed - seed) % SEED_STEP == 0)
    rest = (r.seconds or 0.0 for r in mine if (r.kernel, r.property, seed) not in ended)
    return sum(spent for (*_, of), spent in ended.items() if of == seed) + sum(rest)


def _conventions(worker: Isolated) -> list[tuple[str, str]]:
    try:
        worker.options()
        return worker.ask("conventions")
    except Finding as finding:
        return [("calls", finding.sentence)]


def _throughput(records: list[Record], hunted: float) -> str:
    """Of the properties without a finding: shrinking is not part of it. `hunted`: seconds that they
    took in all.
    """
    found = {(r.kernel, r.property) for r in records if r.verdict in ("failed", "finding")}
    mine = [r for r in records if (r.kernel, r.property) not in found]
    judged, judging = sum(r.verdict in JUDGED for r in mine), sum(r.seconds or 0.0 for r in mine)
    if not judged or not hunted:
        return "throughput: nothing was judged"
    rest = max(0.0, 1 - judging / hunted)
    return (
        f"throughput: {judged / hunted:.1f} cases a second; {100 * rest:.0f} % of the time went "
        "into drawing and bookkeeping"
    )


def _summary(
    records: list[Record],
    target: str,
    kernels: Sequence[Kernel],
    device: str,
    spent: float,
    folder: Path,
    console: Console,
    limits: Limits,
) -> None:
    judged = sum(r.verdict in JUDGED for r in records)
    show_run(
        records,
        write=functools.partial(console.print, markup=False, soft_wrap=True),
        width=console.width,
    )
    shown = {
        (r.kernel, r.property): r for r in records if r.verdict in ("failed", "finding")
    }  # the shrunk one comes last
    for number, record in enumerate(shown.values(), 1):
        name, kernel = next(
            (n, k) for n, k in named(target, kernels).items() if k.name == record.kernel
        )
        law, case = PROPERTIES[record.property], Case.parse(record.case)
        stage = "" if record.verdict == "finding" else " (not shrunk: interrupted)"
        console.print(
            f"\n[bold]finding {number}[/bold]: {record.kernel} breaks {record.property}{stage}"
        )
        console.print(f"  law     {' '.join(law.law.split())}", markup=False)
        console.print(f"  case    {case}", markup=False)
        console.print(f"  what    {record.reason}", markup=False, soft_wrap=True)
        with isolated(name, kernel, device, limits) as worker:
            for line in why(worker.ask, case, law.name):
                console.print(line, markup=False, soft_wrap=True)
            written = _write_script(worker, case, folder / f"finding-{number}.py")
        console.print(f"  script  {written}", markup=False, soft_wrap=True)
        console.print(f"  replay  {replay_command(name, law, case)}", markup=False, soft_wrap=True)
    verdict = f"{len(shown)} findings" if shown else "no finding" if judged else "NOTHING JUDGED"
    console.print(
        f"\n{', '.join(k.name for k in kernels)}: {verdict} in {judged} judged cases, {spent:.0f} "
        f"s; records in {folder}"
    )


def _write_script(worker: Isolated, case: Case, path: Path) -> str:
    """Write the script that shows a finding. Returns its path, or why there is none."""
    try:
        try:
            text = worker.ask("script", str(case), False)
        except Finding:
            text = worker.ask("script", str(case), True)
        path.write_text(text, encoding="utf-8")
    except Exception as error:
        return f"none: {type(error).__name__}: {error}"
    return str(path)
