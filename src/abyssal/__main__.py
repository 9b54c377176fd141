"""``python -m abyssal`` is the ``abyssal`` command."""

import sys

from abyssal.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
