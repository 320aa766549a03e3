"""Bad input at the doors of a real server: each gets a clear refusal, and the round finishes with the good deltas."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from hand_volunteer import HandVolunteer, as_arrays, good_delta, header_of, random_factors, raw_delta
from running_server import Server
from test_first_light import wait_for_round

from rankup.errors import DeniedError, InputError, StateError, TooLargeError
from rankup.protocol import LeaseGrant, LeaseState, UploadRequest
from rankup.signing import generate_private_key, parse_private_key

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(300)]

Spoil = Callable[[LeaseGrant, dict[str, Any], Path], Path]


def _rewritten(change: Callable[[dict[str, Any], str], None]) -> Spoil:
    def spoil(lease: LeaseGrant, arrays: dict[str, Any], path: Path) -> Path:
        change(arrays, sorted(lease.targets)[0])
        return raw_delta(lease, arrays, path)

    return spoil


def _wrong_name(arrays: dict[str, Any], name: str) -> None:
    arrays["model.embed_tokens.weight.lora_B"] = arrays.pop(f"{name}.lora_B")


def _wrong_shape(arrays: dict[str, Any], name: str) -> None:
    arrays[f"{name}.lora_B"] = arrays[f"{name}.lora_B"][:-1]


def _wrong_dtype(arrays: dict[str, Any], name: str) -> None:
    arrays[f"{name}.lora_B"] = arrays[f"{name}.lora_B"].astype(np.float32)


def _not_a_number(arrays: dict[str, Any], name: str) -> None:
    arrays[f"{name}.lora_A"] = np.full(arrays[f"{name}.lora_A"].shape, np.nan, dtype=np.float32)


def _rank_too_high(arrays: dict[str, Any], name: str) -> None:
    for part, axis in (("lora_B", 1), ("lora_A", 0), ("lora_scales", 1)):
        arrays[f"{name}.{part}"] = np.repeat(arrays[f"{name}.{part}"], 3, axis=axis)


def _exponent_out_of_range(arrays: dict[str, Any], name: str) -> None:
    arrays[f"{name}.lora_scales"][0] = 20_000


def _lying_maxima(arrays: dict[str, Any], name: str) -> None:
    arrays[f"{name}.lora_scales"][2] = 1


def _nothing(arrays: dict[str, Any], name: str) -> None:
    for values in arrays.values():
        values[:] = 0


def _header_too_large(lease: LeaseGrant, arrays: dict[str, Any], path: Path) -> Path:
    few = dict(sorted(arrays.items())[:3])  # a file of a size that gets a ticket
    rest = raw_delta(lease, few, path).read_bytes()
    length = int.from_bytes(rest[:8], "little")
    padded = rest[8 : 8 + length] + b" " * 1024 * 1024
    path.write_bytes(len(padded).to_bytes(8, "little") + padded + rest[8 + length :])
    return path


def _truncated(lease: LeaseGrant, arrays: dict[str, Any], path: Path) -> Path:
    data = raw_delta(lease, arrays, path).read_bytes()
    path.write_bytes(data[:-100])
    return path


def _pickle(lease: LeaseGrant, arrays: dict[str, Any], path: Path) -> Path:
    path.write_bytes(pickle.dumps(arrays))
    return path


def _of_another_lease(lease: LeaseGrant, arrays: dict[str, Any], path: Path) -> Path:
    return raw_delta(lease, arrays, path, header=header_of(lease).model_copy(update={"lease_id": "l-somebody-else"}))


BAD_DELTAS: dict[str, tuple[Spoil, str]] = {
    "wrong name": (_rewritten(_wrong_name), "embed_tokens"),
    "wrong shape": (_rewritten(_wrong_shape), "malformed"),
    "wrong dtype": (_rewritten(_wrong_dtype), "not an integer matrix"),
    "NaN": (_rewritten(_not_a_number), "not an integer matrix"),
    "rank above the recipe's": (_rewritten(_rank_too_high), "rank"),
    "exponent out of range": (_rewritten(_exponent_out_of_range), "exponent"),
    "lying maxima": (_rewritten(_lying_maxima), "maxima"),
    "nothing at all": (_rewritten(_nothing), "zero"),
    "header too large": (_header_too_large, "header"),
    "truncated": (_truncated, "malformed"),
    "pickle": (_pickle, "malformed"),
    "made for another lease": (_of_another_lease, "lease"),
}


@pytest.fixture(scope="module")
def bad_round(server: Server, campaign_data: str) -> Iterator[str]:
    """An open round of one shard; afterwards a good delta must still end it."""
    opened = server.json("round", "create", "--model", campaign_data, "--dataset", "pydocs", "--shards", "1")
    yield opened["round_id"]
    server.rankup("round", "cancel", opened["round_id"], check=False)


@pytest.fixture(scope="module")
def volunteer(server: Server, bad_round: str) -> HandVolunteer:
    return HandVolunteer(server.url, server.invite, "mallory")


@pytest.mark.parametrize(("spoil", "word"), BAD_DELTAS.values(), ids=BAD_DELTAS.keys())
def test_a_bad_delta_is_rejected_with_a_reason_and_its_shard_is_free_again(
    volunteer: HandVolunteer, tmp_path: Path, spoil: Spoil, word: str
) -> None:
    lease = volunteer.claim()
    arrays = as_arrays(random_factors(lease, seed=1))
    view = volunteer.hand_in(lease, spoil(lease, arrays, tmp_path / "bad.delta"))
    assert view.state is LeaseState.REJECTED
    assert word in view.verdict
    again = volunteer.claim()
    assert (again.shard, again.fence > lease.fence) == (lease.shard, True)


def test_the_object_store_refuses_other_bytes_than_the_ticket_was_given_for(
    volunteer: HandVolunteer, tmp_path: Path
) -> None:
    lease = volunteer.claim()
    data = good_delta(lease, tmp_path, seed=2).read_bytes()
    wanted = UploadRequest(fence=lease.fence, sha256="0" * 64, size_bytes=len(data))
    ticket = volunteer.client.upload_ticket(lease.lease_id, wanted)
    assert httpx2.put(ticket.url, content=data, headers=ticket.headers).status_code in (400, 403)
    headers = {name: value for name, value in ticket.headers.items() if name.lower() != "content-length"}
    longer = httpx2.put(ticket.url, content=data + b"x", headers=headers)
    assert longer.status_code in (400, 403)
    with pytest.raises(StateError, match="no upload"):
        volunteer.submit(lease, tmp_path / "good-2.delta")


def test_a_delta_above_the_limit_gets_no_ticket(volunteer: HandVolunteer) -> None:
    lease = volunteer.claim()
    huge = UploadRequest(fence=lease.fence, sha256="0" * 64, size_bytes=lease.max_delta_bytes + 1)
    with pytest.raises(TooLargeError):
        volunteer.client.upload_ticket(lease.lease_id, huge)


def test_a_wrong_signature_an_old_fence_and_a_foreign_lease_are_denied(
    server: Server, volunteer: HandVolunteer, tmp_path: Path
) -> None:
    lease = volunteer.claim()
    path = good_delta(lease, tmp_path, seed=3)
    volunteer.upload(lease, path)
    own_key = volunteer.key
    volunteer.key = parse_private_key(generate_private_key())
    try:
        with pytest.raises(DeniedError):
            volunteer.submit(lease, path)
    finally:
        volunteer.key = own_key
    with pytest.raises(DeniedError):
        volunteer.submit(lease, path, fence=lease.fence - 1)
    stranger = HandVolunteer(server.url, server.invite, "trudy")
    with pytest.raises(DeniedError):
        stranger.submit(lease, path)
    with pytest.raises(InputError):
        volunteer.submit(lease, path, base_manifest="0" * 64)


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b"[" * 50_000, b'{"fence": 1e999}', b'{"surprise": 1}', b"null"])
def test_malformed_json_is_the_clients_fault(volunteer: HandVolunteer, body: bytes) -> None:
    lease = volunteer.claim()
    answer = volunteer.post(f"/v1/leases/{lease.lease_id}/heartbeat", body)
    assert 400 <= answer.status_code < 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["remedy"]


def test_a_body_above_the_limit_is_refused_before_it_is_parsed(volunteer: HandVolunteer) -> None:
    answer = volunteer.post("/v1/workers", b'{"statement": "' + b"x" * 1_000_000 + b'"}')
    assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (413, "too-large")


def test_after_all_that_a_good_delta_ends_the_round_and_a_late_one_is_refused(
    server: Server, volunteer: HandVolunteer, bad_round: str, tmp_path: Path
) -> None:
    lease = volunteer.claim()
    path = good_delta(lease, tmp_path, seed=4)
    assert volunteer.hand_in(lease, path).state is LeaseState.ACCEPTED
    assert volunteer.submit(lease, path).state is LeaseState.ACCEPTED  # submitting twice is one submission
    view = wait_for_round(server, bad_round)
    assert (view["state"], view["accepted"]) in (("published", 1), ("rejected", 1))
    with pytest.raises(StateError):
        volunteer.client.upload_ticket(lease.lease_id, UploadRequest(fence=lease.fence, sha256="1" * 64, size_bytes=10))
    assert server.json("verify", server.url, "tiny")["ok"]
