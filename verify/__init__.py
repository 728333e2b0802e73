"""attention-verify: decides whether an attention kernel is right. `from verify import Arithmetic, kernel` is all a kernel needs."""

from verify.arithmetic import Arithmetic
from verify.errors import VerifyError
from verify.registry import kernel
from verify.masks import Mask
from verify.problem import Problem

__all__ = ["Arithmetic", "Mask", "Problem", "VerifyError", "kernel"]
