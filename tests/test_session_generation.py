"""Trie, beam search over sessions and recommending, against brute force and stock `generate`."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, LogitsProcessorList, pipeline

from onerec_hf import (
    ItemTrie,
    ItemTrieLogitsProcessor,
    OneRecConfig,
    OneRecForConditionalGeneration,
    OneRecTokenizer,
    generate_sessions,
    recommend,
)

SIZES = (4, 3, 4)


def catalogue(num_items, seed=0, strings=False):
    generator = np.random.default_rng(seed)
    every = np.array(list(itertools.product(*(range(size) for size in SIZES))))
    codes = every[generator.permutation(len(every))[:num_items]]
    ids = [f"item-{index}" for index in range(num_items)] if strings else list(range(100, 100 + num_items))
    codebooks = [torch.randn(size, 4) for size in SIZES]
    return OneRecTokenizer.from_semantic_ids(ids, codes, codebooks)


def tiny_model(session_items=2, seed=0):
    torch.manual_seed(seed)
    config = OneRecConfig.from_preset(
        "debug", codebook_sizes=list(SIZES), session_items=session_items, history_items=6, initializer_range=0.4
    )
    return OneRecForConditionalGeneration(config).eval()


@torch.no_grad()
def brute_force(model, tokenizer, history, num_items, excluded):
    """Every session without repeats and its log-probability, best first."""
    encoded = tokenizer.encode_histories([history], catalogue_indices=True)
    allowed = [item for item in range(tokenizer.num_items) if item not in excluded]
    sessions = list(itertools.permutations(allowed, num_items))
    labels = tokenizer.encode_sessions(sessions, catalogue_indices=True)
    logits = model(**encoded, decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels)).logits
    log_probs = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    scores = log_probs.masked_fill(labels == 2, 0).sum(-1)
    order = scores.argsort(descending=True)
    return [sessions[place] for place in order.tolist()], scores[order]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), num_items=st.integers(3, 9), exclude=st.booleans())
def test_enough_beams_give_exactly_the_best_sessions(seed, num_items, exclude):
    tokenizer, model = catalogue(num_items, seed), tiny_model(seed=seed)
    trie = ItemTrie(tokenizer.codes, tokenizer.codebook_sizes)
    history = [0, num_items - 1]
    excluded = torch.zeros(1, num_items, dtype=torch.bool)
    if exclude:
        excluded[0, 0] = True
    sessions, scores = brute_force(model, tokenizer, history, 2, {0} if exclude else set())
    encoded = tokenizer.encode_histories([history], catalogue_indices=True)
    found = generate_sessions(model, trie, **encoded, num_beams=128, excluded=excluded)
    real = found.items[0][found.scores[0] > -torch.inf]
    assert len(real) == len(sessions)
    torch.testing.assert_close(found.scores[0][: len(sessions)], scores, atol=1e-4, rtol=1e-4)
    assert {tuple(session) for session in real.tolist()} == set(sessions)
    assert (found.items[0][len(sessions) :] == -1).all()
    legal = tokenizer.codes_to_index(found.token_ids[0][: len(sessions)].numpy() - np.array(tokenizer.level_offsets))
    assert legal.tolist() == real.tolist()


def test_equals_stock_generate_with_the_logits_processor():
    tokenizer, model = catalogue(30), tiny_model(session_items=3)
    trie = ItemTrie(tokenizer.codes, tokenizer.codebook_sizes)
    encoded = tokenizer.encode_histories([[1, 2, 3], [4], [5, 6, 7, 8]], catalogue_indices=True)
    excluded = torch.zeros(3, 30, dtype=torch.bool)
    excluded[0, [1, 2, 3]] = excluded[1, 4] = True
    beams = generate_sessions(model, trie, **encoded, num_beams=6, excluded=excluded)
    processor = ItemTrieLogitsProcessor(trie, model.config.level_offsets, excluded=excluded)
    stock = model.generate(
        **encoded,
        num_beams=6,
        num_return_sequences=6,
        logits_processor=LogitsProcessorList([processor]),
        return_dict_in_generate=True,
        output_scores=True,
    )
    torch.testing.assert_close(stock.sequences_scores.view(3, 6), beams.scores, atol=1e-4, rtol=1e-4)
    assert torch.equal(stock.sequences.view(3, 6, 3, 4)[..., 1:], beams.token_ids)
    assert stock.sequences[0].tolist()[::4] == [2, 2, 2]


def test_trie_refuses_what_is_no_catalogue():
    with pytest.raises(ValueError, match="share the semantic ID"):
        ItemTrie(torch.tensor([[0, 1, 2], [3, 2, 1], [0, 1, 2]]), SIZES)
    with pytest.raises(ValueError, match="catalogue index 1 has code 4 at level 0"):
        ItemTrie(torch.tensor([[0, 1, 2], [4, 0, 0]]), SIZES)


@pytest.mark.parametrize("strings", [False, True])
def test_recommends_item_ids_without_repeats_or_seen_items(strings, tmp_path):
    tokenizer, model = catalogue(20, strings=strings), tiny_model(session_items=3)
    ids = tokenizer.item_ids.tolist()
    histories = [ids[:4], [], ids[5:6]]
    results = recommend(model, tokenizer, histories, top_k=7, num_beams=16)
    for history, result in zip(histories, results, strict=True):
        assert len(result["items"]) == len(result["scores"]) == 7
        assert len(set(result["items"])) == 7 and len(set(result["session"])) == 3
        assert not set(history) & {*result["items"], *result["session"]}
        assert {*result["items"], *result["session"]} <= set(ids)
        assert result["scores"] == sorted(result["scores"], reverse=True)
        assert all(type(item) is type(ids[0]) for item in result["items"])
    seen = recommend(model, tokenizer, [ids[:19]], top_k=30, num_beams=16, exclude_seen=False)[0]["items"]
    assert sorted(seen) == sorted(ids)
    assert recommend(model, tokenizer, [ids[:19]], top_k=30)[0]["items"] == ids[19:]
    with pytest.raises(ValueError, match="not in the catalogue"):
        recommend(model, tokenizer, [["nobody" if strings else -7]])

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = recommend(
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
        histories,
        top_k=7,
        num_beams=16,
    )
    assert loaded == results
    task = pipeline("generative-recommendation", model=str(tmp_path))
    assert task(histories, top_k=7, num_beams=16) == results
    single = task(histories[0], top_k=7, num_beams=16)
    assert (single["items"], single["session"]) == (results[0]["items"], results[0]["session"])


def test_batches_do_not_change_the_recommendations():
    tokenizer, model = catalogue(20), tiny_model(session_items=2)
    histories = [[100, 101, 102], [103], [104, 105]]
    together = recommend(model, tokenizer, histories, top_k=5, num_beams=8)
    for history, expected in zip(histories, together, strict=True):
        alone = recommend(model, tokenizer, [history], top_k=5, num_beams=8)[0]
        assert alone["items"] == expected["items"]
        np.testing.assert_allclose(alone["scores"], expected["scores"], atol=1e-4)
