"""Requirements: what a problem must be for a property to say anything about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verify.spec.masks import FULL
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

    @property
    def pinned(self) -> dict[str, Any]:
        """The fields of a problem that must have one value, with it."""
        fields: dict[str, Any] = {"mask": FULL, "mask_as": "rule"} if self.full_mask else {}
        fields |= {"bias": "none"} if self.no_bias else {}
        return fields | ({"grads": True} if self.grads else {})

    def __str__(self) -> str:
        """As it is said of a problem."""
        words = {
            "without a mask": self.full_mask,
            "with a mask that hides something": self.hides,
            "without a bias": self.no_bias,
            "with gradients": self.grads,
        }
        return ", ".join(word for word, needed in words.items() if needed) or "anything"

    def met_by(self, problem: Problem) -> Problem:
        """The problem, with gradients where they are needed."""
        return problem.but(grads=True) if self.grads else problem

    def refusal(self, problem: Problem) -> str | None:
        """Return why a problem does not meet them, or None where it does."""
        if self.full_mask and problem.mask != FULL:
            return f"holds without a mask only; the case has {problem.mask}"
        return None


NOTHING = Requirements()
