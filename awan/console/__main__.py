"""`python -m awan.console`: fetches the assets of the console's page."""

from __future__ import annotations

import sys

from awan.console.build import ASSETS

try:
    ASSETS.build()
except RuntimeError as failure:
    sys.exit(str(failure))
