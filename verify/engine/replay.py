"""`verify replay`: one case under one property, in a worker process, in this one, or under NVIDIA's
compute-sanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, files
from typing import Any

from rich.console import Console

from verify.errors import VerifyError
from verify.properties.catalogue import PROPERTIES, Property
from verify.registry import Kernel, named
from verify.sandbox.process import isolated
from verify.spec.case import Case
from verify.spec.finding import Finding
from verify.spec.masks import FULL

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
"""Of compute-sanitizer (docs.nvidia.com/compute-sanitizer)."""


def run_replay(
    target: str,
    kernels: list[Kernel],
    case: Case,
    law: str,
    device: str,
    console: Console,
    *,
    here: bool,
) -> int:
    """Judge one case; print its tensors where they are small. Returns 0 where the law holds, 1
    where it is broken. here: in this process, for a debugger.

    Raises VerifyError for an unknown property, several kernels, or a case that the kernel does not
    support.
    """
    prop, (kernel, *others) = named_law(law), kernels
    if others:
        raise VerifyError(
            f"{target}: registers {len(kernels)} kernels; name one: "
            f"{', '.join(named(target, kernels))}"
        )
    if prop.grads and not case.problem.grads:
        case = replace(case, problem=case.problem.but(grads=True))
    if prop.full_mask and case.problem.mask != FULL:
        raise VerifyError(
            f"property {law!r} holds without a mask only; the case has {case.problem.mask}"
        )
    if reason := kernel.unsupported(case.problem, device):
        raise VerifyError(f"{kernel.name} does not support {case.problem}: {reason}")
    if here:
        from verify.sandbox.worker import TASKS  # noqa: PLC0415

        return _replay(
            lambda task, *arguments: TASKS[task](kernel, device, *arguments),
            kernel,
            case,
            law,
            console,
        )
    with isolated(target, kernel, device) as worker:
        return _replay(worker.ask, kernel, case, law, console)


def _replay(ask: Callable[..., Any], kernel: Kernel, case: Case, law: str, console: Console) -> int:
    plain = partial(console.print, markup=False, soft_wrap=True)
    try:
        for line in ask("show", str(case)):
            plain(line)
        verdict = ask("check", law, str(case))
    except Finding as finding:
        plain(f"{kernel.name} breaks {law}: {finding.sentence}")
        for line in why(ask, case, law):
            plain(line)
        return 1
    blind = f"; it could not have told: {', '.join(verdict.blind_to)}" if verdict.blind_to else ""
    plain(
        f"{law} is not judged: {verdict.unsupported}"
        if verdict.unsupported
        else f"{kernel.name}: {law} holds{blind}"
    )
    return 0


def why(ask: Callable[..., Any], case: Case, law: str) -> list[str]:
    """What explains a finding, as lines to print; it must not hide the finding, whatever it runs
    into itself.
    """
    try:
        lines = ask("explain", str(case), law)
    except Finding as finding:
        lines = [f"the call itself: {finding.sentence}"]
    except Exception as error:
        lines = [f"not explained: {type(error).__name__}: {error}"]
    return [f"  {'' if number else 'why':7} {line}" for number, line in enumerate(lines)]


def run_sanitized(tool: str, target: str, case: Case, law: str) -> int:
    """The same under a tool of compute-sanitizer, which prints what it sees. Returns 1 where it
    sees anything, or as run_replay.

    Every tensor is an allocation of its own then: within torch's pools the tool could not tell one
    from the next. Raises VerifyError for an unknown tool, or where compute-sanitizer is not
    installed.
    """
    if tool not in TOOLS:
        raise VerifyError(f"sanitizer {tool!r} is unknown: one of {', '.join(TOOLS)}")
    again = [
        sys.executable,
        "-m",
        "verify",
        "replay",
        target,
        str(case),
        "--property",
        law,
        "--device",
        "cuda",
        "--in-process",
    ]
    command, apart = (
        [_sanitizer(), "--tool", tool, "--error-exitcode", "1", *again],
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    return int(subprocess.run(command, check=False, env=os.environ | apart).returncode != 0)  # noqa: S603


def _sanitizer() -> str:
    """The program, from PATH or from its package, which does not put it there."""
    if program := shutil.which("compute-sanitizer"):
        return program
    with suppress(PackageNotFoundError):
        for file in files("nvidia-cuda-sanitizer-api") or []:
            if file.name == "compute-sanitizer":
                return str(file.locate())
    raise VerifyError(
        "compute-sanitizer is not on PATH, nor installed by: pip install nvidia-cuda-sanitizer-api"
    )


def named_law(name: str) -> Property:
    """The property of this name. Raises VerifyError for another."""
    if name not in PROPERTIES:
        raise VerifyError(f"property {name!r} is unknown: one of {', '.join(PROPERTIES)}")
    return PROPERTIES[name]
