"""A worker that dies through no fault of its case is replaced and the case judged again; verdicts
on determinism are right.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from verify.engine.evaluate import evaluate
from verify.errors import VerifyError
from verify.inspection.conventions import rows
from verify.inspection.determinism import broken, verdicts
from verify.kernels.naive import naive
from verify.properties.catalogue import PROPERTIES
from verify.records.events import Outcome
from verify.registry import REGISTRY, Arithmetic, Kernel, find
from verify.sandbox.process import Isolated, isolated
from verify.spec.case import Case
from verify.spec.problem import Problem

ORACLE, CASE = PROPERTIES["oracle"], Case.parse("b1.h2.q5.k7.d8.fp32.full/normal#0")
FILE = """
import ctypes
import time
from verify import kernel
from verify.kernels.naive import naive

def attend(q, k, v, scale, mask):
    return naive(q, k, v, scale=scale, mask=mask, bias=None, slopes=None, softcap=0.0, dropout=0.0)

@kernel
def slow(q, k, v, *, scale, mask):
    time.sleep(1.0)
    return attend(q, k, v, scale, mask)

@kernel
def fears_packed(q, k, v, *, scale, mask):
    if q.stride(2) == 3 * q.shape[1] * q.shape[3]:
        ctypes.string_at(8)
    return attend(q, k, v, scale, mask)
"""


@pytest.fixture
def target(tmp_path: Path) -> str:
    """A file that registers two kernels."""
    (tmp_path / "two.py").write_text(FILE)
    return str(tmp_path / "two.py")


def found(target: str, name: str) -> Kernel:
    kernel = next(k for k in find(target) if k.name == name)
    for other in ("slow", "fears-packed"):
        REGISTRY.pop(other, None)
    return kernel


def pid(worker: Isolated) -> int:
    assert worker._worker is not None
    assert worker._worker._process.pid is not None
    return worker._worker._process.pid


def test_a_worker_that_is_killed_is_replaced(target: str) -> None:
    """Between two cases nobody notices; within one it is judged again in a new worker."""
    kernel = found(target, "slow")
    with isolated(f"{target}::slow", kernel, "cpu") as worker:
        assert worker.run(evaluate, ORACLE, CASE).outcome is Outcome.PASSED
        first = pid(worker)
        os.kill(first, signal.SIGKILL)
        time.sleep(0.3)
        assert worker.run(evaluate, ORACLE, CASE).outcome is Outcome.PASSED
        second = pid(worker)
        threading.Timer(0.5, os.kill, (second, signal.SIGKILL)).start()
        assert worker.run(evaluate, ORACLE, CASE).outcome is Outcome.PASSED
        assert len({first, second, pid(worker)}) == 3


def test_a_layout_that_crashes_is_taken_and_the_rest_is_known(target: str) -> None:
    kernel = found(target, "fears-packed")
    with isolated(f"{target}::fears-packed", kernel, "cpu") as worker:
        options = worker.options()
        assert worker.run(verdicts, 2)  # asks what it takes, which a worker after a crash must know
        assert {"bhsd", "packed", "bshd"} <= set(options.layouts["q"])
        packed = Case.parse(f"{CASE}@q=packed")
        with pytest.raises(AssertionError, match="ended its process: SIGSEGV"):
            worker.run(evaluate, ORACLE, packed)
        assert worker.run(evaluate, ORACLE, CASE).outcome is Outcome.PASSED


def test_a_worker_that_cannot_start_is_an_error() -> None:
    with pytest.raises(VerifyError, match="absent: its worker process did not start"):
        Isolated("absent", REGISTRY["naive"], "cpu").run(rows)


def plainly(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    out, _ = naive(
        q, k, v, scale=scale, mask=mask, bias=None, slopes=None, softcap=0.0, dropout=0.0
    )
    return out


def by_batch(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    return plainly(q, k, v, scale=scale, mask=mask) * (1 + 2.0**-7 * (q.shape[0] > 1))


def by_heads(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    return plainly(q, k, v, scale=scale, mask=mask) * (1 + 2.0**-7 * (k.shape[1] > 1))


def now_and_then(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    out = plainly(q, k, v, scale=scale, mask=mask)
    CALLS[0] += 1
    return out.index_fill(2, torch.tensor([1]), 0.0) if CALLS[0] % 15 == 0 else out


CALLS = [0]


@pytest.mark.parametrize(
    ("fn", "denied"),
    [
        (plainly, ""),
        (by_batch, "the last batch"),
        (by_heads, "the last head"),
        (now_and_then, "the same bits in 20"),
    ],
)
def test_verdicts_on_determinism(fn, denied: str) -> None:
    def forward(problem: Problem, device: str) -> str | None:
        return "forward only" if problem.grads else None

    kernel = Kernel("k", fn, frozenset({"scale", "mask"}), Arithmetic(deterministic=True), forward)
    rows = verdicts(kernel, "cpu", 20)
    said = {question for _, question, answer in rows if answer != "yes"}
    assert len(rows) == 6
    assert all(question.startswith(denied) for question in said)
    assert bool(said) == bool(denied)
    assert all(
        answer.startswith("no: ") and "out[" in answer for _, _, answer in rows if answer != "yes"
    )
    assert broken(kernel, rows, "cpu") == (fn is now_and_then)
