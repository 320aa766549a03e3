"""Where a command's versions come from: its URL and its MODEL@VERSION, and how fast they may come.

Holds always: nothing is asked of a server before it is needed; what kind of server an http address is, it says itself.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from rankup.download import RateLimit
    from rankup.sources import Source

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_RATE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMG]I?)?B?(?:/S)?")


def open_source(url: str) -> Source:
    """Where versions come from: `s3://bucket`, a folder or `file://` URL, a gateway or a static web server.

    Raises InputError where it is none of them.
    """
    from rankup.errors import InputError
    from rankup.sources import FolderSource, StoreSource, WebSource

    scheme, separator, rest = url.partition("://")
    if not separator:
        return FolderSource(Path(url))
    match scheme:
        case "s3":
            from rankup.settings import StoreSettings
            from rankup.store import open_store

            return StoreSource(open_store(StoreSettings(bucket=rest.strip("/"))))
        case "file":
            parts = urlsplit(url)
            if parts.netloc not in ("", "localhost"):
                raise InputError(f"{url!r} names a file on another machine", remedy="Write file:///path/to/folder.")
            return FolderSource(Path(unquote(parts.path)))
        case "http" | "https":
            return WebSource(url)
    raise InputError(
        f"{url!r} is no place for versions",
        remedy="Give https://server, s3://bucket, or the path of a folder that `rankup mirror` made.",
    )


def open_model(url: str, name: str | None) -> tuple[Source, str, int | None]:
    """The source behind `url`, and what `MODEL[@VERSION]` names there: model, and version or None for the latest.

    Where the model is left out, a gateway or a folder that has exactly one is asked for its name.

    Raises InputError where that does not settle it.
    """
    from rankup.errors import InputError
    from rankup.sources import FolderSource, WebSource

    model, _, version = (name or "").partition("@")
    if version and not (version.isascii() and version.isdecimal() and len(version) <= 6):
        raise InputError(f"{version!r} is no version number", remedy="Write MODEL@3, or leave @… out for the latest.")
    source = open_source(url)
    if not model:
        models = source.models() if isinstance(source, (FolderSource, WebSource)) else None
        if models is None:
            raise InputError(f"{url} cannot tell which models it has", remedy=f"Write the model's name after {url}.")
        if len(models) != 1:
            raise InputError(
                f"{url} has {len(models)} models: {', '.join(models[:20]) or 'none'}",
                remedy="Name one of them after the URL." if models else "Check the URL.",
            )
        [model] = models
    return source, model, int(version) if version else None


def parse_rate(text: str | None) -> RateLimit | None:
    """`5M`, `800K`, `2MiB/s`, `1.5 MB/s` or a number of bytes a second; None: no limit.

    Raises InputError.
    """
    from rankup.download import RateLimit
    from rankup.errors import InputError

    if text is None:
        return None
    found = _RATE.fullmatch(text.strip().upper())
    if found is None:
        raise InputError(
            f"{text!r} is no rate", remedy="Write bytes a second, such as 800K, 5M or 2MiB/s (K = 1000, Ki = 1024)."
        )
    return RateLimit(float(found[1]) * _UNITS[found[2] or ""])
