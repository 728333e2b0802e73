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
from verify.records.journal import Journal, Record, done, interrupted, read
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


def test_a_case_that_was_finished_is_read_once(tmp_path: Path) -> None:
    verdicts = ("started", "held", "started", "failed", "started", "started", "finding")
    lines = [
        json.dumps({"kernel": "k", "property": "oracle", "case": "c", "verdict": verdict})
        for verdict in verdicts
    ]
    (tmp_path / "main.jsonl").write_text("\n".join(lines) + "\n")
    assert [r.verdict for r in read(tmp_path)] == ["held", "failed", "finding"]
    with (tmp_path / "main.jsonl").open("a") as file:
        file.write('{"kernel": "k", "prop')
    assert [r.verdict for r in read(tmp_path)] == ["held", "failed", "finding"]


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
    one, two = Journal(tmp_path, "main", {"seed": 1}), Journal(tmp_path, "main", {"seed": 2})
    for journal, case in ((one, "a"), (two, "b"), (one, "c")):
        journal.append(Record("k", "oracle", case, "started", seed=7))
        journal.append(Record("k", "oracle", case, "held", seed=7))
    assert sorted(r.case for r in read(tmp_path)) == ["a", "b", "c"]
    assert done(tmp_path)[0]["k", "oracle"] == {(7, case, "held"): 1 for case in "abc"}
    two.append(Record("k", "oracle", "", "ended", seed=2, seconds=3.0))
    assert done(tmp_path)[1] == {
        ("k", "oracle", 2): 3.0
    }  # of the other run, seed 1, this property has not ended
    with pytest.raises(VerifyError, match="still going on"):
        interrupted(tmp_path)
    two.ended()
    one.close()
    two.close()
    assert interrupted(tmp_path) == [{"seed": 1}]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VerifyError, match="Not a directory; name a folder that can be written"):
        Journal(tmp_path / "file" / "run", "main")
