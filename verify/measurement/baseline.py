"""The ratchet: every kernel's RMSE on a few fixed cases, recorded per machine and versions in a
file that a person can review.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from verify import environment, reports
from verify.bounds.constants import REGRESSION
from verify.bounds.metrics import measure
from verify.errors import VerifyError
from verify.reference.reference import truth
from verify.registry import Kernel
from verify.reports import stored
from verify.sandbox.call import call
from verify.spec.case import Case
from verify.spec.finding import Finding

FILE = Path(reports.__path__[0]) / "baselines.json"
CASES = (
    "b1.h2.q256.k256.d64.fp16.full.grads/normal#0",
    "b1.h4:2.q256.k256.d64.bf16.causal_lower_right.grads/normal#1",
    "b1.h2.q256.k512.d64.fp16.full/outliers(0.001,10)#2",
    "b1.h4:2.q256.k256.d64.bf16.causal_lower_right/normal#3",
    "b1.h2.q256.k256.d128.bf16.full/rising(30)#4",
    "b1.h2.q256.k256.d64.fp32.full/normal#5",
)
"""Most without gradients, for kernels that give none. So is FP32: atomics reorder the very
roundings that it measures.
"""
TENSORS = ("out", "lse", "dq", "dk", "dv")
VERSIONS = {"cpu": ("torch", "triton", "numpy"), "cuda": ("torch", "triton", "cuda", "cudnn")}
Figures = dict[str, float]  # tensor -> RMSE
Entries = dict[str, Figures]  # "kernel case" -> figures


class Change(NamedTuple):
    """One tensor's RMSE in an entry ("kernel case") as it was recorded and as it is now; None where
    there is none.
    """

    entry: str
    tensor: str
    recorded: float | None
    now: float | None

    @property
    def ratio(self) -> float | None:
        """now / recorded"""
        if not self.recorded or self.now is None:
            return None if None in (self.recorded, self.now) else math.inf if self.now else 1.0
        return self.now / self.recorded

    @property
    def mark(self) -> str:
        """new, gone, WORSE, better; empty where it is what was recorded. Not finite is WORSE than
        anything.
        """
        if self.now is not None and not math.isfinite(self.now):
            return "WORSE"
        if self.ratio is None:
            return "new" if self.recorded is None else "gone"
        return (
            "WORSE"
            if self.ratio > 1 + REGRESSION
            else "better"
            if self.ratio * (1 + REGRESSION) < 1
            else ""
        )


def machine(device: str) -> str:
    """What may change a figure for a good reason, as a key: "NVIDIA H200, torch 2.11, triton 3.6,
    cuda 12.8, cudnn 9.19".
    """
    known, number = (
        environment.describe(device) | {"numpy": np.__version__},
        torch.backends.cudnn.version() or 0,
    )
    name = (
        f"cpu {torch.backends.cpu.get_cpu_capability()} ({processor()})"
        if device == "cpu"
        else known["device"]
    )
    known["cudnn"] = f"{number // 10000}.{number // 100 % 100}"
    return ", ".join(
        [
            name,
            *(
                f"{package} {'.'.join(known[package].split('.')[:2])}"
                for package in VERSIONS[device]
            ),
        ]
    )


def processor() -> str:
    """The CPU's name, family and model: OpenBLAS, which multiplies in Triton's interpreter, chooses
    its code by them.
    """
    file = Path("/proc/cpuinfo")
    found = (
        dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", file.read_text(), re.M))
        if file.exists()
        else {}
    )
    return (
        "{model name}, family {cpu family}, model {model}".format_map(found)
        if len(found) == 3
        else platform.machine()
    )


def measured(kernel: Kernel, case: Case, device: str) -> Figures:
    """RMSE of every tensor that the kernel gives, against the float64 oracle. Raises Finding where
    it gives no answer.
    """
    known = truth(case, device)
    output = call(kernel, known.problem, known.inputs)
    names = [name for name in TENSORS if getattr(output, name) is not None]
    return {name: measure(getattr(output, name), getattr(known.exact, name)).rmse for name in names}


def measure_all(kernels: Collection[Kernel], device: str) -> tuple[Entries, Counter[str]]:
    """What these kernels measure now, and why not where they do not, counted. One that raises is
    infinitely wrong.
    """
    now, reasons = Entries(), Counter[str]()
    for case, kernel in itertools.product(map(Case.parse, CASES), kernels):
        entry, why = f"{kernel.name} {case}", kernel.unsupported(case.problem, device)
        try:
            now |= {} if why else {entry: measured(kernel, case, device)}
        except Finding as finding:
            now[entry], why = {"out": math.inf}, finding.sentence
        reasons.update([f"{kernel.name}: {why}"] if why else [])
    return now, reasons


def of(kernels: Collection[str], entries: Iterable[str]) -> list[str]:
    """The entries of these kernels, sorted; a case id has no space."""
    return sorted(entry for entry in entries if entry.rpartition(" ")[0] in kernels)


def compare(recorded: Entries, now: Entries, kernels: Collection[str]) -> list[Change]:
    """Every figure of these kernels that is recorded or was measured, in the file's order."""
    every = (
        (e, t, recorded.get(e, {}).get(t), now.get(e, {}).get(t))
        for e in of(kernels, recorded | now)
        for t in TENSORS
    )
    return [Change(*row) for row in every if row[2:] != (None, None)]


def read(file: Path) -> dict[str, Entries]:
    """machine -> its entries; nothing where there is no file. Raises VerifyError for a file that is
    no record.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not all(
            0 <= rmse < math.inf
            for entries in record.values()
            for found in entries.values()
            for rmse in found.values()
        ):
            raise ValueError("a figure is no RMSE")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise VerifyError(
            f"{file}: no record of figures: {error}; restore it, or delete it and record anew"
        ) from error
    return record


def update(file: Path, machine: str, kernels: Collection[str], now: Entries) -> None:
    """Replace what is recorded of these kernels on this machine, nothing else. Raises VerifyError,
    nothing lost, if it can't.
    """
    if broken := [entry for entry, figures in now.items() if math.inf in figures.values()]:
        raise VerifyError(
            f"{broken[0]}: an infinite error is a defect, not a record; nothing was written"
        )
    record = read(file)
    record[machine] = {
        e: figures for e, figures in record.get(machine, {}).items() if not of(kernels, [e])
    } | now
    try:
        stored.replace(file, text(record))
    except OSError as error:
        raise VerifyError(
            f"{file}: {error.strerror}; make it and its folder writable. Nothing was lost"
        ) from error


def text(record: dict[str, Entries]) -> str:
    """JSON with everything sorted, a line for each kernel and case, 4 significant digits: a diff
    reads like a table.
    """
    sections = []
    for name, entries in sorted(record.items()):
        figures = {
            e: ", ".join(f'"{t}": {rmse:.3e}' for t, rmse in sorted(f.items()))
            for e, f in entries.items()
        }
        lines = [f"  {json.dumps(e)}: {{{figures[e]}}}" for e in sorted(figures)]
        sections += [f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }"] if lines else []
    return "{\n" + ",\n".join(sections) + "\n}\n"
