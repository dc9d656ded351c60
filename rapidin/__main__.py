"""`python -m rapidin`."""

import sys

from rapidin.cli import main

if __name__ == "__main__":
    sys.exit(main())
