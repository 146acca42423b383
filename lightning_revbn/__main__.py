"""`python -m lightning_revbn` is the command `lightning-revbn`."""

import sys

from lightning_revbn.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
