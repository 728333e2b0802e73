"""Conventions are read off a kernel's outputs, whatever these are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from verify.inspection.conventions import PROBES, rows
from verify.kernels.naive import naive
from verify.properties.tests.support import searched
from verify.registry import Kernel

TAKES = frozenset({"scale", "mask"})


def right(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None):
    return naive(q, k, v, scale=scale, mask=mask, bias=None, slopes=None, softcap=0.0, dropout=0.0)


def swapped(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None):
    """Query head h uses key head h % heads_kv, the LSE is in base 2, the scale is doubled."""
    k, v = (t.repeat(1, q.shape[1] // t.shape[1], 1, 1) for t in (k, v))
    out, lse = right(q, k, v, scale=2 * scale, mask=mask)
    return out, lse / math.log(2)


def test_what_a_kernel_does_is_named() -> None:
    found = dict(rows(Kernel("right", right, TAKES), "cpu"))
    assert found.keys() == PROBES.keys()
    assert found["key head of query head h"] == "h // group (repeat_interleave)"
    assert found["LSE"].startswith("natural logarithm")
    assert found["default scale"] == "1 / sqrt(dim_qk)"
    found = dict(rows(Kernel("swapped", swapped, TAKES), "cpu"))
    assert found["key head of query head h"] == "h % heads_kv (repeat)"
    assert found["LSE"].startswith("base 2")
    assert found["default scale"] == "2 / sqrt(dim_qk)"


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e30])
def test_an_output_that_says_nothing_is_no_error(value: float) -> None:
    """A kernel of NaN alone ended `verify fuzz` in a traceback; it gets its finding."""

    def constant(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
        return torch.full((*q.shape[:3], v.shape[3]), value, dtype=torch.float32).to(q.dtype)

    kernel = Kernel(f"constant-{value}", constant, TAKES)
    assert dict(rows(kernel, "cpu")).keys() == PROBES.keys()
    assert searched(kernel, "oracle", judged=5).finding is not None
