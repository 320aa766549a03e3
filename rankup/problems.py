"""`application/problem+json` (RFC 9457) and the error tree: what an answer of the server stands for."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from rankup.errors import BusyError, FatalError, InputError, RankupError, RetryableError
from rankup.protocol import Problem

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "https://rankup.dev/problems/"
MAX_PROBLEM_BYTES = 64 * 1024


def error_of(status: int, body: bytes, *, where: str) -> RankupError:
    """The error that an answer stands for; bodies that are no problem document give one too. `where`: the server."""
    try:
        problem = Problem.model_validate_json(body[:MAX_PROBLEM_BYTES])
    except ValidationError:
        text = body[:200].decode(errors="replace").strip()
        cause = f"{where} answered {status}" + (f": {text}" if text else "")
        if status >= 500 or status == 429:
            return RetryableError(cause)
        return InputError(cause, remedy="Check the URL and that client and server are of matching versions.")
    kind = _by_code().get(problem.type.rsplit("/", 1)[-1])
    if kind is not None and issubclass(kind, BusyError):
        return kind(problem.detail, remedy=problem.remedy, retry_after_s=problem.retry_after_s or 30.0)
    if kind is None:
        kind = RetryableError if status >= 500 or status == 429 else FatalError
    return kind(problem.detail, remedy=problem.remedy)


def _by_code() -> dict[str, type[RankupError]]:
    def walk(kind: type[RankupError]) -> Iterator[type[RankupError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from walk(child)

    return {kind.code: kind for kind in walk(RankupError)}
