"""Journals: the events of a run, one JSON object a line, appended as they happen.

Whatever interrupts a run, its events are there. Every process writes a file of its own.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from verify.errors import RecordsError, VerifyError
from verify.records.events import (
    CaseFinished,
    CaseStarted,
    CaseUnfinished,
    Ended,
    Event,
    Outcome,
    PropertyFinished,
    RunFinished,
    RunStarted,
    from_json,
    to_json,
)

Drawn = tuple[int | None, str, Outcome]
"""(seed, case, outcome)"""


class Journal:
    """A file of events in a folder, which no other process writes: NAME.jsonl, or NAME-1.jsonl if
    that one is there, and so on.

    Raises RecordsError where the folder cannot be written or is full.
    """

    def __init__(self, folder: Path, name: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            opened = (_created(folder, name, number) for number in count())
            self.path, self._file = next(found for found in opened if found)
        except OSError as error:
            wrong = f"records {folder}: {error.strerror}"
            raise RecordsError(f"{wrong}; name a folder that can be written") from error
        fcntl.flock(self._file, fcntl.LOCK_EX)  # until the process ends, however it does

    def append(self, event: Event) -> None:
        """Write one event."""
        line = (json.dumps(to_json(event)) + "\n").encode()
        try:
            written = os.write(self._file, line)
            if written < len(line):
                os.write(self._file, line[written:])
        except OSError as error:
            wrong = f"records {self.path}: {error.strerror}"
            raise RecordsError(f"{wrong}; what was written before is there") from error

    def close(self) -> None:
        """Leave the file to others."""
        os.close(self._file)


def _created(folder: Path, name: str, number: int) -> tuple[Path, int] | None:
    path = folder / (f"{name}-{number}.jsonl" if number else f"{name}.jsonl")
    try:
        return path, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None


def read(folder: Path) -> Iterator[Event]:
    """Every event below a folder, file by file.

    A line cut short by a kill is passed over. CaseStarted is left out, but for the last line of a
    file: that case, or someone from outside, ended the process, and it reads as CaseUnfinished.
    """
    for path in sorted(folder.glob("*.jsonl")):
        last: Event | None = None
        for last in _events(path):
            if not isinstance(last, CaseStarted):
                yield last
        if isinstance(last, CaseStarted):
            yield CaseUnfinished(**vars(last))


def cases(folder: Path) -> Iterator[CaseFinished]:
    """Every finished case below a folder."""
    return (event for event in read(folder) if isinstance(event, CaseFinished))


def completed(
    folder: Path,
) -> tuple[dict[tuple[str, str], Counter[Drawn]], dict[tuple[str, str, int | None], float]]:
    """What need not be done again, by kernel and property: the cases that were judged, by the seed
    that drew them; and, with the run's seed, the seconds of searches that came to their end.
    """
    judged: dict[tuple[str, str], Counter[Drawn]] = {}
    ended: dict[tuple[str, str, int | None], float] = {}
    for event in read(folder):
        if isinstance(event, CaseFinished):
            about = event.kernel, event.property
            judged.setdefault(about, Counter())[event.seed, event.case, event.outcome] += 1
        elif isinstance(event, PropertyFinished) and event.ended in ENDED_FOR_GOOD:
            key = event.kernel, event.property, event.seed
            ended[key] = ended.get(key, 0.0) + event.seconds
    return judged, ended


ENDED_FOR_GOOD = (Ended.FINDING, Ended.CASES, Ended.EXHAUSTED, Ended.UNSUPPORTED)
"""Why a search ended that a resumed run does not take up again."""


def interrupted(folder: Path) -> list[dict[str, Any]]:
    """The configurations of the runs of a folder that did not come to their end, each once.

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
        events = list(_events(path))
        runs = [event.config for event in events if isinstance(event, RunStarted) and event.config]
        whole = any(isinstance(event, RunFinished) and not event.interrupted for event in events)
        (finished if whole else found).extend(runs)
    left = [run for n, run in enumerate(found) if run not in finished and run not in found[:n]]
    if not left:
        ended = f"{len(finished)} that ended"
        raise VerifyError(f"{folder}: no interrupted run of `verify fuzz`; {ended}")
    return left


def _events(path: Path) -> Iterator[Event]:
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        event = from_json(line) if isinstance(line, dict) else None
        if event is not None:
            yield event
