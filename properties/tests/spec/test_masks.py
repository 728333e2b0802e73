"""Masks: their pictures, one rule for Python integers and tensors, composition, errors."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verify.errors import VerifyError
from verify.generation.strategies import masks
from verify.spec.case import handed_over, visibility
from verify.spec.masks import FULL, KINDS, Mask, ways
from verify.spec.problem import HANDED, Problem

CPU = torch.device("cpu")

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
    mask = data.draw(masks(frozenset(ways()), batch, len_q, len_k, two=True))
    problem = Problem(batch=batch, heads_q=3, len_q=len_q, len_k=len_k, mask=mask)
    seen = visibility(problem, CPU)
    assert seen.shape == (
        batch if mask.per_batch else 1,
        3 if mask.per_head else 1,
        len_q,
        len_k,
    )
    for b, h in product(range(batch), range(3)):
        rows = [
            [mask.sees(q, k, len_q, len_k, batch=batch, entry=b, head=h) for k in range(len_k)]
            for q in range(len_q)
        ]
        assert seen.expand(batch, 3, len_q, len_k)[b, h].tolist() == rows


@pytest.mark.parametrize(
    ("mask", "usual", "small"),
    [
        ("causal_upper_left", (1, 1, 4, 5), (1, 1, 4, 5)),
        ("padding(5,2)", (2, 1, 4, 5), (2, 1, 1, 5)),
        ("per_head(50,1)", (1, 3, 4, 5), (1, 3, 1, 5)),
        ("padding(5,2)&per_head(50,1)", (2, 3, 4, 5), (2, 3, 1, 5)),
        ("padding(5,2)&dense(50,1)", (2, 1, 4, 5), (2, 1, 4, 5)),
        ("window(1,0)&per_head(50,1)&padding(5,2)", (2, 3, 4, 5), (2, 3, 4, 5)),
    ],
)
def test_a_mask_is_handed_over_in_every_shape_that_can_hold_it(
    mask: str, usual: tuple[int, ...], small: tuple[int, ...]
) -> None:
    plain = Problem(batch=2, heads_q=3, len_q=4, len_k=5, mask=Mask.parse(mask))
    seen = visibility(plain, CPU).expand(2, 3, 4, 5)
    for form in HANDED:
        problem = Problem.parse(str(plain.but(mask_as=form)))
        shape = {"small": small, "bhqk": (2, 3, 4, 5)}.get(form.partition("_")[2], usual)
        handed = handed_over(problem, CPU)
        assert tuple(handed.shape) == problem.mask_shape == shape
        assert handed.is_contiguous()
        assert torch.equal(handed.expand(2, 3, 4, 5), seen)


@pytest.mark.parametrize("lengths", [(0, 3), (3, 0), (0, 0)])
def test_a_mask_of_nothing_has_a_shape_too(lengths: tuple[int, int]) -> None:
    for form in HANDED:
        problem = Problem(heads_q=3, len_q=lengths[0], len_k=lengths[1], mask_as=form)
        problem = problem.but(mask=Mask.parse("per_head(50,1)"))
        assert handed_over(problem, CPU).expand(1, 3, *lengths).numel() == 0


def test_heads_see_different_keys_as_often_as_they_should() -> None:
    mask = Mask.parse("per_head(75,2)")
    seen = visibility(Problem(heads_q=34, len_k=400, mask=mask), CPU)[0, :, 0].float()
    assert bool(((seen.mean(1) > 0.65) & (seen.mean(1) < 0.85)).all())
    apart = (seen[:, None] != seen).float().mean(2)
    assert bool((apart + torch.eye(34) > 0.2).all())


def test_a_mask_that_differs_from_head_to_head_needs_to_be_told_which() -> None:
    with pytest.raises(TypeError):
        Mask.parse("per_head(50,1)").visible(0, 0, 1, 1, lift=lambda integers: integers[0])


@given(data=st.data(), len_q=st.integers(1, 6), len_k=st.integers(1, 6))
def test_composition_is_conjunction(data: st.DataObject, len_q: int, len_k: int) -> None:
    a, b = (data.draw(masks(frozenset(KINDS), 1, len_q, len_k)) for _ in range(2))
    for head, q in product(range(2), range(len_q)):
        for k in range(len_k):
            both = (m.sees(q, k, len_q, len_k, head=head) for m in (a, b))
            assert (a & b).sees(q, k, len_q, len_k, head=head) == all(both)


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
