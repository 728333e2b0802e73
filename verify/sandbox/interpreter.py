"""Triton's interpreter, which runs kernels on a CPU, mended: what it computes in BF16, and what
made it slow.

A value of BF16 is its bit pattern in uint16 there, and the interpreter of Triton 3.6 to 3.9
computes with that as an integer. Mended for every kernel, as a GPU computes: operands are widened
to float32, and what is BF16 again is rounded to nearest even. tl.dot and reductions sum in float32.
What moves the bits and does not look at them was right: loads, stores, shapes, the choice of
tl.where.

It replaces the functions of triton.language at every call of a device function, though the launch
did; looks a format up in a table that it makes anew; and computes for every sum of integers whether
it overflows, in order to assert it, which it does only where it debugs. Together that was half of
its time.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

COMPUTE = ("binary_op", "unary_op", "create_fma", "create_clampf")
"""What all operations of its builder on floats come to, each operand of one format."""
REDUCE = {"ReduceOps": ("min_max", "sum"), "ScanOps": ("cumsum", "cumprod")}
"""What is reduced by NumPy; other reductions come to what the builder computes."""
ONE_AND_A_HALF, ITS_SQUARE, NAN = 0x3FC0, 0x4010, 0x7FC0
"""Bit patterns."""


def mend_interpreter() -> None:
    """Mend the interpreter, once, if it was imported, as it is by the first kernel that it will
    run: what is wrong, and what is slow.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is not None:
        _mend(interpreter)


@functools.cache
def _mend(interpreter: ModuleType) -> None:
    """Of each of the two all or, where an interpreter is built otherwise than those that are known,
    nothing.
    """
    for changes in (_mended, _hastened):
        try:
            found = [*changes(interpreter)]
        except (AttributeError, TypeError, ValueError):
            continue
        for owner, name, method in found:
            setattr(owner, name, method)


def _hastened(interpreter: ModuleType) -> Iterator[tuple[Any, str, Any]]:
    """(module or object, name, what is put in its place)"""
    tl, patch, lookup = interpreter.tl, interpreter._patch_lang, interpreter._get_np_dtype
    nothing, pointer = interpreter._LangPatchScope, tl.pointer_type
    formats: dict[str, Any] = {}

    def once(fn: Any) -> Any:
        """Whoever launched has replaced the functions, and will put them back."""
        seen = [x for x in fn.__globals__.values() if x is tl or x is tl.core]
        replaced = seen and not any(tl.core.is_builtin(lang.load) for lang in seen)
        return nothing() if replaced else patch(fn)

    def looked_up(of: Any) -> Any:
        scalar = of.element_ty if isinstance(of, tl.block_type) else of
        if isinstance(scalar, pointer):
            return lookup(of)
        if scalar.name not in formats:
            formats[scalar.name] = lookup(of)
        return formats[scalar.name]

    yield interpreter, "_patch_lang", once
    yield interpreter, "_get_np_dtype", looked_up
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        yield builder, "options", replace(builder.options, sanitize_overflow=False)


def _wrong(interpreter: ModuleType) -> bool:
    """Whether 1.5 * 1.5 is not 2.25, by tl.dot or by `*`."""
    builder, handle, tl = interpreter.interpreter_builder, interpreter.TensorHandle, interpreter.tl
    x = handle(np.full((1, 1), ONE_AND_A_HALF, np.uint16), tl.bfloat16)
    total = handle(np.zeros((1, 1), np.float32), tl.float32)
    by_dot, by_element = builder.create_dot(x, x, total, None, 0), builder.create_fmul(x, x)
    return by_dot.data.item() != 1.5 * 1.5 or by_element.data.item() != ITS_SQUARE


def _mended(interpreter: ModuleType) -> Iterator[tuple[type, str, Callable[..., Any]]]:
    """(class, name, method in its place); nothing where BF16 is right."""
    if not _wrong(interpreter):
        return
    values, builder = _Values(interpreter), interpreter.InterpreterBuilder
    for name in COMPUTE:
        yield builder, name, _computed(getattr(builder, name), values)
    for owner, names in REDUCE.items():
        kind = getattr(interpreter, owner)
        for name in names:
            yield kind, name, _reduced(getattr(kind, name), interpreter)
    yield builder, "create_dot", _widened(builder.create_dot, values)
    yield builder, "cast_impl", _cast(builder.cast_impl, values)
    memory = interpreter._interpreter
    yield builder, "create_atomic_rmw", _added(builder.create_atomic_rmw, values, memory)
    constant = lambda self, value: self.cast_impl(self.get_fp32(value), values.narrow)  # noqa: E731
    yield builder, "get_bf16", constant  # Triton 3.6 has none


class _Values:
    """An interpreter's handles of BF16 as handles of float32, and back."""

    def __init__(self, interpreter: ModuleType) -> None:
        self.handle, self.bit = interpreter.TensorHandle, interpreter.tl.int1
        self.narrow, self.wide = interpreter.tl.bfloat16, interpreter.tl.float32

    def among(self, operands: tuple[Any, ...]) -> bool:
        """Whether one of them is BF16."""
        return any(self._is_narrow(x) for x in operands)

    def widened(self, x: Any) -> Any:
        """In float32, exactly; anything else as it is."""
        if not self._is_narrow(x):
            return x
        return self.handle((x.data.astype(np.uint32) << 16).view(np.float32), self.wide)

    def rounded(self, x: Any) -> Any:
        """The float32 nearest in BF16, of two the even one; truths, of a comparison, as truths."""
        if x.data.dtype != np.float32:
            return self.handle(x.data, self.bit)
        bits = np.asarray(x.data).view(np.uint32)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return self.handle(np.where(np.isnan(x.data), NAN, near).astype(np.uint16), self.narrow)

    def _is_narrow(self, x: Any) -> bool:
        return (
            isinstance(x, self.handle)
            and x.data.dtype == np.uint16
            and x.dtype.scalar == self.narrow
        )


def _widened(method: Callable[..., Any], values: _Values) -> Callable[..., Any]:
    """The method of operands in float32."""

    @functools.wraps(method)
    def mended(self: Any, *operands: Any, **others: Any) -> Any:
        return method(self, *map(values.widened, operands), **others)

    return mended


def _computed(method: Callable[..., Any], values: _Values) -> Callable[..., Any]:
    """The same, and its result rounded."""
    wide = _widened(method, values)

    @functools.wraps(method)
    def mended(self: Any, *operands: Any, **others: Any) -> Any:
        if not values.among(operands):
            return method(self, *operands, **others)
        return values.rounded(wide(self, *operands, **others))

    return mended


def _reduced(method: Callable[..., Any], interpreter: ModuleType) -> Callable[..., Any]:
    """The same of a tensor, whose result is a tensor, or several, of which an index stays one."""
    cast, tl = interpreter.interpreter_semantic.cast, interpreter.tl

    @functools.wraps(method)
    def mended(self: Any, x: Any, *others: Any, **named: Any) -> Any:
        if x.dtype != tl.bfloat16:
            return method(self, x, *others, **named)
        result = method(self, cast(x, tl.float32), *others, **named)
        one = isinstance(result, tl.tensor)
        found = [
            cast(t, tl.bfloat16) if t.dtype == tl.float32 else t
            for t in ([result] if one else result)
        ]
        return found[0] if one else type(result)(found)

    return mended


def _cast(method: Callable[..., Any], values: _Values) -> Callable[..., Any]:
    """The cast from any format to any: to BF16 it truncated float32 and cut integers and float64
    off as bits.
    """

    @functools.wraps(method)
    def mended(self: Any, src: Any, dst_type: Any) -> Any:
        src = values.widened(src)
        if dst_type.scalar != values.narrow:
            return method(self, src, dst_type)
        return values.rounded(values.handle(src.data.astype(np.float32), values.wide))

    return mended


def _added(method: Callable[..., Any], values: _Values, memory: ModuleType) -> Callable[..., Any]:
    """The atomic addition, the only atomic operation on BF16, element by element: some may have one
    address.
    """

    @functools.wraps(method)
    def mended(self: Any, operation: Any, ptr: Any, val: Any, mask: Any, *others: Any) -> Any:
        if not values.among((val,)):
            return method(self, operation, ptr, val, mask, *others)
        before = np.zeros(ptr.data.shape, np.uint16)
        here, nothing = np.ones(1, bool), np.zeros(1, np.uint16)
        for at in zip(*np.nonzero(mask.data), strict=True):
            where = np.array([ptr.data[at]])
            held = memory.load(where, here, nothing, nothing.dtype)
            added = np.array([val.data[at]])
            total = self.create_fadd(*(values.handle(t, values.narrow) for t in (held, added)))
            memory.store(where, total.data, here)
            before[at] = held[0]
        return values.handle(before, values.narrow)

    return mended
