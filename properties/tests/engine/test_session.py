"""One engine under two front ends: the same cases, whoever asks and however many workers there are;
and nothing that was not judged is lost.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from verify.cli.main import app
from verify.engine.config import Option, RunConfig, options
from verify.engine.rounds import CORE_SHARE
from verify.engine.run import Run as RunAll
from verify.engine.run import run as run_all
from verify.engine.session import Session
from verify.errors import VerifyError
from verify.properties.catalogue import PROPERTIES
from verify.properties.tests.support import ATTEND
from verify.pytest_plugin import Run, pytest_addoption
from verify.records.events import (
    CaseFinished,
    Ended,
    Event,
    FindingExplained,
    FindingShrunk,
    KernelInspected,
    Outcome,
    PropertyFinished,
    RunFinished,
    RunStarted,
)
from verify.records.journal import cases, read
from verify.records.summary import exit_code, findings
from verify.reports.terminal import not_judged, others

MATRIX = Path(__file__).parents[2] / "test_conformance.py"
SOME = ("oracle", "gradients", "ones", "layout")
FILE = f"""{ATTEND}
@kernel(vendor="Somebody")
def theirs(q, k, v, *, scale, mask):
    return attend(q, k, v, 1.1 * scale, mask)

@kernel
def mine(q, k, v, *, scale, mask):
    return attend(q, k, v, scale, mask)

@kernel(supports=lambda problem, device: "not here")
def nowhere(q, k, v, *, scale, mask):
    return attend(q, k, v, scale, mask)
"""


@pytest.fixture
def config(tmp_path: Path, run: Run) -> RunConfig:
    """Of a run that writes into a folder of its own."""
    places = {"records": tmp_path / "run", "corpus": tmp_path / "corpus.tsv"}
    return RunConfig(device=run.device, seed=1, **places)


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A file of three kernels: somebody else's, which is wrong, the user's, one for no device."""
    (tmp_path / "three.py").write_text(FILE)
    return str(tmp_path / "three.py")


def judged(folder: Path) -> Counter[tuple[object, ...]]:
    return Counter((c.kernel, c.property, c.seed, c.case, c.outcome) for c in cases(folder))


@pytest.mark.slow
def test_both_front_ends_judge_the_same_cases(tmp_path: Path) -> None:
    """Through the two command lines."""
    common = ["--cases", "4", "--device", "cpu"] + [f"--property={name}" for name in SOME]
    fuzz = ["-m", "verify", "fuzz", "naive", "--seed", "1", "--out", str(tmp_path / "fuzz")]
    matrix = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "verify.pytest_plugin"]
    matrix += ["-c", "/dev/null", "--noconftest", "--import-mode=importlib"]
    matrix += [f"--rootdir={tmp_path}", str(MATRIX), "--kernel", "naive"]
    matrix += ["--draw-seed", "1", "--records", str(tmp_path / "pytest"), "-n", "2"]
    for command in (fuzz, matrix):
        done = subprocess.run(
            [sys.executable, *command, *common],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    found = judged(tmp_path / "fuzz")
    assert found == judged(tmp_path / "pytest")
    assert sum(n for (*_, outcome), n in found.items() if outcome is not Outcome.UNSUPPORTED) == 16


@pytest.mark.parametrize("changes", [{"workers": 3}, {"in_process": True}], ids=str)
def test_cases_depend_neither_on_workers_nor_on_where_they_are_judged(
    config: RunConfig, tmp_path: Path, changes: dict[str, object]
) -> None:
    config = config.but(targets=("naive",), cases=3, properties=SOME)
    other = config.but(records=tmp_path / "other", corpus=tmp_path / "other.tsv", **changes)
    for one in (config, other):
        assert isinstance(list(run_all(one))[-1], RunFinished)
    assert judged(tmp_path / "run") == judged(tmp_path / "other")
    assert judged(tmp_path / "run").total() >= 12


def test_events_come_in_order_and_are_in_the_journal(config: RunConfig, file: str) -> None:
    config = config.but(targets=(file,), cases=20, properties=("oracle",), shrink_seconds=2.0)
    events: list[Event] = []
    with Session(config) as session:
        for event in RunAll(session).events():
            assert event in read(session.folder) or not isinstance(event, CaseFinished)
            events.append(event)
    kinds = [type(event) for event in events]
    assert kinds[:4] == [RunStarted, KernelInspected, KernelInspected, KernelInspected]
    assert kinds[-1] is RunFinished
    at = kinds.index(FindingShrunk)
    assert kinds[at + 1] is FindingExplained
    ends = {e.kernel: e.ended for e in events if isinstance(e, PropertyFinished)}
    assert ends == {"theirs": Ended.FINDING, "mine": Ended.CASES, "nowhere": Ended.UNSUPPORTED}
    (found,) = findings(events)
    assert (found.kernel, found.vendor) == ("theirs", "Somebody")
    assert found.explained is not None
    assert "1.1 times the scale" in "".join(found.explained.why)
    assert exit_code(events, strict=False) == 0
    assert exit_code(events, strict=True) == 1
    assert f"theirs (Somebody) breaks oracle: {found.case}" in others(events)[1]
    assert findings(read(session.folder)) == [found]


def asked(events: list[Event]) -> list[PropertyFinished]:
    """The ends of properties that can be judged on a kernel that declares nothing of its own."""
    ends = [event for event in events if isinstance(event, PropertyFinished)]
    return [event for event in ends if not PROPERTIES[event.property].declares]


def test_a_property_without_time_is_named(config: RunConfig) -> None:
    config = config.but(targets=("naive",), seconds=0.001)
    events = list(run_all(config))
    ends = asked(events)
    assert len(ends) == sum(not prop.declares for prop in PROPERTIES.values())
    assert {event.ended for event in ends} <= {Ended.NO_TIME, Ended.TIME}
    (line,) = not_judged(events)
    assert line.startswith("NOT JUDGED: naive: no time for ")
    assert sum(not event.judged for event in ends) == line.count(",") + 1
    assert exit_code(events, strict=False) == 1


def test_a_run_that_is_stopped_says_what_it_left(config: RunConfig) -> None:
    config = config.but(targets=("naive",), cases=1000)
    events: list[Event] = []
    with Session(config) as session:
        for event in RunAll(session).events():
            events.append(event)
            if sum(isinstance(e, CaseFinished) for e in events) == 5:
                session.stop()
    assert events[-1] == RunFinished(interrupted=True, seconds=events[-1].seconds)
    assert {event.ended for event in asked(events)} == {Ended.INTERRUPTED}
    assert "interrupted before" in not_judged(events)[0]


def test_properties_go_round_and_the_oracle_gets_its_share(config: RunConfig) -> None:
    """Every property has its first case before any has its tenth."""
    config = config.but(targets=("naive",), cases=1000, in_process=True)
    order: list[str] = []
    with Session(config) as session:
        for event in RunAll(session).events():
            if isinstance(event, CaseFinished):
                order.append(event.property)
            if len(order) == 100:
                session.stop()
    firsts = {name: order.index(name) for name in set(order)}
    assert len(firsts) == 45
    before = order[: max(firsts.values())]
    assert max(Counter(before).values()) < 10
    core = order.count("oracle") + order.count("gradients")
    assert abs(core / len(order) - CORE_SHARE) < 1 / 20


def test_every_option_is_declared_once_and_reaches_both_front_ends() -> None:
    class Parser:
        def __init__(self) -> None:
            self.names: list[str] = []

        def getgroup(self, *_: str) -> Parser:
            return self

        def addoption(self, name: str, **_: object) -> None:
            self.names.append(name)

    parser = Parser()
    pytest_addoption(parser)  # type: ignore[arg-type]
    assert parser.names == [o.names["pytest"] for o in options() if o.names["pytest"]]
    (fuzz,) = [c for c in app.registered_commands if c.callback and c.callback.__name__ == "fuzz"]
    hints = fuzz.callback.__annotations__
    assert [n for n in hints if n != "target"] == [o.field for o in options() if o.names["cli"]]


def test_a_configuration_turns_into_json_and_back(config: RunConfig) -> None:
    filled = config.but(targets=("naive",), properties=("oracle",), seconds=3.0, strict=True)
    again = RunConfig.from_json(filled.to_json())
    assert again == filled.but(records=None, corpus=again.corpus)
    assert again.corpus == filled.corpus.resolve()
    assert all(isinstance(option, Option) for option in options())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seconds": -1.0}, "seconds=-1: a positive number"),
        ({"cases": 0}, "cases=0: at least 1"),
        ({"workers": 0}, "workers=0: at least 1"),
        ({"call_seconds": 0.5}, "call_seconds=0.5: at least 1"),
    ],
)
def test_a_number_out_of_range_is_an_error(changes: dict[str, float], said: str) -> None:
    with pytest.raises(VerifyError, match=said):
        RunConfig(**changes)
