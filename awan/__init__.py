"""Awan: a self-hostable VPS cloud. `docs/` explains the house, `awan/assembly.py` lists its rooms."""

__version__ = "0.1.0"
