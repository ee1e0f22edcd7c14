"""`python -m awan.cli` is `awan`."""

from awan.cli import main

main()
