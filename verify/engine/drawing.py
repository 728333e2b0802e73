"""Drawing: Hypothesis draws cases, in chunks of a seed; what becomes of them is the search's."""

from __future__ import annotations

import atexit
import functools
import gc
from collections.abc import Callable

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider

from verify.generation.strategies import cases
from verify.properties.catalogue import Property
from verify.registry import Kernel
from verify.spec.case import Case

CHUNK = 50
"""Cases that Hypothesis draws at a time; a new chunk has a new seed."""


class Independent(HypothesisProvider):
    """A Hypothesis backend (its documented interface for alternative ones) that draws as Hypothesis
    does. With any backend but the default each case is drawn afresh; the default mutates earlier
    cases, copying one choice over another, until most of them have the simplest value of most
    options. Shrinking is Hypothesis's own.
    """

    def _maybe_draw_constant(self, *arguments: object, **keywords: object) -> None:
        """Return None: the constants that Hypothesis reads in loaded modules would make a seed's
        cases depend on what is loaded.
        """


BACKEND = "attention-verify"
AVAILABLE_PROVIDERS[BACKEND] = Independent


@functools.cache
def _settle() -> None:
    """Tell collections of garbage not to look at what is loaded. Hypothesis makes one in each
    thread that draws, of which a run has one for each property: a tenth of a second each.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # extensions count what is left at the end, and complain


def draw(
    attempt: Callable[[Case], None],
    kernel: Kernel,
    prop: Property,
    device: str,
    *,
    seed: int,
    number: int = 0,
) -> None:
    """Hand CHUNK cases of this seed to `attempt`; number: of the covering array they follow."""
    _settle()

    @seeded(seed)
    @settings(
        max_examples=CHUNK,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        backend=BACKEND,
    )
    @given(cases(kernel, device, prop.needs, number))
    def one_chunk(case: Case) -> None:
        attempt(case)

    one_chunk()
