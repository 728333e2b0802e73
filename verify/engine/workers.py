"""The processes that call kernels in one run: lent to whoever judges a case, kept for the next."""

from __future__ import annotations

import threading

from verify.registry import Kernel
from verify.sandbox.process import Isolated, Limits


class Workers:
    """At most `most` worker processes, each of one kernel. Safe for several threads."""

    def __init__(self, device: str, limits: Limits, most: int) -> None:
        self.stop = threading.Event()
        """Once it is set, calls that are under way are left with Interrupted."""
        self._device = device
        self._limits = limits
        self._most = most
        self._idle: list[Isolated] = []
        self._busy = 0
        self._lock = threading.Lock()

    def borrow(self, target: str, kernel: Kernel) -> Isolated:
        """A worker of this kernel: an idle one or a new one, in whose place an idle one of another
        kernel ends if there are too many.
        """
        with self._lock:
            found = next((one for one in self._idle if one.target == target), None)
            if found:
                self._idle.remove(found)
            surplus = None
            if not found and self._busy + len(self._idle) >= self._most and self._idle:
                surplus = self._idle.pop(0)
            self._busy += 1
        if surplus:
            surplus.close()
        return found or Isolated(target, kernel, self._device, self._limits, self.stop)

    def give_back(self, worker: Isolated) -> None:
        """Keep a borrowed worker for the next case."""
        with self._lock:
            self._busy -= 1
            self._idle.append(worker)

    def close(self) -> None:
        """End those that nobody has borrowed."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.close()
