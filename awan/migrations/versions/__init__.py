"""One file per revision, written by `python -m awan.migrations`."""
