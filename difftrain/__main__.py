"""`python -m difftrain`: the same program as `difftrain`."""

import sys

from difftrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
