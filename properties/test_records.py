"""Records survive whatever ends a run: a case is on record before its kernel is called."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from verify.records import read
from verify.reports.terminal import unfinished

DIES = """
import os
import torch
from verify import kernel

@kernel
def dies(q, k, v, *, scale, mask):
    if q.shape[2] > 100:
        os._exit(0)
    return torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
"""


def test_the_case_that_ended_the_process_is_known(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(DIES)
    command = [
        sys.executable,
        "-m",
        "verify",
        "fuzz",
        "dies.py",
        "--seconds",
        "60",
        "--out",
        "run",
        "--property",
        "repeat",
        "--seed",
        "1",
    ]
    run = subprocess.run([*command, "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0  # the kernel's own; nothing was printed
    records = list(read(tmp_path / "run"))
    last = records[-1]
    assert last.verdict == "unfinished"
    assert int(last.case.split(".q")[1].split(".")[0]) > 100
    assert unfinished(records) == [f"NOT FINISHED: dies, repeat: {last.case}: the process ended here, or was interrupted"]
    assert all(r.verdict == "held" for r in records[:-1])


def test_a_case_that_was_finished_is_read_once(tmp_path: Path) -> None:
    verdicts = ("started", "held", "started", "failed", "started", "started", "finding")
    lines = [json.dumps({"kernel": "k", "property": "oracle", "case": "c", "verdict": verdict}) for verdict in verdicts]
    (tmp_path / "main.jsonl").write_text("\n".join(lines) + "\n")
    assert [r.verdict for r in read(tmp_path)] == ["held", "failed", "finding"]
    with (tmp_path / "main.jsonl").open("a") as file:
        file.write('{"kernel": "k", "prop')
    assert [r.verdict for r in read(tmp_path)] == ["held", "failed", "finding"]
