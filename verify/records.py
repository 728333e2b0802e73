"""Records: what was measured, one JSON object a line, appended as it happens. Whatever interrupts a run, they are there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from verify.errors import VerifyError

JUDGED = ("held", "uninformative", "known", "failed")
"""Verdicts of a judged case. known: broke the law as a known defect does; failed: broke it, on the way to the shrunk case. A
record may also be `unsupported`, or the `finding`, which is the shrunk case. A case is `started` before its kernel is called;
where that is a file's last line, it reads as `unfinished`.
"""

REQUIRED = {"kernel", "property", "case", "verdict"}


@dataclass(frozen=True)
class Record:
    """One judged case: kernel, property, case id, verdict; `reason` is the finding's sentence or why it is unsupported."""

    kernel: str
    property: str
    case: str
    verdict: str
    reason: str = ""
    known: str = ""
    """the known defect that this case could show"""
    blind_to: list[str] = field(default_factory=list)
    bitwise: bool | None = None
    measured: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    """what judging took"""


class Journal:
    """An append-only file of records. Raises VerifyError where the folder cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise VerifyError(f"records {path}: {error.strerror}; name a folder that can be written") from error

    def append(self, record: Record) -> None:
        """Write one record and flush it."""
        kept = {k: v for k, v in vars(record).items() if k in REQUIRED or v not in ("", [], {}, None)}
        self._file.write(json.dumps(kept) + "\n")
        self._file.flush()


def read(folder: Path) -> Iterator[Record]:
    """Every record below a folder, file by file. A last line cut short by a kill is passed over; a case that was started last and
    not finished is `unfinished`: it, or someone from outside, ended the process.
    """
    for path in sorted(folder.glob("*.jsonl")):
        found = [
            Record(**fields) for line in path.read_text(encoding="utf-8").splitlines() if (fields := _parsed(line)) is not None
        ]
        yield from (record for record in found if record.verdict != "started")
        if found and found[-1].verdict == "started":
            yield replace(found[-1], verdict="unfinished")


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) and REQUIRED <= value.keys() else None
