"""Layouts hold the same values, NaN lies around them, and whoever writes there is seen."""

from __future__ import annotations

import pytest
import torch

from verify.errors import VerifyError
from verify.registry import Kernel
from verify.sandbox.call import call
from verify.spec.case import Case
from verify.spec.finding import Finding
from verify.spec.layouts import BAND, LAYOUTS, laid_out, memory, same_memory, touched

SHAPE = (2, 3, 5, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_holds_the_values_and_nothing_else(layout: str) -> None:
    x = torch.arange(240.0).view(SHAPE)
    wanted = x[:, :1].expand(SHAPE) if layout == "expanded" else x
    moved = laid_out(x, layout)
    assert torch.equal(moved, wanted)
    memory = moved.new_empty(0).set_(moved.untyped_storage())
    held = int((~memory.isnan()).sum())
    assert held == wanted[:, :1].numel() if layout == "expanded" else held == x.numel()
    assert memory[:BAND].isnan().all()
    assert memory[-BAND:].isnan().all()
    assert (moved.stride() == torch.empty(SHAPE).stride()) == (layout in ("bhsd", "odd"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_has_the_same_strides_and_a_write_beside_it_is_seen(layout: str) -> None:
    x = laid_out(torch.arange(240.0).view(SHAPE), layout)
    copy = same_memory(x)
    assert copy.stride() == x.stride()
    assert copy.data_ptr() != x.data_ptr()
    before, after = 2 * [memory(x)], [memory(x), memory(copy)]
    assert touched(before, after) is None
    after[1].view(x.dtype)[BAND - 1] = 0.0
    assert touched(before, after) == 1


def test_a_case_with_layouts_parses_as_it_prints() -> None:
    case = Case.parse("b2.h3.q5.k5.d8.fp16.full.grads/normal#4@k=packed,do=expanded")
    assert Case.parse(str(case)) == case
    inputs = case.inputs()
    assert inputs.k.stride() == laid_out(torch.empty(2, 3, 5, 8), "packed").stride()
    assert inputs.do.stride(1) == 0
    for text in ("@k=sideways", "@slopes=bshd"):
        with pytest.raises(VerifyError, match="layout"):
            Case.parse("b1.h1.q1.k1.d1.fp16.full/normal#4" + text)


def test_what_a_kernel_leaves_unwritten_or_writes_beside_is_a_finding() -> None:
    case = Case.parse("b1.h1.q4.k4.d4.fp32.full/normal#0@k=gapped")

    def beyond(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k.as_strided((1,), (1,), k.storage_offset() + 4).fill_(0.0)
        return torch.zeros_like(q)

    with pytest.raises(Finding, match="changed memory beside its input k"):
        call(Kernel("beyond", beyond, frozenset()), case.problem, case.inputs())
    out = call(
        Kernel("nothing", lambda q, k, v: torch.empty_like(q), frozenset()),
        case.problem,
        case.inputs(),
    ).out
    assert out.isnan().all()
