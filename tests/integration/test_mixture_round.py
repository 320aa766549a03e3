"""A mixture of experts, from a file as it is published to a version with trained experts, on a real server."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
from families import EXPERTS, FAMILIES
from running_server import Server
from test_first_light import manifest_of, wait_for_round

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(900)]


def test_volunteers_train_experts_that_the_base_stores_one_by_one(
    server: Server, campaign_data: str, tmp_path: Path
) -> None:
    tokenizer = families.write_tokenizer(tmp_path / "tokenizer")
    base = families.save(families.build(FAMILIES["mixtral"]), tokenizer, tmp_path / "base", original=True)
    server.rankup("model", "import", str(base), "--name", "mixture", "--stack-experts")
    recipe = {"steps": 4, "batch_size": 4, "rank": 2, "learning_rate": 0.01, "target_parameters": EXPERTS}
    request = {"model": "mixture", "dataset": "pydocs", "shards": 3, "recipe": recipe}
    (tmp_path / "round.yaml").write_text(json.dumps(request), encoding="utf-8")
    opened = server.json("round", "create", str(tmp_path / "round.yaml"))
    crowd = [server.join(name, "--max-leases", leases) for name, leases in (("emmy", "2"), ("olga", "1"))]
    view = wait_for_round(server, opened["round_id"], seconds=600)
    for volunteer in crowd:
        volunteer.terminate()
        volunteer.communicate(timeout=60)
    assert (view["state"], view["accepted"]) == ("published", 3), view
    assert view["heldout_loss"] < view["parent_heldout_loss"]

    before, after = (manifest_of(server, "mixture", version).tensors for version in (0, 1))
    experts = {name for name, entry in before.items() if entry.role == "experts"}
    assert len(experts) == 4
    assert {name for name in after if after[name].master != before[name].master} > experts

    pulled = tmp_path / "pulled"
    server.json("pull", server.url, "mixture", "--to", str(pulled))
    assert server.json("verify", server.url, "mixture")["ok"]
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(pulled, local_files_only=True, output_loading_info=True)
    assert not {name: found for name, found in info.items() if found}
    assert server.rankup("ask", str(pulled), "What?", "--max-new-tokens", "4").returncode == 0
