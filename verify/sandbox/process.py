"""Isolation: a kernel is called in a worker process, which may crash, hang or take all memory: a
finding, and the run goes on.

The worker (worker.py) is forked from a server that has imported torch, so a new one is cheap. It is
watched from here.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from verify import environment
from verify.environment import CALL_SECONDS
from verify.errors import VerifyError
from verify.registry import Kernel
from verify.sandbox.capabilities import known, learn, options, tries
from verify.sandbox.options import Options
from verify.sandbox.probe import probe
from verify.spec.case import Case
from verify.spec.finding import Finding

P = ParamSpec("P")
T = TypeVar("T")
START_SECONDS = 300.0
"""To import torch and load a kernel's file."""
LATE = (2.0, 10.0)
"""After a hang, a call is given this many seconds and so many times the slowest task: it is shrunk
within the engine's time.
"""
RESTARTS = (1.0, 5.0, 20.0)
"""Seconds to wait before a worker that did not start is started again."""
TICK = 0.05
"""Seconds between looks at a worker."""
SHARE = 0.5
"""Of the machine's memory: what the workers of all of pytest's processes may hold together."""
END_SECONDS = 30.0
"""For a killed process to be gone; one that its GPU's driver holds is left behind."""
SAID = 64 * 1024
"""Bytes of a worker's output that are read after its end."""


@dataclass(frozen=True)
class Limits:
    """What one call may take: seconds, and bytes of host memory of its process."""

    seconds: float = CALL_SECONDS
    memory: int | None = None
    """None: its share of the machine."""
    processes: int = field(default_factory=environment.processes)
    """So many workers share the machine."""

    @property
    def bytes(self) -> int:
        """The limit of memory."""
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return self.memory or int(SHARE * whole / self.processes)


class Interrupted(Exception):
    """Somebody asked the run to stop while a worker was busy."""


class Isolated:
    """The worker process of one kernel: started when it is needed, replaced when it is gone. It
    serves one thread at a time.
    """

    def __init__(
        self,
        target: str,
        kernel: Kernel,
        device: str,
        limits: Limits | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """target: what registry.find finds this kernel by, alone. stop: once it is set, a call that
        is under way is left with Interrupted.
        """
        self.target = target
        self.kernel = kernel
        self.device = device
        self._limits = limits or Limits()
        self._stop = stop or threading.Event()
        self._slowest = 0.0
        self._started = False
        self._worker: _Worker | None = None

    def options(self) -> Options:
        """What the kernel takes, for the worker and for this process; a layout that ends the worker
        is one that it takes.
        """
        if not known(self.kernel, self.device):
            found = probe(self.kernel, self.device, self._tries)
            learn(self.kernel, self.device, found)
            self.run(learn, found)  # else it would try it all again, and crash again
        return options(self.kernel, self.device)

    def run(
        self, function: Callable[Concatenate[Kernel, str, P], T], *arguments: P.args, **_: P.kwargs
    ) -> T:
        """Return function(kernel, device, *arguments) as the worker computes it.

        The function is a module's own: it is pickled by name. Raises the Finding that it raises, or
        that the worker's end is; Interrupted; RuntimeError for any other exception.
        """
        for last in (False, True):
            if self._stop.is_set():
                raise Interrupted
            try:
                start = time.monotonic()
                answer = self._running().run(function, arguments, self._limits, self._stop)
                self._slowest = max(self._slowest, time.monotonic() - start)
                return answer
            except _Gone as gone:
                self.close()
                if gone.late:
                    # while this is shrunk, a call that hangs must not take a minute each time
                    shorter = min(self._limits.seconds, LATE[0] + LATE[1] * self._slowest)
                    self._limits = replace(self._limits, seconds=shorter)
                if last or not gone.doubtful:
                    raise Finding(gone.sentence, measured=gone.measured) from gone
            except Interrupted:
                self.close()
                raise
        raise AssertionError

    def close(self) -> None:
        """End the worker."""
        if self._worker:
            self._worker.close()
            self._worker = None

    def _running(self) -> _Worker:
        if self._worker is not None and not self._worker.alive:
            self.close()  # it was killed from outside between two cases
        if self._worker is None:
            self._worker = self._start()
        return self._worker

    def _start(self) -> _Worker:
        """A new worker; one in the place of another is tried again, for what that one held of the
        GPU may not be free yet.
        """
        options, processes = known(self.kernel, self.device), self._limits.processes
        for pause in (*RESTARTS, None) if self._started else (None,):
            try:
                one = _Worker(self.target, self.kernel.name, self.device, options, processes)
            except VerifyError:
                if pause is None:
                    raise
                time.sleep(pause)
            else:
                self._started = True
                return one
        raise AssertionError

    def _tries(self, case: Case) -> tuple[str, bool]:
        try:
            return self.run(tries, case)
        except Finding as finding:
            return finding.sentence, False


@contextmanager
def isolated(
    target: str, kernel: Kernel, device: str, limits: Limits | None = None
) -> Iterator[Isolated]:
    """An Isolated that ends with the block."""
    one = Isolated(target, kernel, device, limits)
    try:
        yield one
    finally:
        one.close()


@dataclass(eq=False)
class _Gone(Exception):
    """A worker is of no more use. `doubtful`: perhaps through no fault of this case; a new one must
    confirm it.
    """

    sentence: str
    doubtful: bool = False
    late: bool = False
    measured: dict[str, float] | None = None


class _Worker:
    """One process, and what is seen of it from outside."""

    def __init__(
        self, target: str, name: str, device: str, options: Options | None, processes: int
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_loaded())
        self.asked = 0
        self._connection, theirs = context.Pipe()
        self._since = context.RawArray("d", 1)
        with tempfile.NamedTemporaryFile(prefix="verify-", delete=False) as log:
            self._log = Path(log.name)
        arguments = (
            theirs,
            self._since,
            str(self._log),
            target,
            name,
            device,
            options,
            _settings(device, processes),
        )
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        try:
            kind, *rest = self._reply(Limits(), time.monotonic() + START_SECONDS)
        except (EOFError, ConnectionError) as error:
            self.close()
            raise _Gone("ended its process while it started", doubtful=True) from error
        if kind != "ready":
            self.close()
            raise VerifyError(f"{target}: its worker process did not start: {rest[0]}")

    @property
    def alive(self) -> bool:
        """Whether it waits for a task."""
        return self._process.is_alive()

    def run(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        limits: Limits,
        stop: threading.Event,
    ) -> Any:
        """What the function returns. Raises Finding, Interrupted, or _Gone where it must be
        replaced.
        """
        self.asked += 1
        try:
            self._connection.send((function, arguments))
            kind, *rest = self._reply(limits, None, stop)
        except (EOFError, ConnectionError) as error:
            self._process.join(END_SECONDS)
            code = self._process.exitcode
            raise _Gone(
                f"ended its process: {_ending(code)}{self._said()}",
                doubtful=code == -signal.SIGKILL,
            ) from error
        if kind == "value":
            return rest[0]
        if kind == "broken":
            raise RuntimeError(f"in the worker, {function.__name__}{arguments}:\n{rest[0]}")
        sentence, measured, lost = rest
        full = "OutOfMemory" in sentence and self.asked > 1  # earlier calls may have left little
        if lost or full:
            raise _Gone(sentence, doubtful=full, measured=measured)
        raise Finding(sentence, measured=measured)

    def close(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.join(END_SECONDS)
        self._connection.close()
        self._log.unlink(missing_ok=True)

    def _reply(
        self, limits: Limits, deadline: float | None, stop: threading.Event | None = None
    ) -> tuple[Any, ...]:
        while not wait([self._connection], TICK):
            if stop and stop.is_set():
                raise Interrupted
            since, now, held = self._since[0], time.monotonic(), environment.held(self._process.pid)
            if since and now - since > limits.seconds:
                raise _Gone(f"did not return within {limits.seconds:g} s{self._stuck()}", late=True)
            if held > limits.bytes:
                share = f"{limits.bytes / 2**30:.1f} GiB are its share"
                taken = f"took {held / 2**30:.1f} GiB of memory; {share}"
                raise _Gone(taken, doubtful=self.asked > 1)
            if deadline and now > deadline:
                return "late", f"not ready after {START_SECONDS:g} s"
        return self._connection.recv()

    def _stuck(self) -> str:
        """Where Python is, if the interpreter still answers."""
        with suppress(ProcessLookupError):
            os.kill(self._process.pid or 0, signal.SIGUSR1)
        time.sleep(2 * TICK)
        return self._said()

    def _said(self) -> str:
        """Where it was, by the innermost frame in its output."""
        with self._log.open("rb") as file:
            file.seek(max(0, self._log.stat().st_size - SAID))
            stack = file.read().decode(errors="replace").rpartition("most recent call first")[2]
        frames = re.findall(r'File "(.*)", line (\d+) in', stack)
        others = (sys.base_prefix, sys.prefix, str(Path(__file__).parent / "allocations"))
        own = [frame for frame in frames if not frame[0].startswith(others)]
        return "".join(f" ({path}:{line})" for path, line in [*own, *frames][:1])


def _serve(*arguments: Any) -> None:
    """The worker's start; what it imports was imported by the server that it is forked from."""
    from verify.sandbox.worker import serve  # noqa: PLC0415

    serve(*arguments)


def _loaded() -> list[str]:
    """What the server imports before it forks: what of this project is imported here, whatever the
    worker is asked for; not what it is that calls a worker, and no kernel, which a worker's device
    decides about.
    """
    apart = ("verify.cli", "verify.kernels", "verify.pytest_plugin", "verify.studies")
    here = [n for n in sys.modules if n.startswith("verify.") and not n.startswith(apart)]
    return ["verify.sandbox.worker", *here]


def _settings(device: str, processes: int) -> dict[str, Any]:
    """What a worker takes over of this process."""
    gpu = torch.cuda.current_device() if device == "cuda" else 0
    return {"gpu": gpu, "sharing": processes}


def _ending(code: int | None) -> str:
    if code is None:
        return "it closed its pipe"
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
