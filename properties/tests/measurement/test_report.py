"""`verify report`: what is measured adds up, stored reports render without torch, comparisons tell
change from noise.
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from verify.errors import VerifyError
from verify.measurement import rmse
from verify.reports import comparison, pages, rmse_pages, rmse_table, stored

WITHOUT_TORCH = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "triton"):
            raise ImportError(name)
sys.meta_path.insert(0, Missing())
from verify.cli.main import main
main()
"""


def command(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "verify", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def row(kernel: str, totals: list[float], **others: Any) -> dict[str, Any]:
    draws = [
        {
            "total": t,
            "input": t / 2,
            "arithmetic": t / 3,
            "expected": t / 3,
            "alpha": 1.0,
            "bias": 0.0,
        }
        for t in totals
    ]
    problem, recipe = rmse_table.PAPER_CASE
    return {
        "kernel": kernel,
        "problem": problem,
        "recipe": recipe,
        "tensor": "out",
        "dtype": "fp16",
        "draws": draws,
    } | others


def report(*rows: dict[str, Any], **changed: Any) -> dict[str, Any]:
    section = {"name": "table3", "title": "RMSE of out", "rows": list(rows)}
    environment = {"device": "a GPU", "torch": "2.11"}
    return {
        "schema": rmse_table.SCHEMA,
        "reduced": False,
        "environment": environment,
        "unsupported": [],
        "sections": [section],
    } | changed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    problem, kernels = "b1.h2.q40.k40.d16.fp16.full.grads", ("naive", "naive-fp8", "sdpa-math")
    args = [part for name in kernels for part in ("--kernel", name)]
    result = command(
        "report",
        "--problem",
        problem,
        "--draws",
        "2",
        *args,
        "--device",
        "cpu",
        "--out",
        "grads",
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr
    result = command(
        "report",
        "--problem",
        problem.removesuffix(".grads"),
        "--draws",
        "2",
        *args,
        "--device",
        "cpu",
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_what_is_measured_adds_up(made: Path) -> None:
    """Total, rounding of the inputs and arithmetic are the sides of a triangle; a kernel that
    quantises has its own rounding.
    """
    found = stored.load(made / "verify-report" / "table.json", rmse_table.SCHEMA)
    rows = {key[0]: r for key, r in rmse_table.rows_of(found).items()}
    assert set(rows) == {"naive", "naive-fp8", "sdpa-math"}
    for each in rows.values():
        assert len(each["draws"]) == 2
        for draw in each["draws"]:
            assert (
                abs(draw["input"] - draw["arithmetic"])
                <= draw["total"]
                <= draw["input"] + draw["arithmetic"]
            )
    assert all(
        eight["input"] > sixteen["input"]
        for eight, sixteen in zip(*(rows[k]["draws"] for k in ("naive-fp8", "naive")))
    )
    assert (
        len({json.dumps([d["input"] for d in rows[k]["draws"]]) for k in ("naive", "sdpa-math")})
        == 1
    )
    gradients = rmse_table.rows_of(stored.load(made / "grads" / "table.json", rmse_table.SCHEMA))
    assert {(key[0], key[3]) for key in gradients} == {
        (k, t) for k in ("naive", "sdpa-math") for t in ("dq", "dk", "dv")
    }
    assert "not measured: naive-fp8 fp16: forward only" in (made / "grads" / "table.md").read_text()


def test_pages_hold_every_row(made: Path) -> None:
    folder = made / "verify-report"
    page = (folder / "table.md").read_text()
    assert all(page.count(f"\n| {name} ") == 1 for name in ("naive", "naive-fp8", "sdpa-math"))
    tex = (folder / "table.tex").read_text()
    assert tex.count(r"\\") == 1 + 3
    assert r"\toprule" in tex
    with (folder / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["kernel"], line["draw"]) for line in lines[:2]] == [
        ("naive", "0"),
        ("naive", "1"),
    ]
    assert all(float(line["total"]) > 0 for line in lines)


def test_a_stored_report_renders_without_torch(made: Path) -> None:
    before = (made / "verify-report" / "table.md").read_text()
    path = str(made / "verify-report" / "table.json")
    for args in (["--from", path, "--out", "again"], ["--compare", path, path]):
        result = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, "report", *args],
            cwd=made,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
    assert (made / "again" / "table.md").read_text() == before
    assert "same" in result.stdout
    assert "moved" not in result.stdout


def test_the_papers_figure_stands_beside_ours() -> None:
    headings, rows = rmse_table.cells(
        report(row("naive", [3.2e-4, 3.2e-4]), row("sdpa-math", [2e-4, 2e-4]))["sections"][0]
    )
    assert headings[-2:] == ["paper", "ours / paper"]
    assert [r[-2:] for r in rows] == [["3.2e-04 baseline FP16", "1.00"], ["-", "-"]]


def test_an_interval_is_students() -> None:
    """Of the squares 1, 4, 9, 16: mean 7.5, standard error 3.2787, 97.5 % quantile of t with 3
    degrees of freedom 3.1824.
    """
    low, high = rmse_table.interval(row("naive", [1.0, 2.0, 3.0, 4.0]), "total") or (0.0, 0.0)
    assert (low, round(high**2, 3)) == (0.0, round(7.5 + 3.1824463 * 3.2787193, 3))
    assert rmse_table.interval(row("naive", [1.0]), "total") is None


def test_a_comparison_tells_change_from_noise() -> None:
    """Draws are paired: 1 % on every draw is a change though the draws differ threefold; 1 % up and
    down is none.
    """
    old = row("naive", [1.0, 2.0, 3.0, 1.5])
    moved, noise = (
        row("naive", [1.01, 2.021, 3.029, 1.515]),
        row("naive", [1.01, 1.98, 3.03, 1.485]),
    )
    for new, said in ((moved, "moved"), (noise, "within noise"), (old, "same")):
        assert comparison.verdict(*comparison.change(old, new, "total")) == said
    one = comparison.change(row("naive", [1.0]), row("naive", [2.0]), "total")
    assert (round(one[0], 9), comparison.verdict(*one)) == (2.0, "one draw: cannot tell")
    lines = comparison.only_in_one(
        report(old),
        report(row("sdpa-math", [1.0]), environment={"device": "another", "torch": "2.11"}),
    )
    assert [line.split(" ")[0:4] for line in lines] == [
        ["only", "in", "the", "new"], ["only", "in", "the", "old"], ["device:", "a", "GPU,", "now"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file or directory; name the .json that a run has written"),
        ('{"schema": 2, "sec', "not JSON"),
        ('{"schema": 1, "rows": []}', "schema 1, this version reads 2; measure again"),
        ("[1]", "schema None, this version reads 2"),
        ('{"schema": 2, "environment": {}}', "'sections' is missing"),
    ],
)
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(VerifyError, match=r"table\.json: ") as error:
        stored.load(path, rmse_table.SCHEMA)
    assert said in str(error.value)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was stored before a write that fails is still there, and the error names the file."""
    path = tmp_path / "table.json"
    stored.save(report(row("naive", [1.0])), path)
    before = path.read_bytes()

    def full(self: Path, text: str, encoding: str) -> int:
        self.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(
        VerifyError,
        match=r"table.json: No space left on device; what was stored there before is kept",
    ):
        stored.save(report(row("naive", [2.0])), path)
    with pytest.raises(VerifyError, match=r"No space left on device; the figures are above"):
        rmse_pages.show(report(row("naive", [1.0])), tmp_path, Console(file=io.StringIO()))
    assert path.read_bytes() == before


def test_a_section_that_is_missing_is_said() -> None:
    with pytest.raises(VerifyError, match="section 'tabel3' is unknown: one of table3, lengths"):
        rmse._chosen(rmse.SECTIONS["cpu"], None, "normal", ["tabel3"])


def test_names_stay_in_their_cells() -> None:
    """Kernels and files come from elsewhere: what they are called is text on every page."""
    name = r"a|b <script> \input{/etc/passwd} 50% $x_1$ & #"
    page = pages.markdown("t", ["kernel", "x"], [[name, "1\n2"]])
    assert r"a\|b &lt;script>" in page
    assert "1 2" in page
    for text in (
        pages.latex("t", ["kernel", "x"], [[name, "1"]]),
        pages.latex(name, ["kernel"], [["k"]]),
    ):
        assert r"\textbackslash{}input\{/etc/passwd\} 50\% \$x\_1\$ \& \#" in text
