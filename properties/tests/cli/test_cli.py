"""The command line: the six bad inputs, a kernel outside the repository beside its own `kernels`
package, replay, Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from verify import registry
from verify.cli import main
from verify.kernels.naive import naive
from verify.pytest_plugin import Run
from verify.records.journal import cases, read
from verify.records.summary import findings
from verify.registry import Kernel

KERNEL = """
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from kernels import FACTOR
from verify import kernel

@kernel
def mine(q, k, v, *, scale, mask):
    assert q.dtype == k.dtype == v.dtype
    wide = [t.float() for t in (q, k, v)]
    with sdpa_kernel([SDPBackend.MATH]):
        out = F.scaled_dot_product_attention(
        *wide, attn_mask=mask, scale=FACTOR * scale, enable_gqa=True
    )
    return out.to(q.dtype)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: a kernel file and a package `kernels` of their own that it imports."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("FACTOR = 1.0\n")
    (tmp_path / "my_kernel.py").write_text(KERNEL)
    return tmp_path


def command(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "verify", *args, "--device", "cpu"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def in_process(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[object, str]:
    """(exit code, standard error) of the console script."""
    monkeypatch.setattr(sys, "argv", ["verify", *args])
    with pytest.raises(SystemExit) as leaving:
        main.main()
    return leaving.value.code, capsys.readouterr().err.strip()


GOOD = "b1.h1.q1.k3.d1.fp32.full/integers#0"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["fuzz", "flsh"], "kernel 'flsh' is unknown: one of "),
        (["fuzz", "empty.py"], "registers no kernel; decorate a function with @verify.kernel"),
        (
            ["fuzz", "raises.py"],
            "raises.py:2: raised ZeroDivisionError on import: division by zero",
        ),
        (["fuzz", "absent.py"], "absent.py: no such file"),
        (["fuzz", "naive", "--seconds", "-1"], "seconds=-1: a positive number"),
        (["fuzz", "naive", "--property", "orcale"], "property 'orcale' is unknown: one of oracle"),
        (["replay", "naive", "b1.h6:4.q1.k1.d8.bf16.full/normal#0"], "heads_q=6, heads_kv=4"),
        (
            ["replay", "naive", "b1.h1.q-1.k1.d8.bf16.full/normal#0"],
            "len_q=-1: a length is 0 or more",
        ),
        (["replay", "naive", "nonsense"], "case id 'nonsense' does not parse: write it like"),
        (
            ["replay", "sdpa-math", "b1.h1.q1.k1.d8.bf16.full.softcap=2.0/normal#0"],
            "sdpa-math does not support",
        ),
        (
            ["replay", "naive", GOOD, "--sanitizer", "valgrind"],
            "sanitizer 'valgrind' is unknown: one of memcheck",
        ),
        (["resume", "absent"], "absent: no interrupted run of `verify fuzz`"),
        (["report", "--problem", "b1"], "problem id 'b1' does not parse: write it like"),
        (["report", "--out", "empty.py/x"], "out=empty.py/x: Not a directory; name a folder"),
        (["kernels", "--device", "tpu"], "device 'tpu' is unknown: cpu or cuda"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_exit_code_2(
    args: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "raises.py").write_text("x = 1\ny = x / 0\n")
    monkeypatch.chdir(tmp_path)
    code, error = in_process(args, monkeypatch, capsys)
    assert code == 2
    assert said in error
    assert "\n" not in error


@pytest.mark.slow
def test_a_right_kernel_passes_a_wrong_one_is_replayed(folder: Path) -> None:
    """Six lines beside a `kernels` package of the user's own; then the scale off by 1 %: found,
    shrunk, replayed.
    """
    some = [f"--property={name}" for name in ("oracle", "one-hot", "layout", "batch-permutation")]
    asked = ["--cases", "10", "--seed", "1", "--out", "good", *some]
    good = command(folder, "fuzz", "my_kernel.py", *asked)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "no finding in" in good.stdout
    assert "h // group (repeat_interleave)" in good.stdout
    (folder / "kernels" / "__init__.py").write_text("FACTOR = 1.01\n")
    bad = command(
        folder,
        "fuzz",
        "my_kernel.py",
        "--cases",
        "100",
        "--seed",
        "3",
        "--out",
        "bad",
        "--property",
        "oracle",
    )
    assert bad.returncode == 1, bad.stdout + bad.stderr
    found = findings(read(folder / "bad"))
    assert f"verify replay my_kernel.py::mine {found[0].case} " in bad.stdout.replace("'", "")
    again = command(folder, "replay", "my_kernel.py::mine", found[0].case, "--property", "oracle")
    assert again.returncode == 1, again.stderr
    assert found[0].reason in again.stdout


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(folder: Path) -> None:
    run = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "verify",
            "fuzz",
            "my_kernel.py",
            "--seconds",
            "500",
            "--out",
            "cut",
            "--device",
            "cpu",
        ],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and sum(1 for _ in cases(folder / "cut")) < 20:
        time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    output, error = run.communicate(timeout=60)
    assert "interrupted; what follows was measured before" in output, error
    assert "no finding in" in output
    assert sum(1 for _ in cases(folder / "cut")) >= 20


def test_masks_and_kernels_are_listed(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "# # # . . ." in command_masks(folder)
    registry.load_bundled()
    without_gpu = Kernel("gpu-only", naive, frozenset(), supports=lambda p, d: "needs another GPU")
    monkeypatch.setattr(registry, "REGISTRY", {"gpu-only": without_gpu})
    monkeypatch.setattr(registry, "UNAVAILABLE", {"absent": "ImportError: no module"})
    monkeypatch.setattr(sys, "argv", ["verify", "kernels", "--device", run.device])
    with pytest.raises(SystemExit, match="0"):
        main.main()
    listed = capsys.readouterr().out
    assert "needs another GPU" in listed
    assert "ImportError: no module" in listed


def command_masks(folder: Path) -> str:
    return subprocess.run(
        [sys.executable, "-m", "verify", "masks", "--len-q", "4", "--len-k", "6"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
