"""What the searches of one process share. They emit events; front ends consume them.

A `Session` judges one property of one kernel at a time, as pytest's matrix does; all of them are
engine/run.py's. Every event is in the journal before anybody sees it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from verify import environment
from verify.engine.config import RunConfig
from verify.engine.corpus import Corpus
from verify.engine.evaluate import evaluate
from verify.engine.otherwise import Otherwise
from verify.engine.resolve import resolve
from verify.engine.search import (
    Budget,
    search,
)
from verify.engine.triage import Triage
from verify.engine.workers import Workers
from verify.generation import pairwise
from verify.properties.catalogue import PROPERTIES, Property, named
from verify.records.events import (
    CaseFinished,
    DeclaredOtherwise,
    Ended,
    Event,
    KernelInspected,
    PairsTaken,
    PropertyFinished,
)
from verify.records.journal import Drawn, Journal, completed
from verify.records.shared import Shared
from verify.registry import Kernel
from verify.sandbox.capabilities import as_variant, known, learn, options
from verify.sandbox.options import Options
from verify.sandbox.process import Limits
from verify.spec.case import Case
from verify.spec.requirements import NOTHING

MOST_WORKERS, FEWEST = 8, 3
"""Idle worker processes are kept up to so many, if the run needs no more; among several processes
that share the machine, fewer each, but for so many.
"""
E = TypeVar("E", bound=Event)


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
        self.targets = {kernel.name: target for target, kernel in self.kernels.items()}
        self.properties = [named(name) for name in config.properties or PROPERTIES]
        self.resumed = resumed
        before = completed(folder) if resumed else ({}, {})
        self.judged: Mapping[tuple[str, str], Counter[Drawn]] = before[0]
        self.ended = before[1]
        self.journal = Journal(folder, journal)
        self._shared = shared or Shared()
        self.corpus = Corpus(config.corpus)
        self.threads = config.workers or (environment.cores() if self.device == "cpu" else 1)
        limits = Limits(config.call_seconds, processes=max(self.threads, Limits().processes))
        idle = max(FEWEST, MOST_WORKERS // environment.processes())
        most = max(self.threads, min(len(self.kernels), idle))
        self.workers = Workers(self.device, limits, most)
        self.interrupted = False
        self._drawn: set[str] = set()
        """Targets of which cases without requirements were drawn: their pairs are known."""
        self._described_once: set[str] = set()
        self.triage = Triage(self.targets, self.device, self.folder, self.in_worker)
        self.otherwise = Otherwise(self.device, self.in_worker)

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
            yield self.emit(self.described(target))
            yield from map(self.emit, self.conventions(target))
            kernel = self.kernels[target]
        if (kernel.name, prop.name, self.config.seed) in self.ended:
            return
        if refused := self.refused(kernel, prop):
            yield self.emit(refused)
            return
        self.note(target, prop)
        self._plan(target, prop)
        events = search(
            kernel,
            prop,
            self.device,
            budget=budget,
            seed=self.config.seed,
            corpus=self.corpus,
            evaluate_case=partial(self.evaluate, target),
            completed=self.judged.get((kernel.name, prop.name)),
        )
        for event in events:
            yield self.emit(event)

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
            f"rows of {target} for {prop.needs!r}", partial(pairwise.rows, *about)
        )
        pairwise.learn_rows(*about, found)

    def pairs(self) -> Iterator[PairsTaken]:
        """The pairs of options of every kernel of which this process drew cases."""
        for target in sorted(self._drawn):
            kernel = self.kernels[target]
            rows = pairwise.covering_rows(kernel, self.device)
            yield self.emit(PairsTaken(kernel=kernel.name, rows=rows))

    def note(self, target: str, prop: Property) -> None:
        """Take note that cases of a property are drawn."""
        if prop.needs == NOTHING:
            self._drawn.add(target)

    def described(self, target: str, **found: Any) -> KernelInspected:
        """The event that says what a kernel is."""
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

    def refused(self, kernel: Kernel, prop: Property) -> PropertyFinished | None:
        """The event of a property that cannot be judged on a kernel."""
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

    def conventions(self, target: str) -> list[DeclaredOtherwise]:
        """Judge the kernel by the conventions that it was found to have."""
        if self.config.strict or self.workers.stop.is_set():
            return []
        kernel, events = self.otherwise.conventions(target, self.kernels[target])
        self.kernels[target] = kernel
        return events

    # ---- in a worker, or here

    def evaluate(self, target: str, prop: Property, case: Case) -> CaseFinished:
        """Judge one case. Raises Finding."""
        return self.in_worker(target, evaluate, prop, case)

    def in_worker(self, target: str, function: Any, *arguments: Any) -> Any:
        """function(kernel, device, *arguments) where the kernel is called, as what it is."""
        kernel = self.kernels[target]
        if changes := self.otherwise.changes(target):
            function, arguments = as_variant, (changes, function, *arguments)
        if self.config.in_process:
            return function(kernel, self.device, *arguments)
        worker = self.workers.borrow(target, kernel)
        try:
            return worker.run(function, *arguments)
        finally:
            self.workers.give_back(worker)

    def emit(self, event: E) -> E:
        """The event, written down."""
        self.journal.append(event)
        return event


def new_folder() -> Path:
    """A folder for the records of a run that begins now."""
    return Path(".verify") / "runs" / time.strftime("%Y%m%d-%H%M%S")
