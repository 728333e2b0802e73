"""Records survive whatever ends a run: a case is on record before its kernel is called."""

from __future__ import annotations

import json
from pathlib import Path

from verify.records import read


def test_a_case_that_was_finished_is_read_once(tmp_path: Path) -> None:
    verdicts = ("started", "held", "started", "failed", "started", "started", "finding")
    lines = [json.dumps({"kernel": "k", "property": "oracle", "case": "c", "verdict": verdict}) for verdict in verdicts]
    (tmp_path / "main.jsonl").write_text("\n".join(lines) + "\n")
    assert [r.verdict for r in read(tmp_path)] == ["held", "failed", "finding"]
    with (tmp_path / "main.jsonl").open("a") as file:
        file.write('{"kernel": "k", "prop')
    assert [r.verdict for r in read(tmp_path)] == ["held", "failed", "finding"]
