"""Wrong kernels that users had, and that were not caught: each is found by what is drawn now."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from verify.properties.catalogue import PROPERTIES
from verify.properties.tests.support import searched
from verify.registry import Kernel
from verify.sandbox.capabilities import options
from verify.spec.arithmetic import Arithmetic
from verify.spec.case import visibility
from verify.spec.problem import Problem
from verify.studies.draws import drawn


def test_a_window_that_ends_at_the_diagonal_and_is_one_short() -> None:
    """A kernel that takes no other windows: each way of drawing them is asked about."""

    def supports(p: Problem, device: str) -> str | None:
        window = [a for n, a in p.mask.parts if n == "window"]
        causal = len(p.mask.parts) == 1 and window and window[0][1] == 0
        return None if str(p.mask) == "full" or causal else "full or a causal window"

    def sliding(q: Tensor, k: Tensor, v: Tensor, *, scale: float, problem: Problem) -> Tensor:
        s = q.float() @ k.float().repeat_interleave(problem.group, 1).mT * scale
        seen = visibility(problem, q.device)
        left = problem.mask.parts[0][1][0] if "window" in problem.mask.names else -1
        i = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        if left >= 0:
            seen = seen & (torch.arange(k.shape[2])[None] > i - left)
        s = s.masked_fill(~seen, -torch.inf)
        p = s.softmax(-1).masked_fill(s.isneginf().all(-1, keepdim=True), 0.0)
        return (p @ v.float().repeat_interleave(problem.group, 1)).to(q.dtype)

    kernel = Kernel("sliding", sliding, frozenset({"scale", "problem"}), supports=supports)
    for prop in ("oracle", "one-hot"):
        assert searched(kernel, prop, judged=40).finding is not None


@pytest.mark.parametrize(("parts", "cases"), [(4, 300), (8, 400)])
def test_a_path_of_long_keys_that_takes_128_columns_whatever_d_is(parts: int, cases: int) -> None:
    """Taken where a part of the keys is 32 or more, and heads are grouped."""

    def supports(p: Problem, device: str) -> str | None:
        if p.grads or p.mask.names != {"full"} or not p.len_k:
            return "forward, no mask"
        return None if p.dim_qk in (64, 128, 256) else "d 64, 128, 256"

    def hard_coded(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        group = q.shape[1] // k.shape[1]
        d = 128 if k.shape[2] // parts >= 32 and group > 1 else q.shape[-1]
        wide_k, wide_v = (t.float().repeat_interleave(group, 1) for t in (k, v))
        s = q[..., :d].float() @ wide_k[..., :d].mT * scale
        return (s.softmax(-1) @ wide_v).to(q.dtype)

    about = {"supports": supports, "arithmetic": Arithmetic(probs="fp32")}
    kernel = Kernel("hard-coded", hard_coded, frozenset({"scale"}), **about)
    assert searched(kernel, "oracle", judged=cases, seed=2).finding is not None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention in FP32, its mask broadcast as it should be."""
    k, v = (t.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    s = q.float() @ k.mT * scale
    s = s if bias is None else s + bias.float()
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    p = s.softmax(-1).masked_fill(s.isneginf().all(-1, keepdim=True), 0.0)
    return (p @ v).to(q.dtype)


def head_zero(mask: Tensor, q: Tensor) -> Tensor:
    """Head 0's for all heads."""
    return mask[:, :1]


def first_entry(mask: Tensor, q: Tensor) -> Tensor:
    """Of [B,1,1,K] the first entry's for all."""
    return mask[:1] if mask.shape[2] == 1 else mask


def entries_as_rows(mask: Tensor, q: Tensor) -> Tensor:
    """[B,1,1,K] is read as [1,1,Q,K]: the query's number counts as the entry's."""
    if mask.shape[2] > 1 or mask.shape[0] == 1:
        return mask
    return mask[torch.arange(q.shape[2]) % mask.shape[0], 0, 0][None, None]


def rows_of_heads(mask: Tensor, q: Tensor) -> Tensor:
    """Strides of a whole [1,H,Q,K], whatever is given: [1,H,1,K] is read as rows of head 0."""
    if mask.shape[2] > 1 or mask.shape[1] == 1:
        return mask
    return mask[:, torch.arange(q.shape[2]) % mask.shape[1], 0][:, None]


@pytest.mark.parametrize(
    ("reads", "props"),
    [
        (head_zero, ("oracle", "one-hot")),  # the same, however it is handed over
        (first_entry, ("oracle", "one-hot", "mask-equivalence")),
        (entries_as_rows, ("oracle", "one-hot", "mask-equivalence")),
        (rows_of_heads, ("oracle", "one-hot", "mask-equivalence")),
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_mask_that_is_broadcast_wrongly(
    reads: Callable[[Tensor, Tensor], Tensor], props: tuple[str, ...], seed: int
) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
        return attend(q, k, v, scale=scale, mask=None if mask is None else reads(mask, q))

    about = {"arithmetic": Arithmetic(probs="fp32"), "origin": __file__}
    kernel = Kernel("wrong", wrong, frozenset({"scale", "mask"}), **about)
    for prop in props:
        assert searched(kernel, prop, judged=100, seed=seed).finding is not None, prop


@pytest.mark.parametrize("prop", ["oracle", "one-hot", "mask-equivalence", "no-leak", "nan"])
def test_a_mask_that_is_broadcast_rightly(prop: str) -> None:
    about = {"arithmetic": Arithmetic(probs="fp32"), "origin": __file__}
    kernel = Kernel("right", attend, frozenset({"scale", "mask", "bias"}), **about)
    assert searched(kernel, prop, judged=150).finding is None


def test_a_bias_that_is_taken_from_head_zero() -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, *, scale: float, bias: Tensor | None) -> Tensor:
        return attend(q, k, v, scale=scale, bias=None if bias is None else bias[:, :1])

    supports = lambda p, device: None if p.bias == "none" else "no bias but a mask"  # noqa: E731
    about = {"arithmetic": Arithmetic(probs="fp32"), "supports": supports}
    kernel = Kernel("biased", wrong, frozenset({"scale", "bias"}), **about)
    assert searched(kernel, "oracle", judged=100).finding is not None


def test_a_shape_that_is_refused_is_not_drawn() -> None:
    """It declares nothing, and raises on masks that are not whole."""

    def whole(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
        if mask is not None and mask.shape[2] < q.shape[2]:
            raise ValueError("a mask has a row for each query")
        return attend(q, k, v, scale=scale, mask=mask)

    about = {"arithmetic": Arithmetic(probs="fp32"), "origin": __file__}
    kernel = Kernel("whole", whole, frozenset({"scale", "mask"}), **about)
    forms = ("rule", "bool", "bool_bhqk")
    assert options(kernel, "cpu").taken["mask_as"] == forms
    assert searched(kernel, "oracle", judged=100).finding is None
    assert {case.problem.mask_as for case in drawn(kernel, PROPERTIES["oracle"], "cpu", 200)} == {
        *forms
    }
