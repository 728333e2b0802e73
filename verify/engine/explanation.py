"""What explains a finding: why its case fails, and a script that shows it. Neither may hide it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from verify.diagnosis.derived import Derived
from verify.diagnosis.explain import ANOTHER, explain
from verify.diagnosis.reproducer import script
from verify.properties.catalogue import Property
from verify.spec.case import Case
from verify.spec.finding import Finding

Run = Callable[..., Any]
"""Isolated.run, or the same in this process: runs function(kernel, device, *arguments)."""


def why(run: Run, case: Case, prop: Property) -> list[str]:
    """Return the facts about a case that breaks a property, one a line."""
    try:
        return run(explain, case, prop.name)
    except Finding as finding:
        return [f"the call itself: {finding.sentence}"]
    except Exception as error:
        return [f"not explained: {type(error).__name__}: {error}"]


def wrong_call(lines: list[str]) -> Derived | None:
    """The call of a property that these facts name as the wrong one."""
    for line in lines:
        if line.startswith(ANOTHER):
            return Derived.parse(line.removeprefix(ANOTHER).partition(": ")[0])
    return None


def write_script(run: Run, case: Case | Derived, path: Path) -> str:
    """Write the script that shows a finding. Return its path, or why there is none."""
    try:
        try:
            text = run(script, case)
        except Finding:  # the kernel does not survive the case, and is not called
            text = run(script, case, True)
        path.write_text(text, encoding="utf-8")
    except Exception as error:
        return f"none: {type(error).__name__}: {error}"
    return str(path)
