"""What is drawn: every kind of case that known bugs needed, as often as it should be, for kernels
with and without restrictions; nothing that costs more than a case may.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from verify.generation.choices import Choices
from verify.generation.kinds import kinds
from verify.generation.sizes import Cost, Size
from verify.generation.unusual import OUT_OF, UNUSUAL, turns
from verify.kernels.mutants.catalogue import control
from verify.properties.catalogue import PROPERTIES
from verify.properties.tests.support import ANYTHING
from verify.registry import KEYWORDS, Kernel, find
from verify.spec.case import Case
from verify.spec.inputs import DISTRIBUTIONS, Recipe
from verify.spec.masks import FULL
from verify.spec.problem import Problem
from verify.studies.draws import drawn, shares

CASES = 2000
SPECIAL = {
    "one key": 4.0,
    "nothing": 2.5,
    "scale 0": 2.5,
    "negative scale": 4.0,
    "length as dim": 2.5,
    "many heads": 5.0,
    "many entries": 3.0,
}
"""Least shares in per cent, of whatever kernel takes it."""
ODD_DIMS = {"head dim above 8, no multiple of it": 10.0}
SIZES = {
    "many keys": 3.0,
    "many queries": 1.0,
    "vast": 0.2,
    "wide": 2.0,
    "entries as heads": 4.0,
    "heads as group": 4.0,
    "group of 12 or 16": 4.0,
    "34 heads and more": 2.0,
    "batch of 64": 1.5,
}
ALIGNED = {
    "one query, mask from the first query": 5.0,
    "one query, mask from the last query": 5.0,
    "one key, mask from the first query": 1.2,
    "one key, mask from the last query": 1.2,
}
MASKS = {
    "window without a left bound": 2.5,
    "window without a right bound": 1.5,
    "window of 128 and more, short of all keys": 1.5,
    "window beside a causal mask": 2.0,
    "0 or 1 keys before an entry of all": 1.0,
    "0 or 1 keys after an entry of all": 1.0,
    "as many entries as key heads, of different lengths": 2.0,
}
HANDED = {
    "mask that differs from head to head": 4.0,
    "mask that differs within a group of heads": 2.0,
    "mask [B,.,1,K], several entries": 2.0,
    "mask [.,H,1,K], several heads": 1.5,
    "mask [B,H,Q,K], handed over whole": 3.0,
}
RESTRICTED: dict[str, tuple[Callable[[Problem], bool], dict[str, float]]] = {
    "causal only": (
        lambda p: str(p.mask) == "causal_upper_left" and p.len_q == p.len_k,
        SPECIAL | ODD_DIMS | {"entries as heads": 4.0, "heads as group": 4.0},
    ),
    "d128 only": (
        lambda p: p.dim_qk == p.dim_v == 128,
        SPECIAL | ALIGNED | MASKS | HANDED | {"many keys": 2.5, "entries as heads": 4.0},
    ),
    "window only": (
        lambda p: p.mask.names == {"window"},
        SPECIAL
        | SIZES
        | ODD_DIMS
        | {
            "mask [B,H,Q,K], handed over whole": 3.0,
            "one query, mask from the last query": 10.0,
            "one key, mask from the last query": 4.0,
            "window without a left bound": 10.0,
            "window without a right bound": 5.0,
            "window of 128 and more, short of all keys": 5.0,
        },
    ),
    "one query only": (
        lambda p: p.len_q == 1,
        SPECIAL
        | ODD_DIMS
        | {
            "many keys": 2.5,
            "vast": 0.2,
            "one query, mask from the first query": 20.0,
            "mask that differs from head to head": 4.0,
            "mask that differs within a group of heads": 2.0,
        },
    ),
    "booleans for each head only": (
        lambda p: (
            p.mask.names <= {"full", "per_head"}
            and not p.mask_is_bias
            and (p.mask == FULL or p.mask_as != "rule")
        ),
        SPECIAL
        | ODD_DIMS
        | {
            "mask that differs from head to head": 10.0,
            "mask [.,H,1,K], several heads": 5.0,
            "mask [B,H,Q,K], handed over whole": 1.0,
        },
    ),
    "padding as it is only": (
        lambda p: p.mask.names <= {"full", "padding"} and p.mask_as in ("rule", "bool_small"),
        SPECIAL | ODD_DIMS | {"mask [B,.,1,K], several entries": 5.0},
    ),
}


def restricted(name: str) -> Kernel:
    takes, _ = RESTRICTED[name]
    supports = lambda p, device: None if takes(p) else name  # noqa: E731
    return Kernel(name, ANYTHING.fn, frozenset(KEYWORDS) - {"problem"}, supports=supports)


def check(kernel: Kernel, least: dict[str, float], device: str = "cpu") -> None:
    found = shares(kernel, PROPERTIES["oracle"], device, CASES)
    few = {kind: (found[kind], share) for kind, share in least.items() if found[kind] < share}
    assert not few, f"drawn, and how often it should be, in per cent: {few}"


def test_an_unrestricted_kernel_gets_every_kind() -> None:
    values = dict.fromkeys(DISTRIBUTIONS, 0.8)
    check(find("naive")[0], SPECIAL | ODD_DIMS | SIZES | ALIGNED | MASKS | HANDED | values)


def test_a_gpu_gets_what_only_it_can_afford() -> None:
    """More rows than its grid has blocks along an axis, ten times as many keys."""
    least = dict.fromkeys(("many keys", "many queries", "many rows", "vast"), 1.5)
    check(find("naive")[0], SPECIAL | ODD_DIMS | ALIGNED | MASKS | HANDED | least, "cuda")


@pytest.mark.parametrize("name", RESTRICTED)
def test_a_restricted_kernel_gets_what_it_takes(name: str) -> None:
    check(restricted(name), RESTRICTED[name][1])


def test_a_kernel_that_quantises_gets_what_is_hard_on_scales() -> None:
    check(control("FP8"), {"beyond a tile": 8.0, "uneven values, more than 128 keys": 6.0})


@pytest.mark.parametrize("name", RESTRICTED)
@pytest.mark.parametrize("law", ["oracle", "gradients"])
def test_no_case_costs_more_than_it_may(name: str, law: str) -> None:
    kernel, cost = restricted(name), Cost("cpu", grads=law == "gradients", times=7)
    for case in drawn(kernel, PROPERTIES[law], "cpu", 300):
        assert kernel.unsupported(case.problem, "cpu") is None
        assert cost.affords(Size.of(case.problem)), case


def test_an_interpreted_kernel_gets_few_tiles() -> None:
    slow = Kernel("slow", ANYTHING.fn, ANYTHING.takes, affordable=lambda device: 9)
    for case in drawn(slow, PROPERTIES["oracle"], "cpu", 300):
        assert Cost("cpu", interpreted=True).affords(Size.of(case.problem)), case


def test_any_size_is_cut_to_what_is_affordable() -> None:
    """As far as need be: heads stay of their kind, lengths stand to each other as they did."""
    rng = random.Random(1)  # noqa: S311 - no secret
    for _ in range(3000):
        heads_kv, length = rng.choice((1, 2, 3, 8, 34)), (0, 1, 5, 64, 65, 129, 257, 2048, 66_000)
        size = Size(
            batch=rng.choice((1, 2, 3, 9, 64, 2000, 65_536)),
            heads_q=heads_kv * rng.choice((1, 2, 4, 16)),
            heads_kv=heads_kv,
            len_q=rng.choice(length),
            len_k=rng.choice(length),
            dim_qk=rng.choice((1, 64, 256, 1024)),
            dim_v=rng.choice((1, 64, 256, 1024)),
        )
        device = rng.choice(("cpu", "cuda"))
        cost = Cost(device, device == "cpu" and rng.random() < 0.5, rng.random() < 0.5)
        cut = cost.cut(size, lengths=rng.random() < 0.5)
        assert cost.affords(cut)
        assert cut == size or not cost.affords(size)
        assert cut.heads_q % cut.heads_kv == 0
        assert (cut.heads_q > cut.heads_kv) == (size.heads_q > size.heads_kv)
        assert size.len_q != size.len_k or cut.len_q == cut.len_k
        assert [n == 0 for n in cut.lengths] == [n == 0 for n in size.lengths]


def test_choices_are_even_and_0_chooses_the_first() -> None:
    assert [Choices(0).of("abc"), Choices(0).below(9), Choices(0).often(7, 8)] == ["a", 0, False]
    counted: Counter[tuple[int, bool]] = Counter()
    for number in range(24):
        choose = Choices(number)
        counted[choose.below(6), choose.often(1, 4)] += 1
    assert set(counted.values()) == {1, 3} == {counted[5, True], counted[5, False]}


def test_unusual_sizes_leave_room_for_usual_ones() -> None:
    for device in ("cpu", "cuda"):
        assert turns(device, quantised=True).count(None) > OUT_OF * 0.45
        for unusual in UNUSUAL.values():
            assert turns(device, quantised=True).count(unusual) == unusual.often[device]


def test_inputs_are_drawn_where_they_have_something_to_say() -> None:
    for case in drawn(find("naive")[0], PROPERTIES["oracle"], "cpu", 400):
        assert case.recipe.family.says(case.problem), case


@pytest.mark.parametrize("recipe", DISTRIBUTIONS)
def test_inputs_are_there_for_whatever_a_case_shrinks_to(recipe: str) -> None:
    """Which they may have nothing to say of."""
    for len_q, len_k in ((0, 3), (3, 0), (0, 0), (1, 1)):
        problem = Problem(len_q=len_q, len_k=len_k, scale=0.0)
        inputs = Case(problem, Recipe(recipe)).inputs()
        assert tuple(inputs.k.shape) == problem.shapes["k"]
        assert bool(inputs.q.isfinite().all())


SHAPE = Problem(batch=3, heads_q=4, heads_kv=2, len_q=130, len_k=150, dim_qk=64, dim_v=64)


def values(recipe: str, problem: Problem = SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    """(the scores [B,H,Q,K], V) in float64."""
    x = Case(problem, Recipe.parse(recipe), 1).draw()
    k = x.k.repeat_interleave(problem.group, 1)
    return x.q @ k.mT * problem.softmax_scale, x.v


@pytest.mark.parametrize("scale", [None, 1e-3, -0.3])
def test_scores_differ_by_more_than_fp16_has_numbers_for(scale: float | None) -> None:
    scores, v = values("apart(131072)", SHAPE.but(scale=scale))
    assert bool((scores.amax(-1) - scores.amin(-1) > 2 * 65504).all())
    near = (scores > scores.amax(-1, keepdim=True) - 1e3).sum(-1)
    assert bool((near > 50).all())
    assert bool((v.std(2) > 0.5).all())


def test_one_row_lies_far_above_the_others() -> None:
    top = values("peak_row(1e4)")[0].amax(-1)
    assert bool(((top > 5e3).sum(-1) == 1).all())
    assert bool(((top.abs() < 100).sum(-1) == SHAPE.len_q - 1).all())


def test_scores_tie_while_values_vary() -> None:
    scores, v = values("ties(3)")
    assert bool((scores[..., 3:] == scores[..., :-3]).all())
    assert not bool((v[..., 3:, :] == v[..., :-3, :]).any())


@pytest.mark.parametrize(
    ("recipe", "split"),
    [
        ("uneven_entries", lambda v: v),
        ("uneven_heads", lambda v: v.transpose(0, 1)),
        ("uneven_blocks", lambda v: v[:, 0].split(64, 1)),
    ],
)
def test_parts_differ_in_size(recipe: str, split: Callable[[torch.Tensor], torch.Tensor]) -> None:
    largest = [part.abs().amax().item() for part in split(values(recipe)[1])]
    assert max(largest) > 3 * min(largest)


def test_every_kind_has_a_name_of_its_own() -> None:
    named = len(UNUSUAL) + len(DISTRIBUTIONS)
    assert len(kinds()) > named + 15
    assert {*SPECIAL, *ODD_DIMS, *SIZES, *ALIGNED, *MASKS, *HANDED} <= kinds().keys()
