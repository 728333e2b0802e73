"""Kernel: a function under test and what it declares; the @kernel decorator; loading by name, file
or entry point.

A kernel is ``fn(q, k, v, *, ...) -> out | (out, lse)`` with q [B,H,Q,D], k [B,Hk,K,D], v
[B,Hk,K,Dv], out [B,H,Q,Dv], lse [B,H,Q] float32. It names the keywords that it takes, and what it
does not take it does not support:

    scale: float             softmax scale, always given
    mask: Tensor | None      bool, True = take part, [B|1, 1, Q, K]
    bias: Tensor | None      added to the scaled scores, dtype of q, [B|1, H|1, Q, K]
    slopes: Tensor | None    ALiBi, float32 [H]: bias_ij = -slope |i + len_k - len_q - j|
    softcap: float           0 = none
    dropout: float           probability that a weight is dropped, 0 = none; those kept are divided
                             by 1 - dropout. Drawn anew in every call from torch's generator
                             (torch.manual_seed), once for forward and backward
    problem: Problem         all of it; serves for `mask` where the kernel applies the rules of
                             problem.mask itself
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verify.errors import VerifyError
from verify.spec.arithmetic import FLASH, Arithmetic
from verify.spec.problem import DTYPES, Problem

if TYPE_CHECKING:
    from verify.spec.case import Case  # a decorated file must load without torch

KEYWORDS = ("scale", "mask", "bias", "slopes", "softcap", "dropout", "problem")
BUNDLED = ("naive", "torch_sdpa", "triton.fa2", "triton.fp8")
OPTIONAL = {"fa3": "fa3_wheel", "fa3-fp8": "fa3_wheel", "flex-attention": "flex"}
"""Kernels of other files of kernels/, which are loaded where they are asked for by name."""
USUAL = ("fp32", "fp16", "bf16")
Supports = Callable[..., str | None]
Stages = Callable[..., dict[str, Callable[[], Any]]]


@dataclass(frozen=True)
class Known:
    """A known defect of a kernel: what it is, with its source, which problems can show it, on which
    families of inputs, by which properties and in which layouts of some tensor (any, if none is
    named). They are judged all the same; what they break there is counted as known, and a defect
    that no longer shows is reported.
    """

    what: str
    where: Callable[[Problem, str], bool]
    recipes: tuple[str, ...] = ()
    laws: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    crashes: bool = False
    """It takes the process along: such a case is not run."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """A registered kernel. `origin` is file:line; `declared(problem, device)` returns None, or why
    it is not supported; where it takes a keyword `dropout`, it is told of dropout, too."""

    name: str
    fn: Callable[..., Any]
    takes: frozenset[str]
    arithmetic: Arithmetic | Callable[[Problem, str], Arithmetic] = FLASH
    declared: Supports | None = None
    dtypes: tuple[str, ...] = USUAL
    empty_row: str = "zero"
    known: tuple[Known, ...] = ()
    origin: str = ""
    stages: Stages | None = None
    tiles: tuple[int, ...] = ()
    layouts: Callable[[str], tuple[str, ...]] | None = None
    bucket: Callable[[Problem], Problem] | None = None

    def numerics(self, problem: Problem, device: str) -> Arithmetic:
        """The arithmetic declared for this problem on this device."""
        return (
            self.arithmetic
            if isinstance(self.arithmetic, Arithmetic)
            else self.arithmetic(problem, device)
        )

    def defect(self, case: Case, device: str, law: str) -> Known | None:
        """What is known to be wrong with this kernel on such a case of this property."""
        possible = (
            k
            for k in self.known
            if law in (k.laws or (law,)) and case.recipe.name in (k.recipes or (case.recipe.name,))
        )
        ways = {way for _, way in case.layouts}
        return next(
            (
                k
                for k in possible
                if (not k.layouts or ways & {*k.layouts}) and k.where(case.problem, device)
            ),
            None,
        )

    def known_defect(self, case: Case, device: str, law: str) -> str:
        """The same in words; empty where nothing is."""
        return found.what if (found := self.defect(case, device, law)) else ""

    def unsupported(self, problem: Problem, device: str, *, dropout: float = 0.0) -> str | None:
        """Why this kernel can't do this problem on this device ("cpu", "cuda"), with this dropout;
        None where it can.
        """
        by_rule = "problem" in self.takes and problem.mask_as == "rule"
        needs = [
            ("bias", problem.bias in ("bhqk", "hqk", "qk") or problem.mask_as == "float"),
            ("slopes", problem.bias == "alibi"),
            ("mask", problem.mask.names != {"full"} and problem.mask_as != "float" and not by_rule),
            ("softcap", problem.softcap != 0),
            ("dropout", dropout != 0),
            ("scale", problem.scale is not None),
        ]
        if problem.dtype not in self.dtypes:
            return f"takes {', '.join(self.dtypes)}"
        for keyword, needed in needs:
            if needed and keyword not in self.takes:
                return f"takes no `{keyword}`"
        if self.declared is None:
            return None
        told = (
            {"dropout": dropout}
            if dropout and "dropout" in inspect.signature(self.declared).parameters
            else {}
        )
        return self.declared(problem, device, **told)


REGISTRY: dict[str, Kernel] = {}
UNAVAILABLE: dict[str, str] = {}
_LOADED: dict[Path, list[Kernel]] = {}


def kernel(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    arithmetic: Arithmetic | Callable[[Problem, str], Arithmetic] = FLASH,
    supports: Supports | None = None,
    dtypes: tuple[str, ...] = USUAL,
    empty_row: str = "zero",
    known: tuple[Known, ...] = (),
    stages: Stages | None = None,
    tiles: tuple[int, ...] = (),
    layouts: Callable[[str], tuple[str, ...]] | None = None,
    bucket: Callable[[Problem], Problem] | None = None,
) -> Any:
    """Register a kernel; usable bare or with arguments. Returns the function unchanged.
    `arithmetic` is a value or a function of (problem, device). `supports(problem, device)` returns
    None or one sentence that says why not; one that takes a keyword `dropout` is also asked with
    dropout in force. `empty_row` is what a row without a visible key gives: "zero" or "nan".
    `known` lists known defects: a run stays green with them in sight. `stages`, called like the
    kernel, gives the parts that `verify bench` times apart. `tiles`: sizes of blocks that the
    kernel works in; lengths around them are tried more often. `layouts(device)`: those of
    verify/spec/layouts.py that may be tried at all (what it refuses with an exception need not be
    left out, what crashes it must). `bucket(problem)`: the one that is drawn in its place, of few
    shapes, if each is compiled apart. Raises VerifyError for an unknown keyword in the signature or
    a name already taken.
    """
    if fn is None:
        half: Any = functools.partial(
            kernel, name=name, arithmetic=arithmetic, supports=supports, dtypes=dtypes, known=known
        )
        return functools.partial(
            half, empty_row=empty_row, stages=stages, tiles=tiles, layouts=layouts, bucket=bucket
        )
    label = name or getattr(fn, "__name__", "kernel").replace("_", "-")
    takes = _keywords(fn, label)
    if wrong := [d for d in dtypes if d not in DTYPES]:
        raise VerifyError(
            f"kernel {label!r}: dtypes={dtypes!r}: {wrong[0]!r} is none of {', '.join(DTYPES)}"
        )
    if empty_row not in ("zero", "nan"):
        raise VerifyError(f"kernel {label!r}: empty_row={empty_row!r}: zero or nan")
    origin = _origin(fn)
    other = REGISTRY.get(label)
    if other and other.origin != origin:
        raise VerifyError(
            f"kernel {label!r} is registered twice: {other.origin} and {origin}; give one another "
            "name="
        )
    REGISTRY[label] = Kernel(
        label,
        fn,
        takes,
        arithmetic,
        supports,
        tuple(dtypes),
        empty_row,
        known,
        origin,
        stages,
        tiles,
        layouts,
        bucket,
    )
    return fn


def _keywords(fn: Callable[..., Any], label: str) -> frozenset[str]:
    parameters = list(inspect.signature(fn).parameters.values())[3:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return frozenset(KEYWORDS)
    free = {p.name for p in parameters if p.default is p.empty} | (
        {p.name for p in parameters} & set(KEYWORDS)
    )
    if unknown := free - set(KEYWORDS):
        raise VerifyError(
            f"kernel {label!r}: keyword {sorted(unknown)[0]!r} is unknown: one of "
            f"{', '.join(KEYWORDS)}"
        )
    return frozenset(free)


def _origin(fn: Callable[..., Any]) -> str:
    inner = inspect.unwrap(getattr(fn, "func", fn))
    code = getattr(inner, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(fn)


def load_bundled(*also: str) -> None:
    """Register the bundled kernels, those of `also` (other files of kernels/) and those of
    installed packages (entry points in the group `attention_verify.kernels`). One that cannot be
    imported is listed in UNAVAILABLE with the reason.
    """
    for stem in (*BUNDLED, *also):
        _attempt(
            stem.replace(".", "-").replace("_", "-"),
            functools.partial(importlib.import_module, f"verify.kernels.{stem}"),
        )
    for entry in importlib.metadata.entry_points(group="attention_verify.kernels"):
        _attempt(entry.name, entry.load)


def _attempt(name: str, load: Callable[[], Any]) -> None:
    try:
        load()
    except (
        Exception
    ) as error:  # whatever a third party's import raises becomes the reason that is shown
        UNAVAILABLE[name] = (
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        )


def load_file(path: Path) -> list[Kernel]:
    """Run a Python file, return the kernels it registered. Raises VerifyError where it is missing,
    raises, or registers none.
    """
    if not path.is_file():
        raise VerifyError(
            f"{path}: no such file; name a kernel ({', '.join(REGISTRY)}) or a Python file that "
            "registers one"
        )
    if path.resolve() in _LOADED:
        return _LOADED[path.resolve()]
    before = dict(REGISTRY)
    spec = importlib.util.spec_from_file_location(f"verify_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise VerifyError(
            f"{path}: not a Python file; name one that registers a kernel with @verify.kernel"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except VerifyError:
        raise
    except (Exception, SystemExit) as error:
        frames = reversed(traceback.extract_tb(error.__traceback__))
        line = next(
            (frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()),
            None,
        )
        where = f"{path}:{line}" if line else str(path)
        raise VerifyError(
            f"{where}: raised {type(error).__name__} on import: {error}; it must import cleanly"
        ) from error
    new = [k for name, k in REGISTRY.items() if before.get(name) is not k]
    if not new:
        raise VerifyError(f"{path}: registers no kernel; decorate a function with @verify.kernel")
    _LOADED[path.resolve()] = new
    return new


def named(target: str, kernels: Sequence[Kernel]) -> dict[str, Kernel]:
    """The kernels of a target, each by a target that finds it alone."""
    file = f"{target.partition('::')[0]}::" if ".py" in target else ""
    return {file + k.name: k for k in kernels}


def find(target: str) -> list[Kernel]:
    """The kernels that a target names: `name`, `path/to/file.py` or `path/to/file.py::name`. Raises
    VerifyError for an unknown name, with the known ones, or for a bundled kernel that is
    unavailable, with the reason.
    """
    also = [OPTIONAL[target]] if target in OPTIONAL else []
    load_bundled(*also)
    path, _, name = target.partition("::")
    if path.endswith(".py") or "/" in path:
        kernels = load_file(Path(path))
        if not name:
            return kernels
    else:
        kernels, name = list(REGISTRY.values()), target
    if found := [k for k in kernels if k.name == name]:
        return found
    for label in (name, *(stem.replace("_", "-") for stem in also)):
        if label in UNAVAILABLE:
            raise VerifyError(f"kernel {name!r} is unavailable here: {UNAVAILABLE[label]}")
    raise VerifyError(
        f"kernel {name!r} is unknown: one of {', '.join(k.name for k in kernels)}, or a path to a "
        ".py file"
    )
