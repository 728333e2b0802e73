"""Which kernels a run is about."""

from __future__ import annotations

from verify import registry
from verify.properties.catalogue import check_known_issues
from verify.registry import Kernel


def resolve(
    targets: tuple[str, ...], *, bundled_only: bool = False
) -> tuple[dict[str, Kernel], dict[str, str]]:
    """Return the kernels of some targets, each by a target that finds it alone, and why others
    cannot be imported. Without targets: all that are bundled or installed; unless bundled_only,
    those that are loaded by name, too.

    Raises VerifyError for an unknown target, or a known issue with an unknown name in it.
    """
    if targets:
        found = {n: k for t in targets for n, k in registry.named(t, registry.find(t)).items()}
        unavailable: dict[str, str] = {}
    else:
        registry.load_bundled(*(() if bundled_only else dict.fromkeys(registry.OPTIONAL.values())))
        found, unavailable = dict(registry.REGISTRY), dict(registry.UNAVAILABLE)
    for kernel in found.values():
        check_known_issues(kernel)
    return found, unavailable
