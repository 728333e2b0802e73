"""Requirements: what a problem must be for a property to say anything about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verify.spec.masks import FULL, Mask
from verify.spec.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """One value that a property declares, and that whoever draws or replays cases is handed."""

    full_mask: bool = False
    """No mask."""
    hides: bool = False
    """A mask that hides something."""
    no_bias: bool = False
    """Neither a bias nor ALiBi."""
    grads: bool = False
    """Gradients are computed."""
    grouped: bool = False
    """Several query heads use one key head."""
    several: bool = False
    """Several batch entries."""
    arranged: bool = False
    """Some tensor is not contiguous."""
    same_heads: bool = False
    """A mask that is the same for all query heads."""

    @property
    def wanted(self) -> dict[str, Any]:
        """Fields of a plain problem that meets them, as far as they are of one value."""
        fields: dict[str, Any] = {"mask": FULL, "mask_as": "rule"} if self.full_mask else {}
        fields |= {"bias": "none"} if self.no_bias else {}
        fields |= {"batch": 2} if self.several else {}
        fields |= {"heads_q": 2, "heads_kv": 1} if self.grouped else {}
        return fields | ({"grads": True} if self.grads else {})

    def __str__(self) -> str:
        """As it is said of a problem."""
        words = {
            "without a mask": self.full_mask,
            "with a mask that hides something": self.hides,
            "without a bias": self.no_bias,
            "with gradients": self.grads,
            "with grouped heads": self.grouped,
            "of several batch entries": self.several,
            "with a tensor that is not contiguous": self.arranged,
            "with a mask that is the same for all heads": self.same_heads,
        }
        return ", ".join(word for word, needed in words.items() if needed) or "anything"

    def lacks(self, problem: Problem) -> str | None:
        """Why a problem is not drawn for the property; None where it may be."""
        met = (
            (not self.full_mask or problem.mask == FULL)
            and (not self.hides or problem.mask != FULL)
            and (not self.no_bias or problem.bias == "none")
            and (not self.grads or problem.grads)
            and (not self.grouped or problem.group > 1)
            and (not self.several or problem.batch > 1)
            and self.allows(problem.mask)
        )
        return None if met else f"is judged on problems {self}"

    def allows(self, mask: Mask) -> bool:
        """Whether a mask may be drawn, as far as its heads go."""
        return not (self.same_heads and mask.per_head)

    def met_by(self, problem: Problem) -> Problem:
        """The problem, with gradients where they are needed."""
        return problem.but(grads=True) if self.grads else problem

    def refusal(self, problem: Problem) -> str | None:
        """Return why a problem does not meet them, or None where it does."""
        if self.full_mask and problem.mask != FULL:
            return f"holds without a mask only; the case has {problem.mask}"
        if not self.allows(problem.mask):
            return f"holds where all heads have one mask; the case has {problem.mask}"
        return None


NOTHING = Requirements()
