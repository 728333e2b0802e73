"""The search for a case that breaks one property of one kernel, as a coroutine.

Hypothesis draws cases; one that fails is shrunk; whoever runs the search judges them. The
search asks for one outcome at a time, so that several searches can go on at once, and the cases of
a seed depend neither on who judges them, nor on time, nor on how many others there are.
"""

from __future__ import annotations

import math
import queue
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from verify.engine.causes import AT_TIMES
from verify.engine.config import SHRINK_SECONDS
from verify.engine.corpus import Corpus
from verify.engine.drawing import draw
from verify.engine.evaluate import evaluate, finished
from verify.engine.shrink import Shrinker
from verify.properties.catalogue import Property
from verify.records.events import (
    TESTED,
    CaseFinished,
    CaseStarted,
    Ended,
    Event,
    FindingShrunk,
    Outcome,
    PropertyFinished,
)
from verify.records.journal import Drawn
from verify.registry import Kernel
from verify.spec.case import Case
from verify.spec.finding import Finding

CASES_IN_VAIN = 25
"""So many cases that cannot be judged, and no other, are not for want of time."""
CHUNKS_IN_VAIN = 8
"""After so many chunks without another judged case there are taken to be no more."""
PROPERTIES_APART, CHUNKS_APART = 1000, 10_000
"""Each property has chunks of its own, by its name: else all with the same needs see the same."""
SEED_STEP = 7919
"""Between the seeds of chunks, so that runs with neighbouring seeds do not repeat each other."""


@dataclass(frozen=True)
class Budget:
    """When to stop: after this many judged cases, or at this time of time.monotonic(), whichever
    comes first; and how long to shrink.
    """

    judged: int | None = None
    deadline: float | None = None
    shrink_seconds: float = SHRINK_SECONDS
    end: float = math.inf
    """When shrinking ends in any case."""


class _Enough(BaseException):
    """Leaves Hypothesis when enough was judged, or the time is up; not an Exception, so that
    Hypothesis lets it through.
    """


Answer = CaseFinished | Finding
"""What judging a case gives."""
Inbox: TypeAlias = "queue.SimpleQueue[tuple[Search, Case | None, Any]]"
"""What searches ask for: (search, case, None), or (search, None, None) at the end of one."""


class Search:
    """A search that is stepped from outside: `resume`, take the case from `inbox`, `judged`, and
    again, until `inbox` has no case.

    The corpus's cases of this kernel and property are asked about first; then Hypothesis draws. It
    ends at the first case that fails, shrunk. `completed`: cases that were judged before a run was
    interrupted; they count and are not asked about again.
    """

    def __init__(
        self,
        kernel: Kernel,
        prop: Property,
        device: str,
        *,
        budget: Budget,
        seed: int,
        kept: Sequence[Case] = (),
        completed: Mapping[Drawn, int] | None = None,
        inbox: Inbox | None = None,
    ) -> None:
        self.kernel = kernel
        self.prop = prop
        self.device = device
        self.budget = budget
        self.run_seed = seed
        self.inbox: Inbox = inbox if inbox is not None else queue.SimpleQueue()
        self.finding: tuple[Case, Finding] | None = None
        self.shown: dict[str, Case] = {}
        """The first case that showed each known issue."""
        self.unsupported: Counter[str] = Counter()
        self.tested = 0
        """Cases that were judged."""
        self.asked = 0
        """Cases that were handed out, unsupported ones among them."""
        self.seconds = 0.0
        """Spent in drawing, judging and shrinking."""
        self.ended = False
        self._worst: tuple[Case, Finding] | None = None
        self._shrinking_since: float | None = None
        self._kept = kept
        self._left = Counter(completed or {})
        self._seed: int | None = None
        self._answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._answer: Answer | None = None
        self._broken: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._since = 0.0

    # ---- the side of whoever runs it

    @property
    def shrinking(self) -> bool:
        """Whether a case failed."""
        return self._shrinking_since is not None

    def resume(self) -> None:
        """Hand the last answer over and draw on, in a thread of the search's own: (self, case), or
        (self, None) at its end, comes into the inbox.
        """
        self._since = time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        else:
            self._answers.put(self._answer)

    def started(self, case: Case) -> CaseStarted:
        """The event of a case that is about to be judged."""
        self.asked += 1
        return CaseStarted(
            kernel=self.kernel.name, property=self.prop.name, case=str(case), seed=self._seed
        )

    def judged(self, case: Case, answer: Answer, seconds: float) -> CaseFinished | None:
        """Take what judging a case gave; return its event, or None while a case is shrunk."""
        self._answer = answer
        now = time.monotonic()
        self.seconds += now - self._since
        self._since = now
        if isinstance(answer, Finding):
            return self._failed(case, answer, seconds)
        if self.shrinking:
            return None
        event = replace(answer, seed=self._seed, seconds=round(seconds, 4))
        self._count(event)
        if event.outcome is Outcome.KNOWN_ISSUE:
            self.shown.setdefault(event.known, case)
        return event

    def finish(self) -> Iterator[FindingShrunk | PropertyFinished]:
        """The events that end it. Raises what broke the search itself."""
        self.seconds += time.monotonic() - self._since if self._since else 0.0
        self.ended = True
        if self._broken is not None:
            raise self._broken
        if found := self.shrunk():
            yield found
        yield self.ending(self._why())

    def shrunk(self, *, cut: bool = False) -> FindingShrunk | None:
        """The event of the smallest case that failed so far, if one did. cut: the run ends here."""
        if self.finding is None or self._worst is None:
            return None
        case, finding = self.finding
        return FindingShrunk(
            kernel=self.kernel.name,
            property=self.prop.name,
            case=str(case),
            reason=finding.sentence,
            measured=finding.measured,
            seed=self._seed,
            worst=str(self._worst[0]),
            worst_reason=self._worst[1].sentence,
            cut=cut,
        )

    def again(self) -> Search:
        """A new search for the same."""
        return Search(
            self.kernel,
            self.prop,
            self.device,
            budget=self.budget,
            seed=self.run_seed,
            inbox=self.inbox,
        )

    def shown_by(self, case: Case, finding: Finding) -> list[CaseFinished | FindingShrunk]:
        """The events of a case, found by another search, that fails here too; it ends this one."""
        self.finding = self._worst = case, finding
        failed = finished(
            self.kernel,
            self.prop,
            case,
            Outcome.FAILED,
            reason=finding.sentence,
            measured=finding.measured,
        )
        self.close()
        found = self.shrunk()
        assert found is not None
        return [failed, found]

    def ending(self, ended: Ended) -> PropertyFinished:
        """The last event of the search."""
        return PropertyFinished(
            kernel=self.kernel.name,
            property=self.prop.name,
            ended=ended,
            reason="; ".join(self.unsupported) if ended is Ended.UNSUPPORTED else "",
            judged=self.tested,
            seconds=round(self.seconds, 2),
            seed=self.run_seed,
            style=self.prop.style,
        )

    def close(self) -> None:
        """Let its thread end."""
        self.ended = True
        if self._thread is not None and self._thread.is_alive():
            self._answers.put(None)

    def over(self) -> bool:
        """Whether enough was judged or the time is up."""
        return self._late() or self._enough()

    def timed_out(self) -> Ended:
        """How it ended, if its time is up: without a judged case of many, there are taken to be
        none.
        """
        if self.tested:
            return Ended.TIME
        in_vain = sum(self.unsupported.values()) >= CASES_IN_VAIN
        return Ended.UNSUPPORTED if in_vain else Ended.NO_TIME

    def _late(self) -> bool:
        return self.budget.deadline is not None and time.monotonic() > self.budget.deadline

    def _enough(self) -> bool:
        return self.budget.judged is not None and self.tested >= self.budget.judged

    def _why(self) -> Ended:
        if self.finding is not None:
            return Ended.FINDING
        if self._enough():
            return Ended.CASES
        if self._late():
            return self.timed_out()
        return Ended.EXHAUSTED if self.tested else Ended.UNSUPPORTED

    def _failed(self, case: Case, finding: Finding, seconds: float) -> CaseFinished | None:
        first = not self.shrinking
        if first:
            self._shrinking_since = time.monotonic()
        if self._worst is None or _violation(finding) > _violation(self._worst[1]):
            self._worst = case, finding
        if self.finding is None or _size(case) <= _size(self.finding[0]):
            self.finding = case, finding
        if not first or self._left[self._seed, str(case), Outcome.FAILED]:
            return None
        event = finished(
            self.kernel,
            self.prop,
            case,
            Outcome.FAILED,
            reason=finding.sentence,
            measured=finding.measured,
        )
        return replace(event, seed=self._seed, seconds=round(seconds, 4))

    def _count(self, event: CaseFinished) -> None:
        if event.outcome not in TESTED:
            self.unsupported[event.reason] += 1
        else:
            self.tested += 1

    # ---- the side of Hypothesis: a thread of its own, of which one step runs at a time

    def _run(self) -> None:
        try:
            self._search()
        except _Enough:
            pass
        except BaseException as error:
            self._broken = error
        self.inbox.put((self, None, None))

    def _search(self) -> None:
        for case in self._kept:
            self._attempt(case)
        chunk = in_vain = 0
        first = zlib.crc32(self.prop.name.encode()) % PROPERTIES_APART * CHUNKS_APART
        while self.finding is None and not self.over() and in_vain < CHUNKS_IN_VAIN:
            before = self.tested
            self._seed = self.run_seed + SEED_STEP * (first + chunk)
            about = self.kernel, self.prop, self.device
            draw(self._attempt, *about, seed=self._seed, number=chunk)
            chunk += 1
            in_vain = 0 if self.tested > before else in_vain + 1

    def _attempt(self, case: Case) -> None:
        """Ask for the outcome of one case; shrink one that fails, which ends the search."""
        if self.over():
            raise _Enough
        if before := self._known_outcome(case):
            self._count(finished(self.kernel, self.prop, case, before))
            return
        if not self._fails(case):
            return
        if not self._late_for_shrinking() and not self._fails(case):
            self._doubt()
        else:
            about = self.kernel, self.device, self.prop.needs
            Shrinker(*about, self._fails).shrink(case)
        raise _Enough

    def _fails(self, case: Case) -> bool:
        """Ask whether a case fails."""
        if self.shrinking and self._late_for_shrinking():
            raise _Enough
        self.inbox.put((self, case, None))
        answer = self._answers.get()
        if answer is None:
            raise _Enough
        return isinstance(answer, Finding)

    def _late_for_shrinking(self) -> bool:
        since = self._shrinking_since or 0.0
        return time.monotonic() > min(since + self.budget.shrink_seconds, self.budget.end)

    def _known_outcome(self, case: Case) -> Outcome | None:
        """The outcome that is on record for a case, which then counts as judged once more."""
        for outcome in Outcome:
            key = self._seed, str(case), outcome
            if outcome is not Outcome.FAILED and self._left[key] > 0:
                self._left[key] -= 1
                return outcome
        return None

    def _doubt(self) -> None:
        """The same case broke the property and held: the kernel is not deterministic, or remembers
        earlier calls.
        """
        if self.finding is not None:
            case, finding = self.finding
            sentence = f"{AT_TIMES}{finding.sentence}"
            self.finding = case, Finding(sentence, measured=finding.measured)


def search(
    kernel: Kernel,
    prop: Property,
    device: str,
    *,
    budget: Budget,
    seed: int,
    corpus: Corpus | None = None,
    evaluate_case: Callable[[Property, Case], CaseFinished] | None = None,
    completed: Mapping[Drawn, int] | None = None,
) -> Iterator[Event]:
    """Run one search to its end; the events of it, as they happen.

    evaluate_case: judges a case, raising Finding; default: `evaluate`, in this process. The corpus
    keeps the finding, and the first case that shows each known issue.
    """
    evaluate_case = evaluate_case or partial(evaluate, kernel, device)
    kept = corpus.cases(kernel.name, prop.name) if corpus else []
    one = Search(kernel, prop, device, budget=budget, seed=seed, kept=kept, completed=completed)
    try:
        while True:
            one.resume()
            _, case, _ = one.inbox.get()
            if case is None:
                break
            yield one.started(case)
            event = one.judged(case, *timed(evaluate_case, prop, case))
            if event:
                yield event
        yield from one.finish()
    finally:
        one.close()
    if corpus:
        keep(corpus, one)


def timed(
    evaluate_case: Callable[[Property, Case], CaseFinished], prop: Property, case: Case
) -> tuple[Answer, float]:
    """(what judging a case gives, the seconds that it takes)"""
    start = time.monotonic()
    try:
        answer: Answer = evaluate_case(prop, case)
    except Finding as finding:
        answer = finding
    return answer, time.monotonic() - start


def keep(corpus: Corpus, one: Search) -> None:
    """Add what a search found to the corpus."""
    found = [one.finding[0]] if one.finding else []
    for case in (*one.shown.values(), *found):
        corpus.add(one.kernel.name, one.prop.name, case)


def _violation(finding: Finding) -> float:
    """Error / allowed, where the finding is of one element."""
    allowed = finding.measured.get("allowed", 0.0)
    return finding.measured.get("error", 0.0) / allowed if allowed else 0.0


def _size(case: Case) -> tuple[int, int, int]:
    p = case.problem
    return p.batch * p.heads_q * p.len_q * p.len_k, p.dim_qk + p.dim_v, len(str(case))
