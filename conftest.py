"""Loads the plugin and takes the checkout off sys.path: its folders are `verify.kernels` and so on,
never `kernels`.
"""

import gc
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

pytest_plugins = ["verify.pytest_plugin"]


def pytest_addoption(parser) -> None:
    """For properties/tests/cli/test_snapshots.py."""
    parser.addoption("--snapshot-update", action="store_true", help="write the snapshots anew")


def pytest_runtest_setup() -> None:
    """What earlier tests left stays: collections, which memory-growth asks for by the dozen, need
    not look at all of it again.
    """
    gc.freeze()


def pytest_unconfigure() -> None:
    """Else extension modules report at exit what was only kept from collections."""
    gc.unfreeze()
