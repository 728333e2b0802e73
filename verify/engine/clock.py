"""The time of a run: when to stop judging so that what was found can still be shrunk and explained
within the time that the user gave.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

RESERVE = 0.05
"""Of the time that was asked for: to end what is under way, and to sum up."""
OVERRUN = 0.06
"""Of it at most this much more, to explain what was found at the last moment."""


@dataclass(frozen=True)
class Clock:
    """Moments of time.monotonic(); without `seconds` there is no end."""

    since: float
    seconds: float | None = None

    @property
    def judge_until(self) -> float:
        """Until then new cases are judged."""
        return self._at(1 - RESERVE)

    @property
    def end(self) -> float:
        """Then calls that are under way are left."""
        return self._at(1.0)

    @property
    def explain_until(self) -> float:
        """Until then findings are explained."""
        return self._at(1 + OVERRUN)

    @property
    def spent(self) -> float:
        """Seconds until now."""
        return time.monotonic() - self.since

    def _at(self, part: float) -> float:
        return math.inf if self.seconds is None else self.since + part * self.seconds


class Alarm:
    """Calls a function at a moment, from another thread, unless the block has ended before."""

    def __init__(self, moment: float, ring: Callable[[], object]) -> None:
        self.rang = False
        self._ring = ring
        left = moment - time.monotonic()
        self._timer = None if math.isinf(left) else threading.Timer(max(0.0, left), self._now)

    def __enter__(self) -> Alarm:
        if self._timer:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._timer:
            self._timer.cancel()

    def _now(self) -> None:
        self.rang = True
        self._ring()
