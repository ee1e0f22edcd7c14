"""Room: one row per thing that a customer owns. The only place where "is it mine?" is asked.

resource = resources.get_owned(session, caller, ResourceKind.INSTANCE, uuid)      # or NotFound
resource = resources.lock_owned(session, caller, ResourceKind.INSTANCE, uuid)     # the same, row locked
"""

from awan.resources.models import Resource, ResourceKind
from awan.resources.service import create, get_owned, in_path, lock, lock_owned, retire

__all__ = [
    "Resource",
    "ResourceKind",
    "create",
    "get_owned",
    "in_path",
    "lock",
    "lock_owned",
    "retire",
]
