"""Kernel: a function under test and what it declares; the @kernel decorator; loading by name, file
or entry point.

A kernel is ``fn(q, k, v, *, ...) -> out | (out, lse)`` with q [B,H,Q,D], k [B,Hk,K,D], v
[B,Hk,K,Dv], out [B,H,Q,Dv], lse [B,H,Q] float32. It names the keywords that it takes, and what it
does not take it does not support:

    scale: float             softmax scale, always given
    mask: Tensor | None      bool, True = take part, [B|1, H|1, Q|1, K]: problem.mask_shape
    bias: Tensor | None      added to the scaled scores, dtype of q, [B|1, H|1, Q|1, K]
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
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from verify.errors import VerifyError
from verify.spec.arithmetic import FLASH, Arithmetic
from verify.spec.masks import FULL
from verify.spec.problem import DTYPES, Problem
from verify.styles import Lacks, adapted

if TYPE_CHECKING:
    from verify.spec.case import Case  # a decorated file must load without torch

KEYWORDS = ("scale", "mask", "bias", "slopes", "softcap", "dropout", "problem")
BUNDLED = ("naive", "torch_sdpa", "triton.fa2", "triton.fp8")
OPTIONAL = {"fa3": "fa3_wheel", "fa3-fp8": "fa3_wheel", "flex-attention": "flex"}
"""Kernels of other files of kernels/, which are loaded where they are asked for by name."""
USUAL = ("fp32", "fp16", "bf16")
DIFFERENTIABLE = ("q", "k", "v", "bias")
CONVENTIONS = {
    "empty_row": ("zero", "nan", "mean", "nan from a bias", "mean, nan from a bias"),
    "head_map": ("blocks", "cycle"),
    "lse_base": ("e", "2"),
    "own_mask": ("full", "causal_upper_left", "causal_lower_right"),
}
"""Fields of Kernel in which right kernels differ, with their values, ours first."""
Supports = Callable[..., str | None]
Stages = Callable[..., dict[str, Callable[[], Any]]]


@dataclass(frozen=True)
class KnownIssue:
    """A defect of a kernel that is known, and the cases that can show it.

    Such cases are tested all the same: what breaks there is counted as a known issue, and one that
    no longer shows is reported. The names in it are checked when a run begins
    (properties/catalogue.py), since a misspelt one would hide a finding, or make one.
    """

    summary: str
    """One sentence: what goes wrong, with the versions in which it was seen."""
    applies_to: Callable[[Problem, str], bool]
    """Whether a problem can show it on a device ("cpu", "cuda")."""
    inputs: tuple[str, ...] = ()
    """Names of input distributions that show it; any where none is named."""
    properties: tuple[str, ...] = ()
    """Names of properties that show it; any where none is named."""
    layouts: tuple[str, ...] = ()
    """Layouts of some tensor that show it; any where none is named."""
    fatal: bool = False
    """It ends or spoils the process: such a case is not run."""
    shows_in: float = 0.05
    """The least share of such cases that show it: how long one must look before it is missed."""
    tracker: str = ""
    """The address of its report."""

    def __post_init__(self) -> None:
        if not 0 < self.shows_in <= 1:
            raise VerifyError(f"known issue: shows_in={self.shows_in}: above 0 and at most 1")

    def covers(self, case: Case, device: str, prop: str) -> bool:
        """Whether this case of this property can show it."""
        return (
            (not self.properties or prop in self.properties)
            and (not self.inputs or case.recipe.name in self.inputs)
            and (not self.layouts or any(layout in self.layouts for _, layout in case.layouts))
            and self.applies_to(case.problem, device)
        )


class Declared(TypedDict, total=False):
    """What `@kernel(...)` takes besides `name`: the fields of Kernel that its author declares."""

    arithmetic: Arithmetic | Callable[[Problem, str], Arithmetic]
    supports: Supports | None
    dtypes: tuple[str, ...]
    empty_row: str
    head_map: str
    lse_base: str
    own_mask: str
    hidden_nan: bool
    gradients: tuple[str, ...]
    known_issues: tuple[KnownIssue, ...]
    vendor: str
    stages: Stages | None
    tiles: tuple[int, ...]
    layouts: Callable[[str], tuple[str, ...]] | None
    bucket: Callable[[Problem], Problem] | None
    affordable: Callable[[str], int | None]


@dataclass(frozen=True, eq=False)
class Kernel:
    """A registered kernel. Raises VerifyError for a dtype or a convention that does not exist."""

    name: str
    fn: Callable[..., Any]
    takes: frozenset[str]
    """The keywords that it takes."""
    arithmetic: Arithmetic | Callable[[Problem, str], Arithmetic] = FLASH
    """Its numerics, or a function of (problem, device)."""
    supports: Supports | None = None
    """(problem, device) -> None, or one sentence that says why not; one that takes a keyword
    `dropout` is told of dropout, too."""
    dtypes: tuple[str, ...] = USUAL
    empty_row: str = "zero"
    """What a row without a visible key gives: "zero"; "nan", and then its gradients are not judged;
    "mean", that of all V; "nan from a bias" and "mean, nan from a bias", if a bias of -inf hides
    them, else 0 or the mean."""
    head_map: str = "blocks"
    """Which key head the query head h uses: "blocks", h // group; "cycle", h % heads_kv."""
    lse_base: str = "e"
    """Of the logarithm that its LSE is: "e" or "2"."""
    own_mask: str = "full"
    """What it applies whatever it is called with: "full", nothing; "causal_upper_left" or
    "causal_lower_right", and then it is given problems with this mask alone."""
    hidden_nan: bool = False
    """K and V of keys that no query sees may hold NaN, as memory beyond a length does; it is judged
    on that then."""
    gradients: tuple[str, ...] = DIFFERENTIABLE
    """The inputs for which it has gradients, if it has any."""
    known_issues: tuple[KnownIssue, ...] = ()
    vendor: str = ""
    """Whose it is, where it is not the user's nor bundled: what breaks is reported as theirs."""
    stages: Stages | None = None
    """Called like the kernel; gives the parts that `verify bench` times apart."""
    tiles: tuple[int, ...] = ()
    """Sizes of blocks that it works in: lengths around them are tried more often."""
    layouts: Callable[[str], tuple[str, ...]] | None = None
    """(device) -> those of spec/layouts.py that may be tried at all: what it refuses with an
    exception need not be left out, what crashes it must."""
    bucket: Callable[[Problem], Problem] | None = None
    """The problem that is drawn in another's place, of few shapes, if each is compiled apart."""
    affordable: Callable[[str], int | None] = lambda device: None
    """(device) -> where it is slow, as under Triton's interpreter or where it is compiled for each
    shape: so many calls are affordable for each property in a plain run; None elsewhere. On a CPU
    its cases are small, too."""
    origin: str = ""
    """Where it is defined: file:line."""
    lacks: Lacks | None = None
    """Why a call in its style (styles.py) cannot express a problem; None where it can."""
    excused: frozenset[str] = frozenset()
    """States of torch that it is known to change, a finding already: the run goes on without it."""

    def __post_init__(self) -> None:
        if wrong := [d for d in self.dtypes if d not in DTYPES]:
            known = ", ".join(DTYPES)
            raise VerifyError(
                f"kernel {self.name!r}: dtypes={self.dtypes!r}: {wrong[0]!r} is none of {known}"
            )
        if unknown := set(self.gradients) - set(DIFFERENTIABLE):
            raise VerifyError(
                f"kernel {self.name!r}: gradients={self.gradients!r}: {min(unknown)!r} is none of "
                f"{', '.join(DIFFERENTIABLE)}"
            )
        for name, values in CONVENTIONS.items():
            if (value := getattr(self, name)) not in values:
                raise VerifyError(
                    f"kernel {self.name!r}: {name}={value!r}: one of {', '.join(values)}"
                )

    @property
    def bundled(self) -> bool:
        """Whether it is one of ours, whose `supports` is complete, or made without a file."""
        return not self.origin or self.origin.startswith(str(_ours()))

    def numerics(self, problem: Problem, device: str) -> Arithmetic:
        """The arithmetic declared for this problem on this device."""
        return (
            self.arithmetic
            if isinstance(self.arithmetic, Arithmetic)
            else self.arithmetic(problem, device)
        )

    def known_issue(self, case: Case, device: str, prop: str) -> KnownIssue | None:
        """Return the known issue that this case of this property can show, or None; one for which
        the case must not be run before others.
        """
        possible = [issue for issue in self.known_issues if issue.covers(case, device, prop)]
        return min(possible, key=lambda issue: not issue.fatal, default=None)

    def unsupported(self, problem: Problem, device: str, *, dropout: float = 0.0) -> str | None:
        """Why this kernel can't do this problem on this device ("cpu", "cuda"), with this dropout;
        None where it can.
        """
        asked = problem
        if self.own_mask != "full":
            if (str(problem.mask), problem.mask_as) != (self.own_mask, "rule"):
                return f"applies {self.own_mask} by itself, and no other mask"
            asked = problem.but(mask=FULL)
        if reason := self._unexpressed(asked, dropout) or self._nan(problem):
            return reason
        if self.lacks and (reason := self.lacks(asked)):
            return reason
        if self.supports:
            told = "dropout" in inspect.signature(self.supports).parameters if dropout else False
            more = {"dropout": dropout} if told else {}
            if reason := self.supports(problem, device, **more):
                return reason
        found_out = FOUND_OUT.get((self, device)) if FOUND_OUT else None
        return found_out(problem) if found_out else None

    def _unexpressed(self, problem: Problem, dropout: float) -> str | None:
        """Why its dtypes and keywords do not have this problem."""
        if problem.dtype not in self.dtypes:
            return f"takes {', '.join(self.dtypes)}"
        by_rule = "problem" in self.takes and problem.mask_as == "rule"
        masked = problem.mask.names != FULL.names
        for keyword, needed in (
            ("bias", problem.bias in ("bhqk", "hqk", "qk") or problem.mask_is_bias),
            ("slopes", problem.bias == "alibi"),
            ("mask", masked and not (problem.mask_is_bias or by_rule)),
            ("softcap", problem.softcap != 0),
            ("dropout", dropout != 0),
            ("scale", problem.scale is not None),
        ):
            if needed and keyword not in self.takes:
                return f"takes no `{keyword}`"
        return None

    def _nan(self, problem: Problem) -> str | None:
        """Why what it gives for a row that sees no key is not judged."""
        if self.empty_row == "nan" and problem.grads and _has_empty_row(problem):
            return "a row that sees no key is NaN, and so are its gradients"
        by_bias = self.empty_row.endswith("nan from a bias") and problem.mask_is_bias
        if by_bias and _has_empty_row(problem):
            return "a row that a bias leaves no key is NaN"
        return None


def _has_empty_row(problem: Problem) -> bool:
    from verify.spec.case import has_empty_row  # noqa: PLC0415 - a decorated file loads without torch

    return has_empty_row(problem)


FOUND_OUT: dict[tuple[Kernel, str], Callable[[Problem], str | None]] = {}
"""By (kernel, device): what a kernel was found not to take when it was called, and why; as good as
declared."""
REGISTRY: dict[str, Kernel] = {}
UNAVAILABLE: dict[str, str] = {}
_LOADED: dict[Path, list[Kernel]] = {}


def kernel(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    style: str = "",
    **declared: Unpack[Declared],
) -> Any:
    """Register a kernel; usable bare or with arguments. Returns the function unchanged.

    name: default: the function's, with - for _. style: how it is called if not as a kernel is:
    "sdpa", "flash_attn" or "bshd" (styles.py); `supports` speaks of the problems that remain. What
    else may be declared are fields of Kernel: arithmetic, supports, dtypes, empty_row,
    head_map, lse_base, own_mask, hidden_nan, gradients,
    known_issues, vendor, stages, tiles, layouts, bucket, affordable. Raises VerifyError for
    anything else, for an unknown style, for an unknown keyword in the function's signature or one
    that does not fit the style, or for a name already taken.
    """
    if unknown := declared.keys() - Declared.__annotations__.keys():
        takes = ", ".join(("name", "style", *Declared.__annotations__))
        raise VerifyError(f"@kernel({min(unknown)}=...): unknown; it takes {takes}")
    if fn is None:
        return functools.partial(kernel, name=name, style=style, **declared)
    label = name or getattr(fn, "__name__", "kernel").replace("_", "-")
    origin = _origin(fn)
    called, lacks = adapted(fn, style, label) if style else (fn, None)
    keywords = _keywords(called, label)
    registered = Kernel(label, called, keywords, origin=origin, lacks=lacks, **declared)
    other = REGISTRY.get(label)
    if other and other.origin != origin:
        places = f"{other.origin} and {origin}"
        raise VerifyError(f"kernel {label!r} is registered twice: {places}; give one another name=")
    REGISTRY[label] = registered
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
    _import_from(path.resolve().parent)
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


def _import_from(folder: Path) -> None:
    """Let a file import its neighbours, then and when its kernel is called. Ours are imported by
    their package: in their folder, `triton` would be another.
    """
    if folder != _ours() and str(folder) not in sys.path:
        sys.path.append(str(folder))  # last: a file may be named like the package that it adapts


@functools.cache
def _ours() -> Path:
    """The folder of the bundled kernels."""
    return Path(importlib.import_module("verify.kernels").__path__[0]).resolve()


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
