"""One round with everything on: audits, screening of the cohort, a robust rule, momentum, layers of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hand_volunteer import HandVolunteer, good_delta
from running_server import start_server
from test_first_light import wait_for_round

from rankup.protocol import LeaseState
from rankup.records import Cohort, Receipt
from rankup.settings import StoreSettings
from rankup.store import open_store
from rankup.versions import MAX_ENVELOPE_BYTES, cohort_key, manifest_key, open_envelope, receipt_prefix

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(400)]

REQUEST = {
    "model": "tiny",
    "dataset": "pydocs",
    "shards": 4,
    "max_shards_per_lease": 1,
    "recipe": {
        "rank": 4,
        "rank_pattern": {"mlp.down_proj": 2},
        "steps": 3,
        "max_tokens": 48,
        "learning_rate": 0.005,
        "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
        "train_vectors": True,
        "aggregation": {"rule": "geometric_median", "outer": {"momentum": 0.875, "learning_rate": 0.75}},
    },
    "max_loss_increase": 1.0,
}


def test_an_audit_refuses_what_training_again_does_not_give_and_the_round_is_replayed(tmp_path: Path) -> None:
    server = start_server(tmp_path / "home", RANKUP_COORDINATOR_AUDITS="true")
    try:
        server.rankup("model", "import", "tiny", "--name", "tiny")
        server.rankup("dataset", "build", "pydocs", "--pydocs", "--shard-rows", "64")
        (tmp_path / "round.yaml").write_text(yaml.safe_dump(REQUEST))
        round_id = server.json("round", "create", "--file", str(tmp_path / "round.yaml"))["round_id"]

        mallory = HandVolunteer(server.url, server.invite, "mallory")
        lease = mallory.claim()
        assert lease.targets["model.norm.weight"].d_in == 1
        assert lease.targets["model.layers.0.mlp.down_proj.weight"].rank == 2
        view = mallory.hand_in(lease, good_delta(lease, tmp_path, seed=1))
        assert view.state is LeaseState.REJECTED
        assert "training the shards again gives a delta at cosine" in view.verdict

        ada = server.join("ada", "--max-leases", "4")
        assert ada.wait(200) == 0, (server.home / "ada.log").read_text()
        assert wait_for_round(server, round_id)["state"] == "published"

        store = open_store(StoreSettings.from_wire(server.access["store"]))
        cohort = Cohort.model_validate_json(store.get(cohort_key(round_id), max_bytes=10**6))
        assert sum(member.coefficient for member in cohort.members) <= 2**16
        receipts = [
            Receipt.model_validate_json(store.get(key, max_bytes=10**6)) for key in store.list(receipt_prefix(round_id))
        ]
        checks = [{check.name: check for check in receipt.checks} for receipt in receipts if receipt.accepted]
        assert len(checks) == 4
        assert all({"norm", "near_duplicate", "heldout", "descent"} <= names.keys() for names in checks)
        audited = [names["audit"].value for names in checks if "audit" in names]
        assert len(audited) >= 2, "the first two of a new volunteer always are"
        assert all(cosine is not None and cosine > 0.98 for cosine in audited)

        sealed = store.get(manifest_key("tiny", 1), max_bytes=MAX_ENVELOPE_BYTES)
        manifest, _, _ = open_envelope(sealed, publisher_key=None)
        moved = {name for name, entry in manifest.tensors.items() if entry.momentum is not None}
        assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"} <= moved
        report = json.loads(server.rankup("verify", server.url, "tiny", "--json").stdout)
        assert (report["ok"], report["level"]) == (True, "round")
    finally:
        server.stop()
