"""The process in which a kernel is called (isolation.py): it does what it is asked, task after
task, until its pipe closes.
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
from verify.diagnosis.explain import explain, script, shown
from verify.engine.evaluate import judge
from verify.inspection import conventions, determinism
from verify.properties.catalogue import PROPERTIES
from verify.registry import Kernel
from verify.sandbox import call
from verify.sandbox.capabilities import Options, learn, tries
from verify.spec.case import Case
from verify.spec.finding import Finding

PRINTED = 1 << 20
"""Bytes that the calls of one task may write to standard output and error; what a kernel has to say
is less.
"""
PARENT_DIED = 1
"""prctl's PR_SET_PDEATHSIG."""
TASKS: dict[str, Callable[..., Any]] = {
    "judge": lambda kernel, device, law, case: judge(
        kernel, PROPERTIES[law], Case.parse(case), device
    ),
    "check": lambda kernel, device, law, case: PROPERTIES[law].check(
        kernel, Case.parse(case), device
    ),
    "learn": learn,
    "tries": lambda kernel, device, case: tries(kernel, Case.parse(case), device=device),
    "show": lambda kernel, device, case: list(shown(kernel, Case.parse(case), device)),
    "explain": lambda kernel, device, case, law: explain(kernel, Case.parse(case), law, device),
    "script": lambda kernel, device, case, deadly: script(
        kernel, Case.parse(case), device, deadly=deadly
    ),
    "conventions": conventions.rows,
    "determinism": determinism.verdicts,
}


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
    """Load the kernel, say "ready", then answer (task, arguments) with what TASKS makes of them."""
    output = _settle(log)
    try:
        environment.prepare(device)
        torch.set_num_threads(settings["threads"])
        if device == "cuda":
            torch.cuda.set_device(settings["gpu"])
            torch.cuda.set_per_process_memory_fraction(1 / settings["sharing"])
            torch.ones(16, 16, device=device) @ torch.ones(
                16, 16, device=device
            )  # no kernel's call is charged for the start
            torch.cuda.synchronize()
        kernel, path = (
            next(k for k in registry.find(target) if k.name == name),
            target.partition("::")[0],
        )
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
    kernel: Kernel, device: str, task: str, arguments: tuple[Any, ...], output: int
) -> tuple[Any, ...]:
    """("value", it), ("broken", traceback) where this project is at fault, ("finding", sentence,
    measured, is the GPU lost?).
    """
    sentence, measured, value, trace = "", {}, None, ""
    try:
        value = TASKS[task](kernel, device, *arguments)
    except Finding as finding:
        sentence, measured = finding.sentence, finding.measured
    except KeyboardInterrupt:  # nobody's Ctrl-C comes here
        sentence = "raised KeyboardInterrupt"
    except Exception:
        trace = traceback.format_exc()
    printed, lost = _printed(output), _lost(device)
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
