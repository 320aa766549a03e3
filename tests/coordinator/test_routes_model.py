"""What the gateway tells of versions that are no longer kept whole, and that a reader understands it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from gateway_world import World, furnished_gateway

from rankup.errors import NotFoundError
from rankup.message import canonical_json
from rankup.records import Retained
from rankup.sources import GatewaySource, WebSource
from rankup.versions import retained_key

if TYPE_CHECKING:
    from conftest import ValkeyServer


@pytest.fixture
def world(valkey: ValkeyServer) -> Iterator[World]:
    with furnished_gateway(valkey.ledger_settings) as made:
        yield made


def test_a_model_of_which_everything_is_kept_has_an_empty_record(world: World) -> None:
    answer = world.http.get("/v1/models/tiny/retained")
    assert (answer.status_code, answer.json()) == (
        200,
        {"format": "rankup.retained/1", "model": "tiny", "gone": {}},
    )


def test_the_record_is_told_as_it_lies_in_the_bucket(world: World) -> None:
    retained = Retained(model="tiny", gone={0: ("export", "master"), 12: ("patch",)})
    world.store.put(retained_key("tiny"), canonical_json(retained))
    with GatewaySource(str(world.http.base_url)) as source:
        assert source.retained("tiny") == retained


def test_an_unknown_model_and_a_broken_record_are_errors(world: World) -> None:
    answer = world.http.get("/v1/models/none/retained")
    assert (answer.status_code, answer.json()["type"].rsplit("/")[-1]) == (404, "not-found")
    world.store.put(retained_key("tiny"), b"{")
    answer = world.http.get("/v1/models/tiny/retained")
    assert (answer.status_code, answer.json()["type"].rsplit("/")[-1]) == (500, "integrity")


def test_a_gateway_is_recognised_by_its_address_alone(world: World) -> None:
    source = WebSource(str(world.http.base_url))
    assert source.models() == ("tiny",)
    assert source.latest("tiny").version == 0
    with pytest.raises(NotFoundError):
        source.envelope("tiny", 7)
    source.close()
