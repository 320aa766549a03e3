"""Images from outside: what is taken comes out as the same pixels everywhere, all else is refused with words."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import pytest
from PIL import Image
from tiny_vision import colour_rows, image_file, in_base64

from rankup.errors import InputError
from rankup.images import (
    MAX_IMAGES,
    MAX_IMAGES_BYTES,
    MAX_PIXELS,
    MAX_SIDE,
    decode_image,
    image_bytes,
    image_format,
    require_pictured,
    row_images,
)

RED = (230, 20, 20)


def png_of(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that says it has this size, whatever it holds."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part)) for kind, part in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def saved(image: Any, kind: str, **options: Any) -> bytes:
    to = io.BytesIO()
    image.save(to, format=kind, **options)
    return to.getvalue()


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (8, 8), "blue")], "duration": 50}
HOSTILE = {
    "nothing": (b"", "neither PNG nor JPEG nor WebP"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "neither PNG"),
    "a GIF": (saved(Image.new("P", (4, 4)), "GIF"), "neither PNG"),
    "a TIFF": (saved(Image.new("RGB", (4, 4)), "TIFF"), "neither PNG"),
    "an EPS that Pillow would give to another program": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "neither",
    ),
    "only the first bytes of a PNG": (b"\x89PNG\r\n\x1a\n", "cannot be read as PNG"),
    "the first bytes of a PNG before a JPEG": (
        b"\x89PNG\r\n\x1a\n" + image_file(RED, kind="JPEG"),
        "cannot be read as PNG",
    ),
    "half a PNG": (saved(Image.effect_noise((64, 64), 50), "PNG")[:2000], "cannot be read as PNG"),
    "half a JPEG": (saved(Image.effect_noise((64, 64), 50), "JPEG")[:900], "cannot be read as JPEG"),
    "half a WebP": (saved(Image.effect_noise((64, 64), 50).convert("RGB"), "WEBP")[:600], "cannot be read as WEBP"),
    "a bomb: a few bytes that say they are gigabytes": (png_of(60_000, 60_000), "pixels"),
    "a bomb below Pillow's own limits": (png_of(5000, 4000), f"{MAX_PIXELS} pixels"),
    "a line": (png_of(MAX_SIDE + 1, 1), f"sides of {MAX_SIDE}"),
    "no pixels": (png_of(0, 5), "PNG|pixels"),
    "several pictures in a PNG": (saved(Image.new("RGB", (8, 8), "red"), "PNG", **FRAMES), "holds 2 pictures"),
    "several pictures in a WebP": (saved(Image.new("RGB", (8, 8), "red"), "WEBP", **FRAMES), "holds 2 pictures"),
    "16 bits a channel": (saved(Image.new("I;16", (4, 4)), "PNG"), "I;16"),
    "more bytes than a row may have": (image_file(RED) + b"\0" * MAX_IMAGES_BYTES, f"{MAX_IMAGES_BYTES} is the most"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_image_is_refused_with_words(name: str) -> None:
    data, words = HOSTILE[name]
    with pytest.raises(InputError, match=words):
        decode_image(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_comes_out_as_rgb(kind: str) -> None:
    data = image_file(RED, (30, 20), kind, quality=100)
    image = decode_image(data)
    assert image_format(data) == kind
    assert (image.mode, image.size) == ("RGB", (30, 20))
    assert all(abs(found - wanted) < 4 for found, wanted in zip(image.getpixel((7, 7)), RED, strict=True))


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
        (Image.new("L", (2, 2), 77), (77, 77, 77)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
    ],
)
def test_what_is_transparent_is_white_and_what_is_grey_stays_grey(image: Any, wanted: tuple[int, int, int]) -> None:
    assert decode_image(saved(image, "PNG")).getpixel((1, 1)) == wanted


def test_a_row_says_which_image_is_wrong() -> None:
    images = [in_base64(image_file(RED)), in_base64(b"GIF89a")]
    with pytest.raises(InputError, match=r"image 2 is neither PNG"):
        row_images({"images": images})


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([in_base64(image_file(RED))] * (MAX_IMAGES + 1), f"{MAX_IMAGES} is the most"),
        (["A" * (MAX_IMAGES_BYTES * 2)], f"more than {MAX_IMAGES_BYTES} bytes"),
        (["A" * MAX_IMAGES_BYTES] * 2, f"more than {MAX_IMAGES_BYTES} bytes"),
        (["not base64!"], "not base64"),
        (["iVBORw0KGgo=\n"], "not base64"),
        ([b"\x89PNG"], "list of images"),
        ([], "list of images"),
        ("iVBORw0K", "list of images"),
        (None, "list of images"),
    ],
)
def test_the_images_of_a_row_are_limited_before_they_are_decoded(images: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        image_bytes(images)


def changed(path: list[Any], value: Any) -> dict[str, Any]:
    row = colour_rows(1)[0]
    place: Any = row
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return row


SEEN = [{"type": "image"}]
BROKEN = {
    "no conversation": (changed(["prompt"], "<image> Which?"), "list of messages"),
    "messages as text": (changed(["prompt", 0, "content"], "Which?"), "list of parts"),
    "no place for the image": (
        changed(["prompt", 0, "content"], [{"type": "text", "text": "a"}]),
        "1 images and 0 places",
    ),
    "two places for one image": (changed(["prompt", 0, "content"], SEEN * 2), "1 images and 2 places"),
    "no image for a place": (changed(["images"], []), "0 images and 1 places"),
    "an image in an answer": (changed(["completion", 0, "content"], SEEN), "only what the user says"),
    "an image in a system's words": (changed(["prompt", 0, "role"], "system"), "only what the user says"),
    "a role that no template knows": (changed(["prompt", 0, "role"], "narrator"), "must be one of"),
    "an address in a part": (
        changed(["prompt", 0, "content"], [{"type": "image", "url": "http://127.0.0.1/"}]),
        "of the type image",
    ),
    "a path in a part": (
        changed(["prompt", 0, "content"], [{"type": "image", "path": "/etc/passwd"}]),
        "of the type image",
    ),
    "a video": (changed(["prompt", 0, "content"], [{"type": "video"}]), "of the type image"),
    "no text in a part": (changed(["completion", 0, "content"], [{"type": "text", "text": None}]), "of the type image"),
    "more in a message": (changed(["prompt", 0, "tool_calls"], []), "role and content"),
    "neither messages nor a prompt": ({"images": ["a"], "text": "b"}, "needs messages, or prompt and completion"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_row_that_breaks_the_shape_is_refused_with_words(name: str) -> None:
    row, words = BROKEN[name]
    with pytest.raises(InputError, match=words):
        require_pictured(row)


def test_a_row_with_a_place_for_each_image_is_taken() -> None:
    require_pictured(colour_rows(1)[0])
    talk = [{"role": "user", "content": [*SEEN, {"type": "text", "text": "and"}, *SEEN]}]
    require_pictured({"images": ["a", "b"], "messages": talk})
