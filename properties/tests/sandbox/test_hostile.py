"""Every hostile kernel gets the finding that it deserves, and nobody beside it gets another verdict
for it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import verify.kernels
from verify.engine.evaluate import evaluate
from verify.properties.tests.support import searched
from verify.pytest_plugin import Run
from verify.records.events import CaseFinished
from verify.records.journal import cases, read
from verify.records.summary import findings
from verify.registry import REGISTRY, Kernel, find
from verify.sandbox.process import Limits, isolated
from verify.spec.case import Case

pytestmark = pytest.mark.slow

FILE = str(Path(verify.kernels.__path__[0]) / "hostile.py")
MANY = 9
"""Queries from which on they are hostile."""
LIMITS = {"cpu": Limits(seconds=2.0, memory=1 << 30), "cuda": Limits(seconds=8.0, memory=6 << 30)}
"""With a GPU, Triton compiles within a call, and CUDA takes host memory."""
GPU = {
    "device-memory": ("oracle", "raised OutOfMemoryError"),
    "device-assert": ("oracle", "raised .*device-side assert"),
    "endless-on-gpu": ("oracle", "did not return within"),
    "illegal-address": ("oracle", "raised .*illegal memory access"),
    "misaligned-address": ("oracle", "raised .*misaligned address"),
    "store-too-far": ("oracle", "wrote outside what it allocated|changed memory"),
}
FOUND = {
    "segfault": ("oracle", r"ended its process: SIGSEGV \(.*hostile.py:\d+\)"),
    "abort": ("oracle", r"ended its process: SIGABRT \(.*hostile.py:\d+\)"),
    "sys-exit": ("oracle", "raised SystemExit: 0"),
    "os-exit": ("oracle", "ended its process: exit code 0"),
    "interrupt": ("oracle", "raised KeyboardInterrupt"),
    "endless-loop": ("oracle", r"did not return within \d s"),
    "deadlock": ("oracle", r"did not return within \d s \(.*hostile.py:\d+\)"),
    "host-memory": ("oracle", r"took \d.* GiB of memory; \d.0 GiB are its share"),
    "impossible-memory": ("oracle", "raised (RuntimeError|OutOfMemoryError)"),
    "odd-lengths": ("oracle", "raised RuntimeError: shape .* is invalid"),
    "wrong-shape": ("oracle", r"out has shape \["),
    "wrong-dtype": ("oracle", "out is torch.float64, its inputs"),
    "wrong-device": ("oracle", "out is on (meta|cpu), its inputs on"),
    "repeated-memory": ("oracle", "elements of out share memory"),
    "returns-input": ("oracle", "out lies in the memory of its input q"),
    "one-row-too-far": ("oracle", "wrote outside what it allocated: element 0 after the end"),
    "index-minus-one": (
        "oracle",
        "wrote outside what it allocated: element -1 before the beginning",
    ),
    "reads-past-the-end": ("oracle", r"out\[.*nan"),
    "last-tile-unwritten": ("oracle", r"out\[.*nan"),
    "scales-q-in-place": ("oracle", "changed its input q"),
    "writes-beside-k": ("oracle", "changed memory beside its input k"),
    "cached-by-shape": ("call-sequence", r"out\["),
    "of-the-call-before": ("call-sequence", r"out\["),
    "same-buffer": ("call-sequence", "out of the first call changed"),
    "one-call-in-fifty": ("repeat", "in call 1, here call"),
    "leaks": ("memory-growth", "keeps memory: each of 8 calls"),
    "prints": ("oracle", "wrote 3000001 bytes"),
    "sets-precision": ("oracle", "changed torch's float32 matmul precision from highest to medium"),
    "sets-dtype": ("oracle", "changed torch's default dtype"),
    "seeds": ("oracle", "changed torch's random state"),
    **GPU,
}
HARMLESS = ("honest", "not-contiguous")


@pytest.fixture(scope="module")
def hostile() -> Iterator[dict[str, Kernel]]:
    """The kernels of the file, which no other test shall meet."""
    before = dict(REGISTRY)
    yield {k.name: k for k in find(FILE)}
    REGISTRY.clear()
    REGISTRY.update(before)


def test_every_hostile_kernel_is_in_the_table(hostile: dict[str, Kernel]) -> None:
    assert {*hostile} == {*FOUND, *HARMLESS}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.gpu] * (n in GPU)) for n in FOUND]
)
def test_a_hostile_kernel_gets_its_finding(name: str, hostile: dict[str, Kernel], run: Run) -> None:
    if name in GPU and run.device != "cuda":
        pytest.skip("needs a GPU")
    law, said = FOUND[name]
    limits = LIMITS[run.device]
    if name == "host-memory":  # so that memory is what ends first
        limits = replace(limits, seconds=60.0)
    with isolated(f"{FILE}::{name}", hostile[name], run.device, limits) as worker:
        worker.options()
        found = searched(
            hostile[name],
            law,
            run.device,
            judged=60,
            shrink_seconds=1.0,
            evaluate_case=partial(worker.run, evaluate),
        )
    assert found.finding is not None
    assert re.search(said, found.finding.reason), found.finding.reason
    assert Case.parse(found.finding.case).problem.len_q >= MANY


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_no_offence_is_not_found(name: str, hostile: dict[str, Kernel], run: Run) -> None:
    with isolated(f"{FILE}::{name}", hostile[name], run.device, LIMITS[run.device]) as worker:
        for law in ("oracle", "repeat", "call-sequence", "memory-growth"):
            found = searched(
                hostile[name],
                law,
                run.device,
                judged=15,
                evaluate_case=partial(worker.run, evaluate),
            )
            assert found.finding is None, found.finding


@pytest.mark.slow
def test_the_neighbours_of_hostile_kernels_get_the_verdicts_that_they_get_alone(
    tmp_path: Path, run: Run
) -> None:
    """A run of pytest in two processes: kernels that crash, hang, fill memory and change settings
    between two honest ones.
    """
    bad = "segfault sets-dtype leaks endless-loop".split()
    bad += list(GPU) if run.device == "cuda" else []
    honest = ["naive", f"{FILE}::honest"]
    for folder, targets in (
        ("alone", honest),
        ("among", [honest[0], *(f"{FILE}::{name}" for name in bad), honest[1]]),
    ):
        matrix = Path(__file__).parents[2] / "test_conformance.py"
        command = [sys.executable, "-m", "pytest", "-q", f"{matrix}::test_kernel_holds"]
        command += ["-n", "2"] * (folder == "among")
        command += "-p no:cacheprovider -p verify.pytest_plugin -c /dev/null --noconftest".split()
        command += f"--import-mode=importlib --rootdir={tmp_path} --timeout=0".split()
        command += f"--device {run.device} --cases 8 --property oracle".split()
        command += "--call-seconds 2 --shrink-seconds 1".split()
        command += [f"--kernel={target}" for target in targets]
        command += [f"--records={tmp_path / folder}", f"--corpus={tmp_path / folder}.tsv"]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == int(folder == "among"), done.stdout + done.stderr
    alone, among = (
        _outcomes(tmp_path / folder, "naive", "honest") for folder in ("alone", "among")
    )
    assert len(alone) == 16
    assert among == alone
    found = {found.kernel for found in findings(read(tmp_path / "among"))}
    assert found == {*bad} - {"leaks"}  # seen by another property


def _outcomes(folder: Path, *kernels: str) -> list[tuple[object, ...]]:
    def key(c: CaseFinished) -> tuple[object, ...]:
        return c.kernel, c.case, c.outcome, c.reason, tuple(c.measured.items())

    return sorted((key(c) for c in cases(folder) if c.kernel in kernels), key=str)
