"""What the processes of one run find out once: a folder of values, each made by who asks first."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

T = TypeVar("T")


class Shared:
    """Values by name. Without a folder nothing is kept: every question is answered anew."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What make() returned to the first process that asked; the others wait for it. A process
        that ends while it makes it leaves its place to the next.
        """
        if self._folder is None:
            return make()
        path = self._folder / hashlib.sha256(name.encode()).hexdigest()
        with FileLock(f"{path}.lock"):
            if path.exists():
                return pickle.loads(path.read_bytes())  # noqa: S301 - written by this very run
            value = make()
            unfinished = path.with_suffix(".new")
            unfinished.write_bytes(pickle.dumps(value))
            os.replace(unfinished, path)
            return value
