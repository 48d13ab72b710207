"""Forced decoding against the scores that generation gives, and against the whole space of sessions."""

import itertools

import numpy as np
import pytest
import torch

from onerec_hf import ItemTrie, OneRecConfig, OneRecForConditionalGeneration, OneRecTokenizer, generate_sessions
from onerec_hf.session_likelihood import session_log_probs

SIZES = (4, 3, 4)


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    every = np.array(list(itertools.product(*(range(size) for size in SIZES))))
    codes = every[np.random.default_rng(0).permutation(len(every))[:20]]
    tokenizer = OneRecTokenizer.from_semantic_ids(list(range(20)), codes, [torch.randn(size, 4) for size in SIZES])
    config = OneRecConfig.from_preset(
        "debug", codebook_sizes=list(SIZES), session_items=3, history_items=6, initializer_range=0.4
    )
    model = OneRecForConditionalGeneration(config).eval()
    return model, ItemTrie.from_tokenizer(tokenizer), tokenizer


def encoded(tokenizer):
    return tokenizer.encode_histories([[1, 2, 3], [4], [5, 6, 7, 8, 9]], catalogue_indices=True)


@pytest.mark.parametrize("normalization", ["constrained", "level", "vocabulary"])
@pytest.mark.parametrize("search", ["beam", "sample"])
def test_equals_the_scores_of_generated_sessions(parts, normalization, search):
    model, trie, tokenizer = parts
    # The last user may be given two items only: the third place of the session stays empty.
    excluded = torch.full((3, 18), -1)
    excluded[0, :3] = torch.tensor([1, 2, 3])
    excluded[2] = torch.arange(18)
    inputs = {**encoded(tokenizer), "excluded": excluded, "normalization": normalization}
    found = generate_sessions(model, trie, **inputs, num_beams=6, search=search)
    real = found.items[..., 0] >= 0
    log_probs = session_log_probs(model, trie, found.items, **inputs)
    torch.testing.assert_close(log_probs[real], found.scores[real], rtol=1e-5, atol=1e-5)


def test_all_sessions_together_have_probability_one_and_forbidden_ones_none(parts):
    model, trie, tokenizer = parts
    every = torch.tensor(list(itertools.product(range(20), repeat=2))).expand(3, -1, -1)
    excluded = torch.tensor([[1, 2], [-1, 4], [7, 7]])
    log_probs = session_log_probs(model, trie, every, **encoded(tokenizer), excluded=excluded)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(3), rtol=1e-5, atol=1e-5)
    forbidden = (every[..., 0] == every[..., 1]) | (every[..., None] == excluded[:, None, None]).any(-1).any(-1)
    assert torch.equal(log_probs.isneginf(), forbidden)


def test_a_removed_item_has_no_probability_and_wrong_sessions_are_refused(parts):
    model, _, tokenizer = parts
    trie = ItemTrie(tokenizer.codes, SIZES, removed=torch.arange(20) == 3)
    items = torch.tensor([[[3], [4]]]).expand(3, -1, -1)
    log_probs = session_log_probs(model, trie, items, **encoded(tokenizer))
    assert log_probs[:, 0].isneginf().all() and log_probs[:, 1].isfinite().all()
    with pytest.raises(ValueError, match="1 to 3"):
        session_log_probs(model, trie, torch.zeros(3, 1, 4, dtype=torch.long), **encoded(tokenizer))
    with pytest.raises(ValueError, match=r"\[0, 20\) or be -1, got 0 to 20"):
        session_log_probs(model, trie, torch.tensor([[[0, 20]]] * 3), **encoded(tokenizer))
    with pytest.raises(ValueError, match="3 histories for the sessions of 2 users"):
        session_log_probs(model, trie, items[:2], **encoded(tokenizer))
