"""One cause, one finding: when two findings of a kernel are the same defect, and which options a
defect needs, so that the run can go on without them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from verify.generation.pairwise import Row, levels
from verify.sandbox.call import CHANGED
from verify.spec.case import Case

STAGE = "likely stage: "
FORM = r"(elements of )?(out|lse) (is|has shape|lies|share)\b"
"""How findings begin that say what is wrong with the form of what is returned."""
AT_TIMES = "not every time: "
"""How the finding of a case begins that was right when it was judged again."""
KEPT = ("lengths", "batch", "grads")
"""Options that are never set aside: every problem has lengths."""


def key(prop: str, reason: str, why: Sequence[str]) -> str:
    """What findings of one cause have in common: the line that raised, the state that changed, the
    stage that is wrong; the property where none of these is known.
    """
    reason = reason.removeprefix(AT_TIMES)
    if raised := re.match(r"raised (\w+):.*\((.*:\d+)\)$", reason):
        return f"raised {raised[1]} at {raised[2]}"
    if re.match(r"(changed|wrote|ended its process|did not return|took|lost)|" + FORM, reason):
        return _without_numbers(reason)
    stages = [line.removeprefix(STAGE) for line in why if line.startswith(STAGE)]
    return _without_numbers("; ".join(stages)) if stages else f"{prop}: {_without_numbers(reason)}"


def state_changed(reason: str) -> str:
    """Which state of torch a finding says was changed; empty for other findings."""
    before, found, state = reason.partition(CHANGED)
    return state if found and before in ("", AT_TIMES) else ""


def _without_numbers(text: str) -> str:
    """Figures and places differ from case to case; so does what stands in brackets."""
    return re.sub(r"-?\d[\d.e+-]*", "#", re.sub(r"\(.*?\)", "", text))


def needed(case: Case, plain: Row) -> Row:
    """The options of a shrunk case that are not as plain as they can be: without them it did not
    fail.
    """
    return {
        name: level
        for name, level in levels(case).items()
        if name not in KEPT and level != plain.get(name, level)
    }


def shows(case: Case, options: Row) -> bool:
    """Whether a case has all of these options."""
    found = levels(case)
    return all(found[name] == level for name, level in options.items())
