"""The structure holds: who may import whom, where tolerances live, how large files grow, and that `kernels` stays free."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import verify
import verify.kernels
import verify.oracles
import verify.properties
import verify.reports

PACKAGES = {p.__name__: Path(p.__path__[0]) for p in (verify, verify.kernels, verify.oracles, verify.properties, verify.reports)}
ORDER = (
    "errors masks problem recipes arithmetic layouts case quantisation exact registry finding records measure"
    " bounds propagation backpropagation allowance expectation allocations settings guard environment corpus"
).split()
"""The vocabulary of verify/, each module importing only those before it."""
TOP = (
    "conventions determinism judging engine isolation worker pytest_plugin replaying fuzzing identify recording reporting"
    " benching cli_tables cli __main__ __init__"
).split()
"""Where everything meets."""
MAY_IMPORT = {
    "verify.kernels": {*ORDER[: ORDER.index("registry") + 1], "kernels"},
    "verify.oracles": {*ORDER[: ORDER.index("exact") + 1], "oracles"},
    "verify.reports": {"errors", "records", "measure", "reports"},
    "verify.properties": {
        *ORDER,
        *"determinism judging engine isolation pytest_plugin cli benching identify recording reporting".split(),
        *"oracles kernels properties reports".split(),
    },
}


def modules() -> Iterator[tuple[str, str, ast.Module, str]]:
    """(package, module, syntax tree, source) of every file of the project."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.glob("*.py")):
            source = path.read_text(encoding="utf-8")
            yield package, path.stem, ast.parse(source), source


def imported(tree: ast.Module) -> set[str]:
    """First component below `verify` of everything that a module imports from the project."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "verify":
            names |= {node.module.split(".")[1]} if "." in node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("verify.")}
    return names


def test_imports_point_one_way() -> None:
    for package, module, tree, _ in modules():
        if package == "verify":
            known = ORDER.index(module) if module in ORDER else None
            assert known is not None or module in TOP, f"verify/{module}.py has no place in the order"
            allowed = set(ORDER[:known]) if known is not None else {*ORDER, *TOP, "oracles", "kernels", "properties", "reports"}
        else:
            allowed = MAY_IMPORT[package]
        assert imported(tree) <= allowed, f"{package}.{module} imports {sorted(imported(tree) - allowed)}"


@pytest.mark.parametrize("module", ["verify", "verify.reports.terminal", "verify.reports.pages"])
def test_reports_and_the_decorator_load_without_torch(module: str) -> None:
    script = f"import sys; sys.modules['torch'] = None; import {module}"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_tolerances_live_in_bounds_alone() -> None:
    words = re.compile(r"allclose|assert_close|approx\(|\b[ar]tol\b|isclose")
    for package, module, _, source in modules():
        if (package, module) not in {("verify", "bounds"), ("verify.properties", "test_layers")}:
            assert not words.search(source), f"{package}.{module} compares with a tolerance of its own"


def test_files_stay_small() -> None:
    for package, module, _, source in modules():
        longest = 400 if package == "verify.kernels" else 250
        assert source.count("\n") <= longest, f"{package}.{module} has {source.count(chr(10))} lines, at most {longest}"


def test_kernels_is_not_ours() -> None:
    """Whoever has a package `kernels` (Hugging Face's, or a folder of their own) still gets it."""
    found = importlib.util.find_spec("kernels")
    assert found is None or PACKAGES["verify.kernels"] not in map(Path, found.submodule_search_locations or [])
    assert "kernels" not in sys.modules or sys.modules["kernels"].__name__ != "verify.kernels"
