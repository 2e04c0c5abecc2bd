"""``python -m unrolled`` is the command ``unrolled``."""

import sys

from unrolled.cli.main import main

sys.exit(main())
