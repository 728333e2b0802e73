"""Every property. Importing this module registers those of all files in this folder."""

from __future__ import annotations

import importlib
import pkgutil

from verify import properties
from verify.errors import VerifyError
from verify.properties.property import PROPERTIES, Property, named
from verify.registry import Kernel
from verify.spec.inputs import DISTRIBUTIONS
from verify.spec.layouts import LAYOUTS

__all__ = ["FILES", "PROPERTIES", "Property", "check_known_issues", "named"]

APART = ("catalogue", "property", "test_conformance")
"""Modules of this folder that define no property."""
FILES = tuple(
    importlib.import_module(f"verify.properties.{module.name}")
    for module in sorted(pkgutil.iter_modules(properties.__path__), key=lambda m: m.name)
    if module.name not in APART and not module.ispkg
)
"""The modules that define properties, accuracy first, since that is judged first."""


def check_known_issues(kernel: Kernel) -> None:
    """Raise VerifyError where a known issue of a kernel names something that does not exist.

    A misspelt name would turn a known issue into a finding, or hide one.
    """
    for issue in kernel.known_issues:
        for field, names, known in (
            ("inputs", issue.inputs, DISTRIBUTIONS),
            ("properties", issue.properties, PROPERTIES),
            ("layouts", issue.layouts, LAYOUTS),
        ):
            if wrong := [name for name in names if name not in known]:
                raise VerifyError(
                    f"kernel {kernel.name!r}: known issue {issue.summary!r}: {field}={wrong[0]!r}"
                    f" is unknown: one of {', '.join(known)}"
                )
