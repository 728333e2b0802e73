"""attention-verify: decides whether an attention kernel is right. `from verify import kernel` is
all that a kernel needs.
"""

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
]
