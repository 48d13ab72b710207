"""Beam search over sessions, sampling, streaming and recommending, against brute force and stock `generate`."""

import itertools
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from model_conformance import LAZY_DECODER
from torch._dynamo.utils import counters
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, LogitsProcessorList, StoppingCriteriaList, pipeline
from transformers.generation import MaxLengthCriteria, TemperatureLogitsWarper

from onerec_hf import (
    ItemTrie,
    ItemTrieLogitsProcessor,
    OneRecConfig,
    OneRecForConditionalGeneration,
    OneRecTokenizer,
    Recommender,
    generate_sessions,
    generate_with_trie,
    recommend,
    stream_sessions,
)
from onerec_hf.session_generation import session_log_probs

SIZES = (4, 3, 4)


def catalogue(num_items, seed=0, strings=False):
    generator = np.random.default_rng(seed)
    every = np.array(list(itertools.product(*(range(size) for size in SIZES))))
    codes = every[generator.permutation(len(every))[:num_items]]
    ids = [f"item-{index}" for index in range(num_items)] if strings else list(range(100, 100 + num_items))
    codebooks = [torch.randn(size, 4) for size in SIZES]
    return OneRecTokenizer.from_semantic_ids(ids, codes, codebooks)


def tiny_model(session_items=2, seed=0, **overrides):
    torch.manual_seed(seed)
    settings = {"codebook_sizes": list(SIZES), "session_items": session_items, "history_items": 6} | overrides
    config = OneRecConfig.from_preset("debug", initializer_range=0.4, **settings)
    return OneRecForConditionalGeneration(config).eval()


@torch.no_grad()
def brute_force(model, tokenizer, history, num_items, allowed, normalization):
    """Every session without repeats and its log-probability, best first."""
    encoded = tokenizer.encode_histories([history], catalogue_indices=True)
    sessions = list(itertools.permutations(allowed, num_items))
    labels = tokenizer.encode_sessions(sessions, catalogue_indices=True)
    logits = model(**encoded, decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels)).logits
    codes, offsets = tokenizer.codes.tolist(), tokenizer.level_offsets
    scores = torch.zeros(len(sessions))
    for row, session in enumerate(sessions):
        for place, item in enumerate(session):
            left = [codes[other] for other in allowed if other not in session[:place]]
            for level, size in enumerate(SIZES):
                token_logits = logits[row, place * (len(SIZES) + 1) + level]
                among = range(size)
                if normalization == "constrained":
                    among = {code[level] for code in left if code[:level] == codes[item][:level]}
                among = [offsets[level] + code for code in among]
                total = token_logits if normalization == "vocabulary" else token_logits[among]
                scores[row] += token_logits[offsets[level] + codes[item][level]] - total.logsumexp(-1)
    order = scores.argsort(descending=True)
    return [sessions[place] for place in order.tolist()], scores[order]


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_items=st.integers(3, 8),
    exclude=st.booleans(),
    forbid=st.booleans(),
    normalization=st.sampled_from(["level", "constrained", "vocabulary"]),
)
def test_enough_beams_give_exactly_the_best_sessions(seed, num_items, exclude, forbid, normalization):
    tokenizer, model = catalogue(num_items, seed), tiny_model(seed=seed)
    trie = ItemTrie.from_tokenizer(tokenizer)
    history = [0, num_items - 1]
    free = [item for item in range(num_items) if not (exclude and item == 0) and not (forbid and item == 1)]
    allowed = torch.ones(num_items, dtype=torch.bool)
    allowed[1] = not forbid
    excluded = torch.tensor([[0, 0] if exclude else [-1, -1]])
    encoded = tokenizer.encode_histories([history], catalogue_indices=True)
    length = min(2, len(free))
    sessions, scores = brute_force(model, tokenizer, history, length, free, normalization)
    found = generate_sessions(
        model, trie, **encoded, num_beams=128, excluded=excluded, allowed=allowed, normalization=normalization
    )
    count = len(sessions)
    torch.testing.assert_close(found.scores[0][:count], scores, atol=1e-4, rtol=1e-4)
    # A catalogue of one item gives a session of one.
    assert {tuple(session[:length]) for session in found.items[0][:count].tolist()} == set(sessions)
    assert (found.items[0][:count, length:] == -1).all()
    assert (found.items[0][count:] == -1).all() and found.scores[0][count:].isneginf().all()
    assert found.items.shape == (1, 128, 2)
    legal = tokenizer.codes_to_index(found.token_ids[0][:count].numpy() - np.array(tokenizer.level_offsets))
    assert legal.tolist() == found.items[0][:count].tolist()


@pytest.mark.parametrize("overrides", [{}, LAZY_DECODER], ids=["encoder", "lazy decoder"])
@pytest.mark.parametrize("normalization", ["vocabulary", "constrained"])
def test_equals_stock_generate_with_the_logits_processor(normalization, overrides):
    tokenizer, model = catalogue(30), tiny_model(session_items=3, **overrides)
    trie = ItemTrie.from_tokenizer(tokenizer)
    encoded = tokenizer.encode_histories([[1, 2, 3], [4], [5, 6, 7, 8]], catalogue_indices=True)
    constraint = {"excluded": torch.tensor([[3, 1, 2], [4, -1, -1], [-1, -1, -1]]), "allowed": torch.arange(30) < 25}
    beams = generate_sessions(model, trie, **encoded, num_beams=6, normalization=normalization, **constraint)
    processor = ItemTrieLogitsProcessor(trie, model.config.level_offsets, **constraint)
    stock = model.generate(
        **encoded,
        num_beams=6,
        num_return_sequences=6,
        logits_processor=LogitsProcessorList([processor]),
        renormalize_logits=normalization == "constrained",
        return_dict_in_generate=True,
        output_scores=True,
    )
    torch.testing.assert_close(stock.sequences_scores.view(3, 6), beams.scores, atol=1e-4, rtol=1e-4)
    assert torch.equal(stock.sequences.view(3, 6, 3, 4)[..., 1:], beams.token_ids)
    assert stock.sequences[0].tolist()[::4] == [2, 2, 2]
    through = model.generate(
        **encoded,
        num_beams=6,
        num_return_sequences=6,
        custom_generate=generate_with_trie,
        trie=trie,
        normalization=normalization,
        return_dict_in_generate=True,
        **constraint,
    )
    assert torch.equal(through.sequences, stock.sequences)
    torch.testing.assert_close(through.sequences_scores, stock.sequences_scores, atol=1e-4, rtol=1e-4)


def hooked(model, tokenizer, encoded, **options):
    trie = ItemTrie.from_tokenizer(tokenizer)
    return model.generate(**encoded, custom_generate=generate_with_trie, trie=trie, **options)


def test_a_compiled_decoder_has_few_graphs_and_finds_the_same():
    tokenizer, model = catalogue(40), tiny_model(session_items=3, decoder_layers=1)
    trie = ItemTrie.from_tokenizer(tokenizer)

    def search(users, num_items, num_beams):
        histories = [[(user + place) % 40 for place in range(4)] for user in range(users)]
        encoded = tokenizer.encode_histories(histories, catalogue_indices=True)
        return generate_sessions(model, trie, **encoded, num_items=num_items, num_beams=num_beams)

    # However many users, items and beams, there are three graphs: of the first token, of one token and of a code with
    # the <bos> after it. A single user has three of its own.
    requests = [(3, 3, 8), (2, 1, 5), (4, 3, 9)]
    expected = [search(*request) for request in requests]
    torch.compiler.reset()
    counters.clear()
    model.get_decoder().compile(dynamic=True, backend="eager")
    for request, plain in zip(requests, expected, strict=True):
        found = search(*request)
        assert torch.equal(found.items, plain.items)
        torch.testing.assert_close(found.scores, plain.scores)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 3


def test_generate_reaches_every_search():
    tokenizer, model = catalogue(30), tiny_model(session_items=3)
    trie = ItemTrie.from_tokenizer(tokenizer)
    encoded = tokenizer.encode_histories([[1, 2, 3], [4]], catalogue_indices=True)

    def same(found, **options):
        expected = generate_sessions(model, trie, **encoded, num_beams=6, **options).token_ids
        return torch.equal(found.view(2, 6, 3, 4)[..., 1:], expected)

    both = {"num_beams": 6, "num_return_sequences": 6}
    groups = {"num_beam_groups": 3, "diversity_penalty": 0.7}
    assert same(hooked(model, tokenizer, encoded, **both, **groups), search="diverse_beam", **groups)
    draws = [{"generator": torch.Generator().manual_seed(0), "temperature": 0.8} for _ in range(4)]
    stochastic = {"search": "stochastic_beam"}
    assert same(hooked(model, tokenizer, encoded, **both, **draws[0], **stochastic), **draws[1], **stochastic)
    with pytest.warns(FutureWarning, match="search='stochastic_beam'"):
        named_before = hooked(model, tokenizer, encoded, **both, **draws[2], stochastic_beams=True)
    assert same(named_before, **draws[3], **stochastic)
    draws = [{"generator": torch.Generator().manual_seed(0), "top_k": 3, "top_p": 0.9} for _ in range(2)]
    sampled = hooked(model, tokenizer, encoded, **both, **draws[0], do_sample=True)
    assert same(sampled, search="sample", **draws[1])
    constrained = {"normalization": "constrained"}
    assert same(hooked(model, tokenizer, encoded, **both, renormalize_logits=True, **constrained), **constrained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits_processor": LogitsProcessorList([lambda tokens, scores: scores])}, "does not follow function"),
        ({"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)])}, "TemperatureLogitsWarper"),
        ({"prefix_allowed_tokens_fn": lambda row, tokens: [5]}, "PrefixConstrainedLogitsProcessor"),
        ({"stopping_criteria": StoppingCriteriaList([lambda tokens, scores: True])}, "does not follow function"),
        ({"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(3)])}, "MaxLengthCriteria"),
        ({"max_time": 1.0}, "MaxTimeCriteria"),
        ({"repetition_penalty": 1.5}, "RepetitionPenaltyLogitsProcessor"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"bad_words_ids": [[5]]}, "NoBadWordsLogitsProcessor"),
        ({"renormalize_logits": True}, "normalization='constrained'"),
        ({"do_sample": True, "min_p": 0.1}, "MinPLogitsWarper"),
        ({"do_sample": True, "search": "beam"}, "search='beam' does not follow TopKLogitsWarper"),
        ({"num_beams": 4, "num_beam_groups": 2, "search": "beam"}, "group_beam_search"),
        ({"force_words_ids": [[5]]}, "constrained_beam_search"),
        ({"decoder_input_ids": torch.tensor([[2, 5]])}, "decoder_input_ids"),
        ({"search": "wide"}, "search must be one of beam"),
    ],
)
def test_generate_refuses_what_the_search_would_drop(options, message):
    tokenizer, model = catalogue(12), tiny_model()
    encoded = tokenizer.encode_histories([[1, 2]], catalogue_indices=True)
    with pytest.raises(ValueError, match=message):
        hooked(model, tokenizer, encoded, **options)


def test_an_unknown_keyword_is_named():
    tokenizer, model = catalogue(12), tiny_model()
    trie = ItemTrie.from_tokenizer(tokenizer)
    encoded = tokenizer.encode_histories([[1, 2]], catalogue_indices=True)
    for generate in (generate_sessions, lambda *args, **options: list(stream_sessions(*args, **options))):
        with pytest.raises(TypeError, match="temprature"):
            generate(model, trie, **encoded, num_beams=4, temprature=0.5)
    with pytest.raises(TypeError, match="exclude"):
        session_log_probs(model, trie, torch.tensor([[[3]]]), **encoded, exclude=None)
    for unknown in ("temprature", "num_items"):
        with pytest.raises(TypeError, match=unknown):
            recommend(model, tokenizer, [[]], num_beams=4, **{unknown: 1})
    with pytest.raises(ValueError, match="unknown_items must be 'error' or 'skip'"):
        recommend(model, tokenizer, [[]], unknown_items="drop")


def test_former_names_of_arguments_still_work():
    tokenizer, model = catalogue(12), tiny_model()
    histories = [[100, -7]]
    with pytest.warns(FutureWarning) as warned:
        former = recommend(model, tokenizer, histories, num_beams=12, top_k=12, exclude_seen=False, unknown="skip")
    assert {str(warning.message).partition(": ")[2] for warning in warned} == {
        "'exclude_seen' is now called 'exclude_consumed'",
        "'unknown' is now called 'unknown_items'",
    }
    today = {"exclude_consumed": False, "unknown_items": "skip"}
    assert former == recommend(model, tokenizer, histories, num_beams=12, top_k=12, **today)
    assert len(former[0]["items"]) == 12


def test_padding_and_order_of_the_consumed_items_change_nothing():
    tokenizer, model = catalogue(30), tiny_model(session_items=3)
    trie = ItemTrie.from_tokenizer(tokenizer)
    encoded = tokenizer.encode_histories([[1, 2, 3], []], catalogue_indices=True)
    left = generate_sessions(model, trie, **encoded, num_beams=5, excluded=torch.tensor([[1, 2, 3], [-1, -1, -1]]))
    tokens = int(encoded["attention_mask"].shape[1])
    right = {key: value.clone() for key, value in encoded.items()}
    for key, fill in (("input_ids", 0), ("attention_mask", 0)):
        right[key][1] = fill
        right[key][1, 0] = encoded[key][1, tokens - 1]
    mirrored = generate_sessions(model, trie, **right, num_beams=5, excluded=torch.tensor([[3, 2, -1, 1], [-1] * 4]))
    assert torch.equal(left.items, mirrored.items)
    torch.testing.assert_close(left.scores, mirrored.scores, atol=1e-5, rtol=1e-5)


def test_few_allowed_items_give_short_sessions_and_none_give_none():
    tokenizer, model = catalogue(12), tiny_model(session_items=4)
    trie = ItemTrie.from_tokenizer(tokenizer)
    encoded = tokenizer.encode_histories([[1], [2], [3]], catalogue_indices=True)
    allowed = torch.zeros(3, 12, dtype=torch.bool)
    allowed[0, [4, 5]] = True
    allowed[1] = True
    for search in ("beam", "sample", "stochastic_beam"):
        found = generate_sessions(model, trie, **encoded, num_beams=30, allowed=allowed, search=search)
        short = {tuple(session) for session in found.items[0][~found.scores[0].isneginf()].tolist()}
        assert short == {(4, 5, -1, -1), (5, 4, -1, -1)}
        assert (found.items[1] >= 0).all() and (found.items[2] == -1).all()
        assert found.scores[2].isneginf().all() and (found.token_ids[2] == 0).all()


def test_items_that_share_an_id_are_all_ranked_and_taken_one_by_one():
    codes = np.array([[0, 0, 0], [1, 1, 1], [0, 0, 0], [0, 0, 0], [2, 0, 1]])
    model = tiny_model(session_items=3)
    tokenizer = OneRecTokenizer.from_semantic_ids(list(range(5)), codes, codebook_sizes=SIZES)
    trie = ItemTrie.from_tokenizer(tokenizer)
    encoded = tokenizer.encode_histories([[1]], catalogue_indices=True)
    ranked = generate_sessions(model, trie, **encoded, num_items=1, num_beams=6, excluded=torch.tensor([[2]]))
    items, scores = ranked.items[0, :, 0].tolist(), ranked.scores[0]
    assert sorted(items[:4]) == [0, 1, 3, 4] and items[4:] == [-1, -1]
    place = items.index(0)
    assert items[place + 1] == 3 and scores[place] == scores[place + 1]
    assert (scores[:3] >= scores[1:4]).all() and scores[4:].isneginf().all()
    only = torch.tensor([True, False, True, True, False])
    sessions = generate_sessions(model, trie, **encoded, num_beams=6, allowed=only)
    assert sessions.items[0].tolist() == [[0, 2, 3]] + [[-1] * 3] * 5


def constrained_probabilities(model, tokenizer, history):
    free = list(range(tokenizer.num_items))
    sessions, scores = brute_force(model, tokenizer, history, 1, free, "constrained")
    probabilities = torch.zeros(len(free))
    probabilities[torch.tensor(sessions)[:, 0]] = scores.exp()
    return probabilities


def test_samples_follow_the_models_distribution():
    tokenizer, model = catalogue(6), tiny_model()
    expected = constrained_probabilities(model, tokenizer, [0, 3])
    encoded = tokenizer.encode_histories([[0, 3]], catalogue_indices=True)
    trie = ItemTrie.from_tokenizer(tokenizer)
    draw = {"num_items": 1, "generator": torch.Generator().manual_seed(0), "normalization": "constrained"}
    found = generate_sessions(model, trie, **encoded, num_beams=4000, search="sample", **draw)
    items = found.items[0, :, 0]
    frequency = torch.bincount(items, minlength=6) / 4000
    torch.testing.assert_close(frequency, expected, atol=0.03, rtol=0)
    torch.testing.assert_close(found.scores[0].exp(), expected[items], atol=1e-5, rtol=1e-4)
    # Gumbel-top-k draws without replacement: the first draw has the model's distribution, none comes twice.
    many = {key: value.expand(1000, -1) for key, value in encoded.items()}
    found = generate_sessions(model, trie, **many, num_beams=4, search="stochastic_beam", **draw)
    items = found.items[..., 0]
    torch.testing.assert_close(torch.bincount(items[:, 0], minlength=6) / 1000, expected, atol=0.05, rtol=0)
    assert (items.sort(1).values.diff(dim=1) > 0).all()
    first, second = items[:, 0], items[:, 1]
    conditional = (expected / (1 - expected)[:, None]).fill_diagonal_(0)
    pairs = torch.zeros(6, 6).index_put_((first, second), torch.ones(1000), accumulate=True) / 1000
    torch.testing.assert_close(pairs, expected[:, None] * conditional, atol=0.05, rtol=0)


def test_filters_of_sampling():
    tokenizer, model = catalogue(30), tiny_model(session_items=3)
    trie = ItemTrie.from_tokenizer(tokenizer)
    encoded = tokenizer.encode_histories([[1, 2], [3]], catalogue_indices=True)
    greedy = generate_sessions(model, trie, **encoded, num_beams=1)
    for filters in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        drawn = generate_sessions(model, trie, **encoded, num_beams=3, search="sample", **filters)
        assert (drawn.items == greedy.items).all()
        torch.testing.assert_close(drawn.scores, greedy.scores.expand(-1, 3), atol=1e-4, rtol=1e-4)
    drawn = generate_sessions(model, trie, **encoded, num_beams=64, search="sample")
    assert (drawn.items.sort(-1).values.diff(dim=-1) > 0).all()
    with pytest.raises(ValueError, match="top_k and top_p 'sample'"):
        generate_sessions(model, trie, **encoded, top_k=3)
    sampled = model.generate(
        **encoded,
        custom_generate=generate_with_trie,
        trie=trie,
        do_sample=True,
        top_k=1,
        num_beams=1,
        num_return_sequences=2,
    )
    assert torch.equal(sampled.view(2, 2, 3, 4)[..., 1:], greedy.token_ids.expand(-1, 2, -1, -1))


@pytest.mark.parametrize("search", ["beam", "sample", "stochastic_beam"])
def test_the_stream_is_the_first_session(search):
    tokenizer, model = catalogue(20), tiny_model(session_items=3)
    trie = ItemTrie.from_tokenizer(tokenizer)
    encoded = tokenizer.encode_histories([[1, 2], [3], []], catalogue_indices=True)
    allowed = torch.ones(3, 20, dtype=torch.bool)
    allowed[1] = torch.arange(20) == 7  # whose first item every beam agrees on
    request = {**encoded, "allowed": allowed, "search": search, "num_beams": 1 if search == "sample" else 4}
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    first = generate_sessions(model, trie, **request, generator=seeds[0]).items[:, 0]
    streamed = list(stream_sessions(model, trie, **request, generator=seeds[1]))
    for user, expected in enumerate(first.tolist()):
        items = [decided for decided in streamed if decided.user == user]
        assert [decided.item for decided in items] == [item for item in expected if item >= 0]
        assert [decided.position for decided in items] == list(range(len(items)))
    assert [decided.item for decided in streamed if decided.user == 1] == [7]
    if search == "beam":
        assert streamed[0] == (1, 0, 7)


@pytest.mark.parametrize("strings", [False, True])
def test_recommends_item_ids_without_repeats_or_consumed_items(strings, tmp_path):
    tokenizer, model = catalogue(20, strings=strings), tiny_model(session_items=3)
    ids = tokenizer.item_ids.tolist()
    histories = [ids[:4], [], ids[5:6]]
    recommender = Recommender(model, tokenizer)
    results = recommender(histories, top_k=7, num_beams=16)
    for history, result in zip(histories, results, strict=True):
        assert len(result["items"]) == len(result["scores"]) == 7
        assert len(set(result["items"])) == 7 and len(set(result["session"])) == 3
        assert not set(history) & {*result["items"], *result["session"]}
        assert {*result["items"], *result["session"]} <= set(ids)
        assert result["scores"] == sorted(result["scores"], reverse=True)
        assert all(type(item) is type(ids[0]) for item in result["items"])
    every = recommender([ids[:19]], top_k=30, num_beams=16, exclude_consumed=False)[0]["items"]
    assert sorted(every) == sorted(ids)
    assert recommender([ids[:19]], top_k=30)[0] == {
        "session": ids[19:],
        "items": ids[19:],
        "scores": recommender([ids[:19]])[0]["scores"],
    }
    region = recommender(histories, top_k=30, allowed_items=ids[8:], blocked_items=ids[8:9])
    assert all(sorted(result["items"]) == sorted(ids[9:]) for result in region)
    assert recommender([[]], allowed_items=[])[0] == {"session": [], "items": [], "scores": []}
    drawn = recommender(histories, top_k=5, search="stochastic_beam", seed=3)
    assert drawn == recommender(histories, top_k=5, search="stochastic_beam", seed=3)
    assert all(len(set(result["items"])) == 5 for result in drawn)
    with pytest.raises(ValueError, match=r"histories\[1\] holds item id .* not in the catalogue"):
        recommender([[], ["nobody" if strings else -7]])
    assert recommender([[ids[0], "nobody" if strings else -7]], unknown_items="skip") == recommender([ids[:1]])
    tokenizer.remove_items(ids[8:])
    assert sorted(recommender([[]], top_k=30)[0]["items"]) == sorted(ids[:8])
    tokenizer.restore_items(ids[8:])

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


def test_histories_come_as_people_have_them(tmp_path):
    tokenizer, model = catalogue(20), tiny_model(session_items=2)
    model.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    ids = tokenizer.item_ids.tolist()
    lists = [ids[:2], ids[3:4]]
    options = {"top_k": 3, "num_beams": 8}
    task = pipeline("generative-recommendation", model=str(tmp_path))
    expected = recommend(model, tokenizer, lists, **options)
    rows = pd.DataFrame({"history_item_ids": lists}, index=[7, 8])
    for call in (partial(recommend, model, tokenizer), task):
        for histories in (
            tuple(map(tuple, lists)),
            [np.array(items, dtype=np.int32) for items in lists],
            [torch.tensor(items) for items in lists],
            rows["history_item_ids"],
            rows,
            Dataset.from_pandas(rows, preserve_index=False),
            (items for items in lists),
        ):
            assert call(histories, **options) == expected
        assert call([None, ids[3:4]], **options) == call([[], ids[3:4]], **options)
        assert call([], **options) == []
        for wrong, message in [
            ([[ids[0], float("nan")]], r"histories\[0\] has no item id at place 1"),
            ([[], [ids[0], None]], r"histories\[1\] has no item id at place 1"),
            ([{"history_item_ids": "1,2"}], r"histories\[0\] is '1,2' \(str\), where a list"),
            ([[], {ids[0]}], r"histories\[1\] .*set.*where a list"),
            ([[], pd.Series([ids[0], pd.NA], dtype="Int64")], r"histories\[1\] has no item id at place 1"),
            ([[], [ids[:2]]], r"the history_item_ids of histories\[1\] must be integers or strings"),
            ([[ids[0]], [float(ids[0])]], r"the history_item_ids of histories\[1\] must be integers or strings"),
            ([[], [ids[0], 2**64 + ids[0]]], r"the history_item_ids of histories\[1\] must fit into 64 bits"),
            ([[str(ids[0])]], "histories: item ids of this catalogue are integers"),
            (None, "histories must be a list with a history for each user, got None"),
        ]:
            for unknown_items in ("error", "skip"):
                with pytest.raises(ValueError, match=message):
                    call(wrong, unknown_items=unknown_items)
    one = recommend(model, tokenizer, lists[:1], **options)[0]
    assert task(np.array(ids[:2]), **options) == task(ids[:2], **options) == one
    for wrong in (ids[:2], ["item 1"], "item 1", {"history_item_ids": ids[:2]}):
        with pytest.raises(ValueError, match="histories.*list"):
            recommend(model, tokenizer, wrong, unknown_items="skip")
    blocked = {"blocked_items": [ids[0], -7], "allowed_items": [ids[0], ids[5], -8], "unknown_items": "skip"}
    assert recommend(model, tokenizer, [[]], **blocked)[0]["items"] == [ids[5]]
    for name, wrong, message in [
        *((name, 2.5, "must be an integer of at least 1") for name in ("top_k", "num_beams", "batch_size")),
        *(
            ("num_beams", -1, "must be an integer of at least 1"),
            ("batch_size", -1, "must be an integer of at least 1"),
        ),
        *(
            ("seed", 0.5, "must be an integer"),
            ("seed", 2**64, "must be an integer"),
            ("allowed_items", 5, "must be a"),
        ),
        *(("allowed_items", "item 1", "must be a list"), ("blocked_items", [-5], ": item id -5 .* is not in the")),
        ("item_share", [], r"is \[\], but the model has no item head"),
        ("blocked_items", [float(ids[0])], ": item_ids must be integers or strings"),
    ]:
        with pytest.raises(ValueError, match=name + " ?" + message):
            recommend(model, tokenizer, lists, **{name: wrong})
    for wrong in (["item 1"], [None]):
        with pytest.raises(ValueError, match=r"histories\[0\] must be a list of items"):
            tokenizer.encode_histories(wrong)


def test_a_table_of_behaviours_becomes_one_of_recommendations():
    tokenizer, model = catalogue(20), tiny_model(session_items=2)
    ids = tokenizer.item_ids.tolist()
    histories = {"ann": [ids[4], ids[2], ids[9]], "bob": [ids[7]]}
    log = pd.DataFrame(
        [(user, item, time) for user, items in histories.items() for time, item in enumerate(items)],
        columns=["who", "item_id", "timestamp"],
    )
    recommender, options = Recommender(model, tokenizer), {"top_k": 3, "num_beams": 8}
    expected = recommender(list(histories.values()), **options)
    shuffled = log.sample(frac=1.0, random_state=1)
    for table in (shuffled, Dataset.from_pandas(shuffled, preserve_index=False), log.drop(columns="timestamp")):
        found = recommender.predict_df(table, user_id="who", **options)
        assert found.columns.tolist() == ["who", "item_id", "rank", "score", "session_place"]
        for user, wanted in zip(histories, expected, strict=True):
            rows = found[found["who"] == user]
            ranked = rows.dropna(subset="rank")
            assert ranked["item_id"].tolist() == wanted["items"] and ranked["rank"].tolist() == [1, 2, 3]
            np.testing.assert_allclose(ranked["score"], wanted["scores"], rtol=1e-6)
            session = rows.dropna(subset="session_place").sort_values("session_place")
            assert session["item_id"].tolist() == wanted["session"] and session["session_place"].tolist() == [1, 2]
            assert not rows["item_id"].duplicated().any()
    assert recommender.predict_df(log.iloc[:0], user_id="who").empty
    with pytest.raises(ValueError, match="no column 'user_id', only who, item_id, timestamp"):
        recommender.predict_df(log)
    with pytest.raises(ValueError, match="Row 3 of the log has no who: drop it"):
        recommender.predict_df(log.assign(who=log["who"].where(log.index != 3)), user_id="who")


def test_batches_do_not_change_the_recommendations():
    tokenizer, model = catalogue(20), tiny_model(session_items=2)
    histories = [[100, 101, 102], [103], [104, 105]]
    together = recommend(model, tokenizer, histories, top_k=5, num_beams=8)
    for history, expected in zip(histories, together, strict=True):
        alone = recommend(model, tokenizer, [history], top_k=5, num_beams=8)[0]
        assert alone["items"] == expected["items"]
        np.testing.assert_allclose(alone["scores"], expected["scores"], atol=1e-4)


def test_blocked_items_of_one_user_are_that_users_alone():
    tokenizer, model = catalogue(20), tiny_model(session_items=2)
    options = {"top_k": 5, "num_beams": 20, "exclude_consumed": False}
    (first,) = recommend(model, tokenizer, [[103]], **options)
    blocked = [first["items"][0], *first["session"]]
    rows = [{"history_item_ids": [103], "blocked_item_ids": blocked}, [103], {"history_item_ids": [103]}]
    (own, *others) = recommend(model, tokenizer, rows, **options)
    (expected,) = recommend(model, tokenizer, [[103]], blocked_items=blocked, **options)
    assert (own["session"], own["items"]) == (expected["session"], expected["items"])
    assert [(row["session"], row["items"]) for row in others] == [(first["session"], first["items"])] * 2
    with pytest.raises(ValueError, match=r"blocked_item_ids of histories\[0\] holds item id 7, which"):
        recommend(model, tokenizer, [{"history_item_ids": [103], "blocked_item_ids": [7]}])
    with pytest.raises(ValueError, match=r"the blocked_item_ids of histories\[1\] is '104' \(str\)"):
        recommend(model, tokenizer, [rows[0], {"history_item_ids": [103], "blocked_item_ids": "104"}])


def test_one_of_session_and_list_is_as_both_and_scores_say_what_each_place_adds():
    tokenizer, model = catalogue(20), tiny_model(session_items=3)
    histories, options = [[100, 101, 102], []], {"top_k": 5, "num_beams": 20}
    both = recommend(model, tokenizer, histories, **options)
    assert recommend(model, tokenizer, histories, only="items", **options) == [
        {name: row[name] for name in ("items", "scores")} for row in both
    ]
    found = recommend(model, tokenizer, histories, only="session", session_scores=True, **options)
    assert [row["session"] for row in found] == [row["session"] for row in both]
    for history, row in zip(histories, found, strict=True):
        indices = [[item - 100 for item in items] for items in (history, row["session"])]
        for places in (1, 2, 3):  # after as many items as the session's beginning has
            expected = session_log_probs(
                model,
                ItemTrie.from_tokenizer(tokenizer),
                torch.tensor([[indices[1][:places]]]),
                **tokenizer.encode_histories(indices[:1], catalogue_indices=True),
                normalization="level",
            )
            assert sum(row["session_scores"][:places]) == pytest.approx(expected.item(), abs=1e-4)
    # A user who may be given a single item has one score.
    (short,) = recommend(model, tokenizer, [[]], only="session", session_scores=True, allowed_items=[105])
    assert short["session"] == [105] and len(short["session_scores"]) == 1
    with pytest.raises(ValueError, match="only must be 'session' or 'items', got 'list'"):
        recommend(model, tokenizer, [[]], only="list")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_half_precision_and_both_attentions_make_real_items(attention):
    tokenizer, model = catalogue(20), tiny_model(session_items=2).to(torch.bfloat16)
    model.set_attn_implementation(attention)
    trie = ItemTrie.from_tokenizer(tokenizer)
    encoded = tokenizer.encode_histories([[1, 2, 3], [4]], catalogue_indices=True)
    found = generate_sessions(model, trie, **encoded, num_beams=16)
    assert found.scores.dtype == torch.float32 and found.scores.isfinite().all()
    full = generate_sessions(model.float(), trie, **encoded, num_beams=16)
    torch.testing.assert_close(found.scores, full.scores, atol=0.15, rtol=0.05)
    legal = tokenizer.codes_to_index(found.token_ids.numpy() - np.array(tokenizer.level_offsets))
    assert (legal == found.items.numpy()).all() and (found.items[..., 0] != found.items[..., 1]).all()
