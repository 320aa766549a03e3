"""Calls of the organiser's and the reader's commands to a gateway: one function, errors as RankupError."""

from __future__ import annotations

import os
from typing import Any

from rankup.errors import RetryableError, UnreachableError
from rankup.problems import error_of

MAX_ANSWER_BYTES = 64 * 1024 * 1024
TIMEOUT_S = 30.0


def call(method: str, url: str, path: str, *, token: str = "", body: Any = None) -> Any:
    """One JSON call. Raises the error that the server's problem document names, UnreachableError without an answer."""
    import httpx2

    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        with (
            httpx2.Client(timeout=TIMEOUT_S) as client,
            client.stream(method, url.rstrip("/") + path, json=body, headers=headers) as answer,
        ):
            content = b""
            for chunk in answer.iter_bytes():
                content += chunk
                if len(content) > MAX_ANSWER_BYTES:
                    raise RetryableError(f"{url} answered with more than {MAX_ANSWER_BYTES} bytes")
    except httpx2.HTTPError as exc:
        raise UnreachableError(
            f"{url} does not answer: {exc}", remedy="Check the URL, and that `rankup up` runs there."
        ) from exc
    if answer.status_code >= 400:
        raise error_of(answer.status_code, content, where=url)
    import json

    return json.loads(content) if content else None


def server_url(given: str | None) -> str:
    """The server to talk to: --server, then RANKUP_SERVER, then the one on this machine."""
    from rankup.cli.stack import ServerAccess

    return given or os.environ.get("RANKUP_SERVER") or ServerAccess.of_this_machine().url


def organiser_token() -> str:
    """The organiser's token: RANKUP_ORGANISER_TOKEN, else the one of the server on this machine."""
    from rankup.cli.stack import ServerAccess

    return os.environ.get("RANKUP_ORGANISER_TOKEN") or ServerAccess.of_this_machine().organiser_token
