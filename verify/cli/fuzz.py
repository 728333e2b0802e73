"""The commands that judge: fuzz, resume, replay. They show the engine's events as they come."""

from __future__ import annotations

import random
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from verify import environment
from verify.cli import app
from verify.cli.app import Device, Target, command, console, plain, with_run_options
from verify.records.events import (
    TESTED,
    CaseFinished,
    DeclaredOtherwise,
    Event,
    FindingExplained,
    FindingShrunk,
    KernelInspected,
    PropertyFinished,
    RunFinished,
    RunStarted,
)
from verify.records.journal import interrupted, read
from verify.records.summary import Found, declare, exit_code, findings, tested
from verify.reports.terminal import counted, show_run


@command
@with_run_options
def fuzz(target: Target, given: dict[str, Any]) -> None:
    """Try to break a kernel: every property on adversarial random cases. Findings come shrunk, with
    a command to replay.
    """
    from verify.engine.config import SECONDS, RunConfig

    given.setdefault("seed", random.SystemRandom().randrange(2**31))
    if "cases" not in given:
        given.setdefault("seconds", SECONDS)
    environment.prepare(given.get("device"))
    config = RunConfig.of(lambda option: given.get(option.field))
    raise typer.Exit(_run(config.but(targets=(target,)), app.STARTED))


@command
def resume(
    folder: Annotated[Path, typer.Argument(help="the records of `verify fuzz` runs")],
) -> None:
    """Go on with interrupted runs: what is on record is not judged again. Exit code as of `verify
    fuzz`.
    """
    from verify.engine.config import RunConfig

    codes = [0]
    for asked in interrupted(folder):
        config = RunConfig.from_json(asked).but(records=folder)
        environment.prepare(config.device)
        plain(f"resumed: {', '.join(config.targets)}, seed {config.seed}, {config.device}")
        codes.append(_run(config, time.monotonic(), resumed=True))
    raise typer.Exit(max(codes))


@command
def replay(
    *,
    target: Target,
    case: Annotated[
        str, typer.Argument(help="a case id, or CASE~PROPERTY:NUMBER, as printed by a finding")
    ],
    property: Annotated[str, typer.Option(help="the property to judge")] = "oracle",
    in_process: Annotated[
        bool, typer.Option("--in-process", help="call the kernel here, for a debugger")
    ] = False,
    sanitizer: Annotated[
        str | None, typer.Option(help="a tool of compute-sanitizer to run it under: memcheck, ...")
    ] = None,
    device: Device = None,
) -> None:
    """Judge one case again and show its tensors where they are small. Exit code 1 where the
    property does not hold.
    """
    device = environment.prepare(device)
    from verify import registry
    from verify.diagnosis.derived import Derived
    from verify.engine import replay as replaying
    from verify.properties.catalogue import named
    from verify.spec.case import Case

    kernels = registry.named(target, registry.find(target))
    if derived := Derived.parse(case):
        holds = replaying.replay_call(
            target, kernels, device, derived, plain, in_process=in_process
        )
        raise typer.Exit(int(not holds))
    parsed = Case.parse(case)
    if sanitizer:
        raise typer.Exit(replaying.run_sanitized(sanitizer, target, parsed, property))
    holds = replaying.replay(
        target, kernels, device, named(property), parsed, plain, in_process=in_process
    )
    raise typer.Exit(int(not holds))


def _run(config: Any, started: float, *, resumed: bool = False) -> int:
    """Run, show what happens, print the summary whatever ended it. Return the exit code. started:
    when the user's time began, of time.monotonic().
    """
    from verify.engine.run import Run
    from verify.engine.session import Session

    events: list[Event] = []
    with Session(config, resumed=resumed) as session:
        with _progress(config.seconds) as show, _ctrl_c(session.stop):
            for event in Run(session).events(started):
                events.append(event)
                show(event)
                _announce(event, config.seed, resumed=resumed)
                _tell(events, time.monotonic() - started)
        names = {kernel.name for kernel in session.kernels.values()}
        if resumed:  # what earlier parts of the run judged counts, too
            events = [
                e for e in read(session.folder) if getattr(e, "kernel", None) in {None, *names}
            ]
    if session.interrupted:
        again = f"verify resume {shlex.quote(str(session.folder))} goes on"
        plain(f"interrupted; what follows was measured before; {again}")
    show_run(events, write=plain, width=console.width)
    for number, found in enumerate(findings(events), 1):
        _show_finding(number, found)
    wrong = {found.kernel for found in findings(events) if not found.style}
    for kernel, line in declare(events).items():
        right = "right but for what was found" if kernel in wrong else "right as it is"
        plain(f"\n{kernel} is not as declared, and {right}: declare\n  @kernel({line})")
    _close(events, ", ".join(sorted(names)), session.folder)
    return exit_code(events, strict=config.strict)


def _announce(event: Event, seed: int, *, resumed: bool) -> None:
    """Print what is known before the first case: versions, seed, conventions."""
    if isinstance(event, RunStarted) and not resumed:
        facts = ", ".join(f"{name} {value}" for name, value in event.environment.items())
        plain(f"seed {seed}, {facts}")
    if isinstance(event, KernelInspected):
        plain(f"{event.kernel} ({event.origin}): conventions found")
        table = Table(show_header=False)
        for row in event.conventions:
            table.add_row(*row)
        console.print(table)


def _tell(events: list[Event], after: float) -> None:
    """Print one line as soon as something is known that matters: a finding whose cause is new, a
    kernel that is not as declared.
    """
    event = events[-1]
    if isinstance(event, DeclaredOtherwise):
        plain(f"after {after:.0f} s: {event.kernel} is not as declared: {event.declare}")
    if isinstance(event, FindingExplained) and not event.same_as:
        about = event.kernel, event.property, event.case
        reason = next(
            e.reason
            for e in reversed(events)
            if isinstance(e, FindingShrunk) and (e.kernel, e.property, e.case) == about
        )
        what = f"{event.kernel} breaks {event.property}: {event.case}: {reason}"
        plain(f"after {after:.0f} s: {what}")


def _show_finding(number: int, found: Found) -> None:
    from verify.properties.catalogue import named

    cut = "" if found.shrunk else " (not shrunk: cut short)"
    what = "style (fails a strict run only)" if found.style else f"finding {number}"
    console.print(f"\n[bold]{what}[/bold]: {found.kernel} breaks {found.property}{cut}")
    plain(f"  law     {' '.join(named(found.property).law.split())}")
    plain(f"  case    {found.case}")
    plain(f"  what    {found.reason}")
    if found.also:
        plain(f"  also    the same cause breaks {', '.join(found.also)}")
    if found.worst and found.worst_reason != found.reason:
        plain(f"  worst   {found.worst}: {found.worst_reason}")
    if found.explained is None:
        return
    for line_number, line in enumerate(found.explained.why):
        plain(f"  {'' if line_number else 'why':7} {line}")
    if found.explained.script:
        plain(f"  script  {found.explained.script}")
    plain(f"  replay  {found.explained.replay}")
    if found.explained.call:
        plain(f"  call    {found.explained.call}")


def _close(events: list[Event], names: str, folder: Path) -> None:
    """The last lines: how much was judged, in what time, and which pairs of options."""
    from verify.engine.coverage import pairs_judged

    judged = tested(events)
    found = findings(events)
    seconds = sum(e.seconds for e in events if isinstance(e, RunFinished))
    verdict = "NOTHING JUDGED"
    if judged:
        wrong = [one for one in found if not one.style]
        verdict = counted(len(wrong), "finding") if wrong else "no finding"
        verdict += f" in {counted(len(judged), 'judged case')}"
    plain(f"\n{names}: {verdict}, {seconds:.0f} s; records in {folder}")
    searching = sum(e.seconds for e in events if isinstance(e, PropertyFinished))
    if judged and searching:
        kernel = sum(case.seconds or 0.0 for case in judged)
        share = max(0.0, 100 * (1 - kernel / searching))
        speed = f"{len(judged) / max(seconds, 0.01):.1f} cases a second"
        plain(f"throughput: {speed}; {share:.0f} % of a search is drawing, shrinking and waiting")
    for line in pairs_judged(events):
        plain(line)


@contextmanager
def _progress(seconds: float | None) -> Iterator[Any]:
    """A bar that moves with every event."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    start = time.monotonic()
    counts = {"judged": 0, "found": 0}
    with Progress(
        *columns, TextColumn("{task.fields[counts]}"), console=console, transient=True
    ) as bar:
        task = bar.add_task("fuzzing", total=seconds, counts="")

        def show(event: Event) -> None:
            if isinstance(event, CaseFinished):
                counts["judged"] += event.outcome in TESTED
            elif isinstance(event, FindingShrunk):
                counts["found"] += 1
            else:
                return
            text = f"{event.kernel} {event.property}: {counts['judged']} judged"
            text += f", {counted(counts['found'], 'finding')}"
            bar.update(task, completed=time.monotonic() - start, counts=text)

        yield show


@contextmanager
def _ctrl_c(stop: Any) -> Iterator[None]:
    """The first Ctrl-C asks the run to stop, so that what was measured is shown; the second ends
    the process.
    """

    def first(*signal_and_frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
