"""Merkle trees against the recursive definitions of RFC 9162."""

import hashlib

import merkle_oracle as oracle
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rankup.errors import InputError
from rankup.merkle import Peaks, inclusion_proof, leaf_hash, root_of_proof, tree_root

LEAVES = st.lists(st.binary(max_size=8), min_size=1, max_size=40)


def hashes(leaves: list[bytes]) -> list[bytes]:
    return [leaf_hash(leaf) for leaf in leaves]


def numbered(size: int) -> list[bytes]:
    return [b"%d" % number for number in range(size)]


def test_the_trees_of_certificate_transparency_have_the_roots_that_it_publishes() -> None:
    # The eight leaves of certificate-transparency's own tests, and the roots of their first n.
    leaves = [
        bytes.fromhex(text)
        for text in (
            "",
            "00",
            "10",
            "2021",
            "3031",
            "40414243",
            "5051525354555657",
            "606162636465666768696a6b6c6d6e6f",
        )
    ]
    roots = {
        0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    }
    for size, root in roots.items():
        assert tree_root(hashes(leaves[:size])).hex() == root


@pytest.mark.parametrize("size", [*range(1, 35), 63, 64, 65, 127, 128, 129])
def test_roots_and_paths_are_those_of_the_definitions(size: int) -> None:
    leaves = numbered(size)
    root = oracle.mth(leaves)
    assert tree_root(hashes(leaves)) == root
    for index in range(size):
        path = inclusion_proof(hashes(leaves), index)
        assert list(path) == oracle.path(index, leaves)
        assert root_of_proof(leaf_hash(leaves[index]), index, size, path) == root


@given(LEAVES)
def test_a_tree_that_grows_has_the_root_of_the_tree_that_is_there(leaves: list[bytes]) -> None:
    peaks = Peaks()
    assert peaks.root() == tree_root([])
    for size, leaf in enumerate(leaves, start=1):
        peaks = peaks.with_leaf(leaf_hash(leaf))
        assert (peaks.size, peaks.root()) == (size, oracle.mth(leaves[:size]))


@given(st.data(), st.integers(1, 40))
def test_no_other_leaf_index_or_size_fits_a_proof(data: st.DataObject, size: int) -> None:
    leaves = numbered(size)
    index = data.draw(st.integers(0, size - 1))
    path = inclusion_proof(hashes(leaves), index)
    root = oracle.mth(leaves)
    other = data.draw(st.integers(0, 45))
    assume(other != index)
    assert root_of_proof(leaf_hash(b"other"), index, size, path) != root
    assert root_of_proof(leaf_hash(leaves[index]), other, size, path) != root


@given(st.data(), st.integers(1, 40))
def test_every_way_that_is_taken_is_one_that_the_definition_takes(data: st.DataObject, size: int) -> None:
    """Any path, also a false one: the root is where PATH, taken apart from its end, leads to; or there is none."""
    index = data.draw(st.integers(0, size + 2))
    path = data.draw(st.lists(st.binary(min_size=32, max_size=32), max_size=8))
    expected = oracle.root_by_path(b"x", index, size, path) if index < size else None
    assert root_of_proof(leaf_hash(b"x"), index, size, path) == expected


@given(st.data(), st.integers(2, 40))
def test_a_proof_with_a_sibling_lost_added_moved_or_changed_leads_elsewhere(data: st.DataObject, size: int) -> None:
    leaves = numbered(size)
    index = data.draw(st.integers(0, size - 1))
    path = list(inclusion_proof(hashes(leaves), index))
    place = data.draw(st.integers(0, len(path) - 1))
    flipped = bytes([path[place][0] ^ 1]) + path[place][1:]
    damaged = [
        path[:place] + path[place + 1 :],
        [*path[:place], flipped, *path[place + 1 :]],
        [*path, path[place]],
        [path[place], *path],
        path[::-1] if path != path[::-1] else [],
    ]
    for one in damaged:
        assert root_of_proof(leaf_hash(leaves[index]), index, size, one) != oracle.mth(leaves)


def test_a_node_cannot_pass_for_a_leaf_nor_a_leaf_for_a_node() -> None:
    leaves = numbered(4)
    left, right = oracle.mth(leaves[:2]), oracle.mth(leaves[2:])
    # The tree of two leaves that are the concatenated children would have the same root without the prefixes.
    assert tree_root(hashes([left + right])) != oracle.mth(leaves)
    assert root_of_proof(leaf_hash(left), 0, 2, [right]) != oracle.mth(leaves)
    assert leaf_hash(b"") == hashlib.sha256(b"\x00").digest()


@pytest.mark.parametrize(("index", "size"), [(0, 0), (-1, 3), (3, 3), (7, 3)])
def test_there_is_no_proof_outside_the_tree(index: int, size: int) -> None:
    with pytest.raises(InputError):
        inclusion_proof(hashes(numbered(size)), index)
    assert root_of_proof(leaf_hash(b"0"), index, size, []) is None
