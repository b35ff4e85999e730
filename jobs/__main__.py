"""`python -m farspan.jobs` is the command line."""

import sys

from farspan.jobs.cli import main

sys.exit(main())
