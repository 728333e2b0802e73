"""Arithmetic: the numerics that a kernel declares. Its error bound and its expected error follow from it (verify/bounds.py)."""

from __future__ import annotations

from dataclasses import dataclass

from verify.errors import VerifyError

FORMATS = ("input", "fp64", "fp32", "tf32", "fp16", "bf16")
"""Names of formats; `input` is the dtype of the problem."""


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Where a kernel rounds, and to which format. The defaults are FlashAttention-2's (arXiv 2307.08691, Algorithms 1 and 2).

    FP64 problems are computed in FP64 throughout, whatever is declared as FP32.
    """

    scores: str = "fp32"
    """Products and accumulation of Q K^T and dO V^T."""
    stored_scores: str = "fp32"
    """S (and dP) after each step: product, scale, softcap, bias; `input` for a kernel that writes each to memory in its dtype."""
    probs: str = "input"
    """P as the operand of P V and P^T dO."""
    normalized_probs: bool = False
    """True: P is divided by its row sum before it is rounded (a softmax function); False: after P V (FlashAttention)."""
    rowsum: str = "unrounded"
    """Which P the row sum adds up: `unrounded` or `rounded`."""
    accumulate: str = "fp32"
    """Products and accumulation of P V and of the gradients."""
    output: str = "input"
    """out, dq, dk, dv as they are stored."""
    dscores: str = "input"
    """dS as the operand of dS K and dS^T Q."""
    ds_probs: str = "fp32"
    """P as the factor of dS = P * (dP - delta); `input` for a kernel that reuses the P it rounded for P^T dO."""
    delta: str = "out"
    """How rowsum is formed in the backward: `out` = rowsum(dO * stored out), `probs` = rowsum(P * dP)."""
    group_sum: str = "fp32"
    """dk, dv of a group of query heads as they are added up (GQA)."""
    spill: tuple[int, int] | None = None
    """(query rows, keys) after which the running sums dk, dv and dq are stored in the output format and read back; or None."""

    def __post_init__(self) -> None:
        for name in ("scores", "stored_scores", "probs", "accumulate", "output", "dscores", "ds_probs", "group_sum"):
            if getattr(self, name) not in FORMATS:
                raise VerifyError(f"{name}={getattr(self, name)!r}: one of {', '.join(FORMATS)}")
        if self.rowsum not in ("unrounded", "rounded"):
            raise VerifyError(f"rowsum={self.rowsum!r}: unrounded or rounded")
        if self.delta not in ("out", "probs"):
            raise VerifyError(f"delta={self.delta!r}: out or probs")

        if self.spill is not None and min(self.spill) < 1:
            raise VerifyError(f"spill={self.spill!r}: (query rows, keys), each at least 1, or None")

    def format(self, field: str, dtype: str) -> str:
        """The format in force for this field in a problem of this dtype."""
        declared = getattr(self, field)
        if dtype == "fp64":
            return "fp64"
        return dtype if declared == "input" else declared


FLASH = Arithmetic()
