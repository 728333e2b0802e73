"""Requirements: what a problem must be for a property to say anything about it."""

from __future__ import annotations

from dataclasses import dataclass

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

    def met_by(self, problem: Problem) -> Problem:
        """The problem, with gradients where they are needed."""
        return problem.but(grads=True) if self.grads else problem

    def refusal(self, problem: Problem) -> str | None:
        """Return why a problem does not meet them, or None where it does."""
        if self.full_mask and problem.mask != FULL:
            return f"holds without a mask only; the case has {problem.mask}"
        return None


NOTHING = Requirements()
