"""Records: what was measured, one JSON object a line, appended as it happens. Whatever interrupts a
run, they are there.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import count
from pathlib import Path
from typing import Any

from verify.errors import VerifyError

JUDGED = ("held", "uninformative", "known", "failed")
"""Verdicts of a judged case. known: broke the law as a known defect does; failed: broke it, on the
way to the shrunk case. A record may also be `unsupported`, or the `finding`, which is the shrunk
case. A case is `started` before its kernel is called; where that is a file's last line, it reads as
`unfinished`. `ended`: enough was judged of a kernel and property.
"""
VERDICTS = (*JUDGED, "unsupported")
"""What becomes of a case that was drawn."""
Drawn = tuple[int | None, str, str]
"""(seed, case, verdict)"""
REQUIRED = {"kernel", "property", "case", "verdict"}


@dataclass(frozen=True)
class Record:
    """One judged case: kernel, property, case id, verdict; `reason` is the finding's sentence or
    why it is unsupported.
    """

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
    seed: int | None = None
    """that Hypothesis drew it with"""


FIELDS = {f.name for f in fields(Record)}


class Journal:
    """A file of records in a folder, which no other process writes: NAME.jsonl, or NAME-1.jsonl if
    that one is there, and so on.

    Raises VerifyError where the folder cannot be written or is full.
    """

    def __init__(self, folder: Path, name: str, run: dict[str, Any] | None = None) -> None:
        """`run`: what `verify resume` needs to go on with it."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path, self._file = next(
                opened for n in count() if (opened := _created(folder, name, n))
            )
        except OSError as error:
            raise VerifyError(
                f"records {folder}: {error.strerror}; name a folder that can be written"
            ) from error
        fcntl.flock(self._file, fcntl.LOCK_EX)  # until the process ends, however it does
        if run is not None:
            self._write({"run": run})

    def append(self, record: Record) -> None:
        """Write one record."""
        self._write(
            {k: v for k, v in vars(record).items() if k in REQUIRED or v not in ("", [], {}, None)}
        )

    def ended(self) -> None:
        """The run came to its end: there is nothing to resume."""
        self._write({"ended": True})

    def close(self) -> None:
        """Leave the file to others."""
        os.close(self._file)

    def _write(self, value: dict[str, Any]) -> None:
        line = (json.dumps(value) + "\n").encode()
        try:
            written = os.write(self._file, line)
            if written < len(line):
                os.write(self._file, line[written:])
        except OSError as error:
            raise VerifyError(
                f"records {self.path}: {error.strerror}; what was written before is there"
            ) from error


def writable(folder: Path) -> None:
    """Raises VerifyError where no journal can be written there."""
    journal = Journal(folder, "try")
    journal.close()
    journal.path.unlink()


def _created(folder: Path, name: str, number: int) -> tuple[Path, int] | None:
    path = folder / (f"{name}-{number}.jsonl" if number else f"{name}.jsonl")
    try:
        return path, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None


def read(folder: Path) -> Iterator[Record]:
    """Every record below a folder, file by file. A line cut short by a kill is passed over; a case
    that was started last and not finished is `unfinished`: it, or someone from outside, ended the
    process.
    """
    for path in sorted(folder.glob("*.jsonl")):
        found = list(_records(path))
        yield from (record for record in found if record.verdict not in ("started", "ended"))
        if found and found[-1].verdict == "started":
            yield replace(found[-1], verdict="unfinished")


def done(
    folder: Path,
) -> tuple[dict[tuple[str, str], Counter[Drawn]], dict[tuple[str, str, int | None], float]]:
    """By kernel and property: the cases that were judged, by the seed that drew them; with the
    run's seed: the seconds it took, where it ended.
    """
    judged: dict[tuple[str, str], Counter[Drawn]] = {}
    ended: dict[tuple[str, str, int | None], float] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for record in _records(path):
            about = record.kernel, record.property
            if record.verdict in VERDICTS:
                judged.setdefault(about, Counter())[record.seed, record.case, record.verdict] += 1
            elif record.verdict == "ended":
                ended[*about, record.seed] = ended.get((*about, record.seed), 0.0) + (
                    record.seconds or 0.0
                )
    return judged, ended


def interrupted(folder: Path) -> list[dict[str, Any]]:
    """What was asked for in the runs of a folder that did not come to their end, each once.

    Raises VerifyError where there is none, or where one is still going on.
    """
    found: list[dict[str, Any]] = []
    finished: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.jsonl")):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise VerifyError(f"{path}: this run is still going on") from None
        lines = list(_lines(path))
        runs = [line["run"] for line in lines if isinstance(line.get("run"), dict)]
        (finished if any("ended" in line for line in lines) else found).extend(runs)
    left = [run for n, run in enumerate(found) if run not in finished and run not in found[:n]]
    if not left:
        raise VerifyError(
            f"{folder}: no interrupted run of `verify fuzz`; {len(finished)} that ended"
        )
    return left


def _records(path: Path) -> Iterator[Record]:
    for line in _lines(path):
        if line.keys() >= REQUIRED:
            yield Record(**{name: value for name, value in line.items() if name in FIELDS})


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            yield value
