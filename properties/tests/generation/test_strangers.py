"""Wrong kernels that users had, and that were not caught: each is found by what is drawn now."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from verify.properties.tests.support import searched
from verify.registry import Kernel
from verify.spec.arithmetic import Arithmetic
from verify.spec.case import visibility
from verify.spec.problem import Problem


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
