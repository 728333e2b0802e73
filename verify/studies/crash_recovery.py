"""Kills in the middle of a run: ``python -m verify.studies.crash_recovery --kills 50 --cases 120``.

`verify fuzz` runs once undisturbed. Then it runs again while SIGKILL strikes now its worker, now
the whole of it, at random moments, and `verify resume` goes on each time. In the end both must have
judged the same cases: none missing, none twice.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from verify.records.journal import cases as cases_of

Judged = tuple[str, str, int | None, str, str]


def main(
    kernel: Annotated[str, typer.Option()] = "naive",
    cases: Annotated[int, typer.Option(help="for each property")] = 20,
    kills: Annotated[int, typer.Option()] = 10,
    within: Annotated[float, typer.Option(help="seconds between two kills, at most")] = 12.0,
    law: Annotated[
        list[str] | None, typer.Option(help="only this property; may be repeated")
    ] = None,
    seed: Annotated[int, typer.Option()] = 1,
    device: Annotated[str, typer.Option()] = "cpu",
) -> None:
    """Print what was killed and whether the cases are the same. Exit code 1 where they are not."""
    with tempfile.TemporaryDirectory() as folder:
        asked = [
            "fuzz",
            str(kernel),
            "--cases",
            str(cases),
            "--seed",
            str(seed),
            "--device",
            device,
        ]
        asked += [f"--property={name}" for name in law or []]
        places = [
            Path(folder) / name for name in ("whole", "killed")
        ]  # each with a corpus of its own
        for place in places:
            place.mkdir()
        start = time.monotonic()
        _verify(str(places[0]), [*asked, "--out", "run"]).wait()
        middle = time.monotonic()
        rng = random.Random(seed)  # noqa: S311 - nothing secret
        struck = strike(str(places[1]), [*asked, "--out", "run"], kills, within, rng)
        spent = f"{middle - start:.0f} s undisturbed, {time.monotonic() - middle:.0f} s with kills"
        whole, killed = (judged(place / "run") for place in places)
    missing, twice = whole - killed, killed - whole
    print(f"{kernel}: {spent}; killed {dict(struck)}")
    print(
        f"judged {whole.total()} and {killed.total()} cases; missing {missing.total()}, twice or "
        f"others {twice.total()}"
    )
    for what, odd in (("missing", missing), ("odd", twice)):
        for case in list(odd)[:5]:
            print(what, *case)
    raise typer.Exit(int(bool(missing or twice)))


def strike(
    folder: str, asked: list[str], kills: int, within: float, chance: random.Random
) -> Counter[str]:
    """Run, kill, resume, until so many kills have struck; then run to the end. What was killed how
    often.
    """
    struck: Counter[str] = Counter()
    process = _verify(folder, asked)
    while struck.total() < kills:
        time.sleep(chance.uniform(0.2, within))
        if process.poll() is not None:
            break  # it came to its end
        victims = list(_workers(process.pid))
        if victims and chance.random() < 0.5:
            os.kill(chance.choice(victims), signal.SIGKILL)
            struck["worker"] += 1
        elif any(Path(folder, asked[-1]).glob("*.jsonl")):
            process.kill()
            process.wait()
            struck["run"] += 1
            process = _verify(folder, ["resume", asked[-1]])
    process.wait()
    while _verify(folder, ["resume", asked[-1]]).wait() != 2:  # until nothing is left to resume
        continue
    return struck


def judged(folder: Path) -> Counter[Judged]:
    """Every case of the records that got an outcome."""
    return Counter((c.kernel, c.property, c.seed, c.case, c.outcome) for c in cases_of(folder))


def _verify(folder: str, arguments: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "verify", *arguments]
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=folder, stdout=nowhere, stderr=nowhere)  # noqa: S603


def _workers(pid: int) -> Iterator[int]:
    """The processes that call kernels: children of the server that a run started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    servers = [child for child, parent in parents.items() if parent == pid]
    yield from (child for child, parent in parents.items() if parent in servers)


if __name__ == "__main__":
    typer.run(main)
