"""Run the command line with ``python -m unrolled``."""

import sys

from unrolled.cli.main import main

sys.exit(main())
