"""The pytest side of the runner: options, the matrix kernel x property, GPUs shared among xdist
workers, the closing tables.
"""

from __future__ import annotations

import json
import os
import time
from argparse import SUPPRESS
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from verify import environment
from verify.errors import VerifyError
from verify.records.journal import JUDGED as WERE_JUDGED
from verify.records.journal import Journal, Record, done, read

if TYPE_CHECKING:
    from verify.engine.evaluate import Judging
    from verify.sandbox.process import Isolated

JUDGED = {"cpu": 25, "cuda": 40}
"""Cases judged for each kernel and property in a plain `pytest` run, ..."""
PATIENCE = 4.0
"""... or as many as so many seconds allow: an interpreted kernel is slow. The closing table says
how many it were.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of a run; the command line of `verify` sets them too."""
    group = parser.getgroup("verify", "attention-verify")
    group.addoption(
        "--kernel",
        action="append",
        metavar="TARGET",
        help="a kernel's name or path/to/file.py[::name]; default: all bundled",
    )
    group.addoption("--property", action="append", metavar="NAME", help="judge only this property")
    group.addoption(
        "--device", default=None, help="cpu or cuda; default: cuda where there is a GPU"
    )
    group.addoption(
        "--seconds",
        type=float,
        default=None,
        help="time for the whole kernel x property matrix instead of a number of cases",
    )
    group.addoption(
        "--cases", type=int, default=None, help="cases to judge for each kernel and property"
    )
    group.addoption("--draw-seed", type=int, default=0, help="seed of the drawn cases")
    group.addoption(
        "--corpus",
        default=None,
        metavar="FILE",
        help="cases to try first; default: .verify/corpus.tsv",
    )
    group.addoption(
        "--in-process",
        action="store_true",
        help="call kernels in pytest's own process (for a debugger): a crash ends the run",
    )
    group.addoption(
        "--call-seconds",
        type=float,
        default=None,
        help="a call that takes longer hangs; default: 60",
    )
    group.addoption(
        "--shrink-seconds", type=float, default=20.0, help="for each finding; default: 20"
    )
    group.addoption(
        "--resume",
        action="store_true",
        help="what the folder of --records holds is not judged again",
    )
    group.addoption("--run", default=None, help=SUPPRESS)
    group.addoption(
        "--records",
        default=None,
        metavar="DIR",
        help="where records are appended; default: .verify/runs/<time>",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose the device before anything imports Triton; give a worker its share of the machine."""
    try:
        environment.prepare(config.getoption("--device"))
    except VerifyError as error:
        raise pytest.UsageError(str(error)) from error
    environment.share_machine(os.environ.get("PYTEST_XDIST_WORKER"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """`-n auto`: a few workers for each GPU; without a GPU, xdist's own count of cores."""
    return environment.workers() if config.getoption("--device") != "cpu" else None


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """Workers write where the controller reads."""
    node.workerinput["records"] = str(_folder(node.config))


class Run:
    """What tests of one process share: device, kernels, the journal, the corpus."""

    def __init__(self, config: pytest.Config) -> None:
        from verify import registry
        from verify.engine.corpus import Corpus
        from verify.sandbox.process import Limits

        self.device = environment.prepare(config.getoption("--device"))
        targets = config.getoption("--kernel")
        if targets:
            self.kernels = {
                n: k for t in targets for n, k in registry.named(t, registry.find(t)).items()
            }
        else:
            registry.load_bundled()
            self.kernels = dict(registry.REGISTRY)
        self.unavailable = {} if targets else dict(registry.UNAVAILABLE)
        folder = _folder(config)
        self.judged, self.ended = done(folder) if config.getoption("--resume") else ({}, {})
        asked = json.loads(config.getoption("--run") or "null")
        self.journal = Journal(folder, os.environ.get("PYTEST_XDIST_WORKER", "main"), asked)
        self.corpus = Corpus(
            Path(config.getoption("--corpus") or config.rootpath / ".verify" / "corpus.tsv")
        )
        self.progress: Callable[[Record], None] = lambda record: None
        self.full: VerifyError | None = None
        self._in_process = config.getoption("--in-process")
        self._limits = Limits(*filter(None, [config.getoption("--call-seconds")]))
        self._isolated: Isolated | None = None

    def judging(self, target: str) -> Judging:
        """Who judges the cases of this kernel: a worker process of its own."""
        from verify.engine.evaluate import judge
        from verify.sandbox.process import Isolated

        if self._in_process:
            return judge
        if self._isolated is None or self._isolated.target != target:
            self.close()
            self._isolated = Isolated(target, self.kernels[target], self.device, self._limits)
            self._isolated.options()
        return self._isolated.judge

    def close(self) -> None:
        """End the worker."""
        if self._isolated:
            self._isolated.close()
        self._isolated = None

    def record(self, record: Record) -> None:
        """Append a record and show it. Ends the run where it cannot be written: what is measured
        then would be lost.
        """
        try:
            self.journal.append(record)
        except VerifyError as error:
            self.full = error
            pytest.exit(str(error))
        self.progress(record)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the worker that calls kernels."""
    if RUN in config.stash:
        config.stash[RUN].close()
        config.stash[RUN].journal.close()


RUN: pytest.StashKey[Run] = pytest.StashKey()
FOLDER: pytest.StashKey[Path] = pytest.StashKey()


def run_of(config: pytest.Config) -> Run:
    """The process's run, made on first use."""
    if RUN not in config.stash:
        try:
            config.stash[RUN] = Run(config)
        except VerifyError as error:
            raise pytest.UsageError(str(error)) from error
    return config.stash[RUN]


def _folder(config: pytest.Config) -> Path:
    if FOLDER not in config.stash:
        given = getattr(config, "workerinput", {}).get("records") or config.getoption("--records")
        config.stash[FOLDER] = Path(
            given or config.rootpath / ".verify" / "runs" / time.strftime("%Y%m%d-%H%M%S")
        )
    return config.stash[FOLDER]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The matrix: every test that asks for `target` and `law` runs for each kernel and property."""
    if {"target", "law"} <= set(metafunc.fixturenames):
        from verify.properties.catalogue import PROPERTIES

        run = run_of(metafunc.config)
        wanted = metafunc.config.getoption("--property") or list(PROPERTIES)
        if unknown := [name for name in wanted if name not in PROPERTIES]:
            raise pytest.UsageError(
                f"property {unknown[0]!r} is unknown: one of {', '.join(PROPERTIES)}"
            )
        pairs = [(t, PROPERTIES[p]) for t in (*run.kernels, *run.unavailable) for p in wanted]
        metafunc.parametrize(("target", "law"), pairs, ids=[f"{t}-{law.name}" for t, law in pairs])


@pytest.fixture(scope="session")
def run(pytestconfig: pytest.Config) -> Run:
    """What the tests of this process share."""
    return run_of(pytestconfig)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Everything that can change a number."""
    facts = environment.describe(config.getoption("--device") or environment.prepare())
    return ["verify: " + ", ".join(f"{name} {value}" for name, value in facts.items())]


def covered(run: Run, records: list[Record]) -> Iterator[str]:
    """For each kernel, how many pairs of its options the judged cases had."""
    from verify.generation.pairwise import coverage
    from verify.spec.case import Case

    for target, kernel in run.kernels.items():
        judged = {r.case for r in records if r.kernel == kernel.name and r.verdict in WERE_JUDGED}
        if judged:
            run.judging(target)  # knows what the kernel takes
            had, all_pairs = coverage(kernel, run.device, map(Case.parse, judged))
            yield (
                f"{kernel.name}: pairs of options judged: {had} of {all_pairs} "
                f"({100 * had / all_pairs:.0f} %)"
            )


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Kernel x property, and what each kernel does not support with the reason."""
    from verify.reports.terminal import show_run

    if FOLDER in config.stash and config.stash[FOLDER].is_dir():
        terminalreporter.write_sep("=", "attention-verify")
        records = list(read(config.stash[FOLDER]))
        show_run(records, write=terminalreporter.write_line)
        for line in covered(run_of(config), records):
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"records: {config.stash[FOLDER]}")
