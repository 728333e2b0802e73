"""What is made of findings: one for each cause, as small as it gets, with the call that is wrong;
or none, where a kernel is right and only declared otherwise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from verify import registry
from verify.diagnosis.derived import Derived
from verify.diagnosis.explain import explain, explain_call
from verify.engine import causes
from verify.engine.clock import Alarm, Clock
from verify.engine.config import RunConfig
from verify.engine.evaluate import evaluate
from verify.engine.otherwise import COMPILED, Otherwise
from verify.engine.run import Run as WholeRun
from verify.engine.session import Session
from verify.errors import VerifyError
from verify.inspection.identify import identified, ordinary
from verify.inspection.questions import TORCH_CPU_ULP
from verify.properties.catalogue import PROPERTIES
from verify.properties.tests.support import ATTEND, searched
from verify.pytest_plugin import Run
from verify.records.events import (
    CaseFinished,
    DeclaredOtherwise,
    Event,
    FindingShrunk,
    Outcome,
)
from verify.records.shared import Shared
from verify.records.summary import OTHERWISE, declare, exit_code, findings
from verify.registry import Kernel, find
from verify.sandbox.capabilities import learn, options
from verify.sandbox.process import Interrupted
from verify.spec.arithmetic import EAGER, FLASH, Arithmetic
from verify.spec.case import Case
from verify.spec.finding import Finding

PASSED = Outcome.PASSED

FILE = f"""{ATTEND}
@kernel
def steep(q, k, v, *, scale, mask):
    return attend(q, k, v, 1.1 * scale, mask)

@kernel
def no_windows(q, k, v, *, scale, mask, problem):
    wrong = "window" in problem.mask.names
    return attend(q, k, v, 2 * scale if wrong else scale, mask)

@kernel
def last_key(q, k, v, *, scale, mask):
    if k.shape[2] % 2 and k.shape[2] > 1:
        seen = torch.arange(k.shape[2], device=k.device) < k.shape[2] - 1
        mask = seen.expand(1, 1, q.shape[2], -1) if mask is None else mask & seen
    return attend(q, k, v, scale, mask)

@kernel
def careless(q, k, v, *, scale, mask):
    return attend(q, k, v, scale, mask)

@kernel
def raises(q, k, v, *, scale, mask):
    if q.shape[2] > 4:
        q.view(3, -1, 7)
    return attend(q, k, v, scale, mask)

@kernel
def refuses(q, k, v, *, scale, mask):
    if q.shape[2] % 5 == 3:
        raise ValueError("not so many queries")
    return attend(q, k, v, scale, mask)

@kernel
def eager(q, k, v, *, scale, mask):
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    s = q @ k.mT * scale
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    return torch.softmax(s, -1) @ v

@kernel
def normalised_first(q, k, v, *, scale, mask):
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    s = q.float() @ k.float().mT * scale
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    p = torch.softmax(s, -1).nan_to_num().to(q.dtype)
    return (p.float() @ v.float()).to(q.dtype).detach()

@kernel
def stored_once(q, k, v, *, scale, mask):
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    s = (q.float() @ k.float().mT * scale).to(q.dtype)
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    return torch.softmax(s.float(), -1).nan_to_num().to(q.dtype) @ v

@kernel
def cycles(q, k, v, *, scale, mask):
    group = q.shape[1] // k.shape[1]
    return attend(q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), scale, mask)
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))
    (tmp_path / "mine.py").write_text(FILE)
    return str(tmp_path / "mine.py")


def run_of(
    target: str,
    run: Run,
    *props: str,
    cases: int = 40,
    seed: int = 1,
    strict: bool = False,
) -> list[Event]:
    folder = Path(target.partition("::")[0]).parent
    config = RunConfig(
        targets=(target,),
        properties=props,
        cases=cases,
        seed=seed,
        device=run.device,
        records=folder / "run",
        corpus=folder / "corpus.tsv",
        strict=strict,
        in_process=True,  # so that which finding comes first depends on no clock
    )
    with Session(config) as session:
        return list(WholeRun(session).events())


def test_one_cause_is_one_finding(file: str, run: Run) -> None:
    props = ("oracle", "gradients", "call-sequence", "key-permutation", "reject")
    events = run_of(f"{file}::steep", run, *props)
    scale, style = findings(events)
    assert {scale.property, *scale.also} >= {"oracle", "gradients", "call-sequence"}
    assert (style.property, style.style) == ("reject", True)
    assert Case.parse(scale.case).problem.len_k == 2
    assert exit_code(events, strict=False) == 1


def test_a_kernel_is_judged_with_the_mask_that_it_always_applies(tmp_path: Path, run: Run) -> None:
    file = tmp_path / "always.py"
    file.write_text(
        f"{ATTEND}\n\n@kernel\ndef always(q, k, v, *, scale):\n"
        "    shape = q.shape[2], k.shape[2]\n"
        "    mask = torch.ones(shape, dtype=torch.bool, device=q.device).tril()\n"
        "    return attend(q, k, v, scale, mask)\n"
    )
    events = run_of(f"{file}::always", run, "oracle", cases=20)
    (found,) = (e for e in events if isinstance(e, DeclaredOtherwise))
    assert found.declare == "own_mask='causal_upper_left'"
    judged = [e for e in events if isinstance(e, CaseFinished) and e.outcome is PASSED]
    assert len(judged) > 10
    assert exit_code(events, strict=False) == OTHERWISE


def test_a_state_that_every_call_changes_is_one_finding(tmp_path: Path, run: Run) -> None:
    file = tmp_path / "draws.py"
    file.write_text(
        f"{ATTEND}\n\n@kernel\ndef draws(q, k, v, *, scale, mask):\n"
        "    torch.rand(1)\n    return attend(q, k, v, scale, mask)\n"
    )
    props = ("oracle", "query-scaling", "key-sums")
    events = run_of(f"{file}::draws", run, *props, cases=15)
    (found,) = findings(events)
    assert found.reason == "changed torch's random state"
    passed = {e.property for e in events if isinstance(e, CaseFinished) and e.outcome is PASSED}
    assert passed == {*props}
    assert exit_code(events, strict=False) == 1


def test_style_alone_fails_a_strict_run_only(file: str, run: Run) -> None:
    events = run_of(f"{file}::careless", run, "oracle", "reject", cases=5)
    assert [found.property for found in findings(events)] == ["reject"]
    assert exit_code(events, strict=False) == 0
    assert exit_code(events, strict=True) == 1


def test_what_a_finding_needs_is_set_aside_and_the_run_goes_on(file: str, run: Run) -> None:
    if run.device != "cpu":
        pytest.skip("a GPU's cases may have no second one with all that the first needs")
    events = run_of(f"{file}::no-windows", run, "oracle", "value-scaling", cases=150, seed=3)
    (found,) = findings(events)
    assert Case.parse(found.case).problem.mask.names == {"window"}
    aside = [e for e in events if isinstance(e, CaseFinished) and "set aside" in e.reason]
    judged = [e for e in events if isinstance(e, CaseFinished) and e.outcome is PASSED]
    assert aside
    assert all(Case.parse(e.case).problem.mask.names & {"window"} for e in aside)
    assert len(judged) > 100


def test_the_call_that_is_wrong_is_named_and_replayed(file: str, run: Run) -> None:
    """Of even lengths: the property's own call, of one key less, is wrong."""
    (kernel,) = find(f"{file}::last-key")
    case = Case.parse("b1.h1.q2.k4.d1.fp32.causal_lower_right/integers#0")
    lines = explain(kernel, run.device, case, "prefix")
    named = next(line for line in lines if "another call is not: " in line)
    derived = Derived.parse(named.partition("is not: ")[2].partition(": ")[0])
    assert derived is not None
    assert str(derived) == f"{case}~prefix:2"
    assert "likely stage: the tail of the keys" in "\n".join(lines)
    assert explain_call(kernel, run.device, derived)
    assert not explain_call(kernel, run.device, Derived(case, "prefix", 1))
    with pytest.raises(VerifyError, match="makes 2 calls"):
        explain_call(kernel, run.device, Derived(case, "prefix", 9))
    with pytest.raises(VerifyError, match="write it like CASE~prefix:2"):
        Derived.parse(f"{case}~prefix")


def test_a_case_is_shrunk_to_the_options_that_it_needs(file: str) -> None:
    (kernel,) = find(f"{file}::last-key")
    found = searched(kernel, "oracle", judged=200, shrink_seconds=100).finding
    assert found is not None
    assert found.case in (
        "b1.h1.q1.k3.d1.fp32.full/integers#0",
        "b1.h1.q1.k3.d1.fp32.full/integers#1",
        "b1.h1.q1.k3.d1.fp32.full/normal#0",
    )


def test_what_a_kernel_raises_of_its_own_accord_is_a_refusal(file: str, run: Run) -> None:
    events = run_of(f"{file}::refuses", run, "oracle", cases=60)
    refused = [e for e in events if isinstance(e, CaseFinished) and e.outcome is Outcome.REFUSED]
    assert refused
    assert all("raised ValueError: not so many queries" in e.reason for e in refused)
    assert not findings(events)
    assert exit_code(events, strict=False) == 0
    assert exit_code(events, strict=True) == 1


def test_what_it_runs_into_is_a_finding_with_its_own_line(file: str) -> None:
    (kernel,) = find(f"{file}::raises")
    found = searched(kernel, "oracle", judged=60).finding
    assert found is None or "mine.py:" in found.reason


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("eager", OTHERWISE, ("stored_scores='input'", "empty_row='nan'")),
        ("stored-once", OTHERWISE, ("stored_scores='input', normalized_probs=True",)),
        ("normalised-first", 0, ()),  # as one whose exponents are relative to a bound of them
        ("cycles", OTHERWISE, ("head_map='cycle'",)),
    ],
)
def test_right_but_not_as_declared(
    name: str, code: int, says: tuple[str, ...], file: str, run: Run
) -> None:
    if run.device != "cpu":
        pytest.skip("products of half precision are summed otherwise on a GPU")
    events = run_of(f"{file}::{name}", run, "oracle", cases=60, seed=2)
    assert not findings(events)
    declared = declare(events).get(name, "")
    assert [line for line in says if line not in declared] == []
    assert bool(declared) is bool(says)
    assert exit_code(events, strict=False) == code


def test_a_strict_run_judges_what_is_declared(file: str, run: Run) -> None:
    events = run_of(f"{file}::cycles", run, "oracle", cases=40, strict=True)
    assert not any(isinstance(event, DeclaredOtherwise) for event in events)
    assert "h % heads_kv" in " ".join(findings(events)[0].explained.why)  # type: ignore[union-attr]


def test_causes_are_told_apart() -> None:
    line = "raised ValueError: size 7 (a.py:3)"
    assert causes.key("ones", line, []) == causes.key("hull", line.replace("7", "9"), [])
    assert causes.key("ones", line, []) != causes.key("ones", line.replace(":3", ":4"), [])
    scale = ["wrong: out", "likely stage: the scale (out is that of 1.1 times the scale)"]
    other = ["wrong: dq", "likely stage: the scale (out is that of 1.09 times the scale)"]
    assert causes.key("oracle", "out[b0] = 1", scale) == causes.key("ones", "dq[b1] = 2", other)
    assert causes.key("oracle", "out = 1", []) != causes.key("ones", "out = 1", [])


def test_the_end_comes_when_it_was_asked_for() -> None:
    clock = Clock(100.0, 60.0)
    assert clock.since < clock.judge_until < clock.end < clock.explain_until
    assert clock.end == 160.0
    assert clock.explain_until <= 166.0
    assert math.isinf(Clock(100.0).end)
    rang: list[bool] = []
    with Alarm(time.monotonic(), lambda: rang.append(True)) as alarm:
        while not alarm.rang:
            time.sleep(0.01)
    assert rang == [True]
    with Alarm(math.inf, lambda: rang.append(True)):
        pass
    assert rang == [True]


def test_what_is_shared_is_made_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> int:
        made.append(1)
        return 7

    for shared in (Shared(tmp_path), Shared(tmp_path)):
        assert shared.once("seven", make) == 7
    assert len(made) == 1
    assert [Shared().once("seven", make) for _ in range(2)] == [7, 7]
    assert len(made) == 3


def test_a_case_is_not_judged_by_an_arithmetic_that_is_being_tried() -> None:
    """Workers judge on meanwhile."""
    meanwhile = []

    def run(target: str, *call: object) -> None:
        meanwhile.append(otherwise.changes(target))

    otherwise = Otherwise("cpu", run)
    cases = [(PROPERTIES["oracle"], "b1.h1.q1.k1.d1.fp32.full/integers#0")]
    assert otherwise._excused("mine", {"arithmetic": EAGER}, cases)
    assert meanwhile == [()]


@pytest.mark.parametrize("hurried", [False, True])
def test_usual_arithmetics_are_tried_though_no_time_is_left(
    hurried: bool,  # noqa: FBT001 (parametrised)
) -> None:

    def run(target: str, function: Callable[..., object], *arguments: Any) -> None:
        if function is ordinary:
            return
        if function is identified:
            raise Interrupted
        changes = dict(arguments[0])
        if changes["arithmetic"] not in COMPILED:
            raise Finding("too much error")

    kernel = replace(find("naive")[0], arithmetic=FLASH)
    case = "b1.h1.q2.k8.d8.bf16.full/normal#0"
    found = FindingShrunk(
        kernel="naive", property="oracle", case=case, reason="", measured={"out": 2.0}, worst=case
    )
    otherwise = Otherwise("cpu", run)
    event = otherwise.explains("naive", kernel, found, hurried=hurried)
    assert event
    assert f"exp_ulp={TORCH_CPU_ULP}" in event.declare
    assert otherwise.changes("naive") == (("arithmetic", COMPILED[0]),)


def asked(kernel: Kernel, case: str) -> tuple[Otherwise, FindingShrunk]:
    """What is asked about this kernel, in this process, and the finding that it has in a case."""
    with pytest.raises(Finding) as raised:
        evaluate(kernel, "cpu", PROPERTIES["oracle"], Case.parse(case))
    found = FindingShrunk(
        kernel=kernel.name,
        property="oracle",
        case=case,
        reason=raised.value.sentence,
        measured=raised.value.measured,
        worst=case,
    )

    def run(target: str, function: Callable[..., object], *arguments: Any) -> object:
        return function(kernel, "cpu", *arguments)

    return Otherwise("cpu", run), found


@pytest.mark.parametrize(("crawls", "says"), [(True, "empty_row='mean'"), (False, "")])
def test_an_empty_row_may_be_another_where_calls_take_seconds(
    crawls: bool,  # noqa: FBT001 (parametrised)
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its conventions are not read off; another's were, and it is wrong."""
    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))
    (tmp_path / "mean.py").write_text(
        f"{ATTEND}\n\n@kernel(dtypes=('fp32',))\ndef averages(q, k, v, *, scale, mask):\n"
        "    least = torch.finfo(q.dtype).min\n"
        "    s = q @ k.mT * scale\n"
        "    s = s if mask is None else s.masked_fill(~mask, least)\n"
        "    return torch.softmax(s, -1) @ v\n"
    )
    (kernel,) = find(f"{tmp_path / 'mean.py'}::averages")
    learn(kernel, "cpu", replace(options(find("naive")[0], "cpu"), crawls=crawls))
    case = "b1.h1.q2.k1.d1.fp32.causal_lower_right/integers#0"
    otherwise, found = asked(kernel, case)
    event = otherwise.explains("mine", kernel, found)
    assert (event.declare if event else "") == says


def test_what_a_small_case_leaves_open_an_ordinary_one_decides(file: str) -> None:
    """A scale 10 % off, on two keys: as if an exponential were coarse."""
    (kernel,) = find(f"{file}::steep")
    learn(kernel, "cpu", options(find("naive")[0], "cpu"))
    case = "b1.h1.q1.k2.d1.fp32.full/normal#0"
    otherwise, found = asked(kernel, case)
    coarse = replace(kernel, arithmetic=Arithmetic(exp_ulp=8192.0))
    assert evaluate(coarse, "cpu", PROPERTIES["oracle"], Case.parse(case)).outcome is PASSED
    otherwise._identified["mine"] = coarse.arithmetic
    assert otherwise.explains("mine", kernel, found) is None
