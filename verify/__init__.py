"""attention-verify: decides whether an attention kernel is right. `from verify import kernel` is all that a kernel needs."""

from verify.arithmetic import Arithmetic, Quantisation
from verify.errors import VerifyError
from verify.masks import Mask
from verify.problem import Problem
from verify.registry import kernel

__all__ = ["Arithmetic", "Mask", "Problem", "Quantisation", "VerifyError", "kernel"]
