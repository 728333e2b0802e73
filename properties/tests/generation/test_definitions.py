"""A definition carries what others need of it: a mask, a distribution or a property that is added
in one place is probed, drawn, judged and shown.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from verify.cli.main import app
from verify.engine.drawing import draw
from verify.errors import VerifyError
from verify.generation.pairwise import levels, rows
from verify.properties.catalogue import PROPERTIES, check_known_issues
from verify.properties.property import Verdict, holds
from verify.properties.tests.support import searched
from verify.registry import REGISTRY, Kernel, KnownIssue, load_bundled
from verify.sandbox.capabilities import options
from verify.spec import inputs, masks
from verify.spec.case import Case, visibility
from verify.spec.distribution import distribution, drawn_from
from verify.spec.inputs import Recipe
from verify.spec.masks import Drawn, Kind, Mask
from verify.spec.problem import Problem
from verify.spec.requirements import Requirements


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1).double() for t in (k, v))
    s = q.double() @ k.mT * scale
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    return (torch.softmax(s, -1).nan_to_num() @ v).to(q.dtype)


def subject(name: str) -> Kernel:
    return Kernel(name, attend, frozenset({"scale", "mask"}))


def dilated(q, k, len_q, len_k, x, y):
    """Every x-th key, counted from the query's own (Beltagy et al. 2020, section 3.1)."""
    return (q - k) % x == 0


DILATED = Kind(
    dilated,
    "(step >= 1)",
    lambda a: len(a) == 1 and a[0] >= 1,
    lambda a, batch: [((a[0], 0),) * batch],
    "first",
    (Drawn("dilated", "dilated(2)", lambda b, q, k: masks.st.tuples(masks.st.integers(1, 5))),),
)


def test_a_mask_is_probed_drawn_judged_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(masks.KINDS, "dilated", DILATED)
    kernel = subject("sees a new mask")
    assert Mask.parse("dilated(2)") in options(kernel, "cpu").taken["mask"]
    assert "dilated" in {row["mask"] for row in rows(kernel, "cpu")}
    drawn: list[Case] = []
    for seed in range(10):
        draw(drawn.append, kernel, PROPERTIES["oracle"], "cpu", seed=seed)
    of_it = [case for case in drawn if "dilated" in case.problem.mask.names]
    assert len(of_it) > 10
    assert {levels(case)["mask"] for case in of_it} == {"dilated", "two"}
    assert all(Case.parse(str(case)) == case for case in of_it)
    seen = visibility(Problem(len_q=2, len_k=4, mask=Mask.parse("dilated(2)")), torch.device("cpu"))
    assert seen[0, 0].tolist() == [[True, False, True, False], [False, True, False, True]]
    assert searched(kernel, "oracle", judged=25).finding is None
    shown = CliRunner().invoke(app, ["masks", "--len-q", "2", "--len-k", "4"]).output
    assert "dilated(2)  Every x-th key" in shown
    assert "# . # .\n. # . #" in shown


def test_a_distribution_is_drawn_judged_and_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    known = inputs.DISTRIBUTIONS
    monkeypatch.setitem(known, "halves", known["constant"])  # so that it is taken out again

    @distribution({"halves": 3}, stresses={"delta": 4})
    def halves(rng, problem: Problem):
        """Every element 1/2."""
        return inputs.constant(rng, problem, 0.5)

    assert drawn_from().count("halves") == 3
    assert drawn_from("delta").count("halves") == 7
    drawn: list[Case] = []
    for seed in range(10):
        draw(drawn.append, subject("halved"), PROPERTIES["oracle"], "cpu", seed=seed)
    of_it = [case for case in drawn if case.recipe == Recipe("halves")]
    assert of_it
    assert bool((of_it[0].inputs().q == 0.5).all())
    assert all(Case.parse(str(case)) == case for case in of_it)


def test_a_property_is_judged_on_cases_that_meet_its_requirements(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = dict(PROPERTIES)
    judged: list[Problem] = []
    try:

        @holds(hides=True, no_bias=True)
        def looks(kernel: Kernel, case: Case, device: str) -> Verdict:
            """It looks."""
            judged.append(case.problem)
            return Verdict()

        assert PROPERTIES["looks"].needs == Requirements(hides=True, no_bias=True)
        assert searched(subject("looked at"), "looks", judged=30).judged == 30
    finally:
        for name in PROPERTIES.keys() - before.keys():
            del PROPERTIES[name]
    assert all(p.mask != masks.FULL and p.bias == "none" for p in judged)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"properties": ("orcale",)}, "properties='orcale' is unknown: one of oracle, "),
        ({"inputs": ("gauss",)}, "inputs='gauss' is unknown: one of integers, "),
        ({"layouts": ("zigzag",)}, "layouts='zigzag' is unknown: one of bhsd, "),
    ],
)
def test_a_known_issue_names_what_exists(names: dict[str, tuple[str]], said: str) -> None:
    issue = KnownIssue("off", lambda problem, device: True, **names)
    kernel = Kernel("misspelt", attend, frozenset({"scale", "mask"}), known_issues=(issue,))
    with pytest.raises(VerifyError, match="known issue 'off'") as raised:
        check_known_issues(kernel)
    assert said in str(raised.value)


def test_known_issues_of_bundled_kernels_name_what_exists() -> None:
    load_bundled("flex", "fa3_wheel")
    for kernel in REGISTRY.values():
        check_known_issues(kernel)
