"""The item head's memory: neighbours by co-consumption beside the softmax."""

import numpy as np
import pytest
import torch

from onerec_hf import OneRecConfig, OneRecForConditionalGeneration
from onerec_hf.item_head import MEMORY_HALF_LIFE, MEMORY_ITEMS
from onerec_hf.item_memory import SHRINKAGE, remember_items

ITEMS, NEIGHBOURS = 30, 3
HISTORIES = [np.random.default_rng(user).permutation(ITEMS)[: 2 + user % 9] for user in range(40)]


def model_with_memory():
    torch.manual_seed(0)
    config = OneRecConfig.from_preset(
        "debug",
        history_positions="item",
        encoder_attention="causal",
        encoder_positions="distance",
        history_items=50,
        item_head="encoder",
        num_items=ITEMS,
        item_memory=NEIGHBOURS,
        item_memory_weight=5.0,
        initializer_range=0.3,
    )
    return OneRecForConditionalGeneration(config).eval()


def neighbours_by_hand(histories):
    """Each item's most similar others, the most similar first, and the similarities."""
    sets, found = [set(history.tolist()) for history in histories], []
    users = [sum(item in consumed for consumed in sets) for item in range(ITEMS)]
    for item in range(ITEMS):
        together = [sum({item, other} <= consumed for consumed in sets) for other in range(ITEMS)]
        similar = [
            (-count / ((users[item] * users[other]) ** 0.5 + SHRINKAGE), other)
            for other, count in enumerate(together)
            if count and other != item
        ]
        found.append([(other, -similarity) for similarity, other in sorted(similar)[:NEIGHBOURS]])
    return found


def test_an_item_has_the_neighbours_that_were_consumed_with_it_most_of_all():
    model = model_with_memory()
    remember_items(model, HISTORIES[:20])
    remember_items(model, HISTORIES[:3])  # in their place
    memory, few = model.item_memory, 0
    for item, expected in enumerate(neighbours_by_hand(HISTORIES[:3])):
        few += len(expected) < NEIGHBOURS
        padded = [*expected, *[(-1, 0.0)] * NEIGHBOURS][:NEIGHBOURS]
        assert memory.neighbours[item].tolist() == [other for other, _ in padded]
        assert memory.similarities[item].tolist() == pytest.approx([similarity for _, similarity in padded])
    assert 0 < few < ITEMS


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_latest_items_neighbours_come_to_the_logits_the_older_the_less(side):
    model = model_with_memory()
    remember_items(model, HISTORIES)
    histories = [[4, 9, 4], list(np.arange(MEMORY_ITEMS + 6) % ITEMS), []]
    similar = neighbours_by_hand(HISTORIES)
    states, longest = torch.randn(3, 1, 1, 16), max(map(len, histories))
    expected = states[:, 0, 0] @ model.item_vectors().T
    for row, history in enumerate(histories):
        for later, item in enumerate(history[::-1][:MEMORY_ITEMS]):
            for other, similarity in similar[item]:
                expected[row, other] += 5 * 0.5 ** (later / MEMORY_HALF_LIFE) * similarity
    pads = [[-1] * (longest - len(history)) for history in histories]
    indices = [pad + row if side == "left" else row + pad for row, pad in zip(histories, pads, strict=True)]
    found = model.item_log_probs(states, item_indices=torch.tensor(indices))
    torch.testing.assert_close(found, expected.log_softmax(-1))
    with pytest.raises(ValueError, match="reads the encoder's item_indices"):
        model.item_log_probs(states)


def test_a_memory_is_saved_and_filled_again(tmp_path):
    model = model_with_memory()
    remember_items(model, HISTORIES)
    model.save_pretrained(tmp_path)
    loaded = OneRecForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.item_memory.weight == 5.0
    for name in ("neighbours", "similarities"):
        value = loaded.item_memory.get_buffer(name)
        assert value.any() and torch.equal(model.item_memory.get_buffer(name), value)
    without = OneRecForConditionalGeneration(OneRecConfig.from_preset("debug"))
    with pytest.raises(ValueError, match="set item_memory"):
        remember_items(without, HISTORIES)
