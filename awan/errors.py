"""Every error that Awan raises on purpose.

AwanError
├── Refused                     the caller asked for something that is not possible; nothing was changed
│   ├── BadRequest              400 BAD_REQUEST             the body cannot be parsed
│   ├── Unauthenticated         401 UNAUTHENTICATED
│   ├── InsufficientBalance     402 INSUFFICIENT_BALANCE
│   ├── Forbidden               403 FORBIDDEN
│   │   ├── QuotaExceeded       403 QUOTA_EXCEEDED
│   │   └── AccountSuspended    403 ACCOUNT_SUSPENDED
│   ├── NotFound                404 NOT_FOUND               absent, or not the caller's: the same answer
│   ├── MethodNotAllowed        405 METHOD_NOT_ALLOWED
│   ├── Conflict                409 INVALID_OPERATION       the resource's state does not allow it
│   │   ├── Protected           409 PROTECTED               the thing is protected against deletion
│   │   └── IdempotencyConflict 409 IDEMPOTENCY_CONFLICT
│   ├── PayloadTooLarge         413 PAYLOAD_TOO_LARGE
│   ├── UnsupportedMediaType    415 UNSUPPORTED_MEDIA_TYPE
│   ├── Invalid                 422 VALIDATION_ERROR        carries `errors` per field
│   ├── RateLimited             429 RATE_LIMITED
│   ├── OperationFailed         502 ENGINE_ERROR            the operation that the call waited for failed
│   ├── NoCapacity              503 NO_CAPACITY
│   └── Unavailable             503 UNAVAILABLE             database or engine away
├── EngineError                 502 ENGINE_ERROR            an engine (libvirt, OVN, ...) failed
│   ├── EngineUnavailable       may pass: steps retry within a bound
│   └── EngineRejected          will not pass: the workflow unwinds
└── OperationCancelled          a workflow was asked to stop at a step boundary; it unwinds

Anything else that is raised is a bug and is answered with 500 INTERNAL without detail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class AwanError(Exception):
    """Root of all errors raised on purpose."""


class Refused(AwanError):
    """An expected refusal. `message` is a sentence for the user; `retry_after_s` becomes a header."""

    status = 400
    type = "BAD_REQUEST"

    def __init__(
        self,
        message: str,
        *,
        errors: Mapping[str, Sequence[str]] | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.errors = {field: list(texts) for field, texts in errors.items()} if errors else None
        self.retry_after_s = retry_after_s


class BadRequest(Refused):
    """The request cannot be parsed."""


class Unauthenticated(Refused):
    """No API key, or one that is unknown, revoked, expired or used from a foreign network."""

    status = 401
    type = "UNAUTHENTICATED"


class InsufficientBalance(Refused):
    """The account's balance does not cover what was asked for."""

    status = 402
    type = "INSUFFICIENT_BALANCE"


class Forbidden(Refused):
    """The key is valid, but its scope does not include this call."""

    status = 403
    type = "FORBIDDEN"


class QuotaExceeded(Forbidden):
    """A count or size limit of the account would be passed."""

    type = "QUOTA_EXCEEDED"


class AccountSuspended(Forbidden):
    """The account is suspended: reads, payments and deletions only."""

    type = "ACCOUNT_SUSPENDED"


class NotFound(Refused):
    """Absent, or not visible to the caller: both are answered alike."""

    status = 404
    type = "NOT_FOUND"


class MethodNotAllowed(Refused):
    """The path exists, the method does not."""

    status = 405
    type = "METHOD_NOT_ALLOWED"


class Conflict(Refused):
    """The state of the resource does not allow the change, or another change is running."""

    status = 409
    type = "INVALID_OPERATION"


class Protected(Conflict):
    """The thing is protected against deletion: the protection has to be taken away first."""

    type = "PROTECTED"


class IdempotencyConflict(Conflict):
    """The Idempotency-Key was used for another request, or that request is still in flight."""

    type = "IDEMPOTENCY_CONFLICT"


class PayloadTooLarge(Refused):
    """The body is larger than the route accepts."""

    status = 413
    type = "PAYLOAD_TOO_LARGE"


class UnsupportedMediaType(Refused):
    """The body is neither JSON nor a form."""

    status = 415
    type = "UNSUPPORTED_MEDIA_TYPE"


class Invalid(Refused):
    """One or more fields are wrong; `errors` maps each field to its sentences."""

    status = 422
    type = "VALIDATION_ERROR"

    def __init__(self, errors: Mapping[str, Sequence[str]], message: str | None = None) -> None:
        super().__init__(message or "The given data was invalid.", errors=errors)

    @classmethod
    def field(cls, name: str, sentence: str) -> Invalid:
        """An error of exactly one field."""
        return cls({name: [sentence]})


class RateLimited(Refused):
    """The key's calls per minute are used up."""

    status = 429
    type = "RATE_LIMITED"


class OperationFailed(Refused):
    """The operation that a call waited for failed for a reason that is not the caller's."""

    status = 502
    type = "ENGINE_ERROR"


class NoCapacity(Refused):
    """Nothing fits. `message` is coarse (for customers), `detail` exact (for operators and the log)."""

    status = 503
    type = "NO_CAPACITY"

    def __init__(self, message: str, *, detail: str | None = None) -> None:
        super().__init__(message, retry_after_s=60)
        self.detail = detail or message


class Unavailable(Refused):
    """The database or an engine is away for the moment."""

    status = 503
    type = "UNAVAILABLE"

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_s=5)


class EngineError(AwanError):
    """An engine failed. Carries which engine, which call on what, and the engine's own words."""

    def __init__(self, engine: str, call: str, words: str) -> None:
        super().__init__(f"{engine}: {call}: {words}")
        self.engine = engine
        self.call = call
        self.words = words


class EngineUnavailable(EngineError):
    """The engine cannot be reached or did not answer in time; a retry may succeed."""


class EngineRejected(EngineError):
    """The engine refused the call; a retry will not help."""


class OperationCancelled(AwanError):
    """The running operation was asked to stop; raised at a step boundary, followed by the undo."""
