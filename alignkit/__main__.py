"""`python -m alignkit` is the `alignkit` command."""

import sys

from alignkit.jobs.cli import main

sys.exit(main())
