"""`python -m bitdance …` is the command `bitdance …`."""

import sys

from bitdance.cli import main

if __name__ == "__main__":
    sys.exit(main())
