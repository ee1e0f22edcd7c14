"""`python -m awan.apidocs`: fetches the assets of the API pages."""

from __future__ import annotations

import sys

from awan.apidocs.build import ASSETS

try:
    ASSETS.build()
except RuntimeError as failure:
    sys.exit(str(failure))
