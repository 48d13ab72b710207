"""The trie of real items and the constraint on it, against brute force over the catalogue."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.item_trie import ItemConstraint, ItemTrie

SIZES = (3, 2, 3)


@st.composite
def catalogues(draw):
    rows = draw(st.lists(st.tuples(*(st.integers(0, size - 1) for size in SIZES)), min_size=1, max_size=14))
    removed = draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    removed[draw(st.integers(0, len(rows) - 1))] = False
    return torch.tensor(rows), torch.tensor(removed)


@settings(max_examples=60, deadline=None)
@given(catalogue=catalogues(), data=st.data())
def test_available_children_are_those_that_an_allowed_unused_item_follows(catalogue, data):
    codes, removed = catalogue
    trie = ItemTrie(codes, SIZES, removed)
    items = [item for item in range(len(codes)) if not removed[item]]
    assert sorted(trie.order.tolist()) == items
    assert codes[trie.order.long()].tolist() == sorted(codes[items].tolist())
    lists = st.lists(st.integers(-1, len(codes) - 1), min_size=4, max_size=4)
    excluded = torch.tensor(data.draw(st.lists(lists, min_size=2, max_size=2)))
    allowed = data.draw(st.sampled_from([None, (len(codes),), (2, len(codes))]))
    if allowed is not None:
        allowed = torch.tensor(data.draw(st.integers(0, 2**20))).expand(allowed) >> torch.arange(len(codes)) & 1 == 1
    constraint = ItemConstraint(trie, 2, excluded, allowed)
    prefixes = sorted({tuple(codes[item, :depth].tolist()) for item in items for depth in range(len(SIZES))})
    for user in range(2):
        marks = torch.ones(len(codes), dtype=torch.bool) if allowed is None else allowed.expand(2, -1)[user]
        free = [item for item in items if marks[item] and item not in excluded[user].tolist()]
        assert int(constraint.num_available[user]) == len(free)
        used = data.draw(st.lists(st.sampled_from(free), unique=True, max_size=2)) if free else []
        left = [item for item in free if item not in used]
        positions = trie.position[torch.tensor(used, dtype=torch.long)].long().expand(2, 1, -1)
        for prefix in prefixes:
            level = len(prefix)
            node = trie.walk(torch.tensor(prefix, dtype=torch.long)).expand(2, 1)
            children, exists = trie.child_nodes(node, level)
            available = constraint.available(node, children, exists, level, positions)
            found = trie.codes(children, level)[user, 0][available[user, 0]].tolist()
            expected = {int(codes[item, level]) for item in left if codes[item, :level].tolist() == list(prefix)}
            assert found == sorted(expected)
        for leaf in range(len(trie.codes_2)):
            below, mask = constraint.items_of_leaves(torch.full((2, 1), leaf), positions)
            given_items = trie.order[below[user, 0][mask[user, 0]]].tolist()
            first = codes[trie.order[trie.first_item_2[leaf]]].tolist()
            assert given_items == [item for item in left if codes[item].tolist() == first]


def test_codes_of_one_byte():
    codes = torch.tensor([[255, 1], [37, 0], [255, 0]], dtype=torch.uint8)
    trie = ItemTrie(codes, (256, 2))
    assert trie.order.tolist() == [1, 2, 0] and int(trie.walk(torch.tensor([[255, 1]]))) == 2


def test_a_prefix_of_no_item_leads_nowhere():
    trie = ItemTrie(torch.tensor([[0, 1, 2], [2, 0, 1], [2, 0, 2]]), SIZES)
    prefixes = torch.tensor([[0, 1], [0, 0], [1, 0], [2, 0]])
    assert trie.walk(prefixes).tolist() == [0, -1, -1, 1]
    assert trie.fan_outs == (2, 1, 2)


def test_a_million_items_take_little_memory():
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (100_000, 3)))
    trie = ItemTrie(codes, (256, 256, 256))
    assert sum(buffer.numel() * buffer.element_size() for buffer in trie.buffers()) <= 100 * len(codes)


def test_refuses_what_is_not_a_catalogue_or_a_request():
    with pytest.raises(ValueError, match="catalogue index 1 has code 4 at level 0"):
        ItemTrie(torch.tensor([[0, 1, 2], [4, 0, 0]]), SIZES)
    codes = torch.tensor([[0, 1, 2], [2, 0, 0]])
    with pytest.raises(ValueError, match="No item is left"):
        ItemTrie(codes, SIZES, torch.tensor([True, True]))
    trie = ItemTrie(codes, SIZES)
    with pytest.raises(ValueError, match="excluded holds 2, which is not a catalogue index"):
        ItemConstraint(trie, 1, excluded=torch.tensor([[2, -1]]))
    with pytest.raises(ValueError, match="goes to `allowed`"):
        ItemConstraint(trie, 1, excluded=torch.tensor([[True, False]]))
    with pytest.raises(ValueError, match=r"of shape \[2\] or \[3, 2\]"):
        ItemConstraint(trie, 3, allowed=torch.ones(2, 2, dtype=torch.bool))
