"""attention-verify: decides whether an attention kernel is right. `from verify import kernel` is
all that a kernel needs.
"""

from typing import Any

from verify.errors import VerifyError
from verify.registry import KnownIssue, kernel
from verify.spec.arithmetic import Arithmetic, Quantisation
from verify.spec.masks import Mask
from verify.spec.problem import Problem

__all__ = [
    "Arithmetic",
    "KnownIssue",
    "Mask",
    "Problem",
    "Quantisation",
    "VerifyError",
    "kernel",
    "visibility",
]


def __getattr__(name: str) -> Any:
    """`visibility`, which needs torch, where it is asked for."""
    if name == "visibility":
        from verify.spec.case import visibility  # noqa: PLC0415

        return visibility
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
