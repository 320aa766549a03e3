"""Images on their way into a dataset: found beside the rows, freed of what is not the picture, and never mixed up."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin
from pyarrow import parquet
from tiny_vision import COLOURS, colour_rows, image_file, in_base64

from coordinator import dataset, rows
from coordinator.dataset import build_dataset
from coordinator.imagerows import clean_row, features, parse_row
from coordinator.images import bare_image
from coordinator.rowfiles import Origin
from coordinator.rows import RowError, encode_row
from rankup.errors import InputError, TooLargeError
from rankup.images import MAX_IMAGES, MAX_IMAGES_BYTES, decode_image, row_images
from rankup.store import MemoryStore, get_blob

RED, BLUE = image_file(COLOURS["red"]), image_file(COLOURS["blue"])
ORIENTATION, PLACE, MAKER = 0x0112, 0x8825, 0x010F


def photo(kind: str, *, turned: int = 1) -> bytes:
    """A picture, red at its left and blue at its right, with all that a camera adds."""
    image = Image.new("RGB", (32, 16), COLOURS["red"])
    image.paste(COLOURS["blue"], (16, 0, 32, 16))
    exif = Image.Exif()
    exif[ORIENTATION], exif[MAKER] = turned, "a camera of mine"
    exif.get_ifd(PLACE)[2] = (52.0, 31.0, 12.0)
    options: dict[str, Any] = {
        "exif": exif,
        "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    }
    if kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("Comment", "my address")
    elif kind == "JPEG":
        options |= {"comment": b"my address", "quality": 90, "progressive": True}
    else:
        options["quality"] = 90
    to = io.BytesIO()
    image.save(to, format=kind, **options)
    return to.getvalue() + b"and what is hidden behind the end"


def message(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": list(parts) if parts and not isinstance(parts[0], str) else parts[0]}


SEEN = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


# -- freed of all that is not the picture ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_keeps_its_pixels_and_loses_everything_else(kind: str) -> None:
    data = photo(kind)
    assert b"a camera of mine" in data
    bare = bare_image(data)
    assert decode_image(bare).tobytes() == decode_image(data).tobytes()
    opened = Image.open(io.BytesIO(bare))
    assert not opened.getexif()
    assert opened.info.keys() <= {
        "jfif",
        "jfif_version",
        "jfif_unit",
        "jfif_density",
        "progressive",
        "progression",
        "loop",
        "background",
    }
    for word in (b"camera", b"address", b"hidden", b"Exif", b"sRGB"):
        assert word not in bare
    assert bare_image(bare) == bare


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_that_its_metadata_turns_is_turned(kind: str) -> None:
    bare = bare_image(photo(kind, turned=6))
    image = decode_image(bare)
    assert image.size == (16, 32)
    # Turned clockwise: what was at the left is at the top.
    assert image.getpixel((8, 4))[0] > 200
    assert image.getpixel((8, 28))[2] > 200
    assert bare_image(bare) == bare


def test_transparent_pictures_stay_transparent() -> None:
    for kind in ("PNG", "WEBP"):
        to = io.BytesIO()
        Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(to, format=kind)
        assert decode_image(bare_image(to.getvalue())).getpixel((1, 1)) == (255, 255, 255)


@given(kind=st.sampled_from(["PNG", "JPEG", "WEBP"]), at=st.integers(0, 2000), bits=st.integers(1, 255))
def test_a_damaged_image_is_bare_or_refused_but_nothing_else(kind: str, at: int, bits: int) -> None:
    data = bytearray(photo(kind))
    data[at % len(data)] ^= bits
    try:
        bare = bare_image(bytes(data))
    except InputError:
        return
    assert bare_image(bare) == bare


@given(kind=st.sampled_from(["PNG", "JPEG", "WEBP"]), length=st.integers(0, 600))
def test_an_image_that_ends_early_is_refused(kind: str, length: int) -> None:
    whole = bare_image(photo(kind))
    with pytest.raises(InputError):
        bare_image(whole[: min(length, len(whole) - 12)])


# -- found beside the rows ---------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for _, text in Origin.of(path).read()]


def test_paths_beside_the_rows_and_data_in_them_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.png").write_bytes(RED)
    ways: list[Any] = [
        {"images": ["pictures/one.png"]},
        {"image": "pictures/one.png"},
        {"images": [{"bytes": None, "path": "pictures/one.png"}]},
        {"images": [in_base64(RED)]},
        {"image": {"bytes": in_base64(RED), "path": "elsewhere.png"}},
    ]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(way | {"messages": []}) + "\n" for way in ways))
    (tmp_path / "rows.json").write_text(json.dumps(ways))
    hub = [{"image": {"bytes": RED, "path": "one.png"}}, {"image": {"bytes": RED, "path": None}}]
    parquet.write_table(pa.Table.from_pylist(hub), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        assert {json.dumps(row["images"]) for row in rows_of(tmp_path / name)} == {json.dumps([in_base64(RED)])}


def test_only_ordinary_files_beside_the_rows_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(RED)
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "large.png").write_bytes(b"\0" * (MAX_IMAGES_BYTES + 1))
    file = folder / "rows.jsonl"
    for image, words in {
        "../secret.png": "leads out",
        str(tmp_path / "secret.png"): "leads out",
        "out.png": "a link that leads out",
        "folder.png": "no ordinary file",
        "pipe.png": "no ordinary file",
        "large.png": f"above {MAX_IMAGES_BYTES} bytes",
        "none.png": "cannot be read",
        "a\0.png": "leads out",
        "https://example.org/a.png": "Download|address",
        "not base64": "neither a path nor base64",
        7: "neither a path",
    }.items():
        file.write_text(json.dumps({"images": [image], "messages": []}) + "\n")
        with pytest.raises(InputError, match=words) as caught:
            rows_of(file)
        assert "rows.jsonl, line 1: image 1" in str(caught.value)
    file.write_text(json.dumps({"images": [in_base64(RED)] * (MAX_IMAGES + 1)}) + "\n")
    with pytest.raises(InputError, match=f"{MAX_IMAGES} is the most"):
        rows_of(file)
    with pytest.raises(InputError, match="the rows are in no file"):
        list(Origin.of([{"images": ["one.png"]}]).read())


# -- rows --------------------------------------------------------------------------------------------------------------

PAIR = [in_base64(RED), in_base64(BLUE)]
WRITTEN: dict[str, tuple[dict[str, Any], str, list[Any]]] = {
    "text: images stand before the first words of the user": (
        {"images": PAIR, "messages": [message("system", "s"), message("user", "q"), message("assistant", "a")]},
        "image messages",
        [SEEN, SEEN, text("q")],
    ),
    "parts stay where they are": (
        {"images": PAIR, "messages": [message("user", SEEN, text("q"), SEEN), message("assistant", text("a"))]},
        "image messages",
        [SEEN, text("q"), SEEN],
    ),
    "nulls of columnar files": (
        {
            "images": PAIR[:1],
            "text": None,
            "messages": [
                message("user", {"type": "image", "text": None}, {"type": "text", "text": "q", "index": None}),
                message("assistant", {"type": "text", "text": "a"}),
            ],
        },
        "image messages",
        [SEEN, text("q")],
    ),
    "prompt and completion": (
        {"images": PAIR, "prompt": [message("user", "q ")], "completion": [message("assistant", "a")]},
        "image prompt-completion",
        [SEEN, SEEN, text("q")],
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_way_to_write_a_row_with_images_becomes_one(name: str) -> None:
    given_row, shape, wanted = WRITTEN[name]
    found, row, _ = parse_row(json.dumps(given_row | {"id": 7}))
    cleaned = clean_row(row)
    assert cleaned is not None
    asked = next(m for m in cleaned.get("messages", cleaned.get("prompt")) if m["role"] == "user")
    assert (found, asked["content"]) == (shape, wanted)
    assert len(row_images(cleaned)) == len(given_row["images"])
    assert parse_row(encode_row(cleaned)) == (shape, cleaned, ())
    assert clean_row(cleaned) == cleaned


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"images": PAIR, "text": "q"}, "images need messages"),
        ({"images": PAIR, "prompt": "q", "completion": "a"}, "must be a list of messages"),
        ({"images": PAIR, "messages": [message("assistant", "a")]}, "2 images and 0 places"),
        ({"images": PAIR, "messages": [message("user", SEEN), message("assistant", "a")]}, "2 images and 1 places"),
        ({"images": PAIR, "messages": [message("user", "q"), message("assistant", SEEN, SEEN)]}, "only what the user"),
        ({"images": [in_base64(b"<svg/>")], "messages": [message("user", "q")]}, "image 1 is neither PNG"),
        ({"images": ["?"], "messages": [message("user", "q")]}, "not base64"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_refused(row: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError, match=words):
        parse_row(json.dumps(row))


def test_blank_words_go_and_a_message_of_nothing_takes_its_row_along() -> None:
    row = {
        "images": PAIR[:1],
        "messages": [message("user", text(" "), SEEN, text(" q\r\n")), message("assistant", "a\x00")],
    }
    cleaned = clean_row(parse_row(json.dumps(row))[1])
    assert cleaned is not None
    assert cleaned["messages"] == [message("user", SEEN, text(" q")), message("assistant", text("a"))]
    row["messages"][1] = message("assistant", " ")
    assert clean_row(parse_row(json.dumps(row))[1]) is None


def test_rows_are_alike_by_their_images_alone() -> None:
    one, two, other = colour_rows(3)
    other["prompt"] = one["prompt"] = [message("user", SEEN, text("What is the colour of this whole large image?"))]
    assert features(one).isdisjoint(features(other))
    assert not features(one).isdisjoint(features(two | {"images": two["images"] + one["images"]}))


def test_rows_without_images_are_as_ever() -> None:
    plain = {"messages": [message("user", "q"), message("assistant", "a")]}
    assert parse_row(json.dumps(plain | {"images": []})) == ("messages", plain, ())
    assert parse_row(json.dumps(plain | {"images": None}))[:2] == ("messages", plain)
    assert clean_row(plain) == plain
    assert features(plain | {"messages": [message("user", "which")]}) == {rows.features({"prompt": "which"}).pop()}


@pytest.mark.stack
@pytest.mark.usefixtures("ray_cluster")
def test_a_dataset_of_images_is_built_from_files_beside_the_rows(tmp_path: Path) -> None:
    written = []
    for number, row in enumerate(colour_rows(24)):
        (tmp_path / f"{number}.png").write_bytes(photo("PNG") if number == 0 else base64.b64decode(row["images"][0]))
        written.append({"image": f"{number}.png", "messages": [*row["prompt"], *row["completion"]], "source": "a test"})
    # The same words about another image are another row; the same image again is the same row.
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*written, written[3]]))
    store = MemoryStore()
    options: dict[str, Any] = {
        "source": "a test",
        "licence": "CC0-1.0",
        "shard_rows": 10,
        "heldout_rows": 4,
        "now": 1.0,
    }
    card = build_dataset(store, dataset="colours", rows=file, **options)
    assert card.shape == "image messages"
    assert (card.rows, card.heldout_rows) == (20, 4)
    found = [
        json.loads(line) for ref in card.shards for line in get_blob(store, ref.sha256, max_bytes=10**6).splitlines()
    ]
    assert {row["messages"][1]["content"][0]["text"] for row in found} == set(COLOURS)
    assert all(row_images(row)[0].size in {(20, 20), (32, 16)} for row in found)
    assert all(row.keys() == {"images", "messages"} for row in found)


def test_what_one_machine_has_to_hold_at_once_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MAX_LEASE_BYTES", 100)
    assert dataset._limited(b"a" * 100, "shard_rows") == b"a" * 100
    with pytest.raises(TooLargeError, match="shard_rows says make 101 bytes; 100 is the most"):
        dataset._limited(b"a" * 101, "shard_rows")
