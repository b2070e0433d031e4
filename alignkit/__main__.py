"""`python -m alignkit` is the `alignkit` command."""

import sys

from alignkit.jobs.cli import main

if __name__ == "__main__":  # a process that a tracker starts may import this again
    sys.exit(main())
