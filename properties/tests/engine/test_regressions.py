"""Cases that once broke a property, of the kernels that are bundled: each holds."""

from __future__ import annotations

import pytest

from verify.engine.evaluate import evaluate
from verify.properties.catalogue import PROPERTIES
from verify.pytest_plugin import Run
from verify.records.events import Outcome
from verify.spec.case import Case

REGRESSIONS = (
    (
        "triton-fa2",
        "oracle",
        "b2.h4:2.q33.k70.d40:24.fp16.full/normal#1",
    ),  # wrong keys from the second tile on, on sm_90
    (
        "triton-fa2",
        "oracle",
        "b1.h8.q146.k65.d192:16.fp16.blocks(6,10).scale=0.5/normal#1",
    ),  # likewise
    (
        "triton-fa2",
        "oracle",
        "b1.h5:1.q129.k129.d72:80.fp16.dense(50,3).as_float.scale=0.001/normal(0.1)#1",
    ),  # P rounds to 1
    (
        "triton-fa2",
        "mask-equivalence",
        "b1.h1.q1.k1.d1.fp32.full.bias=qk/integers#0",
    ),  # int32 for booleans in the interpreter
    (
        "sdpa-flash",
        "gradients",
        "b1.h1.q76.k33.d128.bf16.full.grads/integers#0",
    ),  # spills partial sums on the CPU
    (
        "sdpa-flash",
        "gradients",
        "b1.h8:2.q256.k256.d64.fp16.full.grads/normal#0",
    ),  # and across the heads of a group
    (
        "sdpa-flash",
        "gradients",
        "b2.h1.q255.k255.d192.bf16.padding(202,140).as_bool.grads/uniform#319",
    ),  # delta's error is shared
    (
        "sdpa-flash",
        "gradients",
        "b2.h1.q177.k177.d256.fp32.dense(1,0).as_bool.scale=-0.3.grads/shift(10000)#296",
    ),  # scores of 1e6, computed in another order for the backward
    (
        "sdpa-flash",
        "oracle",
        "b2.h14:2.q63.k63.d128.bf16.full/sink#743",
    ),  # an exponential's error, in the row sum but not in P
    (
        "sdpa-flash",
        "oracle",
        "b3.h8.q16.k16.d24.fp16.full/normal(5)#0",
    ),  # exponentials off by 1e-4 in 16 bits, on the CPU
    (
        "naive",
        "gradients",
        "b3.h8.q257.k19.d80:2.bf16.full.grads/one_sign#543",
    ),  # torch stores P * dP on CUDA
    (
        "naive",
        "gradients",
        "b3.h1.q7.k31.d24.fp16.full.softcap=30.0.grads/shift(90)#0",
    ),  # every step of a softcap is stored
    (
        "sdpa-math",
        "gradients",
        "b1.h7:1.q35.k26.d40.fp16.full.bias=hqk.grads/normal#192",
    ),  # dbias is stored
    (
        "sdpa-efficient",
        "oracle",
        "b2.h1.q256.k256.d192.fp16.full.scale=0.001/normal(0.1)#466",
    ),  # P rounds to 1
    (
        "sdpa-efficient",
        "oracle",
        "b2.h8.q146.k146.d80.fp32.blocks(1,1,1).as_bool.bias=bhqk/uniform#758",
    ),  # FP32 as 3 x TF32
    (
        "sdpa-efficient",
        "gradients",
        "b1.h1.q1.k31.d8.fp16.full.grads/integers#0",
    ),  # rounds P as the factor of dS
    (
        "sdpa-math",
        "gradients",
        "b1.h1.q0.k1.d1.fp32.full.grads/integers#0",
    ),  # no queries: bounds of gradients
    (
        "naive",
        "oracle",
        "b2.h7:1.q12.k1.d3.fp16.full.bias=alibi/integers#0",
    ),  # stores ALiBi's product in FP16
    (
        "sdpa-math",
        "gradients",
        "b2.h1.q1.k127.d96.bf16.padding(60,4).bias=hqk.grads/integers#0",
    ),  # dbias of each entry stored
    (
        "sdpa-math",
        "gradients",
        "b2.h3.q113.k94.d8.fp16.padding(65,59).bias=hqk.grads/shift(90)#53",
    ),  # and so the expected error is 1.4 times as large
    (
        "naive",
        "oracle",
        "b1.h3.q1.k4.d1.fp64.full.bias=alibi/integers#0",
    ),  # ALiBi rounded to FP32 in an FP64 problem
    (
        "naive",
        "gradients",
        "b1.h2:1.q1.k3.d1.fp16.causal_lower_right.grads/rising(30)#0",
    ),  # dk of each head is subnormal
    (
        "naive",
        "lse-gradient",
        "b1.h1.q1.k441.d1.fp16.full.scale=0.001.grads/integers#0",
    ),  # and so is scale * dS
)


@pytest.mark.parametrize(
    ("name", "prop", "case"), REGRESSIONS, ids=[" ".join(r) for r in REGRESSIONS]
)
def test_what_was_once_found_holds(run: Run, name: str, prop: str, case: str) -> None:
    if name not in run.kernels:
        why = run.unavailable.get(name, "not among the kernels of this run")
        pytest.skip(f"{name}: {why}")
    event = evaluate(run.kernels[name], run.device, PROPERTIES[prop], Case.parse(case))
    if event.outcome is Outcome.UNSUPPORTED:
        pytest.skip(f"{name}: {event.reason}")
    assert event.outcome in (Outcome.PASSED, Outcome.INCONCLUSIVE)


def test_properties_state_their_law() -> None:
    """A property without a law in its docstring judges nobody knows what."""
    assert all(prop.law for prop in PROPERTIES.values())
