"""Rounds: many searches at once, each with as many cases as its weight says, on several workers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from verify.engine.search import Answer, Inbox, Search
from verify.records.events import Event
from verify.sandbox.process import Interrupted
from verify.spec.case import Case

CORE_SHARE = 0.4
"""Of a run's cases: those of properties that compare with the oracle (Property.core)."""
NOT_JUDGED = 0.25
"""Of a judged case: what one counts that was drawn and could not be judged."""
WAIT = 0.1
"""Seconds between looks at whether the run was stopped."""

Judge = Callable[[Search, Case], tuple[Answer, float]]
"""(search, case) -> (what judging the case gives, seconds)"""


class Rounds:
    """Goes round the searches: next comes the one that had the fewest cases for its weight.

    While `workers` threads wait for judged cases, one case more is drawn. Without workers, cases
    are judged in the caller's thread. What is judged does not depend on their number.
    """

    def __init__(
        self,
        searches: list[Search],
        inbox: Inbox,
        judge: Judge,
        stop: threading.Event,
        workers: int,
    ) -> None:
        self._idle = list(searches)
        self._weight = weights(searches)
        self._inbox = inbox
        self._judge = judge
        self._stop = stop
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._most = workers + 1 if workers else 1
        self._busy: set[Search] = set()

    def again(self, one: Search) -> Search:
        """A new search for the same, in the place of one that has ended."""
        other = one.again()
        self._weight[other] = self._weight[one]
        self._idle.append(other)
        return other

    def run(self) -> Iterator[Event | Search]:
        """The events, and each search when it has come to its end, until all have, or `stop` is
        set.
        """
        try:
            while not self._stop.is_set() and (self._idle or self._busy):
                self._resume()
                try:
                    one, case, answer = self._inbox.get(timeout=WAIT)
                except queue.Empty:
                    continue
                if one.ended or case is None or answer is not None:
                    self._busy.discard(one)
                if one.ended:
                    self._raise(answer)
                elif case is None:
                    yield one
                elif answer is None:
                    yield one.started(case)
                    self._submit(one, case)
                elif event := self._take(one, case, answer):
                    yield event
        finally:
            if self._busy:
                self._stop.set()  # so that nobody waits for calls that are under way
            if self._pool:
                self._pool.shutdown(cancel_futures=True)

    def _resume(self) -> None:
        self._idle = [one for one in self._idle if not one.ended]
        while self._idle and len(self._busy) < self._most:
            one = min(self._idle, key=self._turn)
            self._idle.remove(one)
            one.resume()
            self._busy.add(one)

    def _turn(self, one: Search) -> tuple[bool, float]:
        """What is shrunk goes on; else by the divisors of Webster and Sainte-Lague, so that shares
        are as near to the weights as whole cases allow, from the first round on. A case that was
        not judged counts in part: a property of which few cases can be is drawn more often.
        """
        asked = one.tested + (one.asked - one.tested) * NOT_JUDGED
        return not one.shrinking, (asked + 0.5) / self._weight[one]

    def _submit(self, one: Search, case: Case) -> None:
        """Have a case judged; what comes of it, an exception too, goes into the inbox."""

        def judge() -> None:
            try:
                answer: Any = self._judge(one, case)
            except BaseException as error:
                answer = error
            self._inbox.put((one, case, answer))

        if self._pool:
            self._pool.submit(judge)
        else:
            judge()

    def _take(self, one: Search, case: Case, answer: Any) -> Event | None:
        self._idle.append(one)
        if self._raise(answer):
            return None
        return one.judged(case, *answer)

    def _raise(self, answer: Any) -> bool:
        """Whether the run is to stop. Raises what judging a case raised."""
        if isinstance(answer, Interrupted | KeyboardInterrupt):
            self._stop.set()
            return True
        if isinstance(answer, BaseException):
            raise answer
        return False


def weights(searches: list[Search]) -> dict[Search, float]:
    """How many cases each search gets beside one of a property that is not core."""
    core = sum(one.prop.core for one in searches)
    rest = len(searches) - core
    share = CORE_SHARE / (1 - CORE_SHARE)
    weight = max(1.0, share * rest / core) if core and rest else 1.0
    return {one: weight if one.prop.core else 1.0 for one in searches}
