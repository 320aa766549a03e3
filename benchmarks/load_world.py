"""What the simulated volunteers work on: the tiny model, a dataset of many small shards, one round over all of them.

The shards are written as they would be by `rankup dataset build`, without the pipeline: every one has bytes of its own,
so that every lease gets an address of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import httpx2
from load_server import Server

from rankup.message import canonical_json
from rankup.records import BlobRef, DatasetCard
from rankup.settings import StoreSettings
from rankup.store import Store, open_store, put_blob
from rankup.versions import dataset_key, heldout_key

MODEL: Final = "tiny"
DATASET: Final = "made-up"
WRITERS: Final = 8
RECIPE: Final = {"rank": 1, "steps": 10, "batch_size": 4, "max_tokens": 64, "target_modules": ["q_proj"]}
"""A small delta: the volunteers upload thousands, and what is measured is the door, not the arithmetic behind it."""


def furnish(server: Server, shards: int) -> None:
    """The model and a dataset of `shards` shards; what is there already is kept."""
    store = open_store(StoreSettings.from_wire(server.access["store"]))
    subprocess.run(
        [sys.executable, "-m", "rankup", "model", "import", MODEL, "--name", MODEL],
        env=dict(server.environment),
        check=True,
        capture_output=True,
    )
    heldout = b'{"prompt": "q", "completion": "a"}\n'
    card = DatasetCard(
        dataset=DATASET,
        source="made up",
        licence="cc0-1.0",
        rows=shards,
        heldout_rows=1,
        shards=_shards(store, shards),
        heldout=put_blob(store, heldout),
        created_at=time.time(),
    )
    store.put(heldout_key(DATASET, card.heldout.sha256), heldout)
    store.put(dataset_key(DATASET), canonical_json(card))


def _shards(store: Store, count: int) -> tuple[BlobRef, ...]:
    def write(number: int) -> BlobRef:
        return put_blob(store, json.dumps({"prompt": f"question {number}", "completion": f"answer {number}"}).encode())

    with ThreadPoolExecutor(WRITERS) as pool:
        return tuple(pool.map(write, range(count)))


def open_round(server: Server, **request: Any) -> dict[str, Any]:
    asked = {"model": MODEL, "dataset": DATASET, "recipe": RECIPE} | request
    answer = httpx2.post(f"{server.url}/v1/rounds", json=asked, headers=server.organiser, timeout=120)
    if answer.status_code != 201:
        raise RuntimeError(f"the round was not opened: {answer.text}")
    view: dict[str, Any] = answer.json()
    return view
