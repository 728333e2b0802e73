"""`verify replay`: one case under one property, in a worker process, in this one, or under NVIDIA's
compute-sanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, files
from typing import Any

from verify.diagnosis.derived import Derived
from verify.diagnosis.explain import explain_call, show
from verify.engine.evaluate import check
from verify.engine.explanation import Run, why
from verify.errors import VerifyError
from verify.inspection import conventions
from verify.properties.catalogue import Property
from verify.registry import Kernel
from verify.sandbox.capabilities import as_variant
from verify.sandbox.process import isolated
from verify.spec.case import Case
from verify.spec.finding import Finding

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
"""Of compute-sanitizer (docs.nvidia.com/compute-sanitizer)."""


Write = Callable[[str], None]


def replay(
    target: str,
    kernels: dict[str, Kernel],
    device: str,
    prop: Property,
    case: Case,
    write: Write,
    *,
    in_process: bool = False,
) -> bool:
    """Judge one case; write its tensors where they are small, what was found, and why, a line at a
    time. Return whether the property holds.

    Raises VerifyError for several kernels, or a case that the kernel or the property does not take.
    """
    alone, kernel = _only(target, kernels)
    case = replace(case, problem=prop.needs.met_by(case.problem))
    if refusal := prop.needs.refusal(case.problem):
        raise VerifyError(f"property {prop.name!r} {refusal}")
    if reason := kernel.unsupported(case.problem, device):
        raise VerifyError(f"{kernel.name} does not support {case.problem}: {reason}")
    with _running(alone, kernel, device, in_process=in_process) as run:
        return _replayed(_as_found(run, write), kernel, prop, case, write)


def replay_call(
    target: str,
    kernels: dict[str, Kernel],
    device: str,
    derived: Derived,
    write: Write,
    *,
    in_process: bool = False,
) -> bool:
    """Judge one call that a property makes against the exact answer. Return whether it is right.

    Raises VerifyError for several kernels, or where the property makes no such call.
    """
    alone, kernel = _only(target, kernels)
    with _running(alone, kernel, device, in_process=in_process) as run:
        try:
            lines = _as_found(run, write)(explain_call, derived)
        except Finding as finding:
            lines = [f"the call itself fails: {finding.sentence}"]
    for line in lines or [f"{kernel.name}: call {derived.number} of {derived.prop} is right"]:
        write(line)
    return not lines


def _only(target: str, kernels: dict[str, Kernel]) -> tuple[str, Kernel]:
    if len(kernels) > 1:
        names = ", ".join(kernels)
        raise VerifyError(f"{target}: registers {len(kernels)} kernels; name one: {names}")
    return next(iter(kernels.items()))


@contextmanager
def _running(target: str, kernel: Kernel, device: str, *, in_process: bool) -> Iterator[Run]:
    if in_process:
        yield partial(_here, kernel, device)
        return
    with isolated(target, kernel, device) as worker:
        worker.options()
        yield worker.run


def _as_found(run: Run, write: Write) -> Run:
    """The same, of a kernel with the conventions that it is found to have, as `verify fuzz` judges
    it.
    """
    try:
        found = run(conventions.detected)
    except Finding:
        return run
    if not found:
        return run
    write("judged with " + ", ".join(f"{name}={value!r}" for name, value in found.items()))
    return partial(run, as_variant, tuple(sorted(found.items())))


def _here(kernel: Kernel, device: str, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(kernel, device, *arguments)


def _replayed(run: Run, kernel: Kernel, prop: Property, case: Case, write: Write) -> bool:
    try:
        for line in run(show, case):
            write(line)
        verdict = run(check, prop, case)
    except Finding as finding:
        write(f"{kernel.name} breaks {prop.name}: {finding.sentence}")
        for number, line in enumerate(why(run, case, prop)):
            write(f"  {'' if number else 'why':7} {line}")
        return False
    if verdict.unsupported:
        write(f"{prop.name} is not judged: {verdict.unsupported}")
        return True
    blind = f"; it could not have told: {', '.join(verdict.blind_to)}" if verdict.blind_to else ""
    write(f"{kernel.name}: {prop.name} holds{blind}")
    return True


def run_sanitized(tool: str, target: str, case: Case, law: str) -> int:
    """The same under a tool of compute-sanitizer, which prints what it sees. Returns 1 where it
    sees anything, or the property is broken.

    Every tensor is an allocation of its own then: within torch's pools the tool could not tell one
    from the next. Raises VerifyError for an unknown tool, or where compute-sanitizer is not
    installed.
    """
    if tool not in TOOLS:
        raise VerifyError(f"sanitizer {tool!r} is unknown: one of {', '.join(TOOLS)}")
    again = [sys.executable, "-m", "verify", "replay", target, str(case), "--in-process"]
    again += ["--property", law, "--device", "cuda"]
    command = [_sanitizer(), "--tool", tool, "--error-exitcode", "1", *again]
    apart = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return int(subprocess.run(command, check=False, env=apart).returncode != 0)  # noqa: S603


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
