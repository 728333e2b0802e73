"""The engine: Hypothesis draws cases for one kernel and one property until enough were judged or
the time is up.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.errors import Flaky
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider

from verify.engine.corpus import Corpus
from verify.engine.evaluate import Judging, judge, recorded
from verify.generation.strategies import cases
from verify.properties.catalogue import Property
from verify.records.journal import VERDICTS, Drawn, Record
from verify.registry import Kernel
from verify.spec.case import Case
from verify.spec.finding import Finding

CHUNK = 50
"""Cases that Hypothesis draws at a time; a new chunk has a new seed."""
CHUNKS_IN_VAIN = 40
"""After so many chunks without a single judged case the kernel is taken to support none."""
SEED_STEP = 7919
"""Between the seeds of chunks, so that runs with neighbouring seeds do not repeat each other."""


class Independent(HypothesisProvider):
    """A Hypothesis backend (its documented interface for alternative ones) that draws as Hypothesis
    does. With any backend but the default each case is drawn afresh; the default mutates earlier
    cases, copying one choice over another, until most of them have the simplest value of most
    options. Shrinking is Hypothesis's own.
    """

    def _maybe_draw_constant(self, *arguments: Any, **keywords: Any) -> None:
        """None: the constants that Hypothesis reads in loaded modules would make a seed's cases
        depend on what is loaded.
        """


BACKEND = "attention-verify"
AVAILABLE_PROVIDERS[BACKEND] = Independent


@dataclass(frozen=True)
class Budget:
    """When to stop: after this many judged cases or seconds, whichever comes first; and how long to
    shrink.
    """

    judged: int | None = None
    seconds: float | None = None
    shrink_seconds: float = 20.0


@dataclass
class Hunt:
    """What a hunt found: judged cases, why others were not, and the smallest case that breaks the
    law.
    """

    judged: int = 0
    unsupported: dict[str, int] = field(default_factory=dict)
    finding: tuple[Case, Finding] | None = None
    shown: dict[str, Case] = field(default_factory=dict)
    """the first case that showed each known defect"""


class _Enough(BaseException):
    """Leaves Hypothesis when enough was judged, or the time is up; not an Exception, so that
    Hypothesis lets it through.
    """


def hunt(
    kernel: Kernel,
    law: Property,
    device: str,
    *,
    budget: Budget,
    seed: int,
    record: Callable[[Record], None] = lambda r: None,
    corpus: Corpus | None = None,
    judging: Judging | None = None,
    done: Mapping[Drawn, int] | None = None,
) -> Hunt:
    """Try to break a law, first with the cases of the corpus that broke it once. Stops at the first
    failing case, shrunk, which the corpus then keeps, as it does the first that shows a known
    defect; every judged case is recorded as it is judged.

    judging: who judges a case, Isolated.judge say; default: `judge`, in this process. done: the
    cases that were judged before this hunt was interrupted (records.done); they count and are not
    judged again.
    """
    hunter, chunk, start = (
        _Hunter(kernel, law, device, budget, record, judging or judge, done or {}),
        0,
        time.monotonic(),
    )
    hunter.replay(corpus.cases(kernel.name, law.name) if corpus else [])
    while (
        hunter.found.finding is None
        and not hunter.over()
        and (hunter.found.judged or chunk < CHUNKS_IN_VAIN)
    ):
        hunter.seed = seed + SEED_STEP * chunk
        try:
            _chunk(hunter, database=corpus.path.parent / "hypothesis" if corpus else None)
        except (Finding, _Enough):
            pass
        except Flaky:
            hunter.doubt()
        chunk += 1
    if hunter.found.finding is not None:
        case, finding = hunter.found.finding
        record(hunter.record_of(case, "finding", finding.sentence, measured=finding.measured))
    if corpus:
        for case in (
            *hunter.found.shown.values(),
            *([hunter.found.finding[0]] if hunter.found.finding else []),
        ):
            corpus.add(kernel.name, law.name, case)
    record(
        Record(
            kernel.name,
            law.name,
            "",
            "ended",
            seed=seed,
            seconds=round(time.monotonic() - start, 2),
        )
    )
    return hunter.found


class _Hunter:
    """Judges the cases that Hypothesis draws, keeps the smallest that fails, and knows when to
    stop.
    """

    def __init__(
        self,
        kernel: Kernel,
        law: Property,
        device: str,
        budget: Budget,
        record: Callable[[Record], None],
        judging: Judging,
        done: Mapping[Drawn, int],
    ) -> None:
        self.kernel, self.law, self.device, self.budget, self.record = (
            kernel,
            law,
            device,
            budget,
            record,
        )
        self.seed: int | None
        self.judging, self.done, self.seed = judging, Counter(done), None
        self.found, self.start, self.shrinking_since = Hunt(), time.monotonic(), 0.0

    def over(self) -> bool:
        """Whether enough was judged or the time is up."""
        spent = (
            self.budget.seconds is not None and time.monotonic() - self.start > self.budget.seconds
        )
        return spent or (self.budget.judged is not None and self.found.judged >= self.budget.judged)

    def attempt(self, case: Case) -> None:
        """Judge one case; raises its Finding, which Hypothesis then shrinks."""
        if self.shrinking_since:
            if time.monotonic() - self.shrinking_since > self.budget.shrink_seconds:
                raise _Enough
        elif self.over():
            raise _Enough
        else:
            before = next((v for v in VERDICTS if self.done[self.seed, str(case), v]), "")
            if before and before != "failed":
                self.done[self.seed, str(case), before] -= 1
                _count(self.found, self.record_of(case, before))
                return
        self.record(self.record_of(case, "started"))
        start = time.monotonic()
        try:
            judged = self.judging(self.kernel, self.law, case, self.device)
            judged = replace(judged, seed=self.seed, seconds=round(time.monotonic() - start, 4))
        except Finding as finding:
            self._keep(case, finding)
            raise
        if not self.shrinking_since:
            _count(self.found, judged)
            self.record(judged)
            if judged.verdict == "known":
                self.found.shown.setdefault(judged.known, case)

    def record_of(self, case: Case, verdict: str, reason: str = "", **rest: Any) -> Record:
        """A record of this hunt."""
        return replace(
            recorded(self.kernel, self.law, case, verdict, reason, **rest), seed=self.seed
        )

    def replay(self, kept: list[Case]) -> None:
        """Judge these first; they are small already."""
        for case in kept:
            try:
                self.attempt(case)
            except (Finding, _Enough):
                return

    def _keep(self, case: Case, finding: Finding) -> None:
        if not self.shrinking_since:
            self.shrinking_since = time.monotonic()
            if not self.done[self.seed, str(case), "failed"]:
                self.record(
                    self.record_of(case, "failed", finding.sentence, measured=finding.measured)
                )
        if self.found.finding is None or _size(case) <= _size(self.found.finding[0]):
            self.found.finding = (case, finding)

    def doubt(self) -> None:
        """The same case broke the law and held: the kernel is not deterministic, or remembers
        earlier calls.
        """
        if self.found.finding is not None:
            case, finding = self.found.finding
            self.found.finding = (
                case,
                Finding(f"not every time: {finding.sentence}", measured=finding.measured),
            )


def _chunk(hunter: _Hunter, *, database: Path | None) -> None:
    """Draw and judge CHUNK cases. Hypothesis keeps what fails in its own database, in a folder of
    this kernel and property.
    """
    law, folder = (
        hunter.law,
        database and database / re.sub(r"\W", "_", hunter.kernel.name) / hunter.law.name,
    )
    config = settings(
        max_examples=CHUNK,
        database=DirectoryBasedExampleDatabase(folder) if folder else None,
        deadline=None,
        phases=[Phase.reuse, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        backend=BACKEND,
    )

    @seeded(hunter.seed)
    @config
    @given(cases(hunter.kernel, hunter.device, **law.cases))
    def attempt(case: Case) -> None:
        hunter.attempt(case)

    attempt()


def _count(state: Hunt, record: Record) -> None:
    if record.verdict == "unsupported":
        state.unsupported[record.reason] = state.unsupported.get(record.reason, 0) + 1
    else:
        state.judged += 1


def _size(case: Case) -> tuple[int, int, int]:
    p = case.problem
    return p.batch * p.heads_q * p.len_q * p.len_k, p.dim_qk + p.dim_v, len(str(case))
