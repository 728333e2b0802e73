"""A whole run: every property of every kernel, in rounds, within the user's time."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from verify import environment
from verify.engine.clock import Alarm, Clock
from verify.engine.config import RunConfig
from verify.engine.evaluate import finished
from verify.engine.rounds import Rounds
from verify.engine.search import SEED_STEP, Answer, Budget, Inbox, Search, keep, timed
from verify.engine.session import Session
from verify.inspection import conventions
from verify.properties.catalogue import Property
from verify.records.events import (
    CaseFinished,
    DeclaredOtherwise,
    Ended,
    Event,
    FindingShrunk,
    KernelInspected,
    Outcome,
    PropertyFinished,
    RunFinished,
    RunStarted,
)
from verify.records.journal import cases
from verify.registry import Kernel
from verify.sandbox.capabilities import known, options
from verify.sandbox.process import Interrupted
from verify.spec.case import Case
from verify.spec.finding import Finding

STYLE_CASES = 25
"""Cases of a property whose findings are a matter of style."""
SHRINK_SHARE = 0.15
"""Of a run's time: what one finding may take to be shrunk."""


def run(config: RunConfig) -> Iterator[Event]:
    """Run what the configuration asks for, to its end or until the iterator is closed."""
    with Session(config) as session:
        yield from Run(session).events()


class Run:
    """All that a session's configuration asks for."""

    def __init__(self, session: Session) -> None:
        self._of = session

    def events(self, since: float | None = None) -> Iterator[Event]:
        """Judge every property of every kernel, in rounds, and explain what is found. since: when
        the time that was asked for began, of time.monotonic(); default: now.
        """
        clock = Clock(time.monotonic() if since is None else since, self._seconds_left())
        facts = environment.describe(self._of.device)
        yield self._of.emit(RunStarted(config=self._of.config.to_json(), environment=facts))
        inbox: Inbox = queue.SimpleQueue()
        searches: list[Search] = []
        with Alarm(clock.end, self._of.stop) as over:
            for target in self._of.kernels:
                yield self._of.emit(self._inspect(target))
                yield from map(self._of.emit, self._of.conventions(target))
            if over.rang or not self._of.workers.stop.is_set():
                searches, refused = self._searches(inbox, clock)
                yield from map(self._of.emit, refused)
            yield from map(self._of.emit, self._rounds(searches, inbox))
        self._of.interrupted = self._of.workers.stop.is_set() and not over.rang
        self._of.workers.stop.clear()
        with Alarm(clock.explain_until, self._of.stop):
            for one in searches:
                if not one.ended:
                    yield from map(self._of.emit, self._break_off(one, timed_out=over.rang))
        yield from self._of.pairs()
        spent = round(clock.spent, 2)
        yield self._of.emit(RunFinished(interrupted=self._of.interrupted, seconds=spent))

    def _inspect(self, target: str) -> KernelInspected:
        try:
            self._of.learn(target)
            found = self._of.in_worker(target, conventions.rows)
        except Finding as finding:
            found = [("calls", finding.sentence)]
        except Interrupted:
            found = []
        return self._of.described(target, conventions=found)

    def _searches(self, inbox: Inbox, clock: Clock) -> tuple[list[Search], list[PropertyFinished]]:
        """(a search for each property of each kernel, the events of those not to be judged)"""
        deadline = None if clock.seconds is None else clock.judge_until
        shrink = self._of.config.shrink_seconds
        if clock.seconds is not None:
            shrink = min(shrink, SHRINK_SHARE * clock.seconds)
        budget = Budget(self._of.config.cases, deadline, shrink, clock.end)
        found, refused = [], []
        for target, kernel in self._of.kernels.items():
            for prop in self._of.properties:
                about = kernel.name, prop.name
                if (*about, self._of.config.seed) in self._of.ended:
                    continue
                if not known(kernel, self._of.device):  # time was up before it was known
                    refused.append(_no_time(kernel, prop, self._of.config.seed))
                    continue
                if refusal := self._of.refused(kernel, prop):
                    refused.append(refusal)
                    continue
                self._of.note(target, prop)
                few = min(budget.judged or STYLE_CASES, STYLE_CASES)
                found.append(
                    Search(
                        kernel,
                        prop,
                        self._of.device,
                        budget=replace(budget, judged=few) if prop.style else budget,
                        seed=self._of.config.seed,
                        kept=self._of.corpus.cases(*about),
                        completed=self._of.judged.get(about),
                        inbox=inbox,
                    )
                )
        return found, refused

    def _seconds_left(self) -> float | None:
        """Of the time that was asked for, without what earlier parts of a resumed run took."""
        if self._of.config.seconds is None:
            return None
        if not self._of.resumed:
            return self._of.config.seconds
        spent = sum(
            event.seconds or 0.0
            for event in cases(self._of.folder)
            if event.seed is not None and (event.seed - self._of.config.seed) % SEED_STEP == 0
        )
        return max(1.0, self._of.config.seconds - spent)

    def _rounds(self, searches: list[Search], inbox: Inbox) -> Iterator[Event]:
        """The events of all searches, as they happen."""

        def judge(one: Search, case: Case) -> tuple[Answer, float]:
            if reason := self._of.triage.set_aside(one, case):
                return finished(one.kernel, one.prop, case, Outcome.UNSUPPORTED, reason=reason), 0.0
            return timed(
                partial(self._of.evaluate, self._of.targets[one.kernel.name]),
                one.prop,
                case,
            )

        threads = 0 if self._of.config.in_process else self._of.threads
        rounds = Rounds(searches, inbox, judge, self._of.workers.stop, threads)
        for event in rounds.run():
            if not isinstance(event, Search):
                yield event
                if one := _failing(searches, event):
                    yield from self._spared(one, rounds, searches)
                continue
            for end in event.finish():
                yield end
                if isinstance(end, FindingShrunk):
                    if other := self._right_otherwise(event, end):
                        yield other
                        searches.append(rounds.again(event))
                        break
                    yield from self._of.triage.found(end, searches)
                    target = self._of.targets[end.kernel]
                    if self._of.otherwise.excuses(target, end):
                        searches.append(rounds.again(event))
            keep(self._of.corpus, event)

    def _spared(
        self, one: Search, rounds: Rounds, searches: list[Search]
    ) -> Iterator[FindingShrunk | DeclaredOtherwise]:
        """The events of a search whose first case that fails holds in another arithmetic, where
        shrinking it would take what time there is: it begins anew. Else a case is shrunk first,
        since the worst that is seen on the way tells arithmetics from defects.
        """
        found = one.shrunk() if options(one.kernel, self._of.device).slow else None
        if found and (other := self._right_otherwise(one, found, hurried=True)):
            yield found
            yield other
            one.close()
            searches.append(rounds.again(one))

    def _right_otherwise(
        self, one: Search, found: FindingShrunk, *, hurried: bool = False
    ) -> DeclaredOtherwise | None:
        if self._of.config.strict:
            return None
        target = self._of.targets[one.kernel.name]
        return self._of.otherwise.explains(target, one.kernel, found, hurried=hurried)

    def _break_off(self, one: Search, *, timed_out: bool) -> Iterator[Event]:
        """The events of a search that the end of the run, or of its time, cut short."""
        one.close()
        if found := one.shrunk(cut=True):
            yield found
            other = self._right_otherwise(one, found, hurried=True)
            yield other or self._of.triage.explain(found)
        yield one.ending(one.timed_out() if timed_out else Ended.INTERRUPTED)


def _failing(searches: list[Search], event: Event) -> Search | None:
    """The search of which a case failed, if the event says so."""
    if not (isinstance(event, CaseFinished) and event.outcome is Outcome.FAILED):
        return None
    about = event.kernel, event.property
    of_it = (one for one in searches if (one.kernel.name, one.prop.name) == about)
    return next((one for one in of_it if one.shrinking and not one.ended), None)


def _no_time(kernel: Kernel, prop: Property, seed: int) -> PropertyFinished:
    return PropertyFinished(kernel=kernel.name, property=prop.name, ended=Ended.NO_TIME, seed=seed)
