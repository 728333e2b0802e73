"""How a kernel is called: what it returns is checked, what it does to its inputs is noticed, its
errors become findings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from verify.errors import VerifyError
from verify.registry import REGISTRY, Kernel, find, kernel
from verify.sandbox.call import call
from verify.spec.case import Case
from verify.spec.finding import Finding
from verify.spec.problem import Problem

CASE = Case.parse("b1.h2:1.q3.k5.d4:6.fp32.causal_lower_right.bias=hqk.grads/normal#0")


def run(fn: Callable[..., object], *takes: str) -> object:
    return call(Kernel("k", fn, frozenset(takes)), CASE.problem, CASE.inputs())


def raises_on_zero_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    raise IndexError("list index out of range")


def writes_into_v(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        v.add_(1)
    return q.new_zeros(CASE.problem.shapes["out"])


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (
            raises_on_zero_keys,
            r"raised IndexError: list index out of range \(.*test_call.py:\d+\)",
        ),
        (lambda q, k, v: None, "out is a NoneType"),
        (lambda q, k, v: q, r"out has shape \[1, 2, 3, 4\], not \[1, 2, 3, 6\]"),
        (
            lambda q, k, v: torch.zeros(1, 2, 3, 6, dtype=torch.float64),
            "out is torch.float64, its inputs torch.float32",
        ),
        (
            lambda q, k, v: (torch.zeros(1, 2, 3, 6), torch.zeros(1, 3, 2)),
            r"lse has shape \[1, 3, 2\], not \[1, 2, 3\]",
        ),
        (writes_into_v, "changed its input v"),
    ],
)
def test_a_wrong_form_is_a_finding(fn: Callable[..., object], said: str) -> None:
    with pytest.raises(Finding, match=said):
        run(fn)


class Logged(torch.autograd.Function):
    """Says in `log` when it is called."""

    log: ClassVar[list[str]] = []

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor) -> torch.Tensor:
        """Zeros."""
        Logged.log.append("forward")
        return q.new_zeros(CASE.problem.shapes["out"])

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor) -> torch.Tensor:
        """Zeros."""
        Logged.log.append("backward")
        return do.new_zeros(CASE.problem.shapes["q"])


def test_calls_can_be_made_between_a_forward_and_its_backward() -> None:
    """As layers of a model make them; what is raised there is not taken for the kernel's."""
    Logged.log.clear()
    logged = Kernel("logged", lambda q, k, v: Logged.apply(q), frozenset())
    call(
        logged,
        CASE.problem,
        CASE.inputs(),
        between=lambda: call(logged, CASE.problem, CASE.inputs()),
    )
    assert Logged.log == ["forward", "forward", "backward", "backward"]
    with pytest.raises(ZeroDivisionError):
        call(logged, CASE.problem, CASE.inputs(), between=lambda: 1 // 0)


def test_a_kernel_gets_the_keywords_that_it_takes() -> None:
    got: dict[str, object] = {}

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: object) -> torch.Tensor:
        got.update(keywords)
        return q.new_zeros(CASE.problem.shapes["out"])

    run(spy, "scale", "mask", "bias", "problem")
    assert set(got) == {"scale", "mask", "bias", "problem"}
    mask = got["mask"]
    assert isinstance(mask, torch.Tensor)
    assert mask[0, 0].tolist() == [[q + 2 >= k for k in range(5)] for q in range(3)]


def test_a_mask_handed_as_float_hides_with_minus_infinity() -> None:
    got: list[torch.Tensor] = []

    def spy(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, bias: torch.Tensor
    ) -> torch.Tensor:
        got.append(bias)
        return q.new_zeros(CASE.problem.shapes["out"])

    problem = CASE.problem.but(mask_as="float")
    call(Kernel("k", spy, frozenset({"bias"})), problem, CASE.inputs())
    assert torch.equal(got[0][0, 0] == -torch.inf, torch.ones(3, 5, dtype=torch.bool).triu(3))


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem(mask=CASE.problem.mask), "takes no `mask`"),
        (Problem(bias="hqk"), "takes no `bias`"),
        (Problem(bias="alibi"), "takes no `slopes`"),
        (Problem(softcap=2.0), "takes no `softcap`"),
        (Problem(scale=2.0), "takes no `scale`"),
    ],
)
def test_what_a_kernel_does_not_take_it_does_not_support(problem: Problem, reason: str) -> None:
    assert Kernel("k", lambda q, k, v: q, frozenset()).unsupported(problem, "cpu") == reason


def test_registering_twice_or_with_an_unknown_keyword_is_an_error() -> None:
    with pytest.raises(VerifyError, match="keyword 'causal' is unknown: one of"):
        kernel(name="odd")(lambda q, k, v, *, causal: q)
    try:
        kernel(name="twice")(lambda q, k, v: q)
        with pytest.raises(VerifyError, match="registered twice"):
            kernel(name="twice")(lambda q, k, v: k)
    finally:
        del REGISTRY["twice"]


def test_an_unknown_kernel_is_named_with_the_known_ones() -> None:
    with pytest.raises(VerifyError, match=r"kernel 'flash' is unknown: one of .*sdpa-flash"):
        find("flash")


def test_what_torch_maps_over_is_left_alone() -> None:
    """torch.vmap hands allocation functions tensors that have no memory of their own."""

    def maps(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = torch.vmap(lambda row: torch.zeros_like(row) + torch.empty_like(row).fill_(0.0))(q)
        return rows.new_zeros(CASE.problem.shapes["out"]) + rows.sum()

    assert not call(Kernel("k", maps, frozenset()), CASE.problem, CASE.inputs()).out.any()


@pytest.mark.parametrize("at", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int32, torch.bool])
def test_a_write_beside_an_allocation_is_seen(at: str, dtype: torch.dtype) -> None:
    def wild(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        counters = torch.zeros(7, dtype=dtype)
        beside = counters.storage_offset() + (7 if at == "after" else -1)
        counters.new_empty(0).set_(counters.untyped_storage(), beside, (1,), (1,)).zero_()
        return q.new_zeros(CASE.problem.shapes["out"])

    where = "element 0 after the end" if at == "after" else "element -1 before the beginning"
    with pytest.raises(Finding, match=f"wrote outside what it allocated: {where} of {dtype} "):
        run(wild)


def test_settings_are_put_back_where_a_kernel_raises() -> None:
    def fails(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        torch.set_default_dtype(torch.float64)
        raise ValueError("no")

    with pytest.raises(Finding, match="raised ValueError: no"):
        run(fails)
    assert torch.get_default_dtype() == torch.float32


def test_a_mask_is_an_input_that_must_not_be_changed() -> None:
    def careless(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None) -> Tensor:
        if mask is not None:
            mask |= True
        return torch.zeros(*q.shape[:3], v.shape[3])

    case = Case.parse("b1.h1.q2.k3.d1.fp32.causal_upper_left/integers#0")
    kernel = Kernel("careless", careless, frozenset({"mask"}))
    with pytest.raises(Finding, match="changed its input mask"):
        call(kernel, case.problem, case.inputs("cpu"))


def test_gradients_that_a_kernel_stores_itself_are_seen() -> None:
    """In the leaves' `.grad`, beside what autograd gives."""

    class Stores(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, v: Tensor) -> Tensor:
            ctx.q = q
            return torch.zeros(*q.shape[:3], v.shape[3])

        @staticmethod
        def backward(ctx: Any, do: Tensor) -> Any:
            ctx.q.grad = torch.ones_like(ctx.q)
            return None, None

    def stores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Stores.apply(q, v)

    case = Case.parse("b1.h1.q2.k3.d1.fp32.full.grads/integers#0")
    output = call(Kernel("stores", stores, frozenset()), case.problem, case.inputs("cpu"))
    assert output.dq is not None
    assert output.dq.tolist() == torch.ones(1, 1, 2, 1).tolist()


def test_a_kernel_may_have_no_gradient_of_its_bias() -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None) -> Tensor:
        s = q @ k.mT
        return torch.softmax(s if bias is None else s + bias, -1) @ v

    case = Case.parse("b1.h1.q2.k3.d1.fp32.full.bias=qk.grads/integers#0")
    kernel = Kernel("plain", plain, frozenset({"bias"}), gradients=("q", "k", "v"))
    output = call(kernel, case.problem, case.inputs("cpu"))
    assert output.dbias is None
    assert output.dq is not None
    with pytest.raises(VerifyError, match="'mask' is none of q, k, v, bias"):
        Kernel("wrong", plain, frozenset({"bias"}), gradients=("q", "mask"))
