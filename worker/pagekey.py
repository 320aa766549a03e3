"""Who may use the worker's page: a key in the home, codes that open the page once, the cookie that stays.

    home/page.key ─> code in the address, good once and for ten minutes ─> cookie of this page, in one browser

What always holds: the key never leaves its file of mode 600; nobody without it makes a code or a cookie (HMAC-SHA256);
a code opens the page of one port once, so one in a browser's history or in a list of processes is worth nothing. No
HTTP here.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rankup.durable import write_file
from rankup.errors import SetupError

FILE_NAME = "page.key"
CODE_S = 600.0
_KEY_BYTES = 32


def open_key(home: Path) -> bytes:
    """The home's key, made when there is none; workers that start together get the same. Raises `SetupError`."""
    path = home / FILE_NAME
    try:
        if not path.exists():
            home.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f".{FILE_NAME}.{secrets.token_hex(4)}.new")
            write_file(fresh, secrets.token_bytes(_KEY_BYTES))
            try:
                with contextlib.suppress(FileExistsError):
                    os.link(fresh, path)
            finally:
                fresh.unlink()
        key = path.read_bytes()[: _KEY_BYTES + 1]
    except OSError as exc:
        raise SetupError(f"the key of the page cannot be used: {exc}") from exc
    if len(key) != _KEY_BYTES:
        raise SetupError(f"{path} is not a key", remedy=f"Delete {path} and start the worker again.")
    return key


def make_code(key: bytes, port: int, now: float) -> str:
    """A code for the page at `port`, made at `now` (seconds since 1970)."""
    words = f"{int(now + CODE_S)}-{secrets.token_hex(8)}"
    return f"{words}-{_mac(key, 'code', port, words)}"


class Door:
    """Lets in whoever brings a code or the cookie. Its methods may be called from several threads."""

    def __init__(self, key: bytes, port: int, clock: Callable[[], float] = time.time) -> None:
        self._key = key
        self._port = port
        self._clock = clock
        self._lock = threading.Lock()
        self._used: dict[str, float] = {}
        """Codes that opened the page already, and when they end by themselves."""

    @property
    def cookie_name(self) -> str:
        """Cookies do not know ports, so the name says which page is meant."""
        return f"rankup-{self._port}"

    @property
    def cookie(self) -> str:
        """What the cookie holds."""
        return _mac(self._key, "cookie", self._port, "")

    def is_cookie(self, value: str) -> bool:
        """Whether `value` is what the cookie holds."""
        return hmac.compare_digest(value.encode(), self.cookie.encode())

    def open_with(self, code: str) -> bool:
        """Whether `code` opens the page; it does not do so again."""
        words, _, mac = code.rpartition("-")
        if not hmac.compare_digest(mac.encode(), _mac(self._key, "code", self._port, words).encode()):
            return False
        ends, now = float(words.partition("-")[0]), self._clock()
        with self._lock:
            self._used = {used: until for used, until in self._used.items() if until > now}
            if ends <= now or code in self._used:
                return False
            self._used[code] = ends
        return True


def _mac(key: bytes, what: str, port: int, words: str) -> str:
    return hmac.new(key, f"rankup page {what} {port} {words}".encode(), hashlib.sha256).hexdigest()
