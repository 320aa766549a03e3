"""The cards of a version: what they tell, in what cases, and that no text from outside can change their shape."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from card_world import child, dataset_card
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from toy_world import World, make_world

from aggregator.cards import Chapter, Contributor, model_card, openness_card
from aggregator.openness import assess
from rankup.message import DisplayName
from rankup.records import KeyChange, KeyRotation, KeyStatement, PipelineStep, Revocation, Rollback, Term
from rankup.versions import manifest_digest


def front_matter(card: str) -> dict[str, object]:
    _, head, _ = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(head)  # type: ignore[no-any-return]


# -- what they tell ----------------------------------------------------------------------------------------------------


def test_the_card_tells_where_a_version_comes_from(world: World) -> None:
    card = model_card(child(world))
    assert front_matter(card) == {
        "base_model": "someone/toy",
        "base_model_relation": "finetune",
        "datasets": ["docs"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["rankup", "lora", "community-trained"],
    }
    for part in ("round-1", "| `Ada` | 2 | 1,234,567 | 65536/65536 |", "2.5000", "2.7500", "rankup verify URL toy@1"):
        assert part in card
    assert manifest_digest(world.parent) in card
    assert "So far" not in card


def test_the_card_tells_of_several_shards_and_of_late_deltas(world: World) -> None:
    manifest = child(world)
    late = manifest.terms[0].model_copy(update={"shards": 3, "round_id": "round-0"})
    assert "| `Ada` | 2-4 of `round-0` | 1,234,567 |" in model_card(manifest.model_copy(update={"terms": (late,)}))


def test_the_card_of_the_base_tells_that_it_is_the_base(world: World) -> None:
    card = model_card(world.parent)
    assert "before the first round" in card
    assert "Contribut" not in card
    assert "Held-out" not in card
    assert "base_model_relation" not in front_matter(card)


def test_a_base_that_is_no_hub_name_and_a_licence_in_prose_stay_out_of_the_hubs_fields(world: World) -> None:
    manifest = world.parent.model_copy(update={"base_model": "/home/me/model.gguf", "licence": "Ask\n---\nme: first"})
    fields = front_matter(model_card(manifest))
    assert "base_model" not in fields
    assert fields["license"] == "other"
    assert fields["license_name"] == "Ask\ufffd---\ufffdme: first"


def test_a_chapter_counts_what_had_a_part_in_the_sum(world: World) -> None:
    term = child(world).terms[0]
    terms = [
        term.model_copy(update={"contribution": f"{n:064x}", "worker_id": f"w-{n % 2}", "coefficient": c, "tokens": 10})
        for n, c in enumerate((5, 5, 5, 0))
    ]
    chapter = Chapter.of(child(world).model_copy(update={"terms": tuple(terms)}))
    assert chapter.contributors == (Contributor("w-0", "Ada", 2, 20), Contributor("w-1", "Ada", 1, 10))
    assert (chapter.version, chapter.made_by, chapter.heldout_loss) == (1, "round", 2.5)
    assert Chapter.of(world.parent).made_by == "base"


def test_with_chapters_the_card_tells_of_all_rounds_and_everybody(world: World) -> None:
    ada, grace = Contributor("w-1", "Ada", 2, 500), Contributor("w-2", "Grace", 1, 9_000_000)
    history = [
        Chapter(0, "base", 3.25, ()),
        Chapter(1, "round", 3.0, (ada, grace)),
        Chapter(2, "rollback", None, ()),
        Chapter(3, "round", 2.9, (ada,)),
    ]
    manifest = child(world, name="Ada Lovelace").model_copy(update={"version": 4})
    card = model_card(manifest, history)
    assert "So far: 6 contributions by 2 contributors in 3 rounds. What was taken back later is counted too." in card
    losses = ["| 0 | base | 3.2500 |", "| 1 | round | 3.0000 |", "| 3 | round | 2.7500 |", "| 4 | round | 2.5000 |"]
    assert [line for line in card.splitlines() if re.match(r"\| \d+ \| (base|round|roll)", line)] == losses
    people = card.split("## Contributors so far")[1]
    assert people.index("| `Grace` | 1 | 9,000,000 |") < people.index("| `Ada Lovelace` | 5 | 1,235,567 |")
    assert "Since version 3: 3 contributions by 1 contributor in 2 rounds.\n" in model_card(manifest, history[3:])


KEYS = (
    KeyChange(statement=KeyStatement(model="toy", old="aa" * 32, new="bb" * 32, from_version=4), signature="cc" * 64),
)
CHANGES = {
    "one version taken back": (
        Rollback(to=2, reason="spam"),
        "takes back version 3: its tensors are those of version 2",
    ),
    "more versions": (Rollback(to=0), "takes back versions 1 to 3: its tensors are those of version 0"),
    "nothing": (Rollback(to=3), "nothing is taken back"),
    "one contribution": (
        Revocation(contributions=("ab" * 32,)),
        "takes back one contribution: `abababababababab`. Its",
    ),
    "many": (
        Revocation(contributions=tuple(f"{n:064x}" for n in range(25)), reason="their data was stolen"),
        "takes back 25 contributions: `0000000000000000`, ",
    ),
    "a key": (KeyRotation(reason="the old one was on a lost disk"), f"signs with the key `{'bb' * 32}`"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_version_that_no_round_made_says_what_it_takes_back_and_why(case: str, world: World) -> None:
    change, says = CHANGES[case]
    keys = KEYS if isinstance(change, KeyRotation) else ()
    update = {"version": 4, "round_id": None, "terms": (), "change": change, "keys": keys, "evaluation": None}
    card = model_card(child(world).model_copy(update=update))
    assert says in card
    assert "Made in round" not in card
    assert ("Reason: `" in card) == bool(change.reason)
    assert change.reason in card


def test_the_openness_card_shows_every_part_and_every_dataset(world: World) -> None:
    record = assess(child(world), [dataset_card()])
    card = openness_card(record)
    rows = [line for line in card.splitlines() if line.startswith("|") and "**" in line]
    assert len(rows) == len(record.components)
    for part, row in zip(record.components, rows, strict=True):
        assert row.startswith(f"| {part.name} | **{part.state}** | ")
        assert row.count("|") == 6
    for text in ("## Dataset `docs`", "- Licence: `CC-BY-4.0`", "| `deduplicate` | 1,000 | 964 |", "64 secret"):
        assert text in card


# -- text from outside -------------------------------------------------------------------------------------------------

HOSTILE_NAMES = {
    "html": "<script>alert(1)</script>",
    "link": "[free money](https://evil.example)",
    "image": "![x](https://evil.example/pixel.png)",
    "end of the code span": "` <b>bold</b> `",
    "two backticks": "``x`` **y**",
    "new table cells": "a | b | c",
    "escaped pipe": "a\\| b",
    "backslash at the end": "a\\",
    "right-to-left override": "abc\u202ecba",
    "line separator": "a\u2028# heading",
    "next line": "a\u0085---",
    "front matter": "--- license: mit",
}


def check_card(card: str, plain: str) -> None:
    """The card with a hostile name has the same lines as with a plain one, but for code spans."""
    assert card.isprintable() or {c for c in card if not c.isprintable()} == {"\n"}
    assert len(card.splitlines()) == len(plain.splitlines())
    for line, expected in zip(card.splitlines(), plain.splitlines(), strict=True):
        if line != expected:
            assert line.count("`") == expected.count("`")
            assert line.count("|") == expected.count("|")
            assert re.sub(r"`[^`|]*`", "`Ada`", line) == re.sub(r"`[^`|]*`", "`Ada`", expected)


@pytest.mark.parametrize("name", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES.keys())
def test_a_hostile_name_stays_inside_its_code_span(world: World, name: str) -> None:
    history = [Chapter(0, "base", 3.0, (Contributor("w-9", name, 1, 1),))]
    plain = [Chapter(0, "base", 3.0, (Contributor("w-9", "Ada", 1, 1),))]
    check_card(model_card(child(world, name=name), history), model_card(child(world), plain))


@pytest.mark.parametrize("text", [*HOSTILE_NAMES.values(), "two\nlines\n# three"], ids=[*HOSTILE_NAMES, "lines"])
def test_a_hostile_dataset_card_or_reason_stays_inside_its_code_span(world: World, text: str) -> None:
    def card(words: str) -> str:
        step = PipelineStep(name=words, rows_in=2, rows_out=1, detail=words)
        source = dataset_card(source=words, licence=words).model_copy(update={"pipeline": (step,)})
        manifest = child(world).model_copy(update={"software": words, "licence": words, "base_model": words})
        return openness_card(assess(manifest, [source]))

    check_card(card(text), card("Ada"))

    def undone(reason: str) -> str:
        update = {"round_id": None, "terms": (), "change": Rollback(to=0, reason=reason)}
        return model_card(child(world).model_copy(update=update))

    check_card(undone(text), undone("Ada"))


def is_display_name(text: str) -> bool:
    try:
        TypeAdapter(DisplayName).validate_python(text)
    except ValidationError:
        return False
    return True


def test_no_name_at_all_can_change_the_cards_shape(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    plain = model_card(child(world))

    @given(st.text(min_size=1, max_size=64))
    def law(name: str) -> None:
        assume(is_display_name(name))
        check_card(model_card(child(world, name=name)), plain)

    law()


def test_a_card_of_many_contributors_ends_and_says_so(world: World) -> None:
    term: Term = child(world).terms[0]
    terms = tuple(term.model_copy(update={"contribution": f"{n:064x}", "worker_id": f"w-{n:04d}"}) for n in range(1010))
    card = model_card(child(world).model_copy(update={"terms": terms}), [Chapter.of(world.parent)])
    assert "And 10 more, listed in the manifest." in card
    assert "And 10 more, listed in the manifests." in card
