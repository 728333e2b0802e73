"""The bundled FP8 attention beyond what the matrix draws: its quantisation, its scales, what must
not leak into them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from verify.bounds.constants import RESOLUTION, UNIT, narrowed
from verify.bounds.proved import allowance
from verify.errors import VerifyError
from verify.oracles import float64, formats, quantised
from verify.reference.compare import compare
from verify.registry import Kernel
from verify.sandbox.call import call
from verify.spec.arithmetic import Quantisation
from verify.spec.case import Case, Inputs, visibility
from verify.spec.problem import Problem
from verify.spec.quantization import FIT, key_mean, rotation, seen_keys

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
import triton
import triton.language as tl

from verify.kernels.fp8_choices import CHOICES
from verify.kernels.triton import fp8
from verify.kernels.triton.fp8_quantize import ROWS, Quantised, quantise
from verify.kernels.triton.tiles import INTERPRET, rounded, wide

pytestmark = pytest.mark.interpreter

DEVICE = "cpu" if INTERPRET else "cuda"
HOPPER = fp8.supports(Problem(dtype="bf16"), DEVICE)
pytestmark = pytest.mark.skipif(HOPPER is not None, reason=f"triton-fp8: {HOPPER}")
ALL = CHOICES | {
    "best": fp8.BEST,
    "fitted": Quantisation("e4m3", 0, fitted=True),
    "balanced": Quantisation("e5m2", ROWS, values="head", balanced=True),
}


def made(case: Case, how: Quantisation = fp8.BEST) -> tuple[Inputs, fp8.Fp8Launch, Quantised]:
    x, p = case.inputs(DEVICE), case.problem
    launch = fp8.Fp8Launch.of(p, x.q, p.mask, None, None, p.softmax_scale, 0.0)
    return x, launch, quantise(x.q, x.k, x.v, how, launch.dim, seen_keys(p, x.q.device))


def attended(launch: fp8.Fp8Launch, x: Quantised) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = launch.results()
    fp8.attend(launch, x, out, lse)
    return out, lse


@triton.jit
def _convert(x, narrow, back, N: tl.constexpr, INTERPRET: tl.constexpr):
    values = tl.load(x + tl.arange(0, N))
    tl.store(narrow + tl.arange(0, N), rounded(values, narrow.dtype.element_ty, INTERPRET))
    tl.store(back + tl.arange(0, N), wide(tl.load(narrow + tl.arange(0, N)), INTERPRET))


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_eight_bits_are_rounded_to_nearest_even_and_saturate(fmt: str) -> None:
    """Every value of the format, every midpoint between two, their neighbours, what is too large,
    NaN.
    """
    kind = formats.EIGHT_BITS[fmt]
    every = torch.arange(256, dtype=torch.uint8).view(kind).double()
    every = every[every.isfinite()].unique()
    between = (every[1:] + every[:-1]) / 2
    x = torch.cat(
        [every, between, between * (1 + 2**-20), between * (1 - 2**-20), 4 * every]
    ).float()
    x = torch.nn.functional.pad(x, (0, 2048 - x.numel()), value=torch.nan).to(DEVICE)
    narrow, back = torch.empty(2048, dtype=kind, device=DEVICE), torch.empty(2048, device=DEVICE)
    _convert[(1,)](x, narrow, back, 2048, INTERPRET)
    want = formats.rounded(x.double(), fmt)
    assert torch.equal(
        torch.where(x.isnan(), torch.nan, want).nan_to_num(nan=-1.0),
        back.double().nan_to_num(nan=-1.0),
    )


def by_rows(x: Quantised, name: str, length: int) -> torch.Tensor:
    """q, k (turned) or v as float64, dequantised, [B,H,length,C]."""
    if name == "v":
        return x.v[..., :length].mT.double() * x.v_scale[:, :, None].double()
    scale = getattr(x, f"{name}_scale").double()
    scale = (
        scale.repeat_interleave(ROWS, 2)[:, :, :length]
        if name == "k" and scale.shape[2] > 1
        else scale
    )
    return getattr(x, name).double() * scale[..., None]


@pytest.mark.parametrize("how", ALL.values(), ids=ALL)
@pytest.mark.parametrize(
    "case",
    [
        "b2.h4:2.q70.k150.d64.fp16.full/outliers(0.01,10)#1",
        "b2.h1.q40.k300.d72:40.bf16.padding(200,7)/shift(90)#2",
        "b1.h2.q130.k129.d128.bf16.causal_lower_right/one_sign#3",
    ],
)
def test_operands_are_what_was_declared(case: str, how: Quantisation) -> None:
    """Centred and turned, each is as near as its format allows; and on the whole as near as the
    declared rounding brings it.
    """
    parsed = Case.parse(case)
    (x, _, operands), p = made(parsed, how), parsed.problem
    exact, declared, seen = (
        x.exact(DEVICE),
        quantised.dequantised(p, x, how),
        seen_keys(p, x.q.device),
    )
    for name in ("q", "k", "v"):
        t, was = getattr(exact, name), getattr(declared, name)
        if name != "q":
            mean = key_mean(t, seen).double() * how.centred
            t, was = ((y - mean).masked_fill(~seen, 0.0) for y in (t, was))
        dim, turn = t.shape[3], torch.eye(t.shape[3], dtype=torch.float64, device=DEVICE)
        if how.rotated and name != "v":
            turn = rotation(dim).to(DEVICE)[:dim] / rotation(dim).shape[0] ** 0.5
        left = by_rows(operands, name, t.shape[2])[..., : turn.shape[1]]
        if name == "v" and how.values == "columns":
            limit = narrowed(t.abs().mT, how, 1).mT
        else:
            limit = narrowed(
                (t @ turn).abs(),
                how,
                0 if name == "v" and how.values == "head" else how.rows,
            )
        if name == "q" and how.fitted:
            limit = limit + FIT * ((t @ turn).abs() + limit)
        assert bool(((left - t @ turn).abs() <= limit).all()), name
        left = left @ turn.T
        if name == "v":  # what is added to the output belongs to every key's
            left = left + operands.v_mean[:, :, None, : t.shape[3]].double() - mean
            left = left.masked_fill(~seen, 0.0)
        mine, its = ((y - t).square().mean().item() for y in (left, was))
        assert abs(mine - its) <= RESOLUTION * its, name


@pytest.mark.parametrize("how", [fp8.BEST, ALL["fitted"], CHOICES["fp8-e5m2"]], ids=str)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_fitted_row_has_the_length_of_its_shadow(how: Quantisation, dtype: str) -> None:
    """q^ . q = q . q wherever no limit is in the way, and a factor of 2 in Q is one in its scales,
    to the bit. Rows of 0 stay.
    """
    case = Case.parse(f"b1.h2.q150.k40.d128.{dtype}.full/outliers(0.01,10)#2")
    x, launch, operands = made(case, how)
    q = x.q.double()
    turn = (
        rotation(128).to(DEVICE) / 128**0.5
        if how.rotated
        else torch.eye(128, dtype=torch.float64, device=DEVICE)
    )
    left = by_rows(operands, "q", 150) @ turn.T
    unfitted = quantise(x.q, x.k, x.v, replace(how, fitted=False), launch.dim, None)
    factor = operands.q_scale.double() / unfitted.q_scale.double()
    free = (factor - 1).abs() < FIT * (1 - UNIT["e4m3"])
    parallel = (left * q).sum(-1) / q.square().sum(-1) - 1
    assert bool((free.sum() > free.numel() // 2).all())
    assert bool((parallel.abs() <= UNIT["fp32"] * 2 * 128)[free].all())
    assert bool((parallel.abs() <= UNIT[how.format]).all())
    q = x.q.clone()
    q[:, :, 3] = 0
    once, twice = (quantise(y, x.k, x.v, how, launch.dim, None) for y in (q, 2 * q))
    assert torch.equal(2 * once.q_scale, twice.q_scale)
    assert torch.equal(once.q.view(torch.uint8), twice.q.view(torch.uint8))
    assert not once.q[:, :, 3].float().any()
    assert bool(once.q_scale.isfinite().all())


def test_what_rounding_took_from_v_is_given_back_on_average() -> None:
    """A query of zeros that sees all keys that count gives their mean, to FP32 and the store of the
    output.
    """
    case = Case.parse("b2.h4:2.q70.k300.d72:40.fp16.padding(300,37)/outliers(0.01,10)#1")
    x, p = case.inputs(DEVICE), case.problem
    out, _ = fp8.attention(torch.zeros_like(x.q), x.k, x.v, mask=p.mask, scale=1.0)
    exact = (
        key_mean(x.v, seen_keys(p, x.q.device)).repeat_interleave(2, 1).expand(out.shape).double()
    )
    assert bool(
        (
            (out.double() - exact).abs()
            <= UNIT["fp16"] * exact.abs() + 300 * UNIT["fp32"] * x.v.abs().max()
        ).all()
    )


RECIPES = ("normal", "outliers(0.001,10)", "sink", "one_sign", "uniform")


@pytest.mark.parametrize("how", ALL.values(), ids=ALL)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_arithmetic_is_as_exact_as_declared(how: Quantisation, recipe: str) -> None:
    """Against exact attention of the dequantised operands: within the bound of the arithmetic
    without its quantisation.
    """
    case = Case.parse(f"b1.h2.q128.k300.d64.bf16.full/{recipe}#5")
    x = case.inputs(DEVICE)
    left = quantised.dequantised(case.problem, x, how)
    kernel = Kernel(
        "choice",
        lambda q, k, v, *, scale: fp8.attention(q, k, v, scale=scale, how=how),
        frozenset({"scale"}),
    )
    exact = float64.exact(case.problem, left)
    arithmetic = replace(fp8.arithmetic(how)(case.problem, DEVICE), quantised=None)
    blocks = partial(float64.blocks, case.problem, left)
    limits = allowance(case.problem, left, exact, blocks, arithmetic)
    compare(
        "out",
        call(kernel, case.problem, x).out,
        exact.out,
        limits["out"],
        against="exact attention of the operands",
    )


@pytest.mark.parametrize("how", ALL.values(), ids=ALL)
def test_v_of_ones_gives_ones_to_the_rounding_of_p(how: Quantisation) -> None:
    """Exactly where V is centred: nothing of it is left to be weighted."""
    case = Case.parse("b1.h2.q40.k200.d64.bf16.padding(130)/normal(3)#1")
    x, p = case.inputs(DEVICE), case.problem
    out, _ = fp8.attention(
        x.q, x.k, torch.ones_like(x.v), mask=p.mask, scale=p.softmax_scale, how=how
    )
    off = 0.0 if how.centred else UNIT[how.format] + UNIT["bf16"]
    assert bool(((out.double() - 1).abs() <= off).all())


def test_a_query_of_zeros_gives_the_mean_of_what_it_sees() -> None:
    """P is 1 for every visible key, and V's small integers are exact in e4m3, as is their sum: it
    shows which keys were seen.
    """
    case = Case.parse("b2.h2.q70.k200.d64.bf16.causal_lower_right&padding(180,3)/normal#1")
    x, p = case.inputs(DEVICE), case.problem
    v = torch.randint(-7, 8, x.v.shape, generator=torch.Generator().manual_seed(1)).to(x.v)
    v[:, :, 0] = 7.0  # 448 / 7 is a power of two, and so is the scale
    how, q = Quantisation("e4m3", ROWS, values="head"), torch.zeros_like(x.q)
    out, _ = fp8.attention(q, x.k, v, mask=p.mask, scale=1.0, how=how)
    seen = visibility(p, x.q.device).double()
    exact = (seen @ v.double()) / seen.sum(-1, keepdim=True).clamp(min=1)
    assert torch.equal(out, exact.to(out.dtype))


def test_descales_enter_once() -> None:
    """Twice V's gives twice the output; Q's and K's enter as a product."""
    case = Case.parse("b1.h4:2.q70.k150.d64.bf16.causal_lower_right/outliers(0.01,10)#1")
    _, launch, x = made(case)
    out, lse = attended(launch, x)
    twice, _ = attended(launch, replace(x, v_scale=2 * x.v_scale, v_mean=2 * x.v_mean))
    assert torch.equal(twice, 2 * out)
    assert not torch.equal(out, torch.zeros_like(out))
    moved, its = attended(launch, replace(x, q_scale=4 * x.q_scale, k_scale=x.k_scale / 4))
    assert torch.equal(moved, out)
    assert torch.equal(its, lse)
    changed, _ = attended(launch, replace(x, q_scale=4 * x.q_scale))
    assert not torch.equal(changed, out)


@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("how", ALL.values(), ids=ALL)
def test_what_no_query_sees_reaches_neither_scales_nor_means(
    how: Quantisation, value: float
) -> None:
    """Through padding: as a rule, as booleans, as a bias of -inf. What some other query sees may
    move a scale: it is declared.
    """
    for handed in ("rule", "bool", "bias"):
        clean, dirty = _padded(how, handed), _padded(how, handed, value)
        assert torch.equal(clean[0], dirty[0])
        assert torch.equal(clean[1], dirty[1])
        assert bool(clean[0].isfinite().all())


@cache
def _padded(
    how: Quantisation, handed: str, value: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) with this value, if one is given, in the keys and values that no query sees."""
    case = Case.parse("b2.h2.q20.k150.d64.bf16.padding(100,37)/normal#1")
    x, p = case.inputs(DEVICE), case.problem
    seen = seen_keys(p, x.q.device)
    k, v = (x.k, x.v) if value is None else (t.masked_fill(~seen, value) for t in (x.k, x.v))
    visible = seen.mT.expand(2, 1, 20, 150)
    hidden = torch.zeros(visible.shape, dtype=x.q.dtype, device=DEVICE)
    masks = {
        "rule": {"mask": p.mask},
        "bool": {"mask": visible},
        "bias": {"bias": hidden.masked_fill(~visible, -torch.inf)},
    }
    return fp8.attention(x.q, k, v, scale=0.1, how=how, **masks[handed])


def test_what_it_cannot_compute_is_said_before_any_launch() -> None:
    q = torch.zeros(1, 2, 8, 16, device=DEVICE)
    with pytest.raises(VerifyError, match="triton-fp8: dtype=fp32: takes fp16, bf16"):
        fp8.attention(q, q, q, scale=1.0)
    half = q.half()
    with pytest.raises(VerifyError, match="rows=64, values='rows': rows None, 0 or 128"):
        fp8.attention(half, half, half, scale=1.0, how=Quantisation("e4m3", 64))
    for other in (Quantisation("int8"), Quantisation(block=32, values="head")):
        with pytest.raises(VerifyError, match="takes formats e4m3, e5m2, FP32 scales of rows"):
            fp8.attention(half, half, half, scale=1.0, how=other)
    with pytest.raises(VerifyError, match=r"triton-fp8: k.shape=\[1, 2, 8, 8\]"):
        fp8.attention(half, half[..., :8], half, scale=1.0)


def test_its_stages_are_its_parts() -> None:
    case = Case.parse("b1.h4:2.q70.k150.d64.bf16.causal_lower_right/normal#1")
    x, p = case.inputs(DEVICE), case.problem
    nothing = {"mask": None, "bias": None, "slopes": None, "softcap": 0.0}
    parts = fp8.stages(x.q, x.k, x.v, problem=p, scale=p.softmax_scale, **nothing)
    assert list(parts) == ["quantise", "attention"]
    assert torch.equal(parts["quantise"]().q.view(torch.uint8), made(case)[2].q.view(torch.uint8))
    assert parts["attention"]() is None
