"""Images of rows: which are taken, and how each room turns them into pixels.

A row with images has `images`, a list of base64 (RFC 4648, padded, no line breaks), and a conversation whose messages
hold a list of parts, as TRL takes them (https://huggingface.co/docs/trl/dataset_formats#vision-datasets):

    {"images": ["iVBORw0…"],
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is this?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}]}

or `prompt` and `completion` in the place of `messages`. The n-th part of the type "image" stands for the n-th image.

What always holds:
- an image is PNG, JPEG or WebP by its first bytes, one picture, and within every limit here, before its pixels are
  unpacked; nothing else of Pillow is ever asked to read it;
- pixels come out as RGB, the same in every room; what was transparent is white.

It reads no file and knows no model. Pillow is imported inside functions.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rankup.errors import InputError, SetupError

MAX_IMAGES: Final = 16
"""Of one row."""
MAX_IMAGES_BYTES: Final = 5 * 2**19
"""Of all images of one row, as files: 2.5 MiB, so that the row keeps within the limit of a line as base64."""
MAX_PIXELS: Final = 2**24
"""Of one image; as RGB it takes 48 MiB."""
MAX_SIDE: Final = 2**14
"""Pixels."""

ROLES: Final = frozenset({"system", "user", "assistant"})
"""Of messages beside images: what the chat templates of vision-language models know."""
CONVERSATIONS: Final = (("prompt", "completion"), ("messages",))
_MODES: Final = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})
"""Eight bits or fewer a channel."""


def image_format(data: bytes) -> str | None:
    """PNG, JPEG or WEBP by the first bytes; None for anything else."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def open_image(data: bytes) -> Any:
    """A Pillow image whose header was read and is within the limits; its pixels are not unpacked yet.

    Raises InputError: no such format, several pictures, too large, or damaged; SetupError: Pillow is missing.
    """
    pillow = _pillow()
    if len(data) > MAX_IMAGES_BYTES:
        raise InputError(f"has {len(data)} bytes; {MAX_IMAGES_BYTES} is the most", remedy="Make the image smaller.")
    kind = image_format(data)
    if kind is None:
        raise InputError("is neither PNG nor JPEG nor WebP", remedy="Save the image as one of them.")
    try:
        image = pillow.open(io.BytesIO(data), formats=(kind,))
        frames = getattr(image, "n_frames", 1)
    except Exception as exc:
        raise InputError(f"cannot be read as {kind}: {exc}") from exc
    width, height = image.size
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise InputError(
            f"is {width} x {height} pixels; {MAX_PIXELS} pixels and sides of {MAX_SIDE} are the most",
            remedy="Make the image smaller: models look at about a million pixels.",
        )
    if frames != 1:
        raise InputError(f"holds {frames} pictures", remedy="Save one of them as an image of its own.")
    if image.mode not in _MODES:
        raise InputError(
            f"has pixels of the kind {image.mode}, which are not taken", remedy="Save it with 8 bits a channel."
        )
    return image


def decode_image(data: bytes) -> Any:
    """The image as Pillow's RGB, unpacked. Raises as `open_image`."""
    image = open_image(data)
    try:
        image.load()
        if "A" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            ground = _pillow().new("RGBA", image.size, "white")
            return _pillow().alpha_composite(ground, image).convert("RGB")
        return image.convert("RGB")
    except Exception as exc:
        raise InputError(f"cannot be read as {image.format}: {exc}") from exc


def row_images(row: Mapping[str, Any]) -> list[Any]:
    """The images of a row as Pillow's RGB. Raises InputError, which says which image; SetupError."""
    found = []
    for number, data in enumerate(image_bytes(row.get("images")), start=1):
        try:
            found.append(decode_image(data))
        except InputError as exc:
            raise InputError(f"image {number} {exc}", remedy=exc.remedy) from exc
    return found


def image_bytes(images: object) -> list[bytes]:
    """The files behind the field `images` of a row; their number and size are checked before they are decoded.

    Raises InputError.
    """
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        raise InputError("field images: is not a list of images in base64")
    if len(images) > MAX_IMAGES:
        raise InputError(f"has {len(images)} images; {MAX_IMAGES} is the most")
    if sum(len(image) for image in images) * 3 // 4 > MAX_IMAGES_BYTES + 3 * MAX_IMAGES:
        raise InputError(f"has images of more than {MAX_IMAGES_BYTES} bytes", remedy="Make them smaller.")
    try:
        return [base64.b64decode(image, validate=True) for image in images]
    except ValueError as exc:
        raise InputError(f"field images: is not base64: {exc}") from exc


def require_pictured(row: Mapping[str, Any]) -> None:
    """Raise InputError unless the conversation of a row with images is made of parts and has a place for each image.

    Images stand in messages of the user only, and never in a completion.
    """
    fields = next((fields for fields in CONVERSATIONS if row.keys() >= set(fields)), None)
    if fields is None:
        raise InputError("a row with images needs messages, or prompt and completion")
    places = sum(_count_places(field, row[field]) for field in fields)
    images = row.get("images")
    if not isinstance(images, list) or len(images) != places:
        count = len(images) if isinstance(images, list) else 0
        raise InputError(f"has {count} images and {places} places for them")


def _count_places(field: str, messages: object) -> int:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"field {field}: beside images it must be a list of messages")
    places = 0
    for number, message in enumerate(messages):
        where = f"field {field}[{number}]"
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise InputError(f"{where}: a message beside images has role and content")
        if message["role"] not in ROLES:
            raise InputError(f"{where}.role: must be one of {', '.join(sorted(ROLES))} beside images")
        found = _count_images(f"{where}.content", message["content"])
        if found and (field == "completion" or message["role"] != "user"):
            raise InputError(f"{where}: only what the user says may hold images, and no completion")
        places += found
    return places


def _count_images(where: str, parts: object) -> int:
    if not isinstance(parts, Sequence) or isinstance(parts, str) or not parts:
        raise InputError(f"{where}: is not a list of parts")
    places = 0
    for part in parts:
        if part == {"type": "image"}:
            places += 1
        elif not (
            isinstance(part, dict)
            and part.keys() == {"type", "text"}
            and part["type"] == "text"
            and isinstance(part["text"], str)
        ):
            raise InputError(f"{where}: a part is of the type image, or of the type text with a text")
    return places


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as exc:
        raise SetupError("images need the package Pillow", remedy="Install it: pip install pillow.") from exc
    return Image
