"""`python -m diffdistill` and the console script."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its status."""
    from diffdistill.cli import main as run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
