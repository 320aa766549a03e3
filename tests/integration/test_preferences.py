"""A community's preferences become a version: pairs, a round with DPO, volunteers, a held-out loss that falls."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from running_server import Server
from test_first_light import wait_for_round

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(900)]

NOUNS = ["moon", "river", "clock", "garden", "letter", "window", "ladder", "violin", "teapot", "harbour"]


def pairs(count: int) -> list[dict[str, str]]:
    """A polite answer is preferred to a rude one."""
    drawn = random.Random(7)
    rows = []
    for number in range(count):
        noun, other = drawn.sample(NOUNS, 2)
        prompt = f"{number}. Where do I find the {noun} of {other} {drawn.randrange(10**6)}?"
        rows.append({"prompt": prompt, "chosen": f" Please look at {noun}.", "rejected": f" Go away with {noun}!"})
    return rows


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_round_of_preferences_publishes_a_version_that_prefers_what_people_do(
    server: Server, campaign_data: str, tmp_path: Path, method: str
) -> None:
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pairs(160)))
    name = f"pairs-{method}"
    options = ("--licence", "CC0-1.0", "--shard-rows", "48", "--heldout-rows", "32")
    card = server.json("dataset", "build", name, str(rows), *options)
    assert card["shape"] == "preference"

    asked: tuple[str, ...] = (
        "--model",
        campaign_data,
        "--dataset",
        name,
        "--shards",
        "2",
        "--steps",
        "10",
        "--batch-size",
        "4",
    )
    asked = (*asked, "--rank", "4", "--learning-rate", "0.003", "--momentum", "0", "--outer-lr", "1")
    refused = server.rankup("round", "create", *asked, check=False)
    assert refused.returncode != 0
    assert "Choose the method dpo or kto" in refused.stdout + refused.stderr

    opened = server.json("round", "create", *asked, "--method", method, "--beta", "0.2")
    crowd = [server.join(f"{volunteer}-{method}", "--max-leases", "1") for volunteer in ("ada", "grace")]
    view = wait_for_round(server, opened["round_id"], seconds=600)
    for volunteer in crowd:
        volunteer.communicate(timeout=120)
    assert view["state"] == "published", view
    assert view["accepted"] == 2
    assert view["heldout_loss"] < view["parent_heldout_loss"] - 0.02
    assert server.json("verify", server.url, campaign_data)["ok"]
