"""What `verify identify` asks: cases on which arithmetics differ, and the fields asked for there.
A new field is asked for by one more Question.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verify.spec.arithmetic import SPLIT, Quantisation


@dataclass(frozen=True)
class Question:
    """A case on which candidates differ, the tensors compared, the fields asked for and their
    candidates, defaults first.
    """

    case: str
    tensors: tuple[str, ...]
    candidates: dict[str, tuple[Any, ...]]


FORWARD: dict[str, tuple[Any, ...]] = {
    "probs": ("input", "fp32", "fp16", "bf16"),
    "normalized_probs": (False, True),
    "rowsum": ("unrounded", "rounded"),
    "stored_scores": ("fp32", "input"),
    "scaled_query": (False, True),
}
BACKWARD: dict[str, tuple[Any, ...]] = {
    "dscores": ("input", "fp32"),
    "ds_probs": ("fp32", "input"),
    "delta": ("out", "probs", "product"),
    "scaled_dscores": (False, True),
}
TORCH_CPU_ULP = 900.0
"""Units in the last place that torch's exponential of 16 bits on a CPU is off by (pytorch pull
151441)."""
CODED = (
    None,
    Quantisation(),
    Quantisation("e4m3", 0),
    Quantisation("e4m3", 1),
    Quantisation("e4m3", 128, values="head"),
    Quantisation("e4m3", queries="given"),
    Quantisation("e4m3", 1, queries="given"),
    *(
        Quantisation("int8", n, values="given", centred=c)
        for n in (0, 1, 64)
        for c in (True, False)
    ),
    Quantisation("e4m3", block=32, scales="ue8m0", values="blocks"),
    Quantisation("e4m3", block=32, scales="ue8m0_floor", values="blocks"),
    Quantisation("e2m1", block=16, scales="e4m3", values="blocks"),
)
"""What kernels and caches of 8 and 4 bits do most often."""
SUMS = ("fp32", "fp16", "bf16")
FACTORS = ("fp32", "tf32", *SPLIT)
SPILLS = (None, (32, 512), (64, 512), (128, 512), (256, 512))
SPILLED: dict[str, tuple[Any, ...]] = {"spill": SPILLS, "atomic": (False, True)}
TILES = (0, 16, 32, 48, 64, 80, 96, 112, 128, 160, 176, 192, 256)
QUESTIONS = (
    Question("b1.h4.q128.k128.d64.{narrow}.full/normal#12", ("out",), {"quantised": CODED}),
    Question("b1.h8.q128.k16.d128.{narrow}.full/normal#1", ("out",), FORWARD),
    Question(
        "b1.h4.q128.k128.d128.{fine}.full/normal#10",
        ("out",),
        {
            "stored_scores": ("fp32", "input"),
            "scores": SUMS,
            "accumulate": SUMS,
            "promoted": (0, 32, 64),
        },
    ),
    Question(
        "b1.h4.q128.k512.d64.{fine}.full/normal#11",
        ("out",),
        {"promoted": (0, 32, 64, 128, 256)},
    ),
    Question(
        "b1.h8.q128.k16.d128.{narrow}.full/normal#13",
        ("out",),
        {"stored_exponents": (False, True)},
    ),
    Question(
        "b1.h8.q128.k16.d128.{narrow}.full/normal#1",
        ("out",),
        {"rounding": ("nearest", "zero")},
    ),
    Question(
        "b1.h8.q128.k64.d128.{fine}.full/normal#2",
        ("out",),
        {"summation": ("hardware", "nearest", "truncated")},
    ),
    Question(
        "b1.h8.q128.k64.d128.{fine}.full/normal#3",
        ("out",),
        {"exp_ulp": (2.0, 20.0, TORCH_CPU_ULP, 8192.0)},
    ),
    Question(
        "b1.h8.q128.k64.d128.{fine}.full.softcap=1.0/normal#3",
        ("out",),
        {"tanh_ulp": (4.0, 4096.0)},
    ),
    Question("b1.h4.q512.k64.d128.{narrow}.full.grads/normal#6", ("dk", "dv"), SPILLED),
    # fewer rows at a time where there are few, as torch has it on a CPU
    Question("b1.h8.q128.k64.d128.{narrow}.full.grads/normal#7", ("dk", "dv"), SPILLED),
    Question("b1.h8.q256.k64.d128.{narrow}.full.grads/normal#4", ("dq", "dk", "dv"), BACKWARD),
    Question(
        "b1.h8:2.q64.k64.d128.{narrow}.full.grads/normal#5",
        ("dk", "dv"),
        {"group_sum": ("fp32", "input")},
    ),
    Question(
        "b1.h8.q128.k32.d128.fp32.full/normal(3)#7",
        ("out",),
        {"scores": FACTORS, "accumulate": FACTORS},
    ),
    Question(
        "b1.h8.q128.k32.d64.fp32.full/normal(12)#8",
        ("out", "lse"),
        {"exp": ("natural", "binary", "fused")},
    ),
    Question(
        "b1.h4.q64.k512.d128.{narrow}.full/normal#9",
        ("out",),
        {"tile": TILES, "splits": (1, 2, 4, 8, 16)},
    ),
    Question(
        "b1.h4.q64.k512.d128.{narrow}.full/normal#9", ("out",), {"partials": ("fp32", "input")}
    ),
)
COARSE = ("exp_ulp", "tanh_ulp")
"""Errors of functions, of which only the size can be found."""
OBSERVED = ("tile", "splits")
"""What a kernel chooses by shape: shown for the shape that was tried, not declared."""
