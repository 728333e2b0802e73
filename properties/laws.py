"""What must hold: `PROPERTIES` has every law, in the order in which they are judged."""

from __future__ import annotations

from verify.properties import accuracy, algebra, dropout, exact_answers, gradient_laws, memory, parts, sequences, symmetries
from verify.properties.property import PROPERTIES, Property

__all__ = ["FILES", "PROPERTIES", "Property"]
FILES = (accuracy, algebra, dropout, exact_answers, gradient_laws, memory, parts, sequences, symmetries)
"""Importing them registers their laws."""
