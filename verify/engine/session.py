"""The engine: one loop over kernels and properties. It emits events; front ends consume them.

`run(config)` is all of `verify fuzz`; a `Session` also judges one property of one kernel at a time,
as pytest's matrix does. Every event is in the journal before anybody sees it.
"""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from verify import environment
from verify.engine.clock import Alarm, Clock
from verify.engine.config import RunConfig
from verify.engine.corpus import Corpus
from verify.engine.evaluate import evaluate, finished
from verify.engine.resolve import resolve
from verify.engine.rounds import Rounds
from verify.engine.search import (
    SEED_STEP,
    Answer,
    Budget,
    Inbox,
    Search,
    keep,
    search,
    timed,
)
from verify.engine.triage import Triage
from verify.engine.workers import Workers
from verify.generation import pairwise
from verify.inspection import conventions
from verify.properties.catalogue import PROPERTIES, Property, named
from verify.records.events import (
    CaseFinished,
    Ended,
    Event,
    FindingShrunk,
    KernelInspected,
    Outcome,
    PairsTaken,
    PropertyFinished,
    RunFinished,
    RunStarted,
)
from verify.records.journal import Drawn, Journal, cases, completed
from verify.records.shared import Shared
from verify.registry import Kernel
from verify.sandbox.capabilities import known, learn, options
from verify.sandbox.options import Options
from verify.sandbox.process import Interrupted, Limits
from verify.spec.case import Case
from verify.spec.finding import Finding
from verify.spec.requirements import NOTHING

SHRINK_SHARE = 0.15
"""Of a run's time: what one finding may take to be shrunk."""
MOST_WORKERS = 8
"""Idle worker processes are kept up to so many, if the run needs no more."""
E = TypeVar("E", bound=Event)


def run(config: RunConfig) -> Iterator[Event]:
    """Run what the configuration asks for, to its end or until the iterator is closed."""
    with Session(config) as session:
        yield from session.run()


class Session:
    """What the searches of one process share: device, kernels, workers, journal, corpus.

    Raises VerifyError for an unknown kernel or property, or a folder that cannot be written.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        journal: str = "main",
        resumed: bool = False,
        shared: Shared | None = None,
    ) -> None:
        """journal: the name of this process's file. resumed: nothing on record is done again.
        shared: with the other processes of the run.
        """
        self.device = environment.prepare(config.device or None)
        folder = config.records or new_folder()
        self.config = config.but(device=self.device, records=folder)
        self.folder = folder
        self.kernels, self.unavailable = resolve(config.targets)
        self._targets = {kernel.name: target for target, kernel in self.kernels.items()}
        self.properties = [named(name) for name in config.properties or PROPERTIES]
        self.resumed = resumed
        before = completed(folder) if resumed else ({}, {})
        self._judged: Mapping[tuple[str, str], Counter[Drawn]] = before[0]
        self._ended = before[1]
        self.journal = Journal(folder, journal)
        self._shared = shared or Shared()
        self.corpus = Corpus(config.corpus)
        self._threads = config.workers or (environment.cores() if self.device == "cpu" else 1)
        limits = Limits(config.call_seconds, processes=max(self._threads, Limits().processes))
        most = max(self._threads, min(len(self.kernels), MOST_WORKERS))
        self.workers = Workers(self.device, limits, most)
        self.interrupted = False
        self._drawn: set[str] = set()
        """Targets of which cases without requirements were drawn: their pairs are known."""
        self._described_once: set[str] = set()
        self.triage = Triage(self._targets, self.device, self.folder, self._in_worker)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, leave the journal."""
        self.workers.stop.set()
        self.workers.close()
        self.journal.close()

    def stop(self) -> None:
        """Ask a run to end; safe in a signal handler."""
        self.workers.stop.set()

    # ---- one property of one kernel

    def search(self, target: str, prop: Property, budget: Budget) -> Iterator[Event]:
        """Search for a case of this kernel that breaks this property. Nothing is judged where it
        ended before a run was resumed.
        """
        kernel = self.kernels[target]
        self.learn(target)
        if target not in self._described_once:
            self._described_once.add(target)
            yield self._emit(self._described(target))
        if (kernel.name, prop.name, self.config.seed) in self._ended:
            return
        if refused := self._refused(kernel, prop):
            yield self._emit(refused)
            return
        self._note(target, prop)
        self._plan(target, prop)
        events = search(
            kernel,
            prop,
            self.device,
            budget=budget,
            seed=self.config.seed,
            corpus=self.corpus,
            evaluate_case=partial(self._evaluate, target),
            completed=self._judged.get((kernel.name, prop.name)),
        )
        for event in events:
            yield self._emit(event)

    def learn(self, target: str) -> None:
        """Find out what a kernel takes, once, in its worker."""
        kernel = self.kernels[target]
        if not known(kernel, self.device):
            found = self._shared.once(f"options of {target}", partial(self._options, target))
            learn(kernel, self.device, found)

    def _options(self, target: str) -> Options:
        kernel = self.kernels[target]
        if self.config.in_process:
            return options(kernel, self.device)
        worker = self.workers.borrow(target, kernel)
        try:
            return worker.options()
        finally:
            self.workers.give_back(worker)

    def _plan(self, target: str, prop: Property) -> None:
        """Find the rows that the property's cases follow, once."""
        about = self.kernels[target], self.device, prop.needs
        found = self._shared.once(
            f"rows of {target} for {prop.needs}", partial(pairwise.rows, *about)
        )
        pairwise.learn_rows(*about, found)

    # ---- all of them

    def run(self, since: float | None = None) -> Iterator[Event]:
        """Judge every property of every kernel, in rounds, and explain what is found. since: when
        the time that was asked for began, of time.monotonic(); default: now.
        """
        clock = Clock(time.monotonic() if since is None else since, self._seconds_left())
        facts = environment.describe(self.device)
        yield self._emit(RunStarted(config=self.config.to_json(), environment=facts))
        inbox: Inbox = queue.SimpleQueue()
        searches: list[Search] = []
        with Alarm(clock.end, self.stop) as over:
            for target in self.kernels:
                yield self._emit(self._inspect(target))
            if over.rang or not self.workers.stop.is_set():
                searches, refused = self._searches(inbox, clock)
                yield from map(self._emit, refused)
            for event in self._rounds(searches, inbox):
                yield self._emit(event)
                if isinstance(event, FindingShrunk):
                    yield from map(self._emit, self.triage.found(event, searches))
        self.interrupted = self.workers.stop.is_set() and not over.rang
        self.workers.stop.clear()
        with Alarm(clock.explain_until, self.stop):
            for one in searches:
                if not one.ended:
                    yield from map(self._emit, self._break_off(one, timed_out=over.rang))
        yield from self.pairs()
        spent = round(clock.spent, 2)
        yield self._emit(RunFinished(interrupted=self.interrupted, seconds=spent))

    def _inspect(self, target: str) -> KernelInspected:
        try:
            self.learn(target)
            found = self._in_worker(target, conventions.rows)
        except Finding as finding:
            found = [("calls", finding.sentence)]
        except Interrupted:
            found = []
        return self._described(target, conventions=found)

    def pairs(self) -> Iterator[PairsTaken]:
        """The pairs of options of every kernel of which this process drew cases."""
        for target in sorted(self._drawn):
            kernel = self.kernels[target]
            rows = pairwise.covering_rows(kernel, self.device)
            yield self._emit(PairsTaken(kernel=kernel.name, rows=rows))

    def _note(self, target: str, prop: Property) -> None:
        if prop.needs == NOTHING:
            self._drawn.add(target)

    def _described(self, target: str, **found: Any) -> KernelInspected:
        kernel = self.kernels[target]
        issues = {
            issue.summary: {"shows_in": issue.shows_in, "tracker": issue.tracker}
            for issue in kernel.known_issues
        }
        return KernelInspected(
            kernel=kernel.name,
            target=target,
            origin=kernel.origin,
            vendor=kernel.vendor,
            issues=issues,
            **found,
        )

    def _searches(self, inbox: Inbox, clock: Clock) -> tuple[list[Search], list[PropertyFinished]]:
        """(a search for each property of each kernel, the events of those not to be judged)"""
        deadline = None if clock.seconds is None else clock.judge_until
        shrink = self.config.shrink_seconds
        if clock.seconds is not None:
            shrink = min(shrink, SHRINK_SHARE * clock.seconds)
        budget = Budget(self.config.cases, deadline, shrink, clock.end)
        found, refused = [], []
        for target, kernel in self.kernels.items():
            for prop in self.properties:
                about = kernel.name, prop.name
                if (*about, self.config.seed) in self._ended:
                    continue
                if refusal := self._refused(kernel, prop):
                    refused.append(refusal)
                    continue
                self._note(target, prop)
                found.append(
                    Search(
                        kernel,
                        prop,
                        self.device,
                        budget=budget,
                        seed=self.config.seed,
                        kept=self.corpus.cases(*about),
                        completed=self._judged.get(about),
                        inbox=inbox,
                    )
                )
        return found, refused

    def _refused(self, kernel: Kernel, prop: Property) -> PropertyFinished | None:
        reason = prop.refusal(kernel, self.device)
        if not reason:
            return None
        return PropertyFinished(
            kernel=kernel.name,
            property=prop.name,
            ended=Ended.UNSUPPORTED,
            reason=reason,
            seed=self.config.seed,
        )

    def _seconds_left(self) -> float | None:
        """Of the time that was asked for, without what earlier parts of a resumed run took."""
        if self.config.seconds is None:
            return None
        if not self.resumed:
            return self.config.seconds
        spent = sum(
            event.seconds or 0.0
            for event in cases(self.folder)
            if event.seed is not None and (event.seed - self.config.seed) % SEED_STEP == 0
        )
        return max(1.0, self.config.seconds - spent)

    def _rounds(self, searches: list[Search], inbox: Inbox) -> Iterator[Event]:
        """The events of all searches, as they happen."""

        def judge(one: Search, case: Case) -> tuple[Answer, float]:
            if reason := self.triage.set_aside(one, case):
                return finished(one.kernel, one.prop, case, Outcome.UNSUPPORTED, reason=reason), 0.0
            return timed(partial(self._evaluate, self._targets[one.kernel.name]), one.prop, case)

        threads = 0 if self.config.in_process else self._threads
        rounds = Rounds(searches, inbox, judge, self.workers.stop, threads)
        for event in rounds.run():
            if isinstance(event, Search):
                yield from event.finish()
                keep(self.corpus, event)
            else:
                yield event

    def _break_off(self, one: Search, *, timed_out: bool) -> Iterator[Event]:
        """The events of a search that the end of the run, or of its time, cut short."""
        one.close()
        if found := one.shrunk(cut=True):
            yield found
            yield self.triage.explain(found)
        ended = Ended.TIME if one.tested else Ended.NO_TIME
        yield one.ending(ended if timed_out else Ended.INTERRUPTED)

    # ---- in a worker, or here

    def _evaluate(self, target: str, prop: Property, case: Case) -> CaseFinished:
        return self._in_worker(target, evaluate, prop, case)

    def _in_worker(self, target: str, function: Any, *arguments: Any) -> Any:
        kernel = self.kernels[target]
        if self.config.in_process:
            return function(kernel, self.device, *arguments)
        worker = self.workers.borrow(target, kernel)
        try:
            return worker.run(function, *arguments)
        finally:
            self.workers.give_back(worker)

    def _emit(self, event: E) -> E:
        self.journal.append(event)
        return event


def new_folder() -> Path:
    """A folder for the records of a run that begins now."""
    return Path(".verify") / "runs" / time.strftime("%Y%m%d-%H%M%S")
