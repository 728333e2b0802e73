"""The suite finds bugs: every known-wrong kernel is caught by the property it names; correct
variants are not accused.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from verify.kernels.mutants.catalogue import CONTROLS, MUTANTS, control, honest
from verify.kernels.mutants.held_out import BLIND
from verify.kernels.mutants.memory import CHANCE
from verify.properties.catalogue import PROPERTIES
from verify.properties.tests.support import searched
from verify.studies import mutation

pytestmark = pytest.mark.mutation

CASES = 600
"""Far more than `verify power` needs in the median, so that a seed of bad luck is no failure."""


def test_there_are_enough_of_every_class() -> None:
    assert {m.kind for m in MUTANTS.values()} == set("ABCDEFGHIJKLM")
    assert len(MUTANTS) - len(BLIND) >= 60
    assert len(CONTROLS) >= 10


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_known_wrong_kernel_is_caught(fault: str) -> None:
    CHANCE.manual_seed(3)
    prop = MUTANTS[fault].law
    found = searched(mutation.hunted(fault), prop, judged=CASES, seed=3, shrink_seconds=0.0)
    assert found.finding is not None, f"{fault} passed {found.judged} cases of {prop}"


@pytest.mark.parametrize("name", CONTROLS)
def test_a_correct_variant_is_not_accused(name: str) -> None:
    """On problems of a few tiles; `verify power --controls` has larger ones."""
    variant = replace(control(name), affordable=lambda device: 1)
    for law in PROPERTIES.values():
        if not law.refusal(variant, "cpu"):
            found = searched(variant, law.name, judged=3, seed=5)
            assert found.finding is None, f"{law.name}: {found.finding}"


def test_every_mutant_is_a_control_but_for_its_fault() -> None:
    assert {honest(fault) for fault in MUTANTS} <= set(CONTROLS)


def test_the_correct_variants_alone_are_judged_by_every_property(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`verify power --seeds 0`: no mutant is hunted; the cases of a variant are shared among its
    properties.
    """
    monkeypatch.setattr(mutation, "CONTROLS", {"FP8": CONTROLS["FP8"]})
    said = Console(record=True, width=120)
    assert (
        mutation.run_power(
            [], seeds=range(3, 3), matrix=False, controls=20, out=tmp_path, console=said
        )
        == 0
    )
    counted = re.search(r"correct variants: 1, (\d+) cases judged", said.export_text())
    assert counted
    assert 20 <= int(counted[1]) <= len(PROPERTIES)
    assert "Known-wrong" not in (tmp_path / "power.md").read_text()
