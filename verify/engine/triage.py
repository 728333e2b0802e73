"""What is done with a finding: it is explained, told from others by its cause, and what it needs is
set aside, so that the run goes on without it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from verify.engine.causes import key as cause
from verify.engine.causes import needed, shows, state_changed
from verify.engine.evaluate import evaluate, replay_command
from verify.engine.explanation import why, write_script, wrong_call
from verify.engine.search import Search
from verify.generation.pairwise import Row, plainest
from verify.properties.catalogue import named
from verify.records.events import Ended, Event, FindingExplained, FindingShrunk
from verify.registry import Kernel
from verify.sandbox.process import Interrupted
from verify.spec.case import Case
from verify.spec.finding import Finding

COSTLY = ("ended its process", "did not return", "took ", "lost the GPU")
"""How findings begin that cost a worker process: they are not shown by forty properties."""


class Triage:
    """The findings of one run."""

    def __init__(
        self, targets: Mapping[str, str], device: str, folder: Path, run: Callable[..., Any]
    ) -> None:
        """targets: by a kernel's name what finds it alone. folder: where scripts are written. run:
        runs (target, function, *arguments) where the target's kernel is called.
        """
        self._targets = targets
        self._device = device
        self._folder = folder
        self._run = run
        self._causes: dict[tuple[str, str], str] = {}
        """(kernel, cause) -> the first property that showed it."""
        self._aside: dict[str, list[tuple[Row, str]]] = defaultdict(list)
        """By kernel: options that cases do without, and the property that they break."""

    def found(self, found: FindingShrunk, searches: list[Search]) -> Iterator[Event]:
        """The explanation of a finding; where its cause is new, the properties that show it too, on
        this very case, and end with it. What the case needs is set aside from now on.
        """
        explained = self.explain(found)
        yield explained
        if explained.same_as or named(found.property).style:
            return
        case = Case.parse(found.case)
        alone = found.reason.startswith(COSTLY) or state_changed(found.reason)
        for one in searches:
            of_kernel = one.kernel.name == found.kernel and not (one.ended or one.prop.style)
            if of_kernel and not alone:
                yield from self._shown_too(one, case, found.property)
        kernel = next(one.kernel for one in searches if one.kernel.name == found.kernel)
        self._put_aside(kernel, found, case)

    def _shown_too(self, one: Search, case: Case, by: str) -> list[Event]:
        """The events of a search that ends, since its property breaks on this case as well."""
        needs, target = one.prop.needs, self._targets[one.kernel.name]
        case = replace(case, problem=needs.met_by(case.problem))
        if needs.refusal(case.problem):
            return []
        try:
            self._run(target, evaluate, one.prop, case)
        except Interrupted:
            return []
        except Finding as finding:
            explained = FindingExplained(
                kernel=one.kernel.name,
                property=one.prop.name,
                case=str(case),
                replay=replay_command(target, one.prop, case),
                same_as=by,
            )
            return [*one.shown_by(case, finding), explained, one.ending(Ended.FINDING)]
        return []

    def _put_aside(self, kernel: Kernel, found: FindingShrunk, case: Case) -> None:
        plain = plainest(kernel, self._device, named(found.property).needs)
        if without := needed(case, plain):
            self._aside[kernel.name].append((without, found.property))

    def set_aside(self, one: Search, case: Case) -> str:
        """Why a case is not judged, if it has all that an earlier finding needs."""
        if one.shrinking:
            return ""
        for without, prop in self._aside[one.kernel.name]:
            if shows(case, without):
                what = ", ".join(f"{name} {level}" for name, level in without.items())
                return f"set aside since it breaks {prop}: {what}"
        return ""

    def explain(self, found: FindingShrunk) -> FindingExplained:
        """Why the case fails, whether its cause was found before, a script if it was not."""
        target = self._targets[found.kernel]
        prop, case = named(found.property), Case.parse(found.case)
        replay = replay_command(target, prop, case)
        plain = FindingExplained(
            kernel=found.kernel, property=found.property, case=found.case, replay=replay
        )
        if prop.style:
            return plain
        ask = partial(self._run, target)
        lines = why(ask, case, prop)
        key = found.kernel, cause(found.property, found.reason, lines)
        first = self._causes.setdefault(key, found.property)
        if first != found.property:
            return replace(plain, why=lines, same_as=first)
        call = wrong_call(lines)
        path = self._folder / f"finding-{len(self._causes)}.py"
        return replace(
            plain,
            why=lines,
            script=write_script(ask, call or case, path),
            call="" if call is None else f"verify replay {quote(target)} {quote(str(call))}",
        )
