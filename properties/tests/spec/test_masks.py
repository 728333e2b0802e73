"""Masks: their pictures, one rule for Python integers and tensors, composition, errors."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verify.errors import VerifyError
from verify.generation.strategies import masks
from verify.spec.case import visibility
from verify.spec.masks import FULL, KINDS, Mask
from verify.spec.problem import Problem

PICTURE = re.compile(r"^ +(\S+) at (\d+)x(\d+)\n((?: +[#.](?: [#.])*\n)+)", re.MULTILINE)


@pytest.mark.parametrize("name", KINDS)
def test_docstring_pictures_are_what_the_rule_says(name: str) -> None:
    pictures = PICTURE.findall((KINDS[name].rule.__doc__ or "") + "\n")
    assert pictures, f"{name} has no picture"
    for text, len_q, len_k, rows in pictures:
        drawn = "\n".join(line.strip() for line in rows.splitlines())
        assert Mask.parse(text).picture(int(len_q), int(len_k)) == drawn


@given(data=st.data(), batch=st.integers(1, 3), len_q=st.integers(1, 9), len_k=st.integers(1, 9))
def test_tensors_and_python_integers_agree(
    data: st.DataObject, batch: int, len_q: int, len_k: int
) -> None:
    mask = data.draw(masks(frozenset(KINDS), batch, len_q, len_k))
    seen = visibility(
        Problem(batch=batch, len_q=len_q, len_k=len_k, mask=mask), torch.device("cpu")
    )
    for b in range(batch):
        rows = [
            [mask.sees(q, k, len_q, len_k, batch=batch, entry=b) for k in range(len_k)]
            for q in range(len_q)
        ]
        assert seen.expand(batch, 1, len_q, len_k)[b, 0].tolist() == rows


@given(data=st.data(), len_q=st.integers(1, 6), len_k=st.integers(1, 6))
def test_composition_is_conjunction(data: st.DataObject, len_q: int, len_k: int) -> None:
    a, b = (data.draw(masks(frozenset(KINDS), 1, len_q, len_k)) for _ in range(2))
    for q in range(len_q):
        for k in range(len_k):
            assert (a & b).sees(q, k, len_q, len_k) == (
                a.sees(q, k, len_q, len_k) and b.sees(q, k, len_q, len_k)
            )


@pytest.mark.parametrize(
    ("one", "other", "len_q", "len_k"),
    [
        ("window(-1,-1)", "full", 3, 5),
        ("window(-1,0)", "causal_lower_right", 3, 5),
        ("prefix_lm(0)", "causal_upper_left", 5, 3),
        ("causal_upper_left", "causal_lower_right", 4, 4),
        ("padding(5)", "full", 3, 5),
        ("blocks(9)", "full", 3, 5),
        ("dense(100,0)", "full", 3, 5),
    ],
)
def test_masks_with_two_names(one: str, other: str, len_q: int, len_k: int) -> None:
    assert Mask.parse(one).picture(len_q, len_k) == Mask.parse(other).picture(len_q, len_k)


def test_padding_hides_keys_and_moves_no_diagonal() -> None:
    both = Mask.parse("causal_lower_right&padding(3)")
    assert both.picture(2, 5) == "# # # . .\n# # # . ."


def test_full_is_neutral_in_composition() -> None:
    causal = Mask.parse("causal_upper_left")
    assert FULL & causal == causal == causal & FULL
    assert FULL & FULL == FULL


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("causal", "'causal' is unknown"),
        ("window(1)", "window(1,)"),
        ("padding(-1)", "padding(-1,)"),
        ("a b", "'a b' does not parse"),
    ],
)
def test_bad_masks_are_named(text: str, named: str) -> None:
    with pytest.raises(VerifyError, match=re.escape(named)):
        Mask.parse(text)
