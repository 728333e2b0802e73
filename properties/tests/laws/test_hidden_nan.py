"""A kernel that says that hidden memory may hold NaN is judged on it; others are not."""

from __future__ import annotations

import torch
from torch import Tensor

from verify.properties.catalogue import PROPERTIES
from verify.properties.tests.support import searched
from verify.registry import Kernel

TAKES = frozenset({"scale", "mask"})
LAWS = ("hidden-nan", "hidden-nan-gradients")


def multiplies(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    """0 * NaN is NaN."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.float().repeat_interleave(group, 1) for t in (k, v))
    s = q.float() @ k.mT * scale
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    return (torch.softmax(s, -1).nan_to_num() @ v).to(q.dtype)


def selects(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    """What no query sees is not read."""
    if mask is not None:
        seen = mask.any(2).unsqueeze(-1)
        k, v = (torch.where(seen, t, 0.0) for t in (k, v))
    return multiplies(q, k, v, scale=scale, mask=mask)


def test_a_kernel_that_does_not_read_hidden_memory_holds() -> None:
    kernel = Kernel("selects", selects, TAKES, hidden_nan=True)
    for law in LAWS:
        found = searched(kernel, law, judged=15)
        assert found.finding is None
        assert found.judged == 15


def test_a_kernel_that_multiplies_it_by_zero_is_wrong() -> None:
    kernel = Kernel("multiplies", multiplies, TAKES, hidden_nan=True)
    for law in LAWS:
        finding = searched(kernel, law, judged=15).finding
        assert finding is not None
        assert "with numbers where no row looks" in finding.reason


def test_a_kernel_that_does_not_say_so_is_not_judged_on_it() -> None:
    kernel = Kernel("multiplies", multiplies, TAKES)
    assert PROPERTIES["hidden-nan"].refusal(kernel, "cpu") == "does not declare hidden_nan"
