"""The contracts of the engines, and the only code that talks to them.

Each sub-package holds one contract (a `Protocol` and frozen dataclasses), its real implementation and a fake
that keeps its state in PostgreSQL. All verbs are *ensure* verbs: calling one twice is the same as once.
"""
