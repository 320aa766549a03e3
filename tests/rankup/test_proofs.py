"""Proving offline that a contribution is in a version, and refusing every proof of what is not so."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from changed_history import LAST, MODEL, SUMS, make_changed_history

from rankup.errors import IntegrityError, NotFoundError, RankupError, StateError, TooLargeError
from rankup.folder import ENVELOPE_NAME
from rankup.message import canonical_json
from rankup.proofs import (
    MAX_PROOF_BYTES,
    InclusionProof,
    check_proof,
    contribution_digest,
    prove_contribution,
    read_proof,
    require_proof,
)
from rankup.pull import StoreSource, pull
from rankup.signing import generate_private_key, parse_private_key, public_key_hex

HISTORY = make_changed_history()
IN_SUM = [(of, number) for of, numbers in SUMS[LAST].items() for number in numbers]


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Version -> a folder with it."""
    folders = {version: tmp_path_factory.mktemp(f"version-{version}") for version in (0, 2, 3, LAST)}
    for version, folder in folders.items():
        pull(StoreSource(HISTORY.store), MODEL, version, folder)
    return folders


@pytest.fixture
def folder(pulled: dict[int, Path], tmp_path: Path) -> Path:
    """The latest version, to be damaged."""
    return Path(shutil.copytree(pulled[LAST], tmp_path / "folder"))


@pytest.mark.parametrize(("of", "number"), IN_SUM)
def test_every_contribution_in_the_sum_has_a_proof_that_needs_the_manifest_alone(
    pulled: dict[int, Path], tmp_path: Path, of: int, number: int
) -> None:
    contribution = HISTORY.contribution(of, number)
    proof, key = prove_contribution(pulled[LAST], contribution)
    assert (proof.version, proof.manifest) == (LAST, HISTORY.digest(LAST))
    assert (proof.leaf.contribution, proof.leaf.version, proof.leaf.coefficient) == (contribution, of, 20000 + number)
    assert (proof.size, key) == (len(IN_SUM), public_key_hex(HISTORY.keys[2]))
    path = tmp_path / "proof"
    path.write_bytes(canonical_json(proof))
    assert read_proof(path) == proof
    for place in (pulled[LAST], pulled[LAST] / ENVELOPE_NAME):
        assert check_proof(proof, contribution, place) == key
        assert check_proof(proof, contribution, place, publisher_key=public_key_hex(HISTORY.keys[0])) == key


def test_a_contribution_is_named_by_its_file_or_its_digest(tmp_path: Path) -> None:
    digest = HISTORY.contribution(12, 0)
    path = tmp_path / "delta"
    path.write_bytes(HISTORY.deltas[digest])
    assert contribution_digest(str(path)) == contribution_digest(digest) == digest
    for name in (str(tmp_path / "absent"), digest[:-1], digest.upper(), str(tmp_path)):
        with pytest.raises(NotFoundError):
            contribution_digest(name)


ABSENT: list[tuple[str, int, tuple[int, int], type[RankupError], str]] = [
    ("taken out by this version", 3, (1, 1), StateError, "was revoked: .* poisoned"),
    ("left out by its round", 2, (2, 3), NotFoundError, "coefficient 0"),
    ("taken out before", LAST, (1, 1), NotFoundError, "not in the sum"),
    ("of a later version", 3, (12, 0), NotFoundError, "not in the sum"),
    ("before there is any", 0, (1, 0), NotFoundError, "not in the sum"),
]


@pytest.mark.parametrize(("version", "which", "error", "says"), [pytest.param(*row[1:], id=row[0]) for row in ABSENT])
def test_what_is_not_in_the_sum_is_said_to_be_so(
    pulled: dict[int, Path], version: int, which: tuple[int, int], error: type[RankupError], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        prove_contribution(pulled[version], HISTORY.contribution(*which))
    assert caught.value.exit_code == 2


def changed(**fields: Any) -> Callable[[InclusionProof], InclusionProof]:
    return lambda proof: proof.model_copy(update=fields)


def with_leaf(**fields: Any) -> Callable[[InclusionProof], InclusionProof]:
    return lambda proof: proof.model_copy(update={"leaf": proof.leaf.model_copy(update=fields)})


FORGED: list[tuple[str, Callable[[InclusionProof], InclusionProof], str]] = [
    ("another model", changed(model="other"), "the manifest is of"),
    ("another version", changed(version=LAST - 1), "the manifest is of"),
    ("another manifest", changed(manifest="ab" * 32), "the manifest is of"),
    ("another contribution", with_leaf(contribution="ab" * 32), "not of"),
    ("another coefficient", with_leaf(coefficient=1), "does not lead"),
    ("another round", with_leaf(version=2), "does not lead"),
    ("another denominator", with_leaf(denominator_log2=0), "does not lead"),
    ("another place", lambda proof: proof.model_copy(update={"index": proof.index ^ 1}), "does not lead"),
    ("a place outside", changed(index=len(IN_SUM)), "does not lead"),
    ("a larger tree", changed(size=len(IN_SUM) + 1), "does not lead"),
    ("no way", changed(path=()), "does not lead"),
    ("the way the other way round", lambda proof: proof.model_copy(update={"path": proof.path[::-1]}), "not lead"),
]


@pytest.mark.parametrize(("forge", "says"), [pytest.param(f, s, id=i) for i, f, s in FORGED])
def test_a_forged_proof_is_refused(
    pulled: dict[int, Path], forge: Callable[[InclusionProof], InclusionProof], says: str
) -> None:
    contribution = HISTORY.contribution(*IN_SUM[0])
    proof, _ = prove_contribution(pulled[LAST], contribution)
    with pytest.raises(IntegrityError, match=says):
        check_proof(forge(proof), contribution, pulled[LAST] / ENVELOPE_NAME)


def test_a_proof_of_one_contribution_or_version_is_none_of_another(pulled: dict[int, Path]) -> None:
    mine, other = HISTORY.contribution(*IN_SUM[0]), HISTORY.contribution(*IN_SUM[1])
    proof, _ = prove_contribution(pulled[LAST], mine)
    with pytest.raises(IntegrityError, match="not of"):
        check_proof(proof, other, pulled[LAST])
    with pytest.raises(IntegrityError, match="the manifest is of"):
        check_proof(proof, mine, pulled[3])


def test_another_publishers_manifest_proves_nothing(pulled: dict[int, Path]) -> None:
    contribution = HISTORY.contribution(*IN_SUM[0])
    proof, _ = prove_contribution(pulled[LAST], contribution)
    stranger = public_key_hex(parse_private_key(generate_private_key()))
    for place in (pulled[LAST], pulled[LAST] / ENVELOPE_NAME):
        with pytest.raises(IntegrityError, match="publisher's key"):
            check_proof(proof, contribution, place, publisher_key=stranger)
    with pytest.raises(IntegrityError, match="publisher's key"):
        prove_contribution(pulled[LAST], contribution, publisher_key=stranger)


def test_a_flipped_byte_in_the_list_or_the_manifest_is_noticed(folder: Path) -> None:
    contribution = HISTORY.contribution(*IN_SUM[0])
    for name, step in (("contributions.json", 37), (ENVELOPE_NAME, 499)):
        data = (folder / name).read_bytes()
        for place in range(0, len(data), step):
            (folder / name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(IntegrityError):
                prove_contribution(folder, contribution)
        (folder / name).write_bytes(data[:-1])
        with pytest.raises(IntegrityError):
            prove_contribution(folder, contribution)
        (folder / name).write_bytes(data)
    (folder / "contributions.json").unlink()
    with pytest.raises(NotFoundError):
        prove_contribution(folder, contribution)


def test_a_flipped_byte_in_a_proof_is_noticed(pulled: dict[int, Path], tmp_path: Path) -> None:
    contribution = HISTORY.contribution(*IN_SUM[0])
    proof, _ = prove_contribution(pulled[LAST], contribution)
    data, digest = canonical_json(proof), HISTORY.digest(LAST)
    assert len(data) < 1000
    path = tmp_path / "proof"
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(IntegrityError):
            require_proof(read_proof(path), contribution, HISTORY.manifests[LAST], digest)


@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 5000, b"\xff", b" " * (MAX_PROOF_BYTES + 1)])
def test_what_is_no_proof_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "proof"
    path.write_bytes(data)
    with pytest.raises((IntegrityError, TooLargeError)):
        read_proof(path)
    with pytest.raises(NotFoundError):
        read_proof(tmp_path / "absent")
