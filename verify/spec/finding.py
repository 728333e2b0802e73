"""Finding: one thing that a kernel does wrong, as one sentence: what, where, how bad, how bad is
allowed and why.
"""

from __future__ import annotations


class Finding(AssertionError):
    """Raised by a property where it does not hold. Hypothesis shrinks the case on it; the engine
    reports it.
    """

    def __init__(
        self, sentence: str, *, measured: dict[str, float] | None = None, refused: bool = False
    ) -> None:
        """refused: the kernel raised of its own accord (sandbox/call.py)."""
        super().__init__(sentence)
        self.sentence = sentence
        self.measured = measured or {}
        self.refused = refused
