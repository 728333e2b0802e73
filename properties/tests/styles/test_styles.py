"""Kernels in the shape of SDPA and flash-attn are called as their users call them, and what that
call cannot express is said.
"""

# ruff: noqa: FBT002 (signatures as SDPA and flash-attn have them)

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from verify.errors import VerifyError
from verify.kernels.torch_sdpa import IN_FLOAT32, KNOWN, flash_arithmetic
from verify.properties.tests.support import searched
from verify.records.events import Ended
from verify.registry import REGISTRY, Kernel, kernel
from verify.sandbox.call import call
from verify.spec.case import Case
from verify.spec.problem import Problem
from verify.styles import STYLES

NOTHING_HIDDEN = torch.zeros((), dtype=torch.bool)


def styled(fn: Callable[..., Any], style: str, **declared: Any) -> Kernel:
    """What registering it makes of it; it is not kept."""
    with mock.patch.dict(REGISTRY, clear=True):
        assert kernel(fn, style=style, name="mine", **declared) is fn
        return REGISTRY["mine"]


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, hidden: Tensor, cap: float, bias: Any
) -> tuple[Tensor, Tensor]:
    """[B,H,L,D] in, (out, lse) out, all in FP32."""
    k, v = (t.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    s = q.float() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = (cap * torch.tanh(s / cap) if cap else s) + bias
    p = torch.softmax(s.masked_fill(hidden, torch.finfo(s.dtype).min), -1).masked_fill(hidden, 0.0)
    return (p @ v).to(q.dtype), torch.logsumexp(s.masked_fill(hidden, -torch.inf), -1)


def flash(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    *,
    diagonal=None,
):
    """flash_attn.flash_attn_func, with what it returns for return_attn_probs."""
    assert not dropout_p
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    diagonal = k.shape[2] - q.shape[2] if diagonal is None else diagonal
    apart = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - diagonal
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = (apart < -left) & (left >= 0) | (apart > right) & (right >= 0)
    bias = 0.0 if alibi_slopes is None else -alibi_slopes[:, None, None] * apart.abs()
    out, lse = attend(q, k, v, softmax_scale, hidden, softcap, bias)
    return out.transpose(1, 2), lse, None


def upper_left(q, k, v, softmax_scale=None, causal=False):
    """flash-attn before 2.1: the diagonal begins in the upper-left corner."""
    return flash(q, k, v, softmax_scale=softmax_scale, causal=causal, diagonal=0)[0]


def no_gqa(query, key, value, is_causal=False):
    """What many write in the place of SDPA."""
    hidden = ~torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    return attend(query, key, value, None, hidden & is_causal, 0.0, 0.0)[0]


def flag_forgotten(query, key, value, attn_mask=None, is_causal=False, scale=None):
    added = 0.0 if attn_mask is None else attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        added = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
    hidden = torch.as_tensor(added) == -torch.inf
    return attend(query, key, value, scale, hidden, 0.0, added)[0]


def bshd(q, k, v, *, scale, mask=None):
    hidden = NOTHING_HIDDEN if mask is None else ~mask
    out, lse = attend(*(t.transpose(1, 2) for t in (q, k, v)), scale, hidden, 0.0, 0.0)
    return [out.transpose(1, 2), lse]


def one_head(q, k, v, *, scale):
    return bshd(*(t[:, :, :1].expand_as(t) for t in (q, k, v)), scale=scale)


RIGHT: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    "sdpa": (
        F.scaled_dot_product_attention,
        "sdpa",
        {"arithmetic": flash_arithmetic, "known_issues": KNOWN["flash"]},
    ),
    "no_gqa": (no_gqa, "sdpa", {"arithmetic": IN_FLOAT32}),
    "flash": (flash, "flash_attn", {"arithmetic": IN_FLOAT32}),
    "bshd": (bshd, "bshd", {"arithmetic": IN_FLOAT32}),
}


@pytest.mark.parametrize("prop", ["oracle", "gradients", "layout-gradients", "mask-equivalence"])
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_kernel_is_found_to_be_right(name: str, prop: str) -> None:
    fn, style, declared = RIGHT[name]
    result = searched(styled(fn, style, **declared), prop, judged=40)
    assert result.finding is None
    assert (result.ended, result.judged) == (Ended.CASES, 40)


@pytest.mark.parametrize(
    ("fn", "style", "shows"),
    [
        (upper_left, "flash_attn", lambda p: p.len_q != p.len_k and "causal" in str(p.mask)),
        (flag_forgotten, "sdpa", lambda p: p.mask_as == "rule" and "causal" in str(p.mask)),
        (one_head, "bshd", lambda p: p.heads_q > 1),
    ],
)
def test_a_wrong_kernel_is_found(
    fn: Callable[..., Any], style: str, shows: Callable[[Problem], bool]
) -> None:
    finding = searched(styled(fn, style, arithmetic=IN_FLOAT32), "oracle", judged=100).finding
    assert finding is not None
    assert shows(Case.parse(finding.case).problem), finding.case


SDPA = "attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False"
FLASH = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)


def with_signature(parameters: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """(a function f(q, k, v, parameters), what it will have been handed by name)"""
    seen: dict[str, Any] = {}
    scope: dict[str, Any] = {"seen": seen}
    text = f"def f(q, k, v, {parameters}): pass"
    exec(text, scope)  # noqa: S102 - what is written here
    f = scope["f"]

    def spy(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        inspect.signature(f).bind(q, k, v, **given)
        seen.update({"q": q, **given})
        return q * 1.0

    spy.__dict__["__signature__"] = inspect.signature(f)
    return spy, seen


def handed(style: str, parameters: str, problem: Problem) -> dict[str, Any]:
    """What such a function is handed by name, tensors by their dtype and shape."""
    spy, seen = with_signature(parameters)
    mine = styled(spy, style)
    assert mine.unsupported(problem, "cpu") is None
    call(mine, problem, Case(problem).inputs())
    as_text = {
        n: f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else x for n, x in seen.items()
    }
    return {n: x for n, x in as_text.items() if n != "q"}


@pytest.mark.parametrize(
    ("style", "parameters", "problem", "wanted"),
    [
        ("sdpa", SDPA, "q5.k7.d8.fp32.full", {}),
        ("sdpa", SDPA, "q5.k7.d8.fp32.full.scale=0.0", {"scale": 0.0}),
        ("sdpa", "scale=1.0", "q5.k7.d4.fp32.full", {"scale": 0.5}),
        ("sdpa", SDPA, "q5.k7.d8.fp32.causal_upper_left", {"is_causal": True}),
        ("sdpa", SDPA, "q5.k5.d8.fp32.causal_lower_right", {"is_causal": True}),
        ("sdpa", "is_causal", "q5.k7.d8.fp32.full", {"is_causal": False}),
        ("sdpa", "is_causal=True", "q5.k7.d8.fp32.full", {"is_causal": False}),
        (
            "sdpa",
            SDPA,
            "q5.k7.d8.fp32.causal_lower_right",
            {"attn_mask": "torch.bool [1, 1, 5, 7]"},
        ),
        (
            "sdpa",
            SDPA,
            "q5.k7.d8.fp32.causal_upper_left.as_bool",
            {"attn_mask": "torch.bool [1, 1, 5, 7]"},
        ),
        (
            "sdpa",
            SDPA,
            "q5.k7.d8.fp32.causal_upper_left.bias=hqk",
            {"attn_mask": "torch.float32 [1, 4, 5, 7]"},
        ),
        (
            "sdpa",
            "attn_mask=None",
            "q5.k7.d8.fp32.causal_upper_left",
            {"attn_mask": "torch.bool [1, 1, 5, 7]"},
        ),
        ("flash_attn", FLASH, "q5.k7.d8.fp32.full", {}),
        ("flash_attn", FLASH, "q5.k7.d8.fp32.causal_lower_right", {"causal": True}),
        ("flash_attn", FLASH, "q5.k5.d8.fp32.causal_upper_left", {"causal": True}),
        (
            "flash_attn",
            FLASH,
            "q5.k7.d8.fp32.window(3,0)",
            {"causal": True, "window_size": (3, 0)},
        ),
        ("flash_attn", "window_size", "q5.k7.d8.fp32.window(3,0)", {"window_size": (3, 0)}),
        ("flash_attn", FLASH, "q5.k7.d8.fp32.window(-1,0)", {"window_size": (-1, 0)}),
        ("flash_attn", FLASH, "q5.k7.d8.fp32.window(-1,-1)", {}),
        (
            "flash_attn",
            FLASH,
            "q5.k7.d8.fp32.window(3,-1)&window(2,4)",
            {"window_size": (2, 4)},
        ),
        (
            "flash_attn",
            FLASH,
            "q5.k7.d8.fp32.causal_lower_right&window(3,2)",
            {"causal": True, "window_size": (3, 0)},
        ),
        (
            "flash_attn",
            FLASH,
            "q5.k7.d8.fp32.causal_lower_right&window(-1,2)",
            {"causal": True},
        ),
        (
            "flash_attn",
            "window_size=(None, None)",
            "q5.k7.d8.fp32.window(-1,2)",
            {"window_size": (None, 2)},
        ),
        (
            "flash_attn",
            "sm_scale, is_causal, window",
            "q5.k7.d4.fp32.full",
            {"sm_scale": 0.5, "is_causal": False, "window": (-1, -1)},
        ),
        (
            "flash_attn",
            "scale=None, **others",
            "q5.k7.d8.fp32.full.bias=alibi.scale=0.5.softcap=2.0",
            {"scale": 0.5, "softcap": 2.0, "alibi_slopes": "torch.float32 [4]"},
        ),
        ("bshd", "*, scale, softcap=1.0", "q5.k7.d4.fp32.full", {"scale": 0.5, "softcap": 0.0}),
    ],
)
def test_a_function_is_handed(
    style: str, parameters: str, problem: str, wanted: dict[str, Any]
) -> None:
    heads = "b1.h4." if style == "sdpa" else "b2.h4:2."
    assert handed(style, parameters, Problem.parse(heads + problem)) == wanted


def test_groups_of_heads_and_dropout_are_handed() -> None:
    spy, seen = with_signature(SDPA)
    problem = Problem.parse("b1.h4:2.q5.k7.d8.fp32.full")
    call(styled(spy, "sdpa"), problem, Case(problem).inputs(), dropout=0.5)
    assert (seen["enable_gqa"], seen["dropout_p"]) == (True, 0.5)


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "expanded"])
@pytest.mark.parametrize("style", ["flash_attn", "bshd"])
def test_tensors_are_views_in_the_layout_of_the_case(style: str, layout: str) -> None:
    """No copy: the kernel meets the strides that the case has."""
    spy, seen = with_signature("scale" if style == "bshd" else "causal=False")
    case = Case.parse(f"b2.h4.q5.k5.d8.fp32.full/normal#1@q={layout}")
    inputs = case.inputs()
    out = call(styled(spy, style), case.problem, inputs).out
    assert seen["q"].shape == (2, 5, 4, 8)
    assert seen["q"].transpose(1, 2).stride() == inputs.q.stride()
    assert torch.equal(out, inputs.q)


def test_what_is_returned_beside_out_and_lse_is_cut_off() -> None:
    case = Case.parse("b2.h4:2.q5.k7.d8.bf16.causal_lower_right.grads/normal#1")
    three = call(styled(flash, "flash_attn"), case.problem, case.inputs())
    assert three.lse is not None
    assert three.lse.shape == (2, 4, 5)
    alone = styled(lambda q, k, v, causal=False: [flash(q, k, v, causal=causal)[0]], "flash_attn")
    one = call(alone, case.problem, case.inputs())
    assert one.lse is None
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(getattr(one, name), getattr(three, name))


def test_a_module_and_a_partial_function_are_kernels() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, causal=False) -> Tensor:
            return flash(q, k, v, causal=causal)[0]

    case = Case.parse("b2.h4:2.q5.k7.d8.bf16.causal_lower_right/normal#1")
    want = call(styled(flash, "flash_attn"), case.problem, case.inputs()).out
    for fn in (Attention(), functools.partial(flash, return_attn_probs=True)):
        mine = styled(fn, "flash_attn")
        assert torch.equal(call(mine, case.problem, case.inputs()).out, want)
    assert mine.takes >= {"scale", "softcap", "slopes", "problem"}


def test_the_decorator_leaves_the_function_and_knows_where_it_is() -> None:
    def mine(q, k, v, causal=False):
        return q

    with mock.patch.dict(REGISTRY, clear=True):
        assert kernel(style="flash_attn", name="mine")(mine) is mine
        line = mine.__code__.co_firstlineno
        assert REGISTRY["mine"].origin == f"{__file__}:{line}"
        assert inspect.unwrap(REGISTRY["mine"].fn) is mine


@pytest.mark.parametrize(
    ("style", "parameters", "problem", "said"),
    [
        ("sdpa", "attn_mask=None", "b1.h4:2.q5.k5.d8.fp32.full", "has no `enable_gqa`"),
        ("sdpa", "is_causal=False", "b1.h1.q5.k7.d8.fp32.causal_lower_right", "no `attn_mask`"),
        ("sdpa", "scale=None", "b1.h1.q5.k5.d8.fp32.causal_upper_left", "takes no mask"),
        ("sdpa", "is_causal=False", "b1.h1.q5.k5.d8.fp32.full.bias=qk", "takes no `bias`"),
        ("sdpa", "attn_mask=None", "b1.h1.q5.k5.d8.fp32.full.scale=0.5", "takes no `scale`"),
        ("sdpa", SDPA, "b1.h1.q5.k5.d8.fp32.full.bias=alibi", "takes no `slopes`"),
        ("sdpa", SDPA, "b1.h1.q5.k5.d8.fp32.full.softcap=1.0", "takes no `softcap`"),
        ("flash_attn", FLASH, "b1.h1.q5.k7.d8.fp32.causal_upper_left", "causal, lower right"),
        ("flash_attn", FLASH, "b1.h1.q5.k7.d8.fp32.padding(3)", "has no mask but full, windows"),
        ("flash_attn", FLASH, "b1.h1.q5.k5.d8.fp32.full.bias=qk", "takes no `bias`"),
        ("flash_attn", FLASH, "b1.h1.q5.k5.d8.fp32.window(1,0).as_bool", "takes no `mask`"),
        ("flash_attn", "causal=False", "b1.h1.q5.k5.d8.fp32.window(1,0)", "no `window_size`"),
        ("flash_attn", "window_size", "b1.h1.q5.k5.d8.fp32.causal_lower_right", "no `causal`"),
        ("flash_attn", "causal", "b1.h1.q5.k5.d8.fp32.full.softcap=1.0", "takes no `softcap`"),
        ("flash_attn", "causal", "b1.h1.q5.k5.d8.fp32.full.bias=alibi", "takes no `slopes`"),
        ("bshd", "scale", "b1.h1.q5.k5.d8.fp32.causal_lower_right", "takes no `mask`"),
        ("flash_attn", FLASH, "b1.h2.q5.k5.d8.fp32.full", "one head"),
    ],
)
def test_what_a_call_cannot_express_is_said_in_a_sentence(
    style: str, parameters: str, problem: str, said: str
) -> None:
    def supports(problem: Problem, device: str) -> str | None:
        return "takes one head" if problem.heads_q > 1 else None

    reason = styled(with_signature(parameters)[0], style, supports=supports).unsupported(
        Problem.parse(problem), "cpu"
    )
    assert reason is not None
    assert said in reason


@pytest.mark.parametrize(
    ("style", "fn", "said"),
    [
        ("flash", flash, "style='flash': one of sdpa, flash_attn, bshd"),
        (
            "sdpa",
            lambda q, k: q,
            "takes (q, k), which does not begin with three tensors by position",
        ),
        ("flash_attn", lambda *qkv: qkv[0], "takes (*qkv), which does not begin with three"),
        (
            "flash_attn",
            lambda q, k, v, cu_seqlens: q,
            "its parameter `cu_seqlens` has no default, and style 'flash_attn' does not know it: "
            "it calls f(q, k, v, dropout_p, softmax_scale | scale | sm_scale, causal | is_causal, ",
        ),
        ("bshd", lambda q, k, v, causal: q, "keyword 'causal' is unknown: one of scale, mask"),
        ("bshd", F.scaled_dot_product_attention, "its signature is not known"),
    ],
)
def test_a_function_that_does_not_fit_is_refused(
    style: str, fn: Callable[..., Any], said: str
) -> None:
    with pytest.raises(VerifyError, match=re.escape(said)) as error:
        styled(fn, style)
    assert "\n" not in str(error.value)
    assert "mine" in str(error.value)


def test_every_style_is_tested() -> None:
    assert {style for _, style, _ in RIGHT.values()} == set(STYLES)
