"""Forced decodes and diverse beams, against generation's own scores and a search in plain Python."""

import itertools

import numpy as np
import pytest
import torch
from model_conformance import LAZY_DECODER

from onerec_hf import ItemTrie, OneRecConfig, OneRecForConditionalGeneration, OneRecTokenizer, generate_sessions
from onerec_hf.session_generation import session_log_probs

SIZES = (4, 3, 4)
HISTORIES = [[0, 7], [3], []]


@pytest.fixture(scope="module")
def tokenizer() -> OneRecTokenizer:
    every = np.array(list(itertools.product(*(range(size) for size in SIZES))))
    codes = every[np.random.default_rng(0).permutation(len(every))[:12]]
    return OneRecTokenizer.from_semantic_ids(list(range(12)), codes, codebook_sizes=list(SIZES))


@pytest.fixture(scope="module", params=[{}, LAZY_DECODER], ids=["encoder", "lazy decoder"])
def model(request) -> OneRecForConditionalGeneration:
    torch.manual_seed(0)
    settings = {"codebook_sizes": list(SIZES), "session_items": 3, "history_items": 6} | request.param
    config = OneRecConfig.from_preset("debug", initializer_range=0.4, **settings)
    return OneRecForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def request_of(tokenizer):
    encoded = tokenizer.encode_histories(HISTORIES, max_items=6, catalogue_indices=True)
    return {**encoded, "excluded": torch.tensor([[0, 7], [3, -1], [-1, -1]])}


@pytest.mark.parametrize("normalization", ["constrained", "level", "vocabulary"])
def test_a_forced_decode_gives_the_scores_of_generation(model, tokenizer, request_of, normalization):
    trie = ItemTrie.from_tokenizer(tokenizer)
    found = generate_sessions(model, trie, **request_of, num_beams=9, normalization=normalization)
    log_probs = session_log_probs(model, trie, found.items, **request_of, normalization=normalization)
    torch.testing.assert_close(log_probs, found.scores)
    shorter = session_log_probs(model, trie, found.items[..., :2], **request_of, normalization=normalization)
    cut = found.items.clone()
    cut[..., 2] = -1
    torch.testing.assert_close(session_log_probs(model, trie, cut, **request_of, normalization=normalization), shorter)


def test_constrained_probabilities_of_all_sessions_sum_to_one(model, tokenizer, request_of):
    trie = ItemTrie.from_tokenizer(tokenizer)
    sessions = torch.tensor(list(itertools.permutations(range(12), 2)))
    log_probs = session_log_probs(model, trie, sessions.expand(3, -1, -1), **request_of)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(3))
    consumed = (sessions == 3).any(1)
    assert log_probs[1, consumed].isneginf().all() and log_probs[1, ~consumed].isfinite().all()


def test_what_does_not_fit_is_named(model, tokenizer, request_of):
    trie = ItemTrie.from_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="1 to 3 items"):
        session_log_probs(model, trie, torch.zeros(3, 1, 4, dtype=torch.long), **request_of)
    with pytest.raises(ValueError, match="not in the trie of 12"):
        session_log_probs(model, trie, torch.full((3, 1, 2), 12), **request_of)
    with pytest.raises(ValueError, match="at least 2 num_beam_groups"):
        generate_sessions(model, trie, **request_of, num_beams=6, search="diverse_beam", num_beam_groups=4)


@torch.no_grad()
def beams_in_python(model, tokenizer, history, groups, widths, penalty=0.0):
    """By user's group the scores and items of sessions, by a search in plain Python that keeps `widths[step]` beams of
    each group; beams in it are (score, items as code tuples, codes of the item at hand)."""
    codes = [tuple(code) for code in tokenizer.codes.tolist()]
    legal = [code for item, code in enumerate(codes) if item not in history]
    encoded = tokenizer.encode_histories([history], max_items=6, catalogue_indices=True)
    beams = [[(0.0, (), ())] for _ in range(groups)]
    for step, width in enumerate(widths):
        level = step % len(SIZES)
        taken = [0] * SIZES[level]
        for group in range(groups):
            candidates = []
            for score, items, prefix in beams[group]:
                tokens = [token for item in items for token in (2, *add_offsets(tokenizer, item))]
                tokens += [2, *add_offsets(tokenizer, prefix)]
                logits = model(**encoded, decoder_input_ids=torch.tensor([tokens])).logits[0, -1]
                offset = tokenizer.level_offsets[level]
                log_probs = logits[offset : offset + SIZES[level]].log_softmax(-1).tolist()
                free = [code for code in legal if code not in items and code[:level] == prefix]
                for code in {code[level] for code in free}:
                    total = score + log_probs[code]
                    candidates.append((total - penalty * taken[code], total, items, prefix, code))
            candidates = sorted(candidates, reverse=True)[:width]
            beams[group] = []
            for _, total, items, prefix, code in candidates:
                taken[code] += 1
                path = (*prefix, code)
                beams[group].append((total, (*items, path), ()) if level == 2 else (total, items, path))
    return [[(score, [codes.index(item) for item in items]) for score, items, _ in group] for group in beams]


def add_offsets(tokenizer, codes):
    return [code + offset for code, offset in zip(codes, tokenizer.level_offsets, strict=False)]


@pytest.mark.parametrize("penalty", [0.3, 3.0])
def test_diverse_beams_against_a_search_in_plain_python(model, tokenizer, request_of, penalty):
    trie = ItemTrie.from_tokenizer(tokenizer)
    found = generate_sessions(
        model,
        trie,
        **request_of,
        num_items=2,
        num_beams=6,
        search="diverse_beam",
        num_beam_groups=3,
        diversity_penalty=penalty,
    )
    for user, history in enumerate(HISTORIES):
        groups = beams_in_python(model, tokenizer, history, 3, [2] * 6, penalty)
        expected = [beam for group in groups for beam in group]
        assert found.items[user].tolist() == [items for _, items in expected]
        torch.testing.assert_close(found.scores[user], torch.tensor([score for score, _ in expected]))


def test_widening_beams_against_a_search_in_plain_python(model, tokenizer, request_of):
    trie = ItemTrie.from_tokenizer(tokenizer)
    widening = {"num_beams": 10, "search": "widening_beam"}
    found = generate_sessions(model, trie, **request_of, num_items=3, **widening)
    for user, history in enumerate(HISTORIES):
        # 4, 7 and 10 beams for an item, of which half go on to the next one.
        [expected] = beams_in_python(model, tokenizer, history, 1, [4, 4, 2, 7, 7, 4, 10, 10, 10])
        assert found.items[user, : len(expected)].tolist() == [items for _, items in expected]
        torch.testing.assert_close(found.scores[user, : len(expected)], torch.tensor([one for one, _ in expected]))
    lists = [
        generate_sessions(model, trie, **request_of, num_items=1, **search)
        for search in (widening, widening | {"search": "beam"})
    ]
    assert torch.equal(lists[0].items, lists[1].items) and torch.equal(lists[0].scores, lists[1].scores)
