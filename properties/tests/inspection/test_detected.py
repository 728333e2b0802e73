"""Conventions in which right kernels differ are read off, translated, and judged as they are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from verify.engine.replay import replay
from verify.errors import VerifyError
from verify.inspection.conventions import detected
from verify.kernels.naive import naive
from verify.properties.catalogue import PROPERTIES
from verify.properties.tests.support import searched
from verify.registry import Kernel
from verify.sandbox.capabilities import options
from verify.spec.case import Case, visibility
from verify.spec.masks import FULL, Mask
from verify.spec.problem import Problem

TAKES = frozenset({"scale", "mask"})


def exact(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> tuple:
    plain = {"bias": None, "slopes": None, "softcap": 0.0, "dropout": 0.0}
    wide = (t.float() for t in (q, k, v))
    out, lse = naive(*wide, scale=scale, mask=mask, **plain)
    return out.to(q.dtype), lse


def base_two(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> tuple:
    out, lse = exact(q, k, v, scale=scale, mask=mask)
    return out, lse / math.log(2.0)


def cycle(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    group = q.shape[1] // k.shape[1]
    return exact(q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), scale=scale, mask=mask)[0]


def uniform(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    if mask is not None:  # a row that sees nothing sees all, with weights of its own
        none = ~mask.any(-1, keepdim=True)
        mask, q = mask | none, q.masked_fill(none, 0.0)
    return exact(q, k, v, scale=scale, mask=mask)[0]


def nan(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    out = exact(q, k, v, scale=scale, mask=mask)[0]
    if mask is None:
        return out
    return torch.where(mask.any(-1, keepdim=True), out, torch.nan)


@pytest.mark.parametrize(
    ("fn", "found"),
    [
        (exact, {}),
        (base_two, {"lse_base": "2"}),
        (cycle, {"head_map": "cycle"}),
        (uniform, {"empty_row": "mean"}),
        (nan, {"empty_row": "nan"}),
    ],
)
def test_a_convention_is_found_and_the_kernel_right_with_it(fn, found: dict[str, str]) -> None:
    kernel = Kernel(fn.__name__, fn, TAKES)
    assert detected(kernel, "cpu") == found
    declared = replace(kernel, **found)
    assert detected(declared, "cpu") == {}
    for prop in ("oracle", "gradients", "grouped-heads"):
        assert searched(declared, prop, judged=15).finding is None


def always(diagonal: str) -> Kernel:
    """Causal self-attention that has no argument for it."""

    def fn(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        problem = Problem(len_q=q.shape[2], len_k=k.shape[2], mask=Mask.parse(diagonal))
        return exact(q, k, v, scale=scale, mask=visibility(problem, q.device))[0]

    return Kernel(diagonal, fn, frozenset({"scale"}))


@pytest.mark.parametrize("diagonal", ["causal_upper_left", "causal_lower_right"])
def test_a_mask_that_nobody_asked_for_is_found(diagonal: str) -> None:
    kernel = always(diagonal)
    assert detected(kernel, "cpu") == {"own_mask": diagonal}
    declared = replace(kernel, own_mask=diagonal)
    assert detected(declared, "cpu") == {}
    for prop in ("oracle", "gradients", "prefix"):
        assert searched(declared, prop, judged=15).finding is None
    asked = Problem(len_q=3, len_k=5, mask=Mask.parse(diagonal))
    assert declared.unsupported(asked, "cpu") is None
    assert declared.unsupported(asked.but(mask=FULL), "cpu") == (
        f"applies {diagonal} by itself, and no other mask"
    )


def test_a_mask_that_is_always_there_in_a_kernel_that_takes_one_is_wrong() -> None:
    """It was told that there is none."""
    fn = always("causal_upper_left").fn
    kernel = Kernel("careless", lambda q, k, v, *, scale, mask: fn(q, k, v, scale=scale), TAKES)
    assert detected(kernel, "cpu") == {}
    assert searched(kernel, "oracle", judged=20).finding is not None


def test_another_convention_than_the_declared_is_wrong() -> None:
    wrong = Kernel("wrong", exact, TAKES, head_map="cycle")
    assert searched(wrong, "oracle", judged=100).finding is not None
    with pytest.raises(VerifyError, match="head_map='h': one of blocks, cycle"):
        Kernel("wrong", exact, TAKES, head_map="h")


def test_nan_in_a_row_that_should_be_a_mean_is_no_convention() -> None:
    """A sum that overflows gives NaN where the mean of V was declared."""
    kernel = Kernel("overflows", nan, TAKES, empty_row="mean")
    assert searched(kernel, "oracle", judged=200).finding is not None


def test_a_case_is_replayed_by_the_conventions_that_a_run_finds() -> None:
    said: list[str] = []
    case = Case.parse("b1.h4:2.q3.k5.d4.fp32.full/normal#1")
    kernels = {"cycle": Kernel("cycle", cycle, TAKES)}
    about = ("cycle", kernels, "cpu", PROPERTIES["oracle"], case)
    assert replay(*about, said.append, in_process=True)
    assert said[0] == "judged with head_map='cycle'"


def test_an_output_without_a_graph_is_asked_for_no_gradients() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
        return exact(q, k, v, scale=scale, mask=mask)[0].detach()

    kernel = Kernel("forward", forward, TAKES)
    assert options(kernel, "cpu").taken["grads"] == (False,)
    assert PROPERTIES["gradients"].refusal(kernel, "cpu") == "takes no problem with gradients"
    assert searched(kernel, "oracle", judged=5).judged == 5
