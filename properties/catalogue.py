"""What must hold: `PROPERTIES` has every law, in the order in which they are judged."""

from __future__ import annotations

from verify.properties import (
    accuracy,
    closed_form,
    decomposition,
    dropout,
    gradients,
    identities,
    memory_safety,
    repeated_calls,
    symmetry,
)
from verify.properties.property import PROPERTIES, Property

__all__ = ["FILES", "PROPERTIES", "Property"]
FILES = (
    accuracy,
    identities,
    dropout,
    closed_form,
    gradients,
    memory_safety,
    decomposition,
    repeated_calls,
    symmetry,
)
"""Importing them registers their laws."""
