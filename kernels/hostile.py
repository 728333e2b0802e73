"""Kernels that a harness must see and survive: each computes attention and does one thing that no
kernel should.

Registered under their own names by this file alone: ``verify fuzz kernels/hostile.py::segfault``.
What each must be found to do stands in properties/tests/sandbox/test_hostile.py. They do it from
MANY queries on, so that there is something to shrink.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from verify.kernels.naive import naive
from verify.registry import kernel
from verify.spec.arithmetic import Arithmetic
from verify.spec.problem import Problem

MANY = 9
HELD: list[Tensor] = []
LAST: dict[Any, Any] = {}
CALLS = [0]


def _plain(problem: Problem, device: str) -> str | None:
    return (
        "without options only"
        if problem.bias != "none" or problem.softcap or problem.grads
        else None
    )


def _cuda(problem: Problem, device: str) -> str | None:
    return "needs a GPU" if device != "cuda" else _plain(problem, device)


def hostile(
    then: Callable[..., Any], *, supports: Callable[[Problem, str], str | None] = _plain
) -> Callable[..., Any]:
    """Register attention that calls then(q, k, v, out), out [B,H,Q,Dv], and returns what that
    returns, or out.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
        out, _ = naive(
            q, k, v, scale=scale, mask=mask, bias=None, slopes=None, softcap=0.0, dropout=0.0
        )
        other = then(q, k, v, out) if q.shape[2] >= MANY else None
        return out if other is None else other

    declared = Arithmetic(normalized_probs=True, stored_scores="input")
    kernel(name=then.__name__.replace("_", "-"), supports=supports, arithmetic=declared)(attend)
    return then


@hostile
def honest(q, k, v, out):
    """Nothing: the neighbour whose verdict must not change."""


@hostile
def segfault(q, k, v, out):
    ctypes.string_at(8)


@hostile
def abort(q, k, v, out):
    os.abort()


@hostile
def sys_exit(q, k, v, out):
    sys.exit(0)


@hostile
def os_exit(q, k, v, out):
    os._exit(0)


@hostile
def interrupt(q, k, v, out):
    raise KeyboardInterrupt


@hostile
def endless_loop(q, k, v, out):
    ctypes.PyDLL(None).pause()  # PyDLL: with the interpreter's lock in its hand


@hostile
def deadlock(q, k, v, out):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


@hostile
def host_memory(q, k, v, out):
    while True:
        HELD.append(torch.ones(2**25))


@hostile
def impossible_memory(q, k, v, out):
    torch.ones(2**50, device=q.device)


@hostile
def odd_lengths(q, k, v, out):
    q.view(q.shape[0], q.shape[1], -1, 2 * q.shape[3])  # raises, but not of its own accord


@hostile
def wrong_shape(q, k, v, out):
    return out.transpose(1, 2)


@hostile
def wrong_dtype(q, k, v, out):
    return out.double()


@hostile
def wrong_device(q, k, v, out):
    return out.to("cpu" if out.is_cuda else "meta")


@hostile
def not_contiguous(q, k, v, out):
    """No offence: torch's own kernels do it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@hostile
def repeated_memory(q, k, v, out):
    return out[:, :, :1].expand_as(out)


@hostile
def returns_input(q, k, v, out):
    return q.copy_(out) if q.shape == out.shape else None


def _beside(out: Tensor, at: int, count: int) -> Tensor:
    """A copy of out in memory allocated for it, and `count` elements written from element `at`
    on.
    """
    mine = torch.empty(out.shape, dtype=out.dtype, device=out.device).copy_(out)
    wild = mine.new_empty(0).set_(
        mine.untyped_storage(), mine.storage_offset() + at, (count,), (1,)
    )
    wild.copy_(torch.nan * torch.ones(count))
    return mine


@hostile
def one_row_too_far(q, k, v, out):
    return _beside(out, out.numel(), out.shape[3]) if out.numel() else None


@hostile
def index_minus_one(q, k, v, out):
    return _beside(out, -1, 1) if out.numel() else None


@hostile
def reads_past_the_end(q, k, v, out):
    if v.numel():
        out += 0 * v.new_empty(0).set_(
            v.untyped_storage(), v.untyped_storage().nbytes() // v.element_size() - 1, (1,), (1,)
        )


@hostile
def last_tile_unwritten(q, k, v, out):
    mine = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    mine[:, :, : q.shape[2] // 8 * 8] = out[:, :, : q.shape[2] // 8 * 8]
    return mine


@hostile
def scales_q_in_place(q, k, v, out):
    q.mul_(0.5)


@hostile
def writes_beside_k(q, k, v, out):
    torch.empty(0, dtype=k.dtype, device=k.device).set_(k.untyped_storage())[-1] = 1.0


@hostile
def cached_by_shape(q, k, v, out):
    return LAST.setdefault((q.shape, k.shape, v.shape, q.dtype), out.clone()).clone()


@hostile
def of_the_call_before(q, k, v, out):
    before, LAST["out"] = LAST.get("out"), out.clone()
    return (
        before
        if before is not None and before.shape == out.shape and before.dtype == out.dtype
        else None
    )


@hostile
def same_buffer(q, k, v, out):
    return LAST.setdefault((out.shape, out.dtype), torch.empty_like(out)).copy_(out)


@hostile
def one_call_in_fifty(q, k, v, out):
    CALLS[0] += 1
    return out + 1 if CALLS[0] % 50 == 0 else None


@hostile
def leaks(q, k, v, out):
    HELD.append(out.clone())


@hostile
def prints(q, k, v, out):
    print("attention " * 300_000)  # noqa: T201


@hostile
def sets_precision(q, k, v, out):
    torch.set_float32_matmul_precision("medium")


@hostile
def sets_dtype(q, k, v, out):
    torch.set_default_dtype(torch.bfloat16)


@hostile
def seeds(q, k, v, out):
    torch.manual_seed(0)


def _on_gpu(then: Callable[..., Any]) -> Callable[..., Any]:
    return hostile(then, supports=_cuda)


@_on_gpu
def device_memory(q, k, v, out):
    while True:
        HELD.append(torch.empty(2**30, device=q.device))


@_on_gpu
def device_assert(q, k, v, out):
    out.flatten()[torch.tensor([out.numel()], device=q.device)]


def _launch(what: str) -> Callable[..., Any]:
    def then(q, k, v, out):
        from verify.kernels.hostile_triton import KERNELS  # noqa: PLC0415 - compiled where there is a GPU

        mine = torch.empty(out.shape, dtype=out.dtype, device=out.device).copy_(out)
        KERNELS[what][(1,)](mine)
        return mine

    then.__name__ = what
    return _on_gpu(then)


for _what in ("endless_on_gpu", "illegal_address", "misaligned_address", "store_too_far"):
    _launch(_what)
