"""Room: accounts (tenants), their API keys, quotas and rate limits; who is calling, and what was already answered.

    caller: Caller = Depends(authenticated("write"))     # or "read", "delete"; billing=True lets billing keys in
    caller: Caller = Depends(operator("write"))          # a customer's key gets the 404 of an unknown route

    quotas.take(session, account_id, instances=1, vcpus=2)      # or QuotaExceeded
    quotas.give_back(session, account_id, instances=1, vcpus=2)

A mutating route honours `Idempotency-Key` in two lines, see `accounts.idempotency`.
"""

from awan.accounts import quotas
from awan.accounts.access import Caller, authenticated, is_key_usable, operator
from awan.accounts.idempotency import EarlierAnswer, forget_old_answers, idempotent, once, replay
from awan.accounts.models import KeyScope
from awan.accounts.service import create_account, create_key, init_operator

__all__ = [
    "Caller",
    "EarlierAnswer",
    "KeyScope",
    "authenticated",
    "create_account",
    "create_key",
    "forget_old_answers",
    "idempotent",
    "init_operator",
    "is_key_usable",
    "once",
    "operator",
    "quotas",
    "replay",
]
