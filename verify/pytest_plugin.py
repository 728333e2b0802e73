"""The pytest front end of the engine: options made from RunConfig, the matrix kernel x property as
tests, GPUs shared among xdist workers, the closing tables. Nothing else here imports pytest.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from verify import environment
from verify.engine.config import CASES, CORPUS, LEAST_CASES, RunConfig, options
from verify.errors import RecordsError, VerifyError
from verify.records.events import Ended, Event, FindingShrunk, PropertyFinished
from verify.records.journal import read

if TYPE_CHECKING:
    from verify.engine.session import Session
    from verify.properties.catalogue import Property

RUN: pytest.StashKey[Run] = pytest.StashKey()
FOLDER: pytest.StashKey[Path] = pytest.StashKey()
SHARED: pytest.StashKey[tempfile.TemporaryDirectory[str]] = pytest.StashKey()
MARKERS = {
    "slow": "takes many seconds: starts processes, compiles",
    "interpreter": "runs a kernel in Triton's interpreter",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add an option for each field of RunConfig that has one here."""
    group = parser.getgroup("verify", "attention-verify")
    for option in options():
        name = option.names["pytest"]
        if not name:
            continue
        settings: dict[str, Any] = {"dest": f"verify_{option.field}", "help": option.text}
        if option.kind is bool:
            settings["action"] = "store_true"
        else:
            settings |= {"type": option.kind, "metavar": option.metavar, "default": None}
            settings["action"] = "append" if option.many else "store"
        group.addoption(name, **settings)


def pytest_configure(config: pytest.Config) -> None:
    """Choose the device before anything imports Triton; give a worker its share of the machine."""
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if hasattr(config, "workerinput"):
        os.environ[environment.OUTSIDE] = config.workerinput["outside"]
    else:
        config.stash[SHARED] = tempfile.TemporaryDirectory(prefix="verify-")
    try:
        environment.prepare(_given(config, "device"))
        config_of(config)
    except VerifyError as error:
        raise pytest.UsageError(str(error)) from error
    environment.share_machine(os.environ.get("PYTEST_XDIST_WORKER"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: as many workers as suit the machine."""
    return environment.workers(_given(config, "device"))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """Workers write where the controller reads."""
    node.workerinput["records"] = str(_folder(node.config))
    node.workerinput["shared"] = node.config.stash[SHARED].name
    node.workerinput["outside"] = str(environment.processes())


def _given(config: pytest.Config, field: str) -> Any:
    return config.getoption(f"verify_{field}", None)


def config_of(config: pytest.Config) -> RunConfig:
    """What this pytest run is asked for."""
    asked = RunConfig.of(lambda option: _given(config, option.field) or None)
    device = environment.prepare(asked.device or None)
    corpus = config.rootpath / CORPUS if _given(config, "corpus") is None else asked.corpus
    return asked.but(device=device, records=_folder(config), corpus=corpus)


def _folder(config: pytest.Config) -> Path:
    if FOLDER not in config.stash:
        given = getattr(config, "workerinput", {}).get("records") or _given(config, "records")
        now = time.strftime("%Y%m%d-%H%M%S")
        config.stash[FOLDER] = Path(given or config.rootpath / ".verify" / "runs" / now)
    return config.stash[FOLDER]


class Run:
    """The engine's session of one pytest process, and what tests ask of it."""

    def __init__(self, config: pytest.Config) -> None:
        from verify.engine.session import Session
        from verify.records.shared import Shared

        self.config = config_of(config)
        journal = os.environ.get("PYTEST_XDIST_WORKER", "main")
        folder = getattr(config, "workerinput", {}).get("shared")
        shared = Shared(Path(folder) if folder else None)
        self.session: Session = Session(self.config, journal=journal, shared=shared)
        self.device = self.session.device
        self.kernels = self.session.kernels
        self.unavailable = self.session.unavailable
        self._deadline: float | None = None
        self._left = 0

    def search(self, target: str, prop: Property, tests_left: int) -> list[Event]:
        """Search for a case that breaks a property; the events of it. A time budget is shared among
        the tests that are left. Ends the run where no record can be written: what is measured then
        would be lost.
        """
        from verify.engine.search import Budget

        now = time.monotonic()
        deadline = None
        if self.config.seconds is not None:
            self._deadline = self._deadline or now + self.config.seconds
            deadline = now + max(0.0, self._deadline - now) / tests_left
        budget = Budget(self._cases(target, prop), deadline, self.config.shrink_seconds)
        try:
            return list(self.session.search(target, prop, budget))
        except RecordsError as error:
            pytest.exit(str(error))

    def _cases(self, target: str, prop: Property) -> int | None:
        """How many cases to judge, where no time is given: as asked, or as usual."""
        if self.config.cases or self.config.seconds:
            return self.config.cases
        affordable = self.kernels[target].affordable(self.device)
        if affordable is None:
            return CASES[self.device]
        calls = prop.calls * (2 if prop.needs.grads else 1)
        cases = affordable if prop.core else max(LEAST_CASES, affordable // calls)
        return min(CASES[self.device], cases)

    def marks(self, target: str) -> list[pytest.MarkDecorator]:
        """How tests of this kernel are marked."""
        kernel = self.kernels.get(target)
        if kernel is None or kernel.affordable(self.device) is None:
            return []
        return [pytest.mark.interpreter if self.device == "cpu" else pytest.mark.slow]

    def fails(self, target: str) -> bool:
        """Whether a finding in this kernel fails the run: not in other people's kernels, unless
        that was asked for.
        """
        return self.config.strict or not self.kernels[target].vendor


def run_of(config: pytest.Config) -> Run:
    """The process's run, made on first use."""
    if RUN not in config.stash:
        try:
            config.stash[RUN] = Run(config)
        except VerifyError as error:
            raise pytest.UsageError(str(error)) from error
    return config.stash[RUN]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """What a test used of the GPU is for the others."""
    environment.give_back()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write down which pairs of options the kernels take, for the closing table."""
    if RUN in session.config.stash:
        for _ in session.config.stash[RUN].session.pairs():
            pass


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the workers that call kernels; remove what the processes shared."""
    if RUN in config.stash:
        config.stash[RUN].session.close()
    if SHARED in config.stash:
        config.stash[SHARED].cleanup()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The matrix: a test that asks for `target` and `prop` runs for each kernel and property."""
    if {"target", "prop"} <= set(metafunc.fixturenames):
        run = run_of(metafunc.config)
        targets = [*run.kernels, *run.unavailable]
        cells = [
            pytest.param(target, prop, id=f"{target}-{prop.name}", marks=run.marks(target))
            for target in targets
            for prop in run.session.properties
        ]
        metafunc.parametrize(("target", "prop"), cells)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """xdist deals tests out in as many parts as there are workers: each part begins with its share
    of the slow ones, then of the matrix, so that no worker is left alone with them at the end.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers == 1:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    slow.sort(key=_of_matrix)
    matrix = [item for item in items if _of_matrix(item) and item not in slow]
    rest = [item for item in items if item not in {*slow, *matrix}]
    items[:] = [
        item
        for n in range(workers)
        for part in (slow[n::workers], _share(matrix, n, workers), _share(rest, n, workers))
        for item in part
    ]


def _of_matrix(item: pytest.Item) -> bool:
    return {"target", "prop"} <= set(getattr(item, "fixturenames", ()))


def _share(items: list[pytest.Item], number: int, of: int) -> list[pytest.Item]:
    """Neighbours stay together: they share kernels' processes and fixtures."""
    return items[len(items) * number // of : len(items) * (number + 1) // of]


@pytest.fixture(scope="session")
def run(pytestconfig: pytest.Config) -> Run:
    """What the tests of this process share."""
    return run_of(pytestconfig)


def judge(run: Run, target: str, prop: Property, request: pytest.FixtureRequest) -> None:
    """The body of a test of the matrix: the property holds for the kernel on every case that was
    drawn. Fails with a finding; in other people's kernels it is reported as an expected failure.
    Skips with the reason where nothing could be judged.
    """
    from verify.engine.evaluate import replay_command
    from verify.spec.case import Case

    if target in run.unavailable:
        pytest.skip(f"{target} is unavailable: {run.unavailable[target]}")
    for event in run.search(target, prop, _tests_left(request)):
        if isinstance(event, FindingShrunk):
            replay = replay_command(target, prop, Case.parse(event.case))
            text = f"{event.kernel} breaks {prop.name}: {event.reason}\n{replay}"
            if run.fails(target):
                pytest.fail(text, pytrace=False)
            pytest.xfail(f"{run.kernels[target].vendor}'s: {text}")
        if isinstance(event, PropertyFinished) and event.ended is Ended.NO_TIME:
            pytest.skip(f"{target}: no time")
        if isinstance(event, PropertyFinished) and event.ended is Ended.UNSUPPORTED:
            pytest.skip(f"{target}: {event.reason or 'no case could be judged'}")


def _tests_left(request: pytest.FixtureRequest) -> int:
    """Tests of the matrix from this one on (in one process)."""
    name = request.node.originalname
    items = [item for item in request.session.items if getattr(item, "originalname", "") == name]
    return len(items) - items.index(request.node)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Everything that can change a number."""
    facts = environment.describe(_given(config, "device") or environment.prepare())
    return ["verify: " + ", ".join(f"{name} {value}" for name, value in facts.items())]


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Kernel x property, what was found in other people's kernels, what was not judged and why."""
    from verify.engine.coverage import pairs_judged
    from verify.reports.terminal import show_run

    folder = config.stash.get(FOLDER, None)
    if folder is not None and folder.is_dir():
        terminalreporter.write_sep("=", "attention-verify")
        events = list(read(folder))
        show_run(events, write=terminalreporter.write_line)
        for line in pairs_judged(events):
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"records: {folder}")
