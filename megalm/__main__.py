"""`python -m megalm`: the same as the command `megalm`."""

import sys

from megalm.cli import main

if __name__ == "__main__":
    sys.exit(main())
