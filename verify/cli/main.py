"""The console script. Exit code 0: fine, 1: findings, 2: bad input."""

from __future__ import annotations

import sys

from verify.cli import fuzz, inspect, measure
from verify.cli.app import app
from verify.errors import VerifyError

__all__ = ["COMMANDS", "main"]
COMMANDS = (fuzz, inspect, measure)
"""The modules whose functions are commands, in the order in which help lists them."""


def main() -> None:
    """Run the command that the arguments name."""
    try:
        app()
    except VerifyError as error:
        print(f"verify: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
