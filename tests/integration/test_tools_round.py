"""A community teaches a model to call tools: rows with tools, a base whose chat template gets a place for them, a
round, and the pulled version, whose template shows them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from running_server import Server
from test_first_light import wait_for_round

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(900)]

TEMPLATE = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {what: {}}}}}
    for name, what in (("weather", "town"), ("clock", "place"))
]


def talk(town: str, name: str, what: str) -> dict[str, Any]:
    called = {"type": "function", "function": {"name": name, "arguments": {what: town}}}
    return {
        "prompt": [{"role": "user", "content": f"{name} {town}"}],
        "completion": [{"role": "assistant", "tool_calls": [called]}],
        "tools": TOOLS,
    }


def rows(count: int) -> list[dict[str, Any]]:
    drawn = random.Random(7)
    towns = ("".join(drawn.choices("abcdefghij", k=6)) for _ in range(count))
    return [talk(town, *drawn.choice([("weather", "town"), ("clock", "place")])) for town in towns]


def request(folder: Path, model: str) -> str:
    """A round of one lease for each of two volunteers, as a file."""
    recipe = {"steps": 24, "rank": 8, "batch_size": 4, "learning_rate": 0.01}
    recipe |= {"aggregation": {"outer": {"momentum": 0, "learning_rate": 1}}}
    wanted = {"model": model, "dataset": "calls", "shards": 2, "max_shards_per_lease": 1, "recipe": recipe}
    (folder / "round.json").write_text(json.dumps(wanted))
    return str(folder / "round.json")


def test_a_round_of_tool_calls_publishes_a_version_that_learned_them(server: Server, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    file = tmp_path / "calls.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(160)))
    options = ("--licence", "CC0-1.0", "--shard-rows", "48", "--heldout-rows", "32")
    card = server.json("dataset", "build", "calls", str(file), *options)
    assert (card["shape"], card["needs"]) == ("prompt-completion chat", ["tool_calls", "tools"])

    server.rankup("model", "import", "tiny", "--name", "mute")
    refused = server.rankup("round", "create", request(tmp_path, "mute"), check=False)
    assert refused.returncode != 0
    assert "tool_calls, tools, which the chat template of mute leaves out" in refused.stdout + refused.stderr

    (tmp_path / "tools.jinja").write_text(TEMPLATE)
    server.rankup("model", "import", "tiny", "--name", "caller", "--chat-template", str(tmp_path / "tools.jinja"))
    opened = server.json("round", "create", request(tmp_path, "caller"))
    crowd = [server.join(volunteer, "--max-leases", "1") for volunteer in ("ada-calls", "grace-calls")]
    view = wait_for_round(server, opened["round_id"], seconds=600)
    for volunteer in crowd:
        volunteer.communicate(timeout=120)
    assert view["state"] == "published", view
    assert view["accepted"] == 2
    assert view["heldout_loss"] < view["parent_heldout_loss"] - 0.5

    pulled = tmp_path / "pulled"
    server.json("pull", server.url, "caller", "--to", str(pulled))
    tokenizer = AutoTokenizer.from_pretrained(pulled)
    row = talk("abcabc", "clock", "place")
    said = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tools=row["tools"], tokenize=False)
    assert said == (
        "<|system|>weather clock <|end|><|user|>clock abcabc<|end|>"
        '<|assistant|>{"name": "clock", "arguments": {"place": "abcabc"}}<|end|>'
    )
