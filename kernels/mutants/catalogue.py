"""Kernels that are known to be wrong, to see that the suite finds them, and correct ones that must
never be accused.

Each is the emulated FlashAttention-2 with one fault (emulated.py). Classes are those of bugs in
public trackers: A empty rows and sentinels, B tails and invalid memory, C mask semantics, D
strides, layouts, heads, E overflow of indices, F races and determinism, G LSE and merging, H
backward alone, I FP8, J scale, softcap, ALiBi, K overflow and rounding, L stale state, M no keys or
queries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from verify.kernels.mutants.backward import BACKWARDS
from verify.kernels.mutants.forward import PROGRAMS
from verify.kernels.mutants.held_out import BLIND
from verify.kernels.mutants.simulator import STATE, Program, Variant, attention
from verify.registry import Kernel
from verify.spec.arithmetic import Arithmetic, Quantisation
from verify.spec.problem import Problem

TAKES = frozenset({"scale", "mask", "bias", "slopes", "softcap", "problem"})
FLASH_TILED = Arithmetic(tile=64)
EIGHT_BITS = Arithmetic(
    tile=64, quantised=Quantisation("e4m3", 0), probs="e4m3", probs_scale=256.0, accumulate="fp32"
)
PLAIN = Variant()
BY_FOUR = Variant(splits=4, keys=16)


@dataclass(frozen=True)
class Mutant:
    """A fault, the class of bugs that it is of, the property that must catch it, and on which
    variant it is.
    """

    fault: str
    kind: str
    law: str
    variant: Variant = PLAIN
    program: Callable[..., Program] = Program


FAULTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("A", "oracle", ("division by an empty sum", "hidden scores are finite", "first tile hidden")),
    ("A", "shift", ("hidden scores are -1e4", "maximum starts at 0")),
    ("A", "uniform", ("LSE of an empty row is 0",)),
    ("A", "empty-row", ("empty rows in the backward",)),
    ("B", "ones", ("keys beyond the end count",)),
    (
        "B",
        "oracle",
        (
            "tail of V not masked",
            "last rows not stored",
            "keys in whole tiles only",
            "values beyond dim_qk not stored",
        ),
    ),
    ("B", "one-hot", ("one key too many",)),
    ("B", "layout", ("head dim not masked",)),
    (
        "C",
        "one-hot",
        ("upper left for lower right", "causal: strictly below", "window one too wide"),
    ),
    ("C", "one-hot", ("window's right edge ignored", "mask of entry 0")),
    ("C", "edges", ("window's first tile skipped",)),
    ("C", "last-rows", ("causal bound without the offset",)),
    ("C", "no-leak", ("diagonal tile of full blocks unmasked",)),
    ("C", "ones", ("hidden after the softmax",)),
    ("C", "oracle", ("bias of head 0",)),
    (
        "D",
        "layout",
        (
            "q: taken for contiguous",
            "k: taken for contiguous",
            "v: taken for contiguous",
            "bias: taken for contiguous",
        ),
    ),
    ("D", "layout", ("k by q's strides", "v by k's strides", "storage offset ignored")),
    ("D", "grouped-heads", ("key head h % heads_kv",)),
    ("E", "oracle", ("offsets in 16 bits", "grid of 8 heads")),
    ("F", "gradients", ("lost update",)),
    ("F", "repeat", ("last bit wavers", "exchanged rows, one call in 20")),
    ("G", "uniform", ("LSE in base 2",)),
    ("G", "shift", ("LSE without the maximum",)),
    ("G", "oracle", ("row sum not rescaled", "sum not rescaled")),
    (
        "H",
        "gradients",
        ("delta forgotten", "delta in the input's dtype", "dq not scaled", "dk scaled twice"),
    ),
    (
        "H",
        "gradients",
        ("dq without the last keys", "dv without the last rows", "softcap's slope forgotten"),
    ),
    ("H", "gradients", ("last head of the group", "dbias of the first entry", "group sum in BF16")),
    ("H", "gradients", ("do: taken for contiguous",)),
    ("H", "lse-gradient", ("LSE's gradient dropped",)),
    ("H", "gradient-subsets", ("dv only with dq",)),
    (
        "J",
        "oracle",
        (
            "scale of the padded head dim",
            "scale without log2(e)",
            "softcap after the bias",
            "bias scaled",
        ),
    ),
    ("J", "query-scaling", ("always the default scale",)),
    ("J", "oracle", ("ALiBi from the upper left", "ALiBi by key head")),
    (
        "K",
        "oracle",
        (
            "S in the input's dtype",
            "Q scaled in the input's dtype",
            "no maximum",
            "one tile's sum in BF16",
        ),
    ),
    (
        "K",
        "oracle",
        (
            "P truncated",
            "exponential off by 1e-3",
            "out rounded towards zero",
            "row sum in 16 bits",
            "out 0.1 % too large",
        ),
    ),
    (
        "L",
        "call-sequence",
        ("result remembered by shape", "scale remembered by shape", "mask remembered by shape"),
    ),
    ("L", "call-sequence", ("one output buffer for all calls",)),
    ("M", "oracle", ("raises without queries", "nothing stored without keys")),
    ("M", "one-hot", ("no mask for a single query",)),
    # the first ten that were written after the suite
    ("C", "one-hot", ("first tile twice",)),
    ("D", "oracle", ("bias transposed",)),
    ("D", "alone", ("batch of K by all query heads",)),
    ("E", "one-hot", ("rows counted in 7 bits",)),
    ("G", "oracle", ("LSE in BF16",)),
    ("H", "gradients", ("dk one key further",)),
    ("J", "oracle", ("slopes in FP16", "scale twice under a softcap")),
    ("K", "oracle", ("V in BF16",)),
    ("K", "nan", ("NaN scores become 0",)),
)
"""Class, the property that must catch them, faults."""
PARTED = {"parts averaged": "oracle", "merged LSE is the larger": "split"}
"""Of parts of the keys, and the property that must catch each."""
EIGHT = {
    "V's scale forgotten": "oracle",
    "K's scale twice": "oracle",
    "P scaled by 1/16": "oracle",
    "P scaled beyond its range": "oracle",
    "e5m2 for e4m3": "oracle",
    "quantised towards zero": "oracle",
    "scale of head 0": "oracle",
    "scales of hidden keys": "no-leak",
}
"""Of FP8, likewise."""
OTHERS = PROGRAMS | BACKWARDS | BLIND
_ALL = (
    *(Mutant(fault, kind, law) for kind, law, faults in FAULTS for fault in faults),
    *(Mutant(fault, "G", law, BY_FOUR) for fault, law in PARTED.items()),
    *(Mutant(fault, "I", law, Variant(fp8=True)) for fault, law in EIGHT.items()),
    *(
        Mutant(fault, kind, law, Variant(fp8=kind == "I"), program)
        for fault, (kind, law, program) in OTHERS.items()
    ),
)
MUTANTS = {mutant.fault: mutant for mutant in _ALL}
CONTROLS: dict[str, tuple[Variant, Arithmetic]] = {
    "tiles of 64 x 64": (PLAIN, FLASH_TILED),
    "tiles of 16 x 16": (Variant(rows=16, keys=16), Arithmetic(tile=16)),
    "tiles of 128 x 32": (Variant(rows=128, keys=32), Arithmetic(tile=32)),
    "tiles of 32 x 256": (Variant(rows=32, keys=256), Arithmetic(tile=256)),
    "exp2": (Variant(binary=True), FLASH_TILED),
    "two parts of the keys": (Variant(splits=2, keys=32), Arithmetic(tile=32, splits=2)),
    "four parts of the keys": (BY_FOUR, Arithmetic(tile=16, splits=4)),
    "P in FP32": (Variant(exact_probs=True), Arithmetic(tile=64, probs="fp32")),
    "tiles from the last to the first": (Variant(reverse=True), FLASH_TILED),
    "reverse, exp2, tiles of 32": (
        Variant(reverse=True, binary=True, keys=32),
        Arithmetic(tile=32),
    ),
    "FP8": (Variant(fp8=True), EIGHT_BITS),
    "FP8, exp2, tiles of 128": (Variant(fp8=True, binary=True, keys=128), EIGHT_BITS),
}


def mutant(fault: str) -> Kernel:
    """The kernel with this fault and nothing to remember."""
    STATE.clear()
    how, repeats = (
        MUTANTS[fault].variant,
        MUTANTS[fault].law == "repeat",
    )  # sums of torch on the CPU may repeat their bits or not
    arithmetic = (
        EIGHT_BITS
        if how.fp8
        else Arithmetic(tile=how.keys, splits=how.splits, deterministic=repeats)
    )
    return _kernel(fault, how, arithmetic, frozenset({fault}), MUTANTS[fault].program)


def honest(fault: str) -> str:
    """The correct variant that this mutant is but for its fault."""
    return next(
        name for name, (variant, _) in CONTROLS.items() if variant == MUTANTS[fault].variant
    )


def control(name: str) -> Kernel:
    """A correct variant."""
    return _kernel(name, *CONTROLS[name], frozenset())


@functools.cache  # what is found out about a kernel is kept by the kernel
def _kernel(
    name: str,
    variant: Variant,
    arithmetic: Arithmetic,
    faults: frozenset[str],
    program: Callable[..., Program] = Program,
) -> Kernel:
    fn = functools.partial(attention, variant=variant, faults=faults, program=program)
    supports = SUPPORTS[variant.fp8]
    return Kernel(
        name.replace(" ", "-"), fn, TAKES, arithmetic, supports, tiles=(variant.rows, variant.keys)
    )


def _supports(problem: Problem, device: str, *, fp8: bool) -> str | None:
    return (
        "runs on the CPU"
        if device != "cpu"
        else "FP8: forward only"
        if fp8 and problem.grads
        else None
    )


SUPPORTS = {fp8: functools.partial(_supports, fp8=fp8) for fp8 in (False, True)}
"""One object for all of each kind, so that what follows from it is found once."""
