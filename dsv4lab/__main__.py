"""`python -m dsv4lab`: the command line."""

import sys

from dsv4lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
