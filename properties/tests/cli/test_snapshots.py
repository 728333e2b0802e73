"""What the command line prints, as a whole: six outputs that a reviewer sees change.

`pytest properties/tests/cli/test_snapshots.py --snapshot-update` writes them anew.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from verify import registry
from verify.cli import main
from verify.properties.tests.support import ATTEND
from verify.pytest_plugin import Run

SNAPSHOTS = Path(__file__).parent / "snapshots"
FILE = f"""{ATTEND}
@kernel(dtypes=("fp32",))
def right(q, k, v, *, scale, mask):
    return attend(q, k, v, scale, mask)

@kernel(dtypes=("fp32",))
def wrong(q, k, v, *, scale, mask):
    return attend(q, k, v, 1.25 * scale, mask)

@kernel(supports=lambda problem, device: "needs a machine that is not here")
def nowhere(q, k, v, *, scale, mask):
    return attend(q, k, v, scale, mask)
"""
FUZZ = "--in-process --seed 1 --out run --cases 4 --property oracle --property ones".split()
CASE = "b1.h1.q2.k3.d1.fp32.causal_lower_right/integers#1"
COMMANDS = {
    "fuzz-green": (0, ["fuzz", "mine.py::right", *FUZZ]),
    "fuzz-finding": (1, ["fuzz", "mine.py::wrong", *FUZZ]),
    "fuzz-unsupported": (1, ["fuzz", "mine.py::nowhere", *FUZZ]),
    "replay": (1, ["replay", "mine.py::wrong", CASE, "--in-process"]),
    "kernels": (0, ["kernels"]),
    "help": (0, ["--help"]),
}


def plain(text: str, folder: Path) -> str:
    """The output without what depends on the machine: paths, versions, times, figures, and which
    of several equally small cases was found.
    """
    text = text.replace(str(folder), "FOLDER")
    text = re.sub(r"^seed 1, device.*", "seed 1, ENVIRONMENT", text)
    text = re.sub(r"kernels on \w+", "kernels on DEVICE", text)
    text = re.sub(r"\b\d+ s([;:])", r"N s\1", text)
    text = re.sub(r"(?<![\w.])-?\d+\.\d+(e[-+]\d+)?\b|\b\d+e[-+]\d+\b", "#", text)
    text = re.sub(r"\d+ %", "N %", text)
    text = re.sub(r"b\d+\.h\d\S*?/\S+?#\d+", "CASE", text)
    text = re.sub(r"(throughput:).*", r"\1 ...", text)
    text = re.sub(r"(would catch: zeros) .*", r"\1 ...", text)
    text = re.sub(r"judged: \d+ of", "judged: N of", text)
    # the bound is another on a GPU, and so is what it lets pass
    text = re.sub(r"(\d+) (\?\d+) │", lambda m: f" {' ' * len(m[2])}{m[1]} │", text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"


def only_naive(text: str) -> str:
    """Of the table of kernels the text of the row that depends on no version of torch."""
    cells = re.sub(r"[━┏┓┡┩╇┳┃│ ]+", " ", text.partition("│ sdpa-math")[0])
    return " ".join(cells.split()) + "\n"


def only_commands(text: str) -> str:
    """Of the help what each command does, without boxes and line breaks."""
    rows = re.findall(r"^│ (\S*) +(.*?) *│$", text.partition("Commands")[2], re.M)
    found = ""
    for name, words in rows:
        found += f"\n{name}: {words}" if name else f" {words}"
    return found.strip() + "\n"


SHOWN = {"kernels": only_naive, "help": only_commands}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_output_is_as_it_was(
    name: str,
    run: Run,
    tmp_path: Path,
    pytestconfig: pytest.Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name == "fuzz-finding" and run.device != "cpu":
        pytest.skip("other cases are drawn on a GPU, and another one is the worst")
    (tmp_path / "mine.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    registry.load_bundled()
    known = {n: registry.REGISTRY[n] for n in ("naive", "sdpa-math")}
    monkeypatch.setattr(registry, "REGISTRY", known)
    monkeypatch.setattr(registry, "UNAVAILABLE", {})
    code, arguments = COMMANDS[name]
    device = [] if name == "help" else ["--device", run.device]
    monkeypatch.setattr(sys, "argv", ["verify", *arguments, *device])
    with pytest.raises(SystemExit) as leaving:
        main.main()
    said = capsys.readouterr().out
    assert leaving.value.code == code, said
    said = SHOWN.get(name, str)(plain(said, tmp_path))
    file = SNAPSHOTS / f"{name}.txt"
    if pytestconfig.getoption("snapshot_update"):
        file.write_text(said, encoding="utf-8")
    assert said == file.read_text(encoding="utf-8")
