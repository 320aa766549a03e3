"""Every error that Rankup raises on purpose, each with a cause, a remedy and an exit code.

    RankupError
    ├── RetryableError              trying the same thing again later may work          exit 75
    │   ├── UnreachableError        a server (gateway, S3, Valkey) does not answer
    │   ├── BusyError               the server answers, but asks to come back later
    │   │   └── NotYetError         what is asked for will be possible soon, for a reason that anybody may read
    │   └── ConflictError           somebody else moved the pointer or the record first
    └── FatalError                  the same call will fail again                       exit 1
        ├── InputError              what the user or a client sent is wrong             exit 2
        │   ├── DeltaError          a delta file breaks its format or its round's limits
        │   ├── NotFoundError       no such round, lease, version, blob
        │   ├── StateError          the thing exists, but not in a state that allows this
        │   └── TooLargeError       above a size limit; nothing of it was parsed
        ├── DeniedError             someone else's lease, a wrong invite or signature   exit 77
        │   └── UnauthenticatedError  no token, or one the server does not know
        ├── IntegrityError          bytes do not have the hash, signature or chain      exit 65
        ├── DiskFullError           no room left; what was written so far is kept       exit 74
        └── SetupError              something this machine lacks: binary, extra, port   exit 78

Exit codes follow sysexits.h where it has one. `code` is the stable, machine-readable name of the error: it is the last
part of the `type` URI in an `application/problem+json` answer, and tests compare it, never the sentence.
"""

from __future__ import annotations

from typing import ClassVar


class RankupError(Exception):
    """Root of the tree. `remedy` tells the reader what to do next, in one sentence."""

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    default_remedy: ClassVar[str] = "Run again with --verbose and report what it prints."

    def __init__(self, cause: str, *, remedy: str | None = None) -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy if remedy is not None else self.default_remedy


class RetryableError(RankupError):
    """Trying the same thing again later may work."""

    code = "retryable"
    http_status = 503
    exit_code = 75
    default_remedy = "Try again in a minute."


class UnreachableError(RetryableError):
    """A server (gateway, S3, Valkey) does not answer."""

    code = "unreachable"


class BusyError(RetryableError):
    """The server answers, but asks to come back later (`retry_after_s` seconds)."""

    code = "busy"
    http_status = 429

    def __init__(self, cause: str, *, remedy: str | None = None, retry_after_s: float = 30.0) -> None:
        super().__init__(cause, remedy=remedy)
        self.retry_after_s = retry_after_s


class NotYetError(BusyError):
    """What is asked for will be possible soon; unlike that of other busy servers, the cause is for who asks."""

    code = "not-yet"


class ConflictError(RetryableError):
    """Somebody else moved the pointer or the record first: read it again, then decide again."""

    code = "conflict"
    http_status = 409


class FatalError(RankupError):
    """The same call will fail again."""

    code = "fatal"


class InputError(FatalError):
    """What the user or a client sent is wrong."""

    code = "bad-input"
    http_status = 400
    exit_code = 2
    default_remedy = "Correct the input and try again."


class DeltaError(InputError):
    """A delta file breaks its format or its round's limits."""

    code = "bad-delta"
    http_status = 422
    default_remedy = "Update the worker and train the shard again; the lease is free for others."


class NotFoundError(InputError):
    """No such round, lease, version or blob."""

    code = "not-found"
    http_status = 404
    default_remedy = "Check the name; `rankup round list` and `rankup versions` show what exists."


class StateError(InputError):
    """The thing exists, but not in a state that allows this."""

    code = "wrong-state"
    http_status = 409
    default_remedy = "Ask for its present state and act on that."


class TooLargeError(InputError):
    """Above a size limit; nothing of it was parsed."""

    code = "too-large"
    http_status = 413
    default_remedy = "Send less; the limit stands in the message."


class DeniedError(FatalError):
    """Someone else's lease, a wrong invite or a wrong signature."""

    code = "denied"
    http_status = 403
    exit_code = 77
    default_remedy = "Join again with the line that the organiser gave you."


class UnauthenticatedError(DeniedError):
    """No token, or one that the server does not know (any more)."""

    code = "unauthenticated"
    http_status = 401


class IntegrityError(FatalError):
    """Bytes do not have the hash, the signature or the parent that they must have."""

    code = "integrity"
    http_status = 422
    exit_code = 65
    default_remedy = "Do not use these bytes; fetch them again, and tell the publisher if it stays."


class DiskFullError(FatalError):
    """No room left on a disk; what was written so far is kept for a later resume."""

    code = "disk-full"
    http_status = 507
    exit_code = 74
    default_remedy = "Free some space and run the same command again: it goes on where it stopped."


class SetupError(FatalError):
    """Something that this machine lacks: a binary, an extra, a free port, a setting."""

    code = "setup"
    exit_code = 78
    default_remedy = "Install what is named in the message."
