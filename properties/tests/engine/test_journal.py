"""Records survive whatever ends a run, a run goes on where it was, and two in one folder do not
disturb each other.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from verify.errors import VerifyError
from verify.records.events import (
    CaseFinished,
    CaseStarted,
    CaseUnfinished,
    Ended,
    Event,
    FindingExplained,
    FindingShrunk,
    KernelInspected,
    Outcome,
    PairsTaken,
    PropertyFinished,
    RunFinished,
    RunStarted,
    from_json,
    to_json,
)
from verify.records.journal import Journal, cases, completed, interrupted, read
from verify.studies.crash_recovery import judged, strike

FUZZ = [
    sys.executable,
    "-m",
    "verify",
    "fuzz",
    "naive",
    "--seed",
    "1",
    "--property",
    "oracle",
    "--device",
    "cpu",
]


def test_what_is_written_is_read_and_a_started_case_once(tmp_path: Path) -> None:
    about = {"kernel": "k", "property": "oracle", "case": "c"}
    started = CaseStarted(**about, seed=7)
    events: list[Event] = [
        CaseFinished(**about, outcome=Outcome.PASSED, measured={"out/proved": 0.5}, seed=7),
        CaseFinished(**about, outcome=Outcome.FAILED, reason="off", seed=7),
        FindingShrunk(**about, reason="off", seed=7),
        PropertyFinished(kernel="k", property="oracle", ended=Ended.FINDING, judged=2, seed=1),
    ]
    journal = Journal(tmp_path, "main")
    for event in events:
        journal.append(started)
        journal.append(event)
    assert list(read(tmp_path)) == events
    journal.append(started)
    unfinished = CaseUnfinished(**about, seed=7)
    assert list(read(tmp_path)) == [*events, unfinished]
    with journal.path.open("a") as file:
        file.write('{"event": "CaseFinished", "kernel": "k", "prop')
    assert list(read(tmp_path)) == [*events, unfinished]
    journal.close()


def test_every_event_turns_into_json_and_back() -> None:
    """Those that a run emits, all fields filled."""
    text = {"kernel": "k", "property": "p", "case": "c", "reason": "r"}
    filled: list[Event] = [
        RunStarted(config={"seed": 3}, environment={"torch": "2"}),
        KernelInspected(kernel="k", target="t", vendor="v", issues={"off": {"shows_in": 0.1}}),
        PairsTaken(kernel="k", rows=[{"dtype": "fp16"}]),
        CaseFinished(**text, outcome=Outcome.KNOWN_ISSUE, known="off", blind_to=["zeros"], seed=1),
        FindingShrunk(**text, measured={"error": 1.0}, worst="c2", worst_reason="r2"),
        FindingExplained(kernel="k", property="p", case="c", why=["a"], script="s", replay="r"),
        PropertyFinished(kernel="k", property="p", ended=Ended.NO_TIME, seconds=1.5),
        RunFinished(interrupted=True, seconds=2.0),
    ]
    assert [from_json(json.loads(json.dumps(to_json(event)))) for event in filled] == filled
    assert to_json(filled[3])["verdict"] == "known"


@pytest.mark.slow
def test_a_killed_run_goes_on_without_a_gap_or_a_duplicate(tmp_path: Path) -> None:
    asked = [
        "fuzz",
        "naive",
        "--cases",
        "50",
        "--seed",
        "1",
        "--property",
        "oracle",
        "--property",
        "repeat",
        "--device",
        "cpu",
    ]
    subprocess.run(
        [sys.executable, "-m", "verify", *asked, "--out", "whole"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    struck = strike(str(tmp_path), [*asked, "--out", "killed"], 2, 2.0, random.Random(2))  # noqa: S311 - no secret
    assert judged(tmp_path / "killed") == judged(tmp_path / "whole")
    assert struck
    with pytest.raises(VerifyError, match="no interrupted run"):
        interrupted(tmp_path / "killed")


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_what_was_measured(tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    run = subprocess.run(
        [*FUZZ, "--cases", "60", "--out", "run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=small_files,
        check=False,
    )
    assert run.returncode == 2, run.stdout + run.stderr
    assert "File too large; what was written before is there" in run.stderr
    assert len(list(read(tmp_path / "run"))) > 5


def test_two_runs_in_one_folder_write_files_of_their_own(tmp_path: Path) -> None:
    one, two = Journal(tmp_path, "main"), Journal(tmp_path, "main")
    one.append(RunStarted(config={"seed": 1}))
    two.append(RunStarted(config={"seed": 2}))
    for journal, case in ((one, "a"), (two, "b"), (one, "c")):
        about = {"kernel": "k", "property": "oracle", "case": case, "seed": 7}
        journal.append(CaseStarted(**about))
        journal.append(CaseFinished(**about, outcome=Outcome.PASSED))
    assert sorted(c.case for c in cases(tmp_path)) == ["a", "b", "c"]
    held = {(7, case, Outcome.PASSED): 1 for case in "abc"}
    assert completed(tmp_path)[0]["k", "oracle"] == held
    end = {"kernel": "k", "property": "oracle", "seed": 2, "seconds": 3.0}
    two.append(PropertyFinished(**end, ended=Ended.CASES))
    # of the other run, seed 1, this property has not ended
    assert completed(tmp_path)[1] == {("k", "oracle", 2): 3.0}
    with pytest.raises(VerifyError, match="still going on"):
        interrupted(tmp_path)
    two.append(RunFinished())
    one.close()
    two.close()
    assert interrupted(tmp_path) == [{"seed": 1}]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VerifyError, match="Not a directory; name a folder that can be written"):
        Journal(tmp_path / "file" / "run", "main")
