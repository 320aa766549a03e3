"""Replies of a real Valkey, as those who call it rely on them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from coordinator.valkey import Valkey

if TYPE_CHECKING:
    from tests.coordinator.conftest import ValkeyServer

REPLIES: dict[str, tuple[list[str], Any]] = {
    "scores with their members": (["ZRANGE", "z", "0", "-1", "WITHSCORES"], [["a", 1.0], ["b", 2.5]]),
    "a score": (["ZSCORE", "z", "b"], 2.5),
    "no score": (["ZSCORE", "z", "c"], None),
    "a hash": (["HGETALL", "h"], {"x": "1"}),
    "no hash": (["HGETALL", "nothing"], {}),
    "fields, there or not": (["HMGET", "h", "x", "y"], ["1", None]),
    "a count": (["ZCARD", "z"], 2),
}


@pytest.mark.parametrize(("command", "reply"), REPLIES.values(), ids=REPLIES)
def test_a_reply_has_one_shape_whichever_way_it_is_asked_for(
    valkey: ValkeyServer, command: list[str], reply: Any
) -> None:
    valkey.client().zadd("z", {"a": 1, "b": 2.5})
    valkey.client().hset("h", "x", "1")

    async def ask() -> list[Any]:
        connection = await Valkey.connect(valkey.ledger_settings)
        try:
            return [await connection.call(*command), *await connection.read(command)]
        finally:
            await connection.close()

    assert asyncio.run(ask()) == [reply, reply]
