"""Stored measurements: one JSON file that is replaced as a whole, so that whatever interrupts a run
leaves the last good one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from verify.errors import VerifyError


def replace(path: Path, text: str) -> None:
    """Replace a file as a whole. An OSError (a full disk) leaves what it held."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def save(report: dict[str, Any], path: Path) -> None:
    """Replace the file. Raises VerifyError where that fails (a full disk); what it held before is
    still there then.
    """
    try:
        replace(path, json.dumps(report, indent=1))
    except OSError as error:
        raise VerifyError(
            f"{path}: {error.strerror}; what was stored there before is kept"
        ) from error


def load(path: Path, schema: int) -> dict[str, Any]:
    """A stored report of this schema. Raises VerifyError where it is missing, not JSON, cut short,
    or of another schema.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VerifyError(
            f"{path}: {error.strerror}; name the .json that a run has written"
        ) from error
    except ValueError as error:
        raise VerifyError(
            f"{path}: not JSON ({error}); name the .json that a run has written"
        ) from error
    found = report.get("schema") if isinstance(report, dict) else None
    if found != schema:
        raise VerifyError(
            f"{path}: schema {found!r}, this version reads {schema}; measure again with this "
            "version"
        )
    if missing := [
        name for name in ("environment", "sections", "unsupported") if name not in report
    ]:
        raise VerifyError(
            f"{path}: {missing[0]!r} is missing; the file is no whole report, measure again"
        )
    return report
