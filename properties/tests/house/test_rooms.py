"""The structure holds: who may import whom, where tolerances live, how large files grow."""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import verify
import verify.kernels
import verify.oracles
import verify.properties
import verify.reports

ROOT = Path(__file__).parents[3]
UMBRELLA = (verify, verify.kernels, verify.oracles, verify.properties, verify.reports)
FOLDERS = {package.__name__: Path(package.__path__[0]) for package in UMBRELLA}
FILE_TOKENS = 2600
KERNEL_TOKENS = 5600
"""How large a file may grow; a kernel, an emulated one too, or a table of mutants is one thing."""
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def floors() -> dict[str, int]:
    """The floor of each room, from the table of rooms in ARCHITECTURE.md."""
    rows = re.findall(
        r"^\| (\d+) \| ([^|]+) \|", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), re.M
    )
    return {
        name.strip("/").removesuffix(".py").replace("/", "."): int(floor)
        for floor, cell in rows
        for name in re.findall(r"`([^`]+)`", cell)
    }


def modules() -> dict[str, Path]:
    """Every module that is shipped, by its dotted name."""
    found: dict[str, Path] = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder).with_suffix("").parts
            if "tests" not in inside:
                name = ".".join((package, *inside))
                found[name.removesuffix(".__init__")] = path
    return found


def room(module: str, known: dict[str, int]) -> str:
    """The room of a module: the longest name in the table that it begins with."""
    name = module.removeprefix("verify.").replace("__main__", "verify")
    while name not in known:
        assert "." in name, f"{module} is in no room of ARCHITECTURE.md's table"
        name = name.rpartition(".")[0]
    return name


def imported(tree: ast.Module, names: dict[str, Path]) -> Iterator[str]:
    """The modules of this project that a module imports, wherever in its text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "verify":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in names else f"{node.module}"
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "verify")


def arrows() -> dict[tuple[str, str], list[str]]:
    """(room, imported room) -> the imports between them, as text."""
    known, names, found = floors(), modules(), {}
    for module, path in names.items():
        for target in imported(ast.parse(path.read_text(encoding="utf-8")), names):
            pair = room(module, known), room(target, known)
            if pair[0] != pair[1]:
                found.setdefault(pair, []).append(f"{module} imports {target}")
    return found


def test_no_room_imports_one_on_its_own_floor_or_above() -> None:
    """So there is no circle among rooms either."""
    known = floors()
    upwards = [text for (a, b), texts in arrows().items() for text in texts if known[b] >= known[a]]
    assert len(known) > 15
    assert not upwards, "\n".join(upwards)


def test_the_table_has_no_room_that_is_not_there() -> None:
    known, names = floors(), modules()
    assert {room(module, known) for module in names} == set(known)


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = modules()
    graph = {
        module: set(imported(ast.parse(path.read_text(encoding="utf-8")), names)) & names.keys()
        for module, path in names.items()
    }
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for target in graph[module]:
                walk(target, (*path, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def test_only_the_plugin_imports_pytest() -> None:
    """pytest is one of two front ends, never the motor."""
    for module, path in modules().items():
        if module not in ("verify.pytest_plugin", "verify.properties.test_conformance"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"^\s*(import|from) _?pytest\b", text, re.M), module


@pytest.mark.parametrize(
    "module", ["verify", "verify.reports.terminal", "verify.reports.pages", "verify.records.events"]
)
def test_reports_records_and_the_decorator_load_without_torch(module: str) -> None:
    script = f"import sys; sys.modules['torch'] = None; import {module}"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_tolerances_live_in_bounds_alone() -> None:
    words = re.compile(r"allclose|assert_close|approx\(|\b[ar]tol\b|isclose")
    tests = {str(path): path for path in (ROOT / "properties" / "tests").rglob("*.py")}
    for name, path in {**modules(), **tests}.items():
        if name != "verify.bounds.constants" and path != Path(__file__):
            text = path.read_text(encoding="utf-8")
            assert not words.search(text), f"{name} compares with a tolerance of its own"


def token_types(text: str) -> Iterator[int]:
    """An f-string is one token, as before Python 3.12, which tells its parts apart."""
    inside = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        inside += (name == "FSTRING_START") - (name == "FSTRING_END")
        if not inside:
            yield token.type


def test_files_stay_small() -> None:
    for module, path in modules().items():
        kernel = module.startswith(("verify.kernels", "verify.oracles.emulator"))
        most = KERNEL_TOKENS if kernel else FILE_TOKENS
        text = path.read_text(encoding="utf-8")
        count = sum(kind not in NO_CODE for kind in token_types(text))
        assert count <= most, f"{module} has {count} tokens, at most {most}"


def test_kernels_is_not_ours() -> None:
    """Whoever has a package `kernels` (Hugging Face's, or a folder of their own) still gets it."""
    found = importlib.util.find_spec("kernels")
    theirs = map(Path, found.submodule_search_locations or []) if found else ()
    assert FOLDERS["verify.kernels"] not in theirs
    ours = sys.modules.get("kernels")
    assert ours is None or ours.__name__ != "verify.kernels"
