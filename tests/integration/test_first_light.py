"""The main job through the commands of the README, on real parts: server, volunteers, round, pull, verify, load."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from running_server import Server, start_server

from aggregator.fold import fold_group
from rankup.records import Manifest, TensorEntry
from rankup.settings import StoreSettings
from rankup.store import open_store
from rankup.versions import MAX_ENVELOPE_BYTES, manifest_key, open_envelope

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(600)]


def wait_for_round(server: Server, round_id: str, *, seconds: float = 180) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while True:
        view = json.loads(server.rankup("round", "show", round_id).stdout)
        if view["state"] in ("published", "rejected", "cancelled"):
            return view
        assert time.monotonic() < deadline, view
        time.sleep(1)


def test_two_volunteers_make_a_version_that_can_be_pulled_verified_and_loaded(
    server: Server, campaign_data: str, tmp_path: Path
) -> None:
    options = ("--shards", "2", "--steps", "12", "--batch-size", "8", "--rank", "4", "--learning-rate", "0.01")
    opened = server.json("round", "create", "--model", campaign_data, "--dataset", "pydocs", *options)
    crowd = [server.join(name, "--max-leases", "1") for name in ("ada", "grace")]
    view = wait_for_round(server, opened["round_id"])
    events = [[json.loads(line) for line in volunteer.communicate(timeout=60)[0].splitlines()] for volunteer in crowd]
    assert [volunteer.returncode for volunteer in crowd] == [0, 0]
    assert all(any(e["event"] == "verdict" and e["accepted"] for e in lines) for lines in events)

    assert view["state"] == "published", view
    assert view["accepted"] == 2
    assert view["heldout_loss"] < view["parent_heldout_loss"]

    pulled = server.json("pull", server.url, campaign_data, "--to", str(tmp_path / "model"))
    assert pulled["version"] == view["published_version"]
    again = server.json("pull", server.url, campaign_data, "--to", str(tmp_path / "model"))
    assert again["manifest"] == pulled["manifest"]

    report = server.json("verify", server.url, campaign_data)
    assert report["ok"]
    assert report["changed"] > 0
    assert not report["mismatches"]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "model")("What does", return_tensors="pt")
    assert model.generate(**tokens, max_new_tokens=4).shape[1] > tokens["input_ids"].shape[1]
    assert server.rankup("ask", str(tmp_path / "model"), "What?", "--max-new-tokens", "4").returncode == 0

    undone, kept = server.json("admin", "contributions", campaign_data)[-2:]
    server.json("admin", "revoke", campaign_data, undone["contribution"], "--reason", "a test", "--yes")
    updated = server.json("pull", server.url, campaign_data, "--to", str(tmp_path / "model"))
    assert updated["version"] == pulled["version"] + 1
    assert server.json("verify", str(tmp_path / "model"))["ok"]
    assert server.json("verify", server.url, campaign_data, "--level", "all")["ok"]
    assert tensors_of(server, campaign_data, updated["version"]) == summed_by_hand(server, campaign_data, kept)

    deadline = time.monotonic() + 60
    while credit_of(server, undone["worker_id"], kept["worker_id"]) != [0.0, float(kept["tokens"])]:
        assert time.monotonic() < deadline, credit_of(server, undone["worker_id"], kept["worker_id"])
        time.sleep(1)
    done = [action["what"] for action in server.json("admin", "log")]
    assert {"import_model", "create_round", "revoke_contributions"} <= set(done)


def credit_of(server: Server, *workers: str) -> list[float]:
    found = {row["worker_id"]: row["credit"] for row in server.json("leaderboard")}
    return [found[worker_id] for worker_id in workers]


def tensors_of(server: Server, model: str, version: int) -> dict[str, TensorEntry]:
    return dict(manifest_of(server, model, version).tensors)


def manifest_of(server: Server, model: str, version: int) -> Manifest:
    store = open_store(StoreSettings.from_wire(server.access["store"]))
    data = store.get(manifest_key(model, version), max_bytes=MAX_ENVELOPE_BYTES)
    return open_envelope(data, publisher_key=None)[0]


def summed_by_hand(server: Server, model: str, term: dict[str, Any]) -> dict[str, TensorEntry]:
    """The tensors of a history in which the round of `term` had no other contribution, its coefficient as it was."""
    store = open_store(StoreSettings.from_wire(server.access["store"]))
    of_round = manifest_of(server, model, term["version"])
    parent = manifest_of(server, model, term["version"] - 1)
    assert of_round.recipe is not None
    [alone] = [one for one in of_round.terms if one.contribution == term["contribution"]]
    folded = [
        fold_group(
            store,
            parent,
            number,
            [alone],
            of_round.denominator_log2,
            outer=of_round.recipe.aggregation.outer,
            patch=False,
        )
        for number in range(1, len(parent.groups) + 1)
    ]
    return {name: entry for part in folded for name, entry in part.tensors.items()}


@pytest.mark.long
def test_a_server_that_is_stopped_in_the_middle_of_a_round_goes_on_with_it_when_started_again(tmp_path: Path) -> None:
    server = start_server(tmp_path / "home")
    try:
        server.rankup("model", "import", "tiny", "--name", "tiny")
        server.rankup("dataset", "build", "pydocs", "--pydocs", "--shard-rows", "64")
        options = ("--shards", "2", "--steps", "6", "--rank", "2", "--learning-rate", "0.01")
        opened = server.json("round", "create", "--model", "tiny", "--dataset", "pydocs", *options)
        first = server.join("ada", "--max-leases", "1")
        first.communicate(timeout=120)
        assert json.loads(server.rankup("round", "show", opened["round_id"]).stdout)["accepted"] == 1
    finally:
        server.stop()
    port = int(server.url.rpartition(":")[2])
    server = start_server(tmp_path / "home", port)
    try:
        second = server.join("grace", "--max-leases", "1")
        second.communicate(timeout=120)
        view = wait_for_round(server, opened["round_id"])
        assert (view["state"], view["accepted"]) == ("published", 2)
        assert server.json("verify", server.url)["ok"]
    finally:
        server.stop()


def test_a_volunteer_that_is_interrupted_gives_its_shard_back_at_once(server: Server, campaign_data: str) -> None:
    options = ("--shards", "1", "--steps", "100000", "--learning-rate", "0.001")
    opened = server.json("round", "create", "--model", campaign_data, "--dataset", "pydocs", *options)
    volunteer = server.join("linus")
    assert volunteer.stdout is not None
    for line in volunteer.stdout:
        if json.loads(line)["event"] == "step":
            break
    volunteer.send_signal(signal.SIGINT)
    volunteer.communicate(timeout=60)
    assert volunteer.returncode == 0
    view = json.loads(server.rankup("round", "show", opened["round_id"]).stdout)
    assert (view["leased"], view["free"]) == (0, 1)
    server.rankup("round", "cancel", opened["round_id"])
    assert wait_for_round(server, opened["round_id"])["state"] == "cancelled"
