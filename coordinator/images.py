"""Images on their way into a dataset: found beside the rows that name them, and freed of all that is not the picture.

`images` (or a single `image`) of a row to build from holds, each in one of these ways:

| as | what is taken |
|---|---|
| text with a dot: a path | the file, relative to the folder of the rows' own file |
| other text | the file itself, in base64 |
| an object with `bytes` and `path`, as Parquet files of the hub have it | the bytes; the path where there are none |

What always holds:
- a path stays within the folder of the rows: nothing absolute, no "..", no link that leads out; only ordinary files,
  and none is read beyond the limit;
- what goes into a shard has no metadata (place, camera, time, thumbnails, comments, colour profile) and nothing behind
  the picture's end; the coded pixels stay as they are, byte for byte. Only a picture that its metadata wants turned is
  turned and coded again;
- doing it twice changes nothing.

The limits and the decoding are those of `rankup.images`.
"""

from __future__ import annotations

import base64
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from rankup.errors import InputError
from rankup.images import MAX_IMAGES, MAX_IMAGES_BYTES, decode_image, open_image

_ORIENTATION: Final = 0x0112
_UPRIGHT: Final = 1
_QUALITY: Final = 95
_PNG_KEPT: Final = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_WEBP_KEPT: Final = frozenset({b"VP8 ", b"VP8L", b"ALPH"})
_WEBP_ALPHA: Final = 0x10
_JFIF: Final = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
"""Says that colours are YCbCr, and holds no thumbnail."""


# -- found beside the rows ---------------------------------------------------------------------------------------------


def with_images(row: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """The row with `images` as base64 texts where it has images, else as it is. `folder`: of the rows' file, if any.

    Raises InputError: too many, a path that leads out or to no ordinary file, or more bytes than a row may have.
    """
    found = dict(row)
    single = found.pop("image", None)
    images = found.get("images") or ([single] if single is not None else None)
    if images is None:
        if single is None and "image" in row:
            found["image"] = None
        return found
    if not isinstance(images, list):
        raise InputError("field images: is not a list")
    if len(images) > MAX_IMAGES:
        raise InputError(f"has {len(images)} images; {MAX_IMAGES} is the most")
    left = MAX_IMAGES_BYTES
    texts = []
    for number, image in enumerate(images, start=1):
        try:
            data = _bytes_of(image, folder, left)
        except InputError as exc:
            raise InputError(f"image {number} {exc}", remedy=exc.remedy) from exc
        left -= len(data)
        texts.append(base64.b64encode(data).decode())
    found["images"] = texts
    return found


def _bytes_of(image: object, folder: Path | None, limit: int) -> bytes:
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and "." in image:
        return _read(image, folder, limit)
    if isinstance(image, str):
        try:
            image = base64.b64decode(image, validate=True)
        except ValueError as exc:
            raise InputError(
                f"is neither a path nor base64: {exc}", remedy="A path has an ending, such as .png."
            ) from exc
    if not isinstance(image, bytes) or not image:
        raise InputError("is neither a path, nor base64, nor an object with bytes")
    if len(image) > limit:
        raise InputError(_too_large(), remedy="Make the images smaller: models look at about a million pixels.")
    return image


def _read(name: str, folder: Path | None, limit: int) -> bytes:
    if folder is None:
        raise InputError(f"is the path {name!r}, but the rows are in no file that it could be beside")
    if "://" in name:
        raise InputError(f"is the address {name[:200]!r}", remedy="Download the images beside the file of the rows.")
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "\x00" in name:
        raise InputError(f"is {name!r}, which leads out of the folder of the rows")
    try:
        # Links are followed here and nowhere later, so what is opened is what was looked at.
        real = (folder / path).resolve(strict=True)
        if not real.is_relative_to(folder.resolve()):
            raise InputError(f"is {name!r}, a link that leads out of the folder of the rows")
        if not stat.S_ISREG(real.lstat().st_mode):
            raise InputError(f"is {name!r}, which is no ordinary file")
        with real.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, RuntimeError) as exc:
        raise InputError(f"is {name!r}, which cannot be read: {exc}") from exc
    if len(data) > limit:
        raise InputError(_too_large(), remedy="Make the images smaller: models look at about a million pixels.")
    return data


def _too_large() -> str:
    return f"takes the row above {MAX_IMAGES_BYTES} bytes of images"


# -- freed of all that is not the picture ------------------------------------------------------------------------------


def bare_image(data: bytes) -> bytes:
    """The image without metadata, upright, in its own format. Raises InputError: it is damaged or beyond a limit."""
    image = open_image(data)
    if _orientation(image) != _UPRIGHT:
        data = _upright(image)
    bare = {"PNG": _bare_png, "JPEG": _bare_jpeg, "WEBP": _bare_webp}[image.format](data)
    # Whatever was cut away: this is what the volunteers get, so this is what must decode.
    decode_image(bare)
    return bare


def _orientation(image: Any) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, _UPRIGHT)
    except Exception:  # noqa: BLE001 - metadata from outside, which is dropped
        return _UPRIGHT
    return value if value in range(1, 9) else _UPRIGHT


def _upright(image: Any) -> bytes:
    import io

    from PIL import ImageOps

    to = io.BytesIO()
    try:
        ImageOps.exif_transpose(image).save(to, format=image.format, quality=_QUALITY)
    except Exception as exc:
        raise InputError(f"cannot be read as {image.format}: {exc}") from exc
    return to.getvalue()


def _bare_png(data: bytes) -> bytes:
    """https://www.w3.org/TR/png-3/#5Chunk-layout: length, type, data, checksum."""
    kept = [data[:8]]
    at, kind = 8, b""
    while kind != b"IEND":
        length, kind = _unpack(">I4s", data, at)
        if kind in _PNG_KEPT:
            kept.append(_slice(data, at, 12 + length))
        at += 12 + length
    return b"".join(kept)


def _bare_jpeg(data: bytes) -> bytes:
    """ITU-T T.81, B.1.1: FF and a kind, a length that counts itself, data; what is coded follows a scan's header."""
    kept = [data[:2]]
    at = 2
    while True:
        mark, kind = _unpack(">BB", data, at)
        if mark != 0xFF:
            raise InputError("is a damaged JPEG: a segment does not begin where the one before ends")
        if kind == 0xFF:  # filling
            at += 1
            continue
        if kind == 0xD9:
            kept.append(data[at : at + 2])
            return b"".join(kept)
        (length,) = _unpack(">H", data, at + 2)
        segment = _slice(data, at, 2 + length)
        at += len(segment)
        if kind == 0xE0 and segment[4:9] == b"JFIF\x00":
            kept.append(_JFIF)
        elif (kind == 0xEE and segment[4:9] == b"Adobe") or not (0xE0 <= kind <= 0xEF or kind == 0xFE):
            kept.append(segment)
        if kind == 0xDA:
            end = _end_of_scan(data, at)
            kept.append(data[at:end])
            at = end


def _end_of_scan(data: bytes, at: int) -> int:
    """Where the next marker is: FF before neither 00 (an FF of the data) nor D0 to D7 (a restart)."""
    while True:
        at = data.find(b"\xff", at)
        if at < 0 or at + 1 >= len(data):
            raise InputError("is a damaged JPEG: it ends in the middle")
        if data[at + 1] != 0 and not 0xD0 <= data[at + 1] <= 0xD7:
            return at
        at += 2


def _bare_webp(data: bytes) -> bytes:
    """https://developers.google.com/speed/webp/docs/riff_container"""
    kept = b"".join(_webp_chunks(data))
    return struct.pack("<4sI4s", b"RIFF", 4 + len(kept), b"WEBP") + kept


def _webp_chunks(data: bytes) -> Iterator[bytes]:
    (size,) = _unpack("<I", data, 4)
    at, end = 12, 8 + size
    while at < end:
        kind, length = _unpack("<4sI", data, at)
        chunk = _slice(data, at, 8 + length) + b"\x00" * (length % 2)
        at += len(chunk)
        if kind == b"VP8X":
            yield chunk[:8] + bytes([chunk[8] & _WEBP_ALPHA]) + chunk[9:]
        elif kind in _WEBP_KEPT:
            yield chunk


def _unpack(layout: str, data: bytes, at: int) -> tuple[Any, ...]:
    try:
        return struct.unpack_from(layout, data, at)
    except struct.error as exc:
        raise InputError("is a damaged image: it ends in the middle") from exc


def _slice(data: bytes, at: int, length: int) -> bytes:
    if at + length > len(data):
        raise InputError("is a damaged image: it ends in the middle")
    return data[at : at + length]
