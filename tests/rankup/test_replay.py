"""Verifying files, and replaying rounds, against honest and dishonest publishers."""

import subprocess
import sys
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
from faulty_server import serve
from history import (
    BIAS,
    EXPERTS,
    GROUPS,
    MODEL,
    RANK,
    SHAPES,
    VARIED_SHAPES,
    History,
    make_history,
    make_varied_history,
)

from rankup import folder, tensorfile
from rankup.checkfiles import Report, verify_files
from rankup.errors import IntegrityError, NotFoundError
from rankup.foldrows import Law
from rankup.pull import GatewaySource, PullProgress, StoreSource, pull
from rankup.recipe import OuterStep, Recipe
from rankup.records import Manifest
from rankup.replay import verify_version
from rankup.signing import generate_private_key, parse_private_key, public_key_hex
from rankup.store import put_blob
from rankup.versions import manifest_digest


@pytest.fixture
def history() -> History:
    return make_history()


def replay(history: History, version: int | None, cache: Path, **options: Any) -> Report:
    return verify_version(StoreSource(history.store), MODEL, version, cache=cache, **options)


def republish(history: History, version: int, change: Callable[[Manifest], Manifest]) -> None:
    """What a dishonest publisher can do: sign another manifest."""
    history.manifests[version] = change(history.manifests[version])
    history.publish(history.manifests[version])


# -- replay ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2, None])
def test_an_honest_version_is_its_replay(history: History, tmp_path: Path, version: int | None) -> None:
    report = replay(history, version, tmp_path)
    assert report.ok
    assert (report.level, report.version, report.publisher_key) == ("round", version or 2, history.publisher_key)
    assert (report.tensors, report.changed, report.contributions) == (len(SHAPES) + 2, len(SHAPES), 3)
    manifest, parent = history.manifests[version or 2], history.manifests[(version or 2) - 1]
    assert report.bytes == sum(term.size_bytes for term in manifest.terms) + sum(
        group.master.size_bytes for group in parent.groups
    )


def test_version_0_has_nothing_to_replay_and_says_so(history: History, tmp_path: Path) -> None:
    report = replay(history, 0, tmp_path)
    assert (report.ok, report.level, report.changed, report.tensors) == (True, "files", 0, len(SHAPES) + 2)
    assert "no round" in report.note


def test_a_replay_over_http_says_the_same_and_the_cache_saves_the_second_download(
    history: History, tmp_path: Path
) -> None:
    with serve(history) as served, GatewaySource(served.url) as source:
        seen: list[PullProgress] = []
        assert verify_version(source, MODEL, 2, cache=tmp_path, progress=seen.append).ok
        assert {report.stage for report in seen} == {"downloading", "replaying"}
        assert seen[-1].done_bytes == seen[-1].total_bytes
        sent = served.blob_bytes
        assert verify_version(source, MODEL, 2, cache=tmp_path).ok
        assert served.blob_bytes == sent > 0


def with_coefficient(manifest: Manifest) -> Manifest:
    first, *others = manifest.terms
    return manifest.model_copy(
        update={"terms": (first.model_copy(update={"coefficient": first.coefficient + 1}), *others)}
    )


def test_one_coefficient_that_is_not_the_one_used_is_found_in_every_tensor(history: History, tmp_path: Path) -> None:
    republish(history, 2, with_coefficient)
    report = replay(history, 2, tmp_path)
    assert not report.ok
    assert set(report.mismatches) == set(SHAPES)


def test_coefficients_that_changed_places_are_found(history: History, tmp_path: Path) -> None:
    def permuted(manifest: Manifest) -> Manifest:
        turned = [term.coefficient for term in manifest.terms][::-1]
        pairs = zip(manifest.terms, turned, strict=True)
        return manifest.model_copy(
            update={"terms": tuple(term.model_copy(update={"coefficient": number}) for term, number in pairs)}
        )

    republish(history, 2, permuted)
    assert set(replay(history, 2, tmp_path).mismatches) == set(SHAPES)


def test_a_contribution_that_was_left_out_of_the_list_is_found(history: History, tmp_path: Path) -> None:
    republish(history, 2, lambda manifest: manifest.model_copy(update={"terms": manifest.terms[1:]}))
    assert set(replay(history, 2, tmp_path).mismatches) == set(SHAPES)


def test_another_denominator_is_found(history: History, tmp_path: Path) -> None:
    republish(history, 2, lambda manifest: manifest.model_copy(update={"denominator_log2": 15}))
    assert set(replay(history, 2, tmp_path).mismatches) == set(SHAPES)


@pytest.mark.parametrize("side", ["master", "export"])
def test_a_tensor_that_is_not_the_sum_is_named(history: History, tmp_path: Path, side: str) -> None:
    name = GROUPS[1][0]

    def forged(manifest: Manifest) -> Manifest:
        entry = manifest.tensors[name].model_copy(update={side: "ab" * 32})
        return manifest.model_copy(update={"tensors": {**manifest.tensors, name: entry}})

    republish(history, 2, forged)
    assert replay(history, 2, tmp_path).mismatches == (name,)


def test_a_flipped_byte_in_a_stored_delta_is_noticed_before_it_is_parsed(history: History, tmp_path: Path) -> None:
    term = history.manifests[2].terms[0]
    data = bytearray(history.deltas[term.contribution])
    data[-1] ^= 1
    store_key = f"blobs/sha256/{term.contribution[:2]}/{term.contribution}"
    history.store.put(store_key, bytes(data))
    with pytest.raises(IntegrityError, match=term.contribution):
        replay(history, 2, tmp_path)


def swap_delta(history: History, data: bytes) -> None:
    """The publisher lists other bytes, under their own hash, than those that were folded."""
    ref = put_blob(history.store, data)

    def swapped(manifest: Manifest) -> Manifest:
        first, *others = manifest.terms
        update = {"contribution": ref.sha256, "size_bytes": ref.size_bytes}
        terms = sorted((first.model_copy(update=update), *others), key=lambda term: term.contribution)
        return manifest.model_copy(update={"terms": tuple(terms)})

    republish(history, 2, swapped)


def test_a_delta_with_one_other_mantissa_is_found(history: History, tmp_path: Path) -> None:
    data = bytearray(history.deltas[history.manifests[2].terms[0].contribution])
    # The first mantissa of A of the first target, not the largest of its row.
    start = 8 + int.from_bytes(data[:8], "little")
    mantissas = memoryview(data)[start : start + 2 * SHAPES[GROUPS[0][0]][1]].cast("h")
    smallest = min(range(len(mantissas)), key=lambda place: abs(mantissas[place]))
    mantissas[smallest] += 1
    mantissas.release()
    swap_delta(history, bytes(data))
    assert replay(history, 2, tmp_path).mismatches == (GROUPS[0][0],)


def test_a_delta_whose_stored_maximum_is_a_lie_is_refused(history: History, tmp_path: Path) -> None:
    data = bytearray(history.deltas[history.manifests[2].terms[0].contribution])
    data[-2] ^= 2  # the last int16 of a delta is max|A| of the last component of the last weight
    swap_delta(history, bytes(data))
    with pytest.raises(IntegrityError, match="not one of this round"):
        replay(history, 2, tmp_path)


def test_a_delta_of_another_round_is_refused(history: History, tmp_path: Path) -> None:
    swap_delta(history, history.deltas[history.manifests[1].terms[0].contribution])
    with pytest.raises(IntegrityError, match="not one of this round"):
        replay(history, 2, tmp_path)


def test_a_delta_above_the_rank_of_the_recipe_is_refused(history: History, tmp_path: Path) -> None:
    recipe = Recipe(rank=RANK - 1)
    republish(history, 2, lambda manifest: manifest.model_copy(update={"recipe": recipe}))
    with pytest.raises(IntegrityError, match="rank"):
        replay(history, 2, tmp_path)


# -- everything that a round may have ----------------------------------------------------------------------------------


@pytest.fixture
def varied() -> History:
    return make_varied_history()


@pytest.mark.parametrize("tile_bytes", [64, 2**24])
def test_momentum_experts_vectors_and_partial_deltas_are_replayed(
    varied: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tile_bytes: int
) -> None:
    monkeypatch.setattr(Law, "__init__", partialmethod(Law.__init__, tile_bytes=tile_bytes))
    stateful = {version: {n for n, e in m.tensors.items() if e.momentum} for version, m in enumerate(varied.manifests)}
    assert stateful == {0: set(), 1: set(VARIED_SHAPES), 2: set(VARIED_SHAPES), 3: set()}
    for version in (1, 2, 3):
        report = replay(varied, version, tmp_path)
        assert (report.ok, report.level, report.contributions) == (True, "round", 3)
        assert report.changed == len(VARIED_SHAPES)
    assert not any(
        (tmp_path / term.contribution).exists() for term in varied.manifests[2].terms if not term.coefficient
    )


def test_a_replay_reads_masters_and_momenta_in_tiles(
    varied: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest: dict[str, int] = {}
    whole = tensorfile.TensorFile.read_part

    def watched(file: tensorfile.TensorFile, name: str, start: int, length: int) -> bytes:
        largest[name] = max(largest.get(name, 0), length)
        return whole(file, name, start, length)

    monkeypatch.setattr(tensorfile.TensorFile, "read_part", watched)
    monkeypatch.setattr(tensorfile.TensorFile, "read", None)
    monkeypatch.setattr(Law, "__init__", partialmethod(Law.__init__, tile_bytes=1024))
    assert replay(varied, 2, tmp_path).ok
    assert largest.keys() == varied.manifests[2].tensors.keys()
    assert max(largest.values()) == 960, "of 1024 bytes, the most that whole rows fill"


@pytest.mark.parametrize("name", [GROUPS[0][0], EXPERTS, BIAS])
def test_a_momentum_that_does_not_follow_is_found(varied: History, tmp_path: Path, name: str) -> None:
    def forged(manifest: Manifest) -> Manifest:
        entry = manifest.tensors[name].model_copy(update={"momentum": "ab" * 32})
        return manifest.model_copy(update={"tensors": {**manifest.tensors, name: entry}})

    republish(varied, 2, forged)
    assert replay(varied, 2, tmp_path).mismatches == (name,)


def test_a_state_that_was_kept_where_the_recipe_keeps_none_is_refused(varied: History, tmp_path: Path) -> None:
    def kept(manifest: Manifest) -> Manifest:
        entry = manifest.tensors[BIAS].model_copy(update={"momentum": varied.manifests[2].tensors[BIAS].momentum})
        momentum = varied.manifests[2].groups[1].momentum
        group = manifest.groups[1].model_copy(update={"momentum": momentum})
        tensors = {**manifest.tensors, BIAS: entry}
        return manifest.model_copy(update={"tensors": tensors, "groups": (manifest.groups[0], group)})

    with pytest.raises(IntegrityError, match="keeps none"):
        republish(varied, 3, kept)


@pytest.mark.parametrize("outer", [OuterStep(momentum=0.75), OuterStep(learning_rate=1)])
def test_another_outer_step_than_the_one_taken_is_found(varied: History, tmp_path: Path, outer: OuterStep) -> None:
    def restated(manifest: Manifest) -> Manifest:
        assert manifest.recipe is not None
        aggregation = manifest.recipe.aggregation.model_copy(update={"outer": outer})
        return manifest.model_copy(update={"recipe": manifest.recipe.model_copy(update={"aggregation": aggregation})})

    republish(varied, 2, restated)
    assert set(replay(varied, 2, tmp_path).mismatches) == set(VARIED_SHAPES)


def test_a_parent_whose_momentum_is_another_is_noticed(varied: History, tmp_path: Path) -> None:
    def forged(manifest: Manifest) -> Manifest:
        entry = manifest.tensors[EXPERTS].model_copy(update={"momentum": "ab" * 32})
        return manifest.model_copy(update={"tensors": {**manifest.tensors, EXPERTS: entry}})

    republish(varied, 1, forged)
    # A round without terms still moves by its momentum, and needs no delta that names the first version as it was.
    update = {"parent": manifest_digest(varied.manifests[1]), "terms": ()}
    republish(varied, 2, lambda manifest: manifest.model_copy(update=update))
    with pytest.raises(IntegrityError, match=r"momentum of tensor layers\.1\.experts"):
        replay(varied, 2, tmp_path)


def test_a_parent_without_the_momentum_file_that_it_names_is_noticed(varied: History, tmp_path: Path) -> None:
    ref = varied.manifests[1].groups[1].momentum
    assert ref is not None
    data = bytearray(varied.blob(ref))
    data[-1] ^= 1
    varied.replace_blob(ref, bytes(data))
    with pytest.raises(IntegrityError, match=ref.sha256):
        replay(varied, 2, tmp_path)


def test_a_delta_must_be_of_the_base_that_its_term_names(varied: History, tmp_path: Path) -> None:
    def forgotten(manifest: Manifest) -> Manifest:
        terms = tuple(term.model_copy(update={"base_manifest": None}) for term in manifest.terms)
        return manifest.model_copy(update={"terms": terms})

    republish(varied, 2, forgotten)
    with pytest.raises(IntegrityError, match="not one of this round"):
        replay(varied, 2, tmp_path)


def test_a_term_that_counts_is_needed(varied: History, tmp_path: Path) -> None:
    def counted(manifest: Manifest) -> Manifest:
        terms = tuple(term.model_copy(update={"coefficient": max(1, term.coefficient)}) for term in manifest.terms)
        return manifest.model_copy(update={"terms": terms})

    republish(varied, 2, counted)
    with pytest.raises(NotFoundError):
        replay(varied, 2, tmp_path)


def test_a_partial_delta_is_refused_where_the_recipe_wants_whole_ones(varied: History, tmp_path: Path) -> None:
    def whole(manifest: Manifest) -> Manifest:
        assert manifest.recipe is not None
        return manifest.model_copy(update={"recipe": manifest.recipe.model_copy(update={"partial": False})})

    republish(varied, 2, whole)
    with pytest.raises(IntegrityError, match="missing"):
        replay(varied, 2, tmp_path)


# -- chain and signature -----------------------------------------------------------------------------------------------


def test_another_parent_than_the_stored_one_breaks_the_chain(history: History, tmp_path: Path) -> None:
    republish(history, 1, lambda manifest: manifest.model_copy(update={"licence": "other"}))
    with pytest.raises(IntegrityError, match="rewritten"):
        replay(history, 2, tmp_path)


def test_a_parent_signed_by_another_key_is_refused(history: History, tmp_path: Path) -> None:
    history.publish(history.manifests[1], key=parse_private_key(generate_private_key()))
    with pytest.raises(IntegrityError, match="publisher's key"):
        replay(history, 2, tmp_path)


def test_another_key_than_the_one_named_is_refused(history: History, tmp_path: Path) -> None:
    stranger = public_key_hex(parse_private_key(generate_private_key()))
    with pytest.raises(IntegrityError):
        replay(history, 2, tmp_path, publisher_key=stranger)
    assert replay(history, 2, tmp_path, publisher_key=history.publisher_key).ok


def test_a_version_that_does_not_exist_is_not_found(history: History, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        replay(history, 3, tmp_path)


def test_a_parent_with_other_bytes_is_noticed(history: History, tmp_path: Path) -> None:
    ref = history.manifests[1].groups[0].master
    data = bytearray(history.blob(ref))
    data[-1] ^= 1
    history.replace_blob(ref, bytes(data))
    with pytest.raises(IntegrityError, match=ref.sha256):
        replay(history, 2, tmp_path)


def test_an_export_that_does_not_follow_from_its_master_is_found_in_version_0(history: History, tmp_path: Path) -> None:
    other = history.manifests[1]

    def mixed(manifest: Manifest) -> Manifest:
        name = GROUPS[1][0]
        entry = manifest.tensors[name].model_copy(update={"export": other.tensors[name].export})
        group = manifest.groups[1].model_copy(update={"export": other.groups[1].export})
        return manifest.model_copy(
            update={"tensors": {**manifest.tensors, name: entry}, "groups": (manifest.groups[0], group)}
        )

    republish(history, 0, mixed)
    assert replay(history, 0, tmp_path).mismatches == (GROUPS[1][0],)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("want", ["export", "master"])
def test_a_pulled_folder_verifies_without_a_network(history: History, tmp_path: Path, want: Any) -> None:
    pull(StoreSource(history.store), MODEL, None, tmp_path, want=want)
    report = verify_files(tmp_path)
    assert (report.ok, report.version, report.tensors) == (True, 2, len(SHAPES) + 2)


def test_a_flipped_byte_or_a_cut_in_any_file_is_named(history: History, tmp_path: Path) -> None:
    manifest = pull(StoreSource(history.store), MODEL, None, tmp_path).manifest
    for file in manifest.export_files():
        path = tmp_path / file.path
        data = path.read_bytes()
        for damaged in (bytes([data[0] ^ 1]) + data[1:], data[:-1], data + b"x", b""):
            path.write_bytes(damaged)
            assert verify_files(tmp_path).mismatches == (file.path,)
        path.unlink()
        assert verify_files(tmp_path).mismatches == (file.path,)
        path.write_bytes(data)
    assert verify_files(tmp_path).ok


def test_a_flipped_byte_in_the_sealed_manifest_of_a_folder_is_noticed(history: History, tmp_path: Path) -> None:
    pull(StoreSource(history.store), MODEL, None, tmp_path)
    path = tmp_path / folder.ENVELOPE_NAME
    data = path.read_bytes()
    for place in range(0, len(data), 499):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(IntegrityError):
            verify_files(tmp_path)
    path.write_bytes(history.store.get(f"models/{MODEL}/versions/000001.json", max_bytes=2**20))
    with pytest.raises(IntegrityError, match="was pulled"):
        verify_files(tmp_path)
    path.unlink()
    with pytest.raises(NotFoundError):
        verify_files(tmp_path)


def test_a_folder_without_a_finished_pull_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        verify_files(tmp_path)


def test_a_file_whose_tensors_are_not_those_of_the_manifest_is_found(history: History, tmp_path: Path) -> None:
    name = GROUPS[0][0]

    def forged(manifest: Manifest) -> Manifest:
        entry = manifest.tensors[name].model_copy(update={"export": "ab" * 32})
        return manifest.model_copy(update={"tensors": {**manifest.tensors, name: entry}})

    republish(history, 2, forged)
    pull(StoreSource(history.store), MODEL, 2, tmp_path)
    assert verify_files(tmp_path).mismatches == (name,)


def test_verifying_needs_neither_ray_nor_torch() -> None:
    script = "import sys, rankup.replay, rankup.pull; print({'ray', 'torch', 'boto3', 'redis'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "set()"
