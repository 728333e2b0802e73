"""The process in which a kernel is called (process.py). It runs the functions that it is handed,
one after another, until its pipe closes; it does not know what they are for.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from verify import environment, registry
from verify.registry import Kernel
from verify.sandbox import call
from verify.sandbox.capabilities import learn
from verify.sandbox.options import Options
from verify.spec.finding import Finding

PRINTED = 1 << 20
"""Bytes that the calls of one task may write to standard output and error; what a kernel has to say
is less.
"""
PARENT_DIED = 1
"""prctl's PR_SET_PDEATHSIG."""


def serve(
    pipe: Connection,
    since: Any,
    log: str,
    target: str,
    name: str,
    device: str,
    options: Options | None,
    settings: dict[str, Any],
) -> None:
    """Load the kernel, say "ready", then answer each (function, arguments) with what the function
    makes of (kernel, device, *arguments).
    """
    output = _settle(log)
    try:
        environment.prepare(device)
        torch.set_num_threads(1)  # workers with more would fight for the cores
        if device == "cuda":
            torch.cuda.set_device(settings["gpu"])
            torch.cuda.set_per_process_memory_fraction(1 / settings["sharing"])
            warm = torch.ones(16, 16, device=device)
            torch.mm(warm, warm)  # no kernel's call is charged for the start
            torch.cuda.synchronize()
        kernel = next(k for k in registry.find(target) if k.name == name)
        path = target.partition("::")[0]
        if path.endswith(".py"):  # what registers it, wherever its function is defined
            kernel = replace(kernel, origin=f"{Path(path).resolve()}:1")
    except Exception:
        pipe.send(("broken", traceback.format_exc()))
        return
    if options:
        learn(kernel, device, options)
    call.since = since
    gc.freeze()  # what was loaded stays: collections need not look at it
    pipe.send(("ready",))
    while True:
        try:
            task, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(kernel, device, task, arguments, output))


def _settle(log: str) -> int:
    """Write to the log; die with the parent, not with its Ctrl-C; say where it was when it crashes,
    or hangs (SIGUSR1). Returns the log, whatever the kernel does to standard output.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, 2)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGKILL)
    return out


def _answer(
    kernel: Kernel, device: str, task: Callable[..., Any], arguments: tuple[Any, ...], output: int
) -> tuple[Any, ...]:
    """("value", it), ("broken", traceback) where this project is at fault, ("finding", sentence,
    measured, is the GPU lost?).
    """
    sentence, measured, value, trace = "", {}, None, ""
    try:
        value = task(kernel, device, *arguments)
    except Finding as finding:
        sentence, measured = finding.sentence, finding.measured
    except KeyboardInterrupt:  # nobody's Ctrl-C comes here
        sentence = "raised KeyboardInterrupt"
    except Exception:
        trace = traceback.format_exc()
    printed, lost = _printed(output), _lost(device)
    if not lost:
        environment.give_back()
    if lost and not sentence:  # perhaps in a call whose exception a law took for an answer
        sentence = f"lost the GPU: {trace.strip().splitlines()[-1]}" if trace else "lost the GPU"
    if printed > PRINTED and not sentence and not trace:
        sentence = f"wrote {printed} bytes to standard output and error"
    if sentence:
        return "finding", sentence, measured, lost
    return ("broken", trace) if trace else ("value", value)


def _printed(output: int) -> int:
    """Bytes written since the last call."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed by the kernel
            stream.flush()
    size = os.fstat(output).st_size
    os.ftruncate(output, 0)
    return size


def _lost(device: str) -> bool:
    """Whether no further call can succeed: the GPU's context is gone."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
