"""Reconcile: what the engines have against what the rows say.

findings = run_audit()          # in a worker or a test, never in the API: it talks to every engine
"""

from awan.reconcile.audit import run_audit
from awan.reconcile.findings import Finding, FindingKind

__all__ = ["Finding", "FindingKind", "run_audit"]
