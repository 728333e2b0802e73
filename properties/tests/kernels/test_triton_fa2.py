"""The bundled FlashAttention-2 beyond what the matrix draws: strides, many conjuncts, errors, BF16
in the interpreter.
"""

from __future__ import annotations

import collections
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from verify.bounds.constants import UNIT
from verify.errors import VerifyError
from verify.generation.strategies import cases
from verify.properties.tests.support import GRADIENTS
from verify.reference.compare import judge
from verify.reference.reference import truth
from verify.registry import REGISTRY
from verify.sandbox.call import call
from verify.spec.arithmetic import FLASH
from verify.spec.case import Case, Inputs
from verify.spec.masks import Mask

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from verify.kernels.triton import fa2, launch
from verify.kernels.triton import fa2_backward as backward
from verify.kernels.triton.tiles import INTERPRET

pytestmark = pytest.mark.interpreter

DEVICE = "cpu" if INTERPRET else "cuda"


def transposed(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(t: Tensor) -> Tensor:
    """Every second column of a larger tensor, from an odd offset."""
    wide = t.new_zeros((*t.shape[:-1], 2 * t.shape[-1] + 1))
    wide[..., 1::2] = t
    return wide[..., 1::2]


def expanded(t: Tensor) -> Tensor:
    """Stride 0 along the rows."""
    return t[:, :, :1].expand_as(t)


def attend(case: Case, x: Inputs) -> tuple[Tensor, ...]:
    """Out, LSE and the gradients of q, k, v and the bias."""
    leaves = x.map(lambda t: t.detach().requires_grad_())
    mask, scale = case.problem.mask, case.problem.softmax_scale
    out, lse = fa2.attention(leaves.q, leaves.k, leaves.v, bias=leaves.bias, mask=mask, scale=scale)
    wanted = [t for t in (leaves.q, leaves.k, leaves.v, leaves.bias) if t is not None]
    return out, lse, *torch.autograd.grad(out, wanted, x.do)


@pytest.mark.parametrize(
    "bias", ["", ".bias=hqk"]
)  # without one all goes through TMA, else through pointers
@pytest.mark.parametrize("layout", [transposed, sliced, expanded])
@pytest.mark.parametrize("name", ["q", "k", "v", "do", "bias"])
def test_strides_change_no_bit(layout: Callable[[Tensor], Tensor], name: str, bias: str) -> None:
    case = Case.parse(f"b1.h2:1.q20.k140.d16:8.bf16.causal_lower_right{bias}.grads/normal#1")
    x = case.inputs(DEVICE)
    if getattr(x, name) is None:
        pytest.skip("this case has no bias")
    one = replace(x, **{name: layout(getattr(x, name))})
    two = replace(x, **{name: getattr(one, name).contiguous()})
    assert all(torch.equal(a, b) for a, b in zip(attend(case, one), attend(case, two), strict=True))


@pytest.mark.parametrize(
    "mask",
    [
        "causal_lower_right",
        "window(9,4)",
        "blocks(20,3,40)&padding(70,0)",
        "prefix_lm(50)",
        "dense(97,1)",
    ],
)
@pytest.mark.parametrize("by_keys", [False, True])
def test_no_block_is_skipped_that_is_seen(mask: str, *, by_keys: bool) -> None:
    """A walk leaves out only what is hidden, and only what is visible to all its rows passes as
    wholly visible.
    """
    len_q, len_k, tile = 75, 110, (16, 32)
    table = launch.plan(
        Mask.parse(mask), 2, len_q, len_k, tile, torch.device("cpu"), by_keys=by_keys
    )
    for entry, rows in enumerate(table.tolist()):
        for block, (low, full_low, full_high, high) in enumerate(rows):
            assert low <= full_low <= full_high <= high
            for other in range(-(-(len_q if by_keys else len_k) // tile[not by_keys])):
                first, second = (other, block) if by_keys else (block, other)
                seen = [
                    Mask.parse(mask).sees(q, k, len_q, len_k, batch=2, entry=entry)
                    if k < len_k
                    else False
                    for q in range(first * tile[0], min(first * tile[0] + tile[0], len_q))
                    for k in range(second * tile[1], second * tile[1] + tile[1])
                ]
                assert low <= other < high or not any(seen)
                assert not full_low <= other < full_high or all(seen)


def test_a_rule_that_hides_nothing_changes_no_bit() -> None:
    """Where nothing is hidden another kernel is compiled; at head dim 128 from the same sizes of
    tiles.
    """
    rule, none = (
        Case.parse(f"b1.h2:1.q40.k128.d128.fp16.{mask}.grads/normal#2")
        for mask in ("window(-1,-1)", "full")
    )
    x = none.inputs(DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(attend(rule, x), attend(none, x), strict=True))


def test_five_hundred_problems_compile_fewer_than_fifty_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted by what distinguishes compiled kernels, without a launch. Head dims that TMA cannot
    address, no multiple of 8, have kernels of their own.
    """
    kernel, problems, compiled = REGISTRY["triton-fa2"], list[Case](), set[tuple[object, ...]]()

    def launched(self, function, kind, loads, stores, others, flags=0, **constants):
        compiled.add((function, self.kernel(kind)[0], self.q.dtype, self.dim, *constants.items()))
        compiled.update({("dO * out", self.q.dtype)} if kind == "rows" else ())

    monkeypatch.setattr(launch.Launch, "run", launched)
    monkeypatch.setattr(launch, "INTERPRET", False)
    monkeypatch.setattr(launch, "has_tma", lambda device: True)
    monkeypatch.setattr(backward, "_rows", collections.defaultdict(lambda: lambda **_: None))

    @seed(1)
    @settings(
        max_examples=500,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.one_of(cases(kernel, DEVICE), cases(kernel, DEVICE, GRADIENTS)))
    def draw(case: Case) -> None:
        if kernel.unsupported(case.problem, DEVICE) is None:
            problems.append(case)
            call(kernel, case.problem, case.inputs(DEVICE))

    draw()
    assert len(problems) > 400
    assert len(compiled) < 50


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper() -> None:
    """Without a GPU; and none has its products serialised by the assembler, but FP8's where more
    than a rule changes a score.
    """
    said = subprocess.run(
        [sys.executable, "-m", "verify.studies.hopper_compile"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = [line.split("│") for line in said.splitlines() if line.startswith("│")]
    passes = {line[4].strip() for line in lines}
    assert passes == {
        "forward",
        "keys",
        "dk",
        "dv",
        "rows",
        "fp8_forward",
        "fp8_largest",
        "fp8_narrow",
    }
    assert {(line[4].strip(), line[3].strip()) for line in lines if line[8].strip()} <= {
        ("fp8_forward", "general")
    }


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRET, reason="needs a GPU: nothing is compiled for the interpreter")
def test_one_kernel_serves_all_problems_of_a_size() -> None:
    """Masks, options, lengths, dims, strides and pointers compile nothing anew: three kinds of
    three passes, and dO * out.
    """
    functions = (fa2._forward, backward._rows, backward._by_keys, backward._by_rows)

    def compiled() -> int:
        return sum(
            len(cache[0]) for function in functions for cache in function.device_caches.values()
        )

    before = compiled()
    for n, mask in enumerate(
        (
            "full",
            "causal_upper_left",
            "window(3,5)&padding(9,64)",
            "blocks(1,2,30)",
            "prefix_lm(7)",
            "dense(50,1)",
        )
    ):
        for option in ("", ".bias=hqk", ".bias=alibi", ".softcap=20.0", ".scale=-1.0"):
            shape = f"b2.h4:{2 ** (n % 3)}.q{n + 16 * n}.k{64 + n}.d{1 + 13 * (n % 4)}:64"
            case = Case.parse(f"{shape}.fp16.{mask}{option}.grads/normal#{n}")
            call(REGISTRY["triton-fa2"], case.problem, case.inputs(DEVICE))
    assert compiled() - before <= 10


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRET, reason="needs a GPU: the interpreter would copy 4 GiB")
def test_offsets_beyond_int32() -> None:
    """Batch entries more than 2^31 elements apart."""
    far = 2**31 + 64
    memory = torch.zeros(far + 4 * 64 * 64, dtype=torch.float16, device="cuda")
    wide = memory.as_strided((2, 1, 64, 64), (far, 64 * 64, 64, 1))
    wide.copy_(torch.randn(2, 1, 64, 64, device="cuda"))
    results = [fa2.attention(t, t, t, scale=0.125)[0] for t in (wide, wide.contiguous())]
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "mask",
    [
        f"blocks({','.join(['3'] * 40)})",
        "causal_lower_right&window(40,-1)&padding(97,3)&prefix_lm(2)&blocks(10,50)",
        "padding(0,100)&causal_upper_left",
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_conjunctions_of_many_rules(mask: str, dtype: str) -> None:
    case = Case.parse(f"b2.h2:1.q70.k130.d16.{dtype}.{mask}/normal#1")
    kernel, known = REGISTRY["triton-fa2"], truth(case, DEVICE)
    judge(kernel, call(kernel, case.problem, known.inputs), known, names=("out", "lse"))


def tensors(**changes: Tensor) -> dict[str, Tensor]:
    made = {
        "q": torch.zeros(1, 6, 3, 8),
        "k": torch.zeros(1, 2, 5, 8),
        "v": torch.zeros(1, 2, 5, 8),
    } | changes
    return {name: t.to(DEVICE) for name, t in made.items()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"q": torch.zeros(6, 3, 8)}, r"q.shape=\[6, 3, 8\]: 4 dimensions, not 3"),
        (
            {"k": torch.zeros(1, 4, 5, 8), "v": torch.zeros(1, 4, 5, 8)},
            "heads_q=6, heads_kv=4: heads_q must be a multiple",
        ),
        ({"v": torch.zeros(1, 2, 4, 8)}, r"k.shape=\[1, 2, 5, 8\]: \[1, 2, 4, 8\]"),
        (
            {"k": torch.zeros(1, 2, 5, 8, dtype=torch.float16)},
            "k.dtype=torch.float16: torch.float32",
        ),
        (
            {"q": torch.zeros(1, 6, 3, 300), "k": torch.zeros(1, 2, 5, 300)},
            "dim_qk=300, dim_v=8: at most 256",
        ),
        (
            {
                n: torch.zeros(s, dtype=torch.int32)
                for n, s in {"q": (1, 6, 3, 8), "k": (1, 2, 5, 8), "v": (1, 2, 5, 8)}.items()
            },
            "int32",
        ),
        (
            {"mask": torch.zeros(1, 1, 3, 4, dtype=torch.bool)},
            r"mask.shape=\[1, 1, 3, 4\]: \[1, 6, 3, 5\], or 1",
        ),
        ({"mask": torch.zeros(1, 1, 3, 5)}, "mask.dtype=torch.float32: torch.bool"),
        ({"slopes": torch.zeros(2)}, r"slopes.shape=\[2\]: \[6\]"),
    ],
)
def test_bad_tensors_are_refused_before_any_launch(changes: dict[str, Tensor], said: str) -> None:
    t = tensors(**changes)
    with pytest.raises(VerifyError, match=said):
        fa2.attention(t["q"], t["k"], t["v"], mask=t.get("mask"), slopes=t.get("slopes"), scale=1.0)


def test_a_dense_mask_as_a_rule_is_refused() -> None:
    with pytest.raises(VerifyError, match="hand it over as a boolean tensor"):
        fa2.attention(*tensors().values(), scale=1.0, mask=Mask.parse("dense(50,1)"))


def test_the_lse_has_a_gradient() -> None:
    """d lse_i / d bias_ij = p_ij = exp(s_ij - lse_i), here of scores 0; linear in the cotangent
    (powers of two are exact).

    p is off by the exponential and by two roundings of lse log2(e), the constant's and the
    product's.
    """
    q, k = torch.zeros(1, 2, 10, 16, device=DEVICE), torch.ones(1, 1, 32, 16, device=DEVICE)
    bias = torch.zeros(1, 2, 10, 32, requires_grad=True, device=DEVICE)
    _, lse = fa2.attention(q, k, k, bias=bias, scale=1.0)
    weights = (2.0 ** torch.arange(20, device=DEVICE)).view(1, 2, 10)
    (found,) = torch.autograd.grad(lse, bias, weights)
    p, stored = found[0, 0, 0, 0].double(), lse[0, 0, 0].detach().double()
    assert torch.equal(found, p.float() * weights[..., None].expand_as(found))
    off = UNIT["fp32"] * (2 * FLASH.exp_ulp + 2 * stored)
    assert abs(p / torch.exp(-stored) - 1) <= off
