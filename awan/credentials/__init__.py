"""Credentials: the SSH public keys of accounts."""

from awan.credentials.models import SshKey
from awan.credentials.service import find_keys

__all__ = ["SshKey", "find_keys"]
