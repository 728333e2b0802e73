"""Problems, recipes and cases: validated, one line each, the same tensors everywhere."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verify.errors import VerifyError
from verify.generation.strategies import cases
from verify.properties.tests.support import ANYTHING, GRADIENTS
from verify.spec.case import TORCH_DTYPES, Case
from verify.spec.distribution import drawn_from
from verify.spec.inputs import Recipe
from verify.spec.problem import DTYPES, Problem


@given(cases(ANYTHING, "cpu", GRADIENTS) | cases(ANYTHING, "cpu"))
def test_ids_parse_back(case: Case) -> None:
    assert Case.parse(str(case)) == case


@given(
    scale=st.floats(allow_nan=False, allow_infinity=False),
    softcap=st.floats(0, 1e300),
    sigma=st.floats(0, 1e300),
)
def test_ids_keep_every_float(scale: float, softcap: float, sigma: float) -> None:
    case = Case(Problem(scale=scale, softcap=softcap), Recipe("normal", (sigma,)), 3)
    assert Case.parse(str(case)) == case


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "b1.h6:4.q1.k1.d8.bf16.full/normal#0",
            "heads_q=6, heads_kv=4: heads_q must be a multiple",
        ),
        ("b1.h1.q-1.k1.d8.bf16.full/normal#0", "len_q=-1: a length is 0 or more"),
        ("b0.h1.q1.k1.d8.bf16.full/normal#0", "batch=0: at least 1"),
        ("b1.h1.q1.k1.d8.fp8.full/normal#0", "dtype='fp8': one of"),
        ("b1.h1.q1.k1.d8.bf16.full.scale=inf/normal#0", "scale=inf: any finite number"),
        ("b2.h1.q1.k1.d8.bf16.padding(1)/normal#0", "one length per batch entry"),
        ("b1.h1.q1.k1.d8.bf16.full/gauss#0", "'gauss' is unknown: one of"),
        ("b1.h1.q1.k1.d8.bf16.full/normal(1,2)#0", "takes at most 1 finite numbers"),
        ("b1.h1.q1.k1.d8.bf16.full/normal", "does not parse: write it like"),
        ("b1.h1.q1.d8.bf16.full/normal#0", "does not parse: write it like"),
    ],
)
def test_bad_ids_are_one_line_that_names_the_value(text: str, said: str) -> None:
    with pytest.raises(VerifyError) as error:
        Case.parse(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("recipe", sorted(set(drawn_from())))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_recipe_is_finite_in_every_dtype(recipe: str, dtype: str) -> None:
    problem = Problem(
        batch=2, heads_q=2, heads_kv=1, len_q=3, len_k=5, dim_qk=4, dim_v=2, dtype=dtype, bias="hqk"
    )
    inputs = Case(problem, Recipe.parse(recipe), 1).inputs()
    for name in ("q", "k", "v", "do", "bias"):
        tensor = getattr(inputs, name)
        assert tuple(tensor.shape) == problem.shapes[name]
        assert tensor.dtype == TORCH_DTYPES[dtype]
        assert bool(tensor.isfinite().all())


def test_a_case_is_the_same_tensors_everywhere() -> None:
    """Replay depends on it. A change of NumPy's streams would show here: then the ids of old
    findings mean other tensors.
    """
    drawn = Case.parse("b1.h1.q3.k4.d2.fp64.full/outliers(0.5,10)#7").draw()
    digest = hashlib.sha256(
        b"".join(t.numpy().tobytes() for t in (drawn.q, drawn.k, drawn.v, drawn.do))
    ).hexdigest()
    assert digest[:16] == "dab793450969d679"


def test_draws_do_not_depend_on_the_dtype() -> None:
    narrow, wide = (
        Case.parse(f"b1.h1.q3.k4.d2.{dtype}.full/normal#7").draw() for dtype in ("bf16", "fp32")
    )
    assert torch.equal(narrow.q, wide.q)
