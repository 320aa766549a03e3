"""A round in which a base of another architecture and another tokenizer learns what a published version answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from running_server import start_server
from test_first_light import wait_for_round

from rankup.records import Receipt, RoundRecord
from rankup.settings import StoreSettings
from rankup.store import open_store
from rankup.versions import receipt_prefix, round_key

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(600)]

REQUEST = {
    "model": "pupil",
    "dataset": "pydocs",
    "teacher": "sage",
    "shards": 2,
    "recipe": {
        "method": "distillation",
        "rank": 4,
        "steps": 3,
        "batch_size": 2,
        "max_tokens": 96,
        "learning_rate": 0.005,
    },
    "max_loss_increase": 1.0,
}


def save_pupil(folder: Path) -> Path:
    """A random GPT-NeoX whose tokenizer knows pieces of words."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner = trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet)
    inner.train_from_iterator([Path(__file__).read_text()], learner)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_new_base_learns_from_a_published_version_of_another_model(tmp_path: Path) -> None:
    server = start_server(tmp_path / "home", RANKUP_COORDINATOR_AUDITS="true")
    try:
        server.rankup("model", "import", "tiny", "--name", "sage")
        server.rankup("model", "import", str(save_pupil(tmp_path / "pupil")), "--name", "pupil")
        server.rankup("dataset", "build", "pydocs", "--pydocs", "--shard-rows", "64")
        (tmp_path / "round.yaml").write_text(yaml.safe_dump(REQUEST))
        round_id = server.json("round", "create", "--file", str(tmp_path / "round.yaml"))["round_id"]
        ada = server.join("ada", "--max-leases", "2")
        output = ada.communicate(timeout=300)[0]
        assert ada.returncode == 0, (server.home / "ada.log").read_text()
        events = [json.loads(line) for line in output.splitlines()]
        assert {event["what"] for event in events if event["event"] == "downloading"} >= {"base", "teacher"}
        answered = [(event["done"], event["total"]) for event in events if event["event"] == "answering"]
        assert (6, 6) in answered, "the prompts of three steps of two"
        view = wait_for_round(server, round_id)
        assert (view["state"], view["accepted"]) == ("published", 2), view

        store = open_store(StoreSettings.from_wire(server.access["store"]))
        record = RoundRecord.model_validate_json(store.get(round_key(round_id), max_bytes=10**7))
        assert record.teacher is not None
        assert (record.teacher.model, record.teacher.version) == ("sage", 0)
        receipts = [
            Receipt.model_validate_json(store.get(key, max_bytes=10**6)) for key in store.list(receipt_prefix(round_id))
        ]
        audits = [check for receipt in receipts for check in receipt.checks if check.name == "audit"]
        assert len(audits) == 2
        assert all(check.value is not None and check.value > 0.98 for check in audits), audits
        report = json.loads(server.rankup("verify", server.url, "pupil", "--json").stdout)
        assert (report["ok"], report["level"]) == (True, "round")
    finally:
        server.stop()
