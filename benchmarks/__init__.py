"""Measurements that anyone can repeat: `make bench`, or `python -m benchmarks NAME`.

Each prints what was measured as a table and adds it to `benchmarks/RESULTS.md` with `--record`. Guest times are ratios
to bare QEMU on the same machine in the same run, because absolute times say nothing about other machines.
"""
