"""``python -m lipcore``."""

import sys

from lipcore.cli import main

if __name__ == "__main__":
    sys.exit(main())
