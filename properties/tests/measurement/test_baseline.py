"""No kernel lost precision since its figures were recorded; and the record: what counts as worse,
what a write keeps.
"""

from __future__ import annotations

import json
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest

from verify.cli import main
from verify.errors import VerifyError
from verify.measurement import baseline
from verify.pytest_plugin import Run, run_of
from verify.spec.case import Case

HERE, OTHER = "cpu AVX512, torch 2.13", "NVIDIA H200, torch 2.11"
ENTRY = "naive b1.h1.q1.k1.d1.fp32.full/normal#0"
NOW = {ENTRY: {"out": 1.0e-5, "lse": 2.0e-7}}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernel_name" in metafunc.fixturenames:
        metafunc.parametrize(
            "kernel_name", [*run_of(metafunc.config).kernels, *run_of(metafunc.config).unavailable]
        )


def test_no_kernel_lost_precision(run: Run, kernel_name: str) -> None:
    if kernel_name in run.unavailable:
        pytest.skip(f"{kernel_name} is unavailable: {run.unavailable[kernel_name]}")
    kernel, machine = run.kernels[kernel_name], baseline.machine(run.device)
    if all(
        reasons := [
            kernel.unsupported(Case.parse(text).problem, run.device) for text in baseline.CASES
        ]
    ):
        pytest.skip(f"{kernel.name}: {reasons[0]}")
    if not baseline.of({kernel.name}, baseline.read(baseline.FILE).get(machine, {})):
        pytest.skip(
            f"{kernel.name} has no record on {machine}: verify record --update --kernel "
            f"{kernel_name}"
        )
    command = [
        sys.executable,
        "-P",
        "-m",
        "verify",
        "record",
        "--kernel",
        kernel_name,
        "--device",
        run.device,
    ]
    judged = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False
    )  # NumPy here has many threads
    assert judged.returncode == 0, judged.stdout + judged.stderr


MARKS: list[tuple[float | None, float | None, str]] = [
    (1.0, 1.0, ""),
    (1.0, 1.005, ""),
    (0.98, 1.0, "WORSE"),
]
MARKS += [
    (1.0, inf, "WORSE"),
    (None, inf, "WORSE"),
    (0.0, 1e-30, "WORSE"),
    (1.0, 0.98, "better"),
    (0.0, 0.0, ""),
]
MARKS += [(None, 1.0, "new"), (1.0, None, "gone")]


@pytest.mark.parametrize(("recorded", "now", "mark"), MARKS)
def test_a_figure_is_marked(recorded: float | None, now: float | None, mark: str) -> None:
    assert baseline.Change(ENTRY, "out", recorded, now).mark == mark


def test_a_write_replaces_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "recorded.json"
    stays = {"sdpa-math b1.h1.q1.k1.d1.fp32.full/normal#0": {"out": 3.0e-5}}
    baseline.update(file, OTHER, {"naive", "sdpa-math"}, NOW | stays)
    baseline.update(file, HERE, {"naive", "sdpa-math"}, {"naive gone": {"out": 1.0}} | stays)
    baseline.update(file, HERE, {"naive"}, NOW)
    assert baseline.read(file) == {OTHER: NOW | stays, HERE: NOW | stays}
    assert list(tmp_path.iterdir()) == [file]


def test_a_kernel_and_case_is_one_line_with_four_digits() -> None:
    lines = baseline.text({HERE: {ENTRY: {"out": 1.23456e-5, "lse": 0.0}}}).splitlines()
    assert lines == [
        "{",
        f' "{HERE}": {{',
        f'  "{ENTRY}": {{"lse": 0.000e+00, "out": 1.235e-05}}',
        " }",
        "}",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"a": 1}',
        '{"a": {"b": {"out": NaN}}}',
        '{"a": {"b": {"out": "1"}}}',
        "<<<<<<< ours",
    ],
)
def test_a_corrupt_file_is_named_and_kept(text: str, tmp_path: Path) -> None:
    (file := tmp_path / "recorded.json").write_text(text)
    with pytest.raises(
        VerifyError, match=r"recorded\.json: no record of figures: .*; restore it, or delete it"
    ):
        baseline.update(file, HERE, {"naive"}, NOW)
    assert file.read_text() == text


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        VerifyError, match=r"absent/recorded\.json: No such file or directory; make it"
    ):
        baseline.update(tmp_path / "absent" / "recorded.json", HERE, {"naive"}, NOW)
    with pytest.raises(VerifyError, match="an infinite error is a defect"):
        baseline.update(tmp_path / "recorded.json", HERE, {"naive"}, {ENTRY: {"out": inf}})


def test_the_command_fails_on_worse_alone_and_writes_when_told(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline, "FILE", file := tmp_path / "recorded.json")
    for library in ("OMP", "OPENBLAS", "MKL"):  # the command sets them for good
        monkeypatch.setenv(f"{library}_NUM_THREADS", "1")

    def code(*options: str) -> object:
        monkeypatch.setattr(
            sys,
            "argv",
            ["verify", "record", "--kernel", "sdpa-math", "--device", run.device, *options],
        )
        with pytest.raises(SystemExit) as leaving:
            main.main()
        return leaving.value.code

    assert (code(), file.exists()) == (0, False)
    assert (code("--update"), code()) == (0, 0)
    record = json.loads(file.read_text())
    record[baseline.machine(run.device)][f"sdpa-math {baseline.CASES[0]}"]["out"] *= 0.98
    file.write_text(baseline.text(record))
    assert code() == 1
