"""Rows with images, and all others: what `coordinator.rows` does, with the images in mind.

| shape | fields |
|---|---|
| image messages | `images` and `messages` |
| image prompt-completion | `images`, `prompt` and `completion`, both conversations |

Messages come as text or as parts; where no part stands for an image, the images stand before the first text of a user,
as in TRL (`trl.prepare_multimodal_messages`). Rows go out as `rankup.images` describes them: parts only.

What always holds: what `coordinator.rows` holds for texts; images are bare (`coordinator.images`); two rows with
different images are different, and alike only if they share an image.

Nothing here does I/O, and nothing here depends on other rows.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from coordinator import rows
from coordinator.chatrows import RowError, clean_text
from coordinator.images import bare_image
from coordinator.rows import Row
from rankup.errors import InputError
from rankup.images import CONVERSATIONS, image_bytes, require_pictured


def parse_row(text: str) -> tuple[str, Row, tuple[str, ...]]:
    """Check one JSON object, as `coordinator.rows.parse_row`. Raises RowError."""
    # Most rows of most datasets have no images: they are parsed once.
    value = _parsed(text) if '"images"' in text else None
    if value is None:
        return rows.parse_row(text)
    if not value["images"]:
        del value["images"]
        return rows.parse_row(json.dumps(value))
    fields = next((fields for fields in CONVERSATIONS if value.keys() >= set(fields)), None)
    if fields is None:
        held = sorted(value.keys() - {"images"})[:8]
        raise RowError(f"has images and the fields {held}; images need messages, or prompt and completion")
    row: Row = {"images": _bare(value["images"])}
    for field in fields:
        row[field] = _as_parts(field, value[field])
    _place_images(row[fields[0]], len(row["images"]))
    try:
        require_pictured(row)
    except InputError as exc:
        raise RowError(str(exc), remedy=exc.remedy) from exc
    return f"image {'-'.join(fields)}", row, tuple(sorted(value.keys() - row.keys()))


def clean_row(row: Row) -> Row | None:
    """As `coordinator.rows.clean_row`. Texts are clean and stripped; None when a message has nothing left."""
    if "images" not in row:
        return rows.clean_row(row)
    cleaned: Row = {"images": row["images"]}
    for field in row.keys() - {"images"}:
        cleaned[field] = [{"role": message["role"], "content": _clean(message["content"])} for message in row[field]]
        if not all(message["content"] for message in cleaned[field]):
            return None
    return cleaned


def features(row: Row) -> set[bytes]:
    """As `coordinator.rows.features`. Of a row with images its images alone: questions about them are often the same,
    and so are answers ("It is red."), while an image that was trained on is no test of anything."""
    if "images" not in row:
        return rows.features(row)
    return {hashlib.blake2b(image.encode(), digest_size=16, person=b"rankup image").digest() for image in row["images"]}


def _parsed(text: str) -> dict[str, Any] | None:
    """The row without its nulls where it has a field for images."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise RowError(f"is not JSON: {exc}") from exc
    if not isinstance(value, dict) or value.get("images") is None:
        return None
    return {name: content for name, content in value.items() if content is not None}


def _bare(images: object) -> list[str]:
    try:
        found = image_bytes(images)
    except InputError as exc:
        raise RowError(str(exc), remedy=exc.remedy) from exc
    texts = []
    for number, data in enumerate(found, start=1):
        try:
            texts.append(base64.b64encode(bare_image(data)).decode())
        except InputError as exc:
            raise RowError(f"image {number} {exc}", remedy=exc.remedy) from exc
    return texts


def _as_parts(field: str, messages: object) -> list[dict[str, Any]]:
    """Messages with their contents as parts, and without the nulls that columnar files fill absent fields with."""
    if not isinstance(messages, list):
        raise RowError(
            f"field {field}: beside images it must be a list of messages",
            remedy='Write it as [{"role": "user", "content": "…"}].',
        )
    found = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RowError(f"field {field}[{number}]: is not a message")
        present = {name: value for name, value in message.items() if value is not None}
        content = present.get("content")
        if isinstance(content, str):
            present["content"] = [{"type": "text", "text": content}]
        elif isinstance(content, list):
            present["content"] = [_part(part) for part in content]
        found.append(present)
    return found


def _part(part: object) -> object:
    if not isinstance(part, Mapping):
        return part
    # The image itself lies in `images`; files of the hub carry an empty text or image along with each part.
    kept = ("type", "text") if part.get("type") == "text" else ("type",)
    return {name: part[name] for name in kept if name in part}


def _place_images(messages: list[dict[str, Any]], count: int) -> None:
    """Where no part stands for an image, let them all stand before the first text of a user."""
    parts = [part for message in messages for part in message.get("content") or () if isinstance(part, dict)]
    first = next((message for message in messages if message.get("role") == "user"), None)
    if first is None or not isinstance(first.get("content"), list) or {"type": "image"} in parts:
        return
    first["content"] = [{"type": "image"}] * count + first["content"]


def _clean(parts: list[dict[str, str]]) -> list[dict[str, str]]:
    """Clean texts without blank ones, and without the space around all of them together."""
    cleaned = [part | {"text": clean_text(part["text"])} if "text" in part else part for part in parts]
    kept = [part for part in cleaned if "text" not in part or part["text"].strip()]
    if kept and "text" in kept[0]:
        kept[0] = kept[0] | {"text": kept[0]["text"].lstrip()}
    if kept and "text" in kept[-1]:
        kept[-1] = kept[-1] | {"text": kept[-1]["text"].rstrip()}
    return kept
