"""Findings explain themselves: for each stage a kernel that is wrong there and nowhere else; and
scripts that show it alone.
"""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from verify import registry
from verify.diagnosis.explain import explain, script
from verify.registry import Kernel
from verify.spec.arithmetic import EAGER
from verify.spec.case import Case
from verify.spec.problem import Problem

CALLS: list[int] = []


class _Attention(torch.autograd.Function):
    """Attention and its gradients by the formulas, wrong at one stage."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor, fault: str
    ) -> Any:
        group = q.shape[1] // k.shape[1]
        wide_k, wide_v = (
            t.repeat(1, group, 1, 1) if fault == "heads" else t.repeat_interleave(group, 1)
            for t in ((t.flip(1) for t in (k, v)) if fault == "heads reversed" else (k, v))
        )
        factor = {"scale = 1": 1.0, "scale squared": scale**2, "scale off": 1.01 * scale}.get(
            fault, scale
        )
        if fault == "last key":
            seen = seen & (torch.arange(k.shape[2]) < k.shape[2] // 64 * 64)
        s = (factor * q @ wide_k.mT).masked_fill(~seen, -torch.inf)
        top = s.amax(-1, keepdim=True)
        total = (weights := torch.exp(s - top)).sum(-1, keepdim=True)
        p = weights / total
        out = (
            (weights if fault == "not normalised" else p)
            @ wide_v
            * (0.5 if fault == "halved" else 1.0)
        )
        lse = (torch.log(total) if fault == "no maximum" else top + torch.log(total)).squeeze(-1)
        ctx.save_for_backward(q, wide_k, wide_v, p, out)
        ctx.scale, ctx.group, ctx.fault = scale, group, fault
        return out, lse / (math.log(2.0) if fault == "base 2" else 1.0)

    @staticmethod
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> Any:
        q, k, v, p, out = ctx.saved_tensors
        delta = (do * out).sum(-1, keepdim=True) * {"no delta": 0.0, "delta off": 1.25}.get(
            ctx.fault, 1.0
        )
        ds = p * (do @ v.mT - delta) * (ctx.scale if ctx.fault == "dS scaled twice" else 1.0)
        kept = slice(ds.shape[3] // 64 * 64 if ctx.fault == "tail of dq" else None)
        dq = ctx.scale * ds[..., kept] @ k[:, :, kept]
        kept = slice(ds.shape[2] // 64 * 64 if ctx.fault == "tail of dk" else None)
        dk = ctx.scale * ds[:, :, kept].mT @ q[:, :, kept]
        dv = p.mT @ do
        dk, dv = (
            t.unflatten(1, (-1, ctx.group))[:, :, -1 if ctx.fault == "last head" else 0 :].sum(2)
            for t in (dk, dv)
        )
        dk, dv = (t + (ctx.group - 1) if ctx.fault == "grouped" else t for t in (dk, dv))
        dq = dq + (
            0.01 * torch.rand(dq.shape, generator=torch.Generator().manual_seed(0))
            if ctx.fault == "noise"
            else 0.0
        )
        return dq, dk, dv, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    problem: Problem,
    fault: str,
) -> Any:
    seen = torch.ones(problem.len_q, problem.len_k, dtype=torch.bool) if mask is None else mask
    kept = torch.arange(problem.len_k) != 3
    seen = {"upper-left": seen.new_ones(seen.shape).tril(), "no key 3": seen & kept}.get(
        fault, seen
    )
    if fault == "reads on":
        v = v + 0 * v.as_strided((1,), (1,), v.storage_offset() + v.numel())
    if fault == "strides":
        v = v.as_strided(v.shape, torch.empty(v.shape).stride(), v.storage_offset())
    if fault == "view":
        q = q.view(-1).view(q.shape)
    out, lse = _Attention.apply(q, k, v, scale, seen, fault)
    if fault == "stale":
        out = out + 0 * torch.empty(out.shape)
    CALLS.append(0)
    return out + (len(CALLS) % 2 if fault == "state" else 0.0), lse


def wrong(fault: str) -> Kernel:
    return Kernel(
        fault,
        partial(attention, fault=fault),
        frozenset({"scale", "mask", "problem"}),
        dtypes=("fp32",),
    )


SQUARE, LOWER = (
    "b1.h2.q9.k9.d8.fp32.full/normal#1",
    "b1.h1.q4.k9.d8.fp32.causal_lower_right/normal#1",
)
GROUPED, LONG = (
    "b1.h4:2.q9.k9.d8.fp32.full.grads/normal#1",
    "b1.h1.q70.k65.d8.fp32.full.grads/normal#1",
)


@pytest.mark.parametrize(
    ("fault", "case", "said"),
    [
        ("scale = 1", SQUARE, "the scale (out is that of 1 = 1, not 0.353553)"),
        ("scale squared", SQUARE, "the scale (out is that of scale ** 2 = 0.125, not 0.353553)"),
        (
            "no key 3",
            SQUARE,
            "the mask (row 0 gives no weight to visible key 3; rows of that kind: 18)",
        ),
        (
            "scale off",
            "b1.h1.q1.k2.d1.fp32.full/integers#3",
            "the scale (out is that of 1.01 times the scale)",
        ),
        ("upper-left", LOWER, "the mask's alignment (out is that of causal_upper_left)"),
        (
            "",
            "b1.h1.q9.k4.d8.fp32.causal_lower_right/normal#1",
            "rows that see no key (no other is wrong)",
        ),
        ("last key", LONG, "the tail of the keys (out is that of the first 64 of 65)"),
        ("halved", SQUARE, "a factor, e.g. a normalisation (out is 0.5 times the exact one"),
        (
            "not normalised",
            SQUARE,
            "the division by the row sum (each row of out is the exact one times",
        ),
        ("heads", GROUPED, "the key head (out is that of h % heads_kv, not h // group)"),
        ("heads reversed", GROUPED, "the key head (out is that of heads_kv - 1 - h // group"),
        ("base 2", SQUARE, "the LSE: its base"),
        ("no maximum", SQUARE, "the LSE: the maximum"),
        ("no delta", SQUARE, "delta = rowsum(dO * O) (dq is that without it)"),
        (
            "delta off",
            SQUARE,
            "delta = rowsum(dO * O) (every row of dq is off by a multiple of its mean key",
        ),
        (
            "dS scaled twice",
            SQUARE,
            "the scale of dS (dq is 0.353553 (scale) times the exact one, dk is",
        ),
        ("tail of dq", LONG, "the tail of the keys (dq is that of the first 64 of 65)"),
        ("tail of dk", LONG, "the tail of the rows (dk is that of the first 64 of 70)"),
        (
            "last head",
            GROUPED,
            "the sum over the query heads of a group (dk is that of the last of each)",
        ),
        (
            "grouped",
            GROUPED,
            "the sum over the query heads of a group (dk, dv right where a key head has one query "
            "head)",
        ),
        (
            "noise",
            SQUARE,
            "dq = scale dS K: the tail of the keys, or how dq is accumulated (dq wrong, dk, of the "
            "same dS",
        ),
        ("reads on", SQUARE, "reads memory that it does not own (out is right with 0 beside v)"),
        ("stale", SQUARE, "uses memory that it allocated and did not fill"),
        ("state", SQUARE, "state kept between calls, or a race (out differs"),
        (
            "strides",
            f"{SQUARE}@k=sbhd,v=bshd",
            "the strides or the alignment of v (right where it is contiguous, not bshd)",
        ),
        (
            "view",
            f"{SQUARE}@q=bshd",
            "the strides or the alignment of q (right where it is contiguous, not bshd)",
        ),
    ],
)
def test_the_stage_is_named(fault: str, case: str, said: str) -> None:
    lines = explain(wrong(fault), "cpu", Case.parse(case), "oracle")
    assert any(line.startswith(f"likely stage: {said}") for line in lines), lines


def test_what_is_wrong_and_where() -> None:
    lines = explain(
        wrong("tail of dk"),
        "cpu",
        Case.parse("b1.h1.q70.k65.d8.fp32.causal_upper_left.grads/normal#1"),
        "gradients",
    )
    assert lines[0] == "wrong: dk; right: out, lse, dq, dv"
    assert "dk: 519 of 520 elements wrong, the first at [0, 0, 0, 0]: " in lines[1]
    assert lines[2:4] == [
        "key 0 is number 0 of tile 0 (65 keys in tiles of 64)",
        "key 0 is seen by rows 0-69 of 70",
    ]
    assert (
        explain(wrong(""), "cpu", Case.parse(SQUARE), "layout")[0]
        == "wrong: none; right: out, lse, dq, dk, dv"
    )
    lines = explain(
        wrong("heads"),
        "cpu",
        Case.parse("b1.h4:2.q9.k9.d8.fp32.causal_lower_right/normal#1"),
        "oracle",
    )
    assert "query head 1 uses key head 0 (h // 2)" in lines
    assert "only heads > 0 are wrong: [1, 2]" in lines


@pytest.mark.parametrize(
    ("dtype", "factor", "said"),
    [
        (
            torch.bfloat16,
            1.0,
            "a rounding (the RMSE of out is 1 times that expected with {'probs': 'bf16'",
        ),
        (
            torch.float32,
            1.0005,
            "a factor, e.g. a normalisation (out is 1.0005 times the exact one",
        ),
    ],
)
def test_an_error_in_all_elements_is_explained(
    dtype: torch.dtype, factor: float, said: str
) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        p = torch.softmax(scale * q.float() @ k.float().mT, -1).to(dtype).float()
        return (factor * p @ v.float()).to(q.dtype)

    case = Case.parse("b1.h8.q64.k64.d64.fp16.full/normal#1")
    lines = explain(Kernel("narrow", fn, frozenset({"scale"})), "cpu", case, "oracle")
    assert any(line.startswith(f"likely stage: {said}") for line in lines), lines
    assert factor == 1.0 or lines[1].startswith(
        "out: no element is farther off than allowed, but as with another softmax scale: RMSE "
    )


def test_formats_that_exclude_each_other_are_not_tried_together() -> None:
    """P normalised leaves no split with a row sum of its own."""

    def fn(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        p = torch.softmax(scale * q.float() @ k.float().mT, -1).to(torch.bfloat16).float()
        return (p @ v.float()).to(q.dtype)

    case = Case.parse("b1.h8.q64.k64.d64.fp16.full/normal#1")
    kernel = Kernel("narrow", fn, frozenset({"scale"}), arithmetic=EAGER)
    lines = explain(kernel, "cpu", case, "oracle")
    assert any(line.startswith("likely stage: a rounding") for line in lines), lines


FILE = """
import torch.nn.functional as F
from verify import Arithmetic, kernel

@kernel
def straight(q, k, v, *, scale, mask, problem):
    wide = [t.double() for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*wide, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.to(q.dtype)

@kernel(arithmetic=Arithmetic(normalized_probs=True))
def crooked(q, k, v, *, scale, mask):
    return straight(q, k, v, scale=1.1 * scale, mask=mask, problem=None)
"""


def ran(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "case", "code"),
    [
        ("mine.py::straight", "b1.h2:1.q3.k4.d2.fp32.causal_lower_right.grads/normal#2", 0),
        ("mine.py::crooked", "b2.h4:2.q9.k17.d16.bf16.padding(5,0).grads/normal#1@k=gapped", 1),
        (
            "sdpa-math",
            "b2.h4:2.q5.k7.d8.bf16.causal_lower_right.bias=hqk.grads/normal#1@k=expanded,q=gapped",
            0,
        ),
        ("sdpa-math", "b1.h1.q3.k3.d4.fp16.causal_upper_left.grads/normal#1", 0),
        ("sdpa-math", "b1.h2.q3.k5.d8.fp32.window(1,0).as_float.scale=0.5/normal#1", 0),
        (
            "naive",
            "b2.h4:2.q5.k7.d8.bf16.padding(3,0).bias=alibi.softcap=2.0.grads/normal#1@v=sbhd",
            0,
        ),
    ],
)
def test_a_script_shows_it_alone(
    name: str, case: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.load_bundled()
    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))
    (tmp_path / "mine.py").write_text(FILE)
    (kernel,) = registry.find(name.replace("mine.py", str(tmp_path / "mine.py")))
    (tmp_path / "alone.py").write_text(text := script(kernel, "cpu", Case.parse(case)))
    assert ("from verify" in text) == (name in ("naive", "mine.py::straight"))
    done = ran(tmp_path, "alone.py")
    assert done.returncode == code, done.stdout + done.stderr
    assert ("dq\ngot\n" in done.stdout) == ("grads" in case)


@pytest.mark.slow
def test_a_fuzz_explains_what_it_finds(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE)
    fuzz = "-m verify fuzz mine.py::crooked --cases 100 --seed 1 --out found".split()
    fuzz += "--property oracle --device cpu".split()
    done = ran(tmp_path, *fuzz)
    assert "  why     wrong: out" in done.stdout, done.stdout + done.stderr
    assert "likely stage: the scale (out is that of 1.1 times the scale)" in done.stdout
    assert "  script  found/finding-1.py" in done.stdout
    assert ran(tmp_path, "found/finding-1.py").returncode == 1
