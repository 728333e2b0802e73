"""The conformance matrix: every kernel x every property. `--kernel`, `--property`, `--cases` and
`--seconds` narrow it.
"""

from __future__ import annotations

import pytest

from verify.properties.catalogue import Property
from verify.pytest_plugin import Run, judge


def test_kernel_holds(
    run: Run, target: str, prop: Property, request: pytest.FixtureRequest
) -> None:
    """The property holds for the kernel. Unsupported is skipped with its reason, never passed."""
    judge(run, target, prop, request)
