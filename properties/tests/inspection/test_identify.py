"""What a kernel does not say is found out: every arithmetic that is planted is identified from its
outputs alone.
"""

from __future__ import annotations

import pytest

from verify.inspection.identify import identify
from verify.inspection.questions import OBSERVED
from verify.oracles.emulator import emulate
from verify.registry import Kernel
from verify.spec.arithmetic import Arithmetic, Quantisation
from verify.spec.case import TORCH_DTYPES, Inputs
from verify.spec.problem import Problem

PLANTED = (
    Arithmetic(rowsum="rounded", summation="truncated"),
    Arithmetic(probs="fp32"),
    Arithmetic(scaled_query=True, exp_ulp=8192.0),
    Arithmetic(rounding="zero", tanh_ulp=4096.0),
    Arithmetic(quantised=Quantisation("e4m3", 1, queries="given")),
    Arithmetic(scores="fp16", accumulate="fp16", promoted=64),
    Arithmetic(scores="bf16x3", accumulate="tf32x3"),
    Arithmetic(stored_scores="input", stored_exponents=True, normalized_probs=True),
)


@pytest.mark.parametrize("planted", PLANTED, ids=str)
def test_a_planted_arithmetic_is_found(planted: Arithmetic) -> None:
    def mine(q, k, v, *, scale: float, softcap: float, problem: Problem):
        return emulate(
            problem, Inputs(q, k, v, q.new_zeros(problem.shapes["out"])), planted
        ).out.to(TORCH_DTYPES[problem.dtype])

    kernel = Kernel(
        "mine",
        mine,
        frozenset({"scale", "problem", "softcap"}),
        supports=lambda problem, device: forward_only(problem),
    )
    identity = identify(kernel, "cpu")
    assert identity.arithmetic == planted
    assert set(identity.unasked) >= {"dscores", "delta", "spill"}


def forward_only(problem: Problem) -> str | None:
    return "forward only" if problem.grads else None


def test_the_tile_is_seen() -> None:
    def mine(q, k, v, *, scale: float, problem: Problem):
        inputs = Inputs(q, k, v, q.new_zeros(problem.shapes["out"]))
        return emulate(problem, inputs, Arithmetic(tile=48)).out.to(TORCH_DTYPES[problem.dtype])

    kernel = Kernel(
        "mine",
        mine,
        frozenset({"scale", "problem"}),
        supports=lambda problem, device: forward_only(problem),
    )
    seen = {
        a.field: a.found
        for a in identify(kernel, "cpu").answers
        if a.certain and a.field in OBSERVED
    }
    assert seen == {"tile": 48, "splits": 1}


def test_a_declaration_prints_as_the_line_to_paste() -> None:
    line = str(Arithmetic(probs="fp32", spill=(32, 512)))
    assert line == "Arithmetic(probs='fp32', spill=(32, 512))"
    assert eval(line) == Arithmetic(probs="fp32", spill=(32, 512))  # noqa: S307 (a literal of this file)
