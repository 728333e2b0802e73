"""The cases that are drawn: every pair of options that a kernel takes, lengths around its tiles, a
corpus that is tried first.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from verify.engine.corpus import Corpus
from verify.generation.pairwise import coverage, covering_rows, levels, rows
from verify.generation.strategies import cases
from verify.kernels.flex import SHAPES, bucket
from verify.kernels.mutants.catalogue import control, mutant
from verify.properties.tests.support import searched
from verify.records.events import CaseStarted, Event
from verify.registry import Kernel, KnownIssue, find
from verify.sandbox.capabilities import options
from verify.spec.case import Case


@pytest.mark.parametrize("name", ["naive", "sdpa-flash", "sdpa-math"])
def test_the_rows_have_every_pair_that_the_kernel_takes(name: str) -> None:
    """Counted on dtype x mask."""
    kernel = find(name)[0]
    found = {(row["dtype"], row["mask"]) for row in rows(kernel, "cpu")}
    taken = options(kernel, "cpu").taken
    ways = {mask.way for mask in taken["mask"]}
    assert {(d, m) for d in taken["dtype"] for m in ways} <= found


def test_drawn_cases_reach_nearly_all_pairs_and_every_level() -> None:
    kernel = control("tiles of 64 x 64")
    drawn = _drawn(kernel, 500)
    had, every = coverage(rows(kernel, "cpu"), drawn)
    assert had > 0.9 * every
    seen = {pair for case in drawn for pair in levels(case).items()}
    assert {pair for row in rows(kernel, "cpu") for pair in row.items()} <= seen
    around = {n for tile in kernel.tiles for n in (tile - 1, tile, tile + 1, 2 * tile + 1)}
    assert around <= {n for case in drawn for n in (case.problem.len_q, case.problem.len_k)}


def test_a_kernel_with_buckets_is_drawn_in_their_shapes() -> None:
    """FlexAttention's: a head dim and a number of heads for each dtype, never a batch of 1, and all
    else as ever.
    """
    drawn = _drawn(replace(control("tiles of 64 x 64"), bucket=bucket), 100)
    shapes = {
        (p.dtype, p.dim_qk, p.dim_v, p.heads_q, p.heads_kv)
        for p in (case.problem for case in drawn)
    }
    assert shapes == {(dtype, dim, dim, *heads) for dtype, (dim, *heads) in SHAPES.items()}
    batches = {case.problem.batch for case in drawn}
    assert {2, 3} <= batches
    assert 1 not in batches
    assert len({case.problem.mask for case in drawn}) > 20


def _drawn(kernel: Kernel, number: int) -> list[Case]:
    found: list[Case] = []

    @seeded(1)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        backend="attention-verify",
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(kernel, "cpu"))
    def draw(case: Case) -> None:
        found.append(case)

    draw()
    return found


def test_a_pair_is_covered_by_a_case_that_has_both() -> None:
    kernel = find("naive")[0]
    case = Case.parse(
        "b2.h4:2.q5.k9.d8.fp16.window(2,0).as_bool.bias=hqk.softcap=1.0/normal#0@q=bshd"
    )
    taken = covering_rows(kernel, "cpu")
    assert coverage(taken, []) == (0, coverage(taken, [case])[1])
    assert coverage(taken, [case])[0] == len(list(combinations(levels(case), 2)))
    assert coverage(taken, [])[1] == coverage(rows(kernel, "cpu"), [])[1]


def test_the_corpus_is_tried_first_and_keeps_what_fails(tmp_path: Path) -> None:
    path, wrong = tmp_path / "corpus.tsv", mutant("one key too many")
    first = searched(wrong, "one-hot", judged=100, corpus=Corpus(path))
    assert first.finding is not None
    assert Corpus(path).cases("one-key-too-many", "one-hot") == [Case.parse(first.finding.case)]
    assert Corpus(path).cases("one-key-too-many", "ones") == []
    events: list[Event] = []
    again = searched(wrong, "one-hot", judged=100, seed=2, corpus=Corpus(path), events=events)
    assert again.judged == 0
    assert isinstance(events[0], CaseStarted)
    assert events[0].case == first.finding.case
    known = Kernel(
        "known",
        mutant("one key too many").fn,
        control("FP8").takes,
        known_issues=(KnownIssue("off", lambda p, device: True),),
    )
    searched(known, "one-hot", judged=3, corpus=Corpus(path))
    assert (
        len(Corpus(path).cases("known", "one-hot")) == 1
    )  # what shows a known defect is of interest, too
    path.write_text(path.read_text() + "one-key-too-many\tone-hot\tof another version\n")
    assert len(Corpus(path).cases("one-key-too-many", "one-hot")) == 1
