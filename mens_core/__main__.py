"""``python -m mens_core``."""

from __future__ import annotations

import sys

from mens_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
