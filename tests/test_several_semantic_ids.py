"""Several semantic IDs for every item in one model: their probabilities against brute force, files and training."""

import itertools

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from onerec_hf import (
    ItemTrie,
    ItemTrieLogitsProcessor,
    OneRecConfig,
    OneRecForConditionalGeneration,
    OneRecTokenizer,
    generate_sessions,
    generate_with_trie,
    recommend,
    stream_sessions,
)
from onerec_hf.alignment.dpo_trainer import PreferenceCollator
from onerec_hf.history_features import encode_history_rows
from onerec_hf.pretraining import SessionCollator
from onerec_hf.semantic_ids import ResidualQuantizer, load_quantizer, make_several_quantizers, shared_pairs
from onerec_hf.session_generation import fit_item_gate, session_log_probs

ITEMS, SIZES, NUM_IDS = 9, (4, 3), 2
HISTORIES = [[0, 7], [3], [8, 2, 5]]
NORMALIZATIONS = ["level", "constrained", "vocabulary"]


def catalogue(shared=False, num_ids=NUM_IDS) -> OneRecTokenizer:
    """With `shared` several items have one ID."""
    random = np.random.default_rng(0)
    every = np.array(list(itertools.product(*(range(size) for size in SIZES))))
    codes = [every[random.integers(5, size=ITEMS) if shared else random.permutation(len(every))[:ITEMS]]]
    codes += [every[random.permutation(len(every))[:ITEMS]] for _ in range(num_ids - 1)]
    return OneRecTokenizer.from_semantic_ids(
        range(100, 100 + ITEMS), np.concatenate(codes, 1), codebook_sizes=SIZES * num_ids, num_semantic_ids=num_ids
    )


def tiny_model(item_head=False, num_ids=NUM_IDS, **overrides) -> OneRecForConditionalGeneration:
    torch.manual_seed(0)
    settings = {
        "codebook_sizes": list(SIZES * num_ids),
        "num_semantic_ids": num_ids,
        "session_items": 2,
        "history_items": 6,
        "history_positions": "item",
        "initializer_range": 0.4,
    }
    if item_head:
        settings |= {"encoder_attention": "causal", "encoder_positions": "distance"}
        settings |= {
            "item_head": "encoder",
            "num_items": ITEMS,
            "item_encoders": ["shared", "learned"],
            "item_share": 0.4,
        }
    return OneRecForConditionalGeneration(OneRecConfig.from_preset("debug", **settings | overrides)).eval()


def inputs_of(model, tokenizer, histories=HISTORIES):
    rows = [{"history": history} for history in histories]
    return dict(encode_history_rows(rows, tokenizer, model.config))


@torch.no_grad()
def brute_force(model, tokenizer, inputs, sessions, free, normalization, item_share=0.0):
    """(users, sessions) probabilities, item by item from the logits of whole sequences, in plain Python."""
    config = model.config
    of_codes = torch.ones(NUM_IDS, len(free), len(sessions), 2, dtype=torch.double)
    for number in range(NUM_IDS):
        span = tokenizer.levels_of(number)
        codes, offsets = tokenizer.codes[:, span].tolist(), tokenizer.level_offsets[span]
        labels = tokenizer.encode_sessions(sessions, catalogue_indices=True, id_numbers=number)
        decoder_input_ids = model.prepare_decoder_input_ids_from_labels(labels)
        assert (decoder_input_ids[:, [0, 3]] == config.bos_token_ids[number]).all()
        for user, given in enumerate(free):
            own = {name: value[[user]] for name, value in inputs.items()}
            logits = model(**own, decoder_input_ids=decoder_input_ids).logits.double()
            for row, session in enumerate(sessions):
                for place, item in enumerate(session):
                    left = [other for other in given if other not in session[:place]]
                    probability = float(item in left)
                    for level, size in enumerate(SIZES):
                        among = range(size)
                        if normalization == "constrained":
                            below = [codes[other] for other in left if codes[other][:level] == codes[item][:level]]
                            among = {code[level] for code in below} or range(size)
                        scores = logits[row, place * 3 + level]
                        among = [offsets[level] + code for code in among]
                        total = (scores if normalization == "vocabulary" else scores[among]).logsumexp(-1)
                        probability *= float((scores[offsets[level] + codes[item][level]] - total).exp())
                    equals = sum(codes[other] == codes[item] for other in left)
                    of_codes[number, user, row, place] = probability / max(equals, 1)
    of_items = of_codes.mean(0)
    if item_share:
        encoded = model.get_encoder()(**inputs)
        mask = model.get_encoder().position_mask(inputs["attention_mask"])
        by_head = model.item_log_probs(encoded.item_states, mask).double().exp()
        for user, given in enumerate(free):
            for row, session in enumerate(sessions):
                for place, item in enumerate(session):
                    left = [other for other in given if other not in session[:place]]
                    total = by_head[user, left].sum() if normalization == "constrained" else 1.0
                    head = by_head[user, item] / total if item in left else 0.0
                    of_items[user, row, place] = item_share * head + (1 - item_share) * of_items[user, row, place]
    return of_items.prod(-1)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("item_head", [False, True])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_session_has_the_mean_of_its_items_code_probabilities(item_head, shared, normalization):
    tokenizer, model = catalogue(shared), tiny_model(item_head)
    trie, inputs = ItemTrie.from_tokenizer(tokenizer), inputs_of(model, tokenizer)
    excluded, allowed = torch.tensor([[0, 7], [3, -1], [-1, -1]]), torch.arange(ITEMS) != 4
    free = [[item for item in range(ITEMS) if item != 4 and item not in row] for row in excluded.tolist()]
    sessions = list(itertools.permutations(range(ITEMS), 2))
    options = {**inputs, "excluded": excluded, "allowed": allowed, "normalization": normalization}
    share = 0.4 if item_head else 0.0
    expected = brute_force(model, tokenizer, inputs, sessions, free, normalization, share)
    found = session_log_probs(model, trie, torch.tensor(sessions).expand(3, -1, -1), **options)
    torch.testing.assert_close(found.double().exp(), expected, atol=1e-6, rtol=1e-4)
    assert (expected.sum(1) <= 1 + 1e-6).all()
    if normalization == "constrained":
        torch.testing.assert_close(expected.sum(1), torch.ones(3, dtype=torch.double))

    # All sessions are found by enough beams where every item is a leaf of its own or told apart by the head.
    beams = generate_sessions(model, trie, **options, num_beams=100)
    for user in range(3):
        there = beams.items[user, :, 0] >= 0
        count = len(free[user]) * (len(free[user]) - 1)
        if item_head or not shared:
            assert int(there.sum()) == count
        listed = [tuple(session) for session in beams.items[user][there].tolist()]
        assert len(set(listed)) == len(listed)
        places = [sessions.index(session) for session in listed]
        torch.testing.assert_close(
            beams.scores[user][there].double().exp(), expected[user, places], atol=1e-6, rtol=1e-4
        )
        assert beams.scores[user].diff().nan_to_num(0).max() <= 0
        assert beams.scores[user][~there].isneginf().all() and (beams.token_ids[user][~there] == 0).all()
        ids = [tokenizer.item_ids[list(session)].tolist() for session in listed]
        if not shared:
            assert tokenizer.decode_sessions(with_bos(beams.token_ids[user][there])) == ids

    singles = [(item,) for item in range(ITEMS)]
    ranked = generate_sessions(model, trie, **options, num_items=1, num_beams=20, num_return=ITEMS)
    alone = session_log_probs(model, trie, torch.tensor(singles).expand(3, -1, -1), **options)
    for user in range(3):
        order = [item for item in alone[user].argsort(descending=True).tolist() if item in free[user]]
        assert ranked.items[user, : len(order), 0].tolist() == order and (ranked.items[user, len(order) :] == -1).all()
        torch.testing.assert_close(ranked.scores[user, : len(order)], alone[user, order])


def with_bos(token_ids):
    """(sessions, items, L) as rows with a BOS after every item."""
    return torch.nn.functional.pad(token_ids, (0, 1), value=2).flatten(1)


def test_few_beams_keep_the_scores_exact_and_users_may_be_scored_in_parts(monkeypatch):
    tokenizer, model = catalogue(), tiny_model(item_head=True)
    trie, inputs = ItemTrie.from_tokenizer(tokenizer), inputs_of(model, tokenizer)
    found = generate_sessions(model, trie, **inputs, num_beams=3)
    assert found.items.shape == (3, 3, 2)
    scores = session_log_probs(model, trie, found.items, **inputs, normalization="level")
    torch.testing.assert_close(found.scores, scores)
    monkeypatch.setattr("onerec_hf.session_generation.generation._TOKENS_AT_ONCE", 1)
    monkeypatch.setattr("onerec_hf.session_generation.item_mixture._TABLE_NUMBERS", 1)
    again = generate_sessions(model, trie, **inputs, num_beams=3)
    assert torch.equal(again.items, found.items)
    torch.testing.assert_close(again.scores, found.scores)
    # A user who may be given one item has a session of one.
    short = generate_sessions(model, trie, **inputs, num_beams=3, allowed=torch.arange(ITEMS) == 6)
    assert short.items[:, 0].tolist() == [[6, -1]] * 3 and (short.items[:, 1:] == -1).all()


def test_a_recommended_item_was_not_consumed_and_the_gate_fits():
    tokenizer, model = catalogue(), tiny_model(item_head=True, item_gate=True)
    [row] = recommend(model, tokenizer, [[100, 103]], top_k=5, num_beams=5)
    assert len(row["items"]) == 5 and not {100, 103} & set(row["items"]) and len(set(row["session"])) == 2
    trie, inputs = ItemTrie.from_tokenizer(tokenizer), inputs_of(model, tokenizer)
    inputs["excluded"] = None
    found = fit_item_gate(model, trie, [(inputs, torch.tensor([1, 2, 4]))])
    assert found["nll_mixture"] <= max(found["nll_items"], found["nll_codes"])


def test_shared_histories_train_as_histories_apart():
    tokenizer, model = catalogue(), tiny_model(item_head=True)
    collate = SessionCollator(tokenizer, model)
    drawn = set()
    for item in range(7):
        apart = [{"history": [4, 5], "session": [item, 7]}, {"history": [4, 5, item], "session": [7]}]
        shared = [{"rows": [{"history": [4, 5, item], "sessions": [[item, 7], [7]], "prefixes": [2, 3]}]}]
        batches = [collate(rows) for rows in (apart, shared)]
        one, other = batches
        assert torch.equal(one["labels"], other["labels"])
        first = one["decoder_input_ids"][:, 0].tolist()
        assert sorted(first) == model.config.bos_token_ids  # each ID as often as the other
        drawn.add(tuple(first))
        with torch.no_grad():
            losses = [model(**batch).code_loss for batch in batches]
        torch.testing.assert_close(*losses)
    assert len(drawn) == 2


@pytest.mark.parametrize("kind", ["balanced_rkmeans", "rqvae"])
@pytest.mark.parametrize("sources", ["projections", "seeds"])
def test_quantizers_of_several_ids_survive_the_disk_and_place_new_items(kind, sources, tmp_path):
    random = np.random.default_rng(0)
    embeddings, new = random.normal(size=(40, 6)).astype(np.float32), random.normal(size=(5, 6)).astype(np.float32)
    settings = {"num_steps": 5} if kind == "rqvae" else {}
    quantizer = make_several_quantizers(3, kind, [8, 8], sources, **settings)
    tokenizer = OneRecTokenizer.fit(range(40), embeddings, quantizer)
    alone = OneRecTokenizer.fit(range(40), embeddings, make_several_quantizers(1, kind, [8, 8], sources, **settings))
    assert tokenizer.codes.shape == (40, 6) and (tokenizer.codes[:, :2] == alone.codes).all()
    assert tokenizer.report["num_semantic_ids"] == 3 and len(tokenizer.report["levels"]) == 6
    assert 0 < tokenizer.report["shared_pairs"] < 1
    tokenizer.save_pretrained(tmp_path)
    loaded = OneRecTokenizer.from_pretrained(tmp_path)
    assert (loaded.num_semantic_ids, loaded.num_levels, len(loaded)) == (3, 2, 5 + 48 + 2)
    assert loaded.semantic_id_fingerprint == tokenizer.semantic_id_fingerprint
    assert loaded("<bos_2><c_1>")["input_ids"] == [54, 5 + 16 + 1]
    assert (load_quantizer(tmp_path).encode(new) == quantizer.encode(new)).all()
    for own in (tokenizer, loaded):
        assert own.add_items(range(40, 45), new).tolist() == list(range(40, 45))
    assert (tokenizer.codes == loaded.codes).all()
    for number in range(3):  # no two items have one ID
        assert len(np.unique(tokenizer.codes[:, tokenizer.levels_of(number)], axis=0)) == 45
        labels = tokenizer.encode_sessions([[3, 41], [7]], id_numbers=number)
        assert tokenizer.decode_sessions(labels) == [[3, 41], [7]]
        assert tokenizer.items_of_semantic_id(tokenizer.semantic_id(41, number), number) == [41]
    histories = tokenizer.encode_histories([[1, 2], [44], []])["input_ids"]
    assert histories.shape == (3, 13) and tokenizer.decode_sessions(histories) == [[1, 2], [44], []]
    mixed = torch.cat([tokenizer.item_token_ids[[5], :2], tokenizer.item_token_ids[[6], 2:]], 1)
    assert tokenizer.decode_sessions(mixed, illegal="none") == [[None]]


def test_a_rotation_changes_no_group_and_other_names_share_all_pairs():
    random = np.random.default_rng(0)
    embeddings = random.normal(size=(60, 4)).astype(np.float32)
    rotation = np.linalg.qr(random.normal(size=(4, 4)))[0].astype(np.float32)
    one, other = (
        ResidualQuantizer([6], collision_policy="share").fit(x).codes[:, 0]
        for x in (embeddings, embeddings @ rotation)
    )
    assert shared_pairs(one, other) == 1 and shared_pairs(one, (one + 1) % 6) == 1
    assert shared_pairs(np.arange(4), np.arange(4)) == 1
    assert shared_pairs(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])) == 0


def test_models_round_trip_and_one_id_is_what_it_was(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = OneRecForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.num_semantic_ids == 2 and loaded.config.vocab_size == 5 + 14 + 1
    assert loaded.config.bos_token_ids == [2, 19] and loaded.config.level_offsets == [5, 9, 12, 16]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    # Of one ID no tensor, token or file says anything of several.
    one, tokenizer = tiny_model(num_ids=1), catalogue(num_ids=1)
    assert one.config.bos_token_ids == [2] and one.config.level_offsets == [5, 9] and one.config.vocab_size == 12
    assert model.state_dict().keys() == one.state_dict().keys()
    assert one.get_encoder().item_proj.weight.shape == (16, 32)
    tokenizer.save_pretrained(tmp_path / "one")
    assert "num_semantic_ids" not in (tmp_path / "one" / "tokenizer_config.json").read_text()
    assert tokenizer.semantic_id_fingerprint == "6d42baebe437ff0a145d13445f36adff"
    labels = torch.tensor([[5, 9, 2, 6, 10], [7, 11, -100, -100, -100]])
    shifted = one.prepare_decoder_input_ids_from_labels(labels)
    assert shifted.tolist() == [[2, 5, 9, 2, 6], [2, 7, 11, 0, 0]]
    state = torch.random.get_rng_state()
    SessionCollator(tokenizer, one)([{"history": [1], "session": [2]}])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_several_ids_cannot_do_is_refused():
    with pytest.raises(StrictDataclassClassValidationError, match="history_positions='item'"):
        tiny_model(history_positions="token")
    with pytest.raises(StrictDataclassClassValidationError, match="as many levels for each of 3 semantic IDs"):
        tiny_model(num_ids=2, num_semantic_ids=3)
    tokenizer, model = catalogue(), tiny_model()
    trie, inputs = ItemTrie.from_tokenizer(tokenizer), inputs_of(model, tokenizer)
    for search in ("sample", "stochastic_beam", "diverse_beam"):
        with pytest.raises(ValueError, match=f"found by 'beam', not by '{search}'"):
            generate_sessions(model, trie, **inputs, num_beams=4, search=search)
    with pytest.raises(ValueError, match="no item of a session is decided before the last"):
        next(stream_sessions(model, trie, **inputs, num_beams=4))
    with pytest.raises(ValueError, match="Alignment is for one semantic ID"):
        PreferenceCollator(tokenizer, model)
    with pytest.raises(ValueError, match="call generate_sessions"):
        model.generate(**inputs, custom_generate=generate_with_trie, trie=trie)
    with pytest.raises(ValueError, match="plain generate is for one semantic ID"):
        ItemTrieLogitsProcessor(trie, model.config.level_offsets)
    with pytest.raises(ValueError, match="the tokenizer belongs to another model"):
        generate_sessions(model, ItemTrie.from_tokenizer(catalogue(num_ids=1)), **inputs, num_beams=4)
    with pytest.raises(ValueError, match=r"id_number 2 is outside \[0, 2\)"):
        tokenizer.semantic_id(100, 2)
    with pytest.raises(ValueError, match=r"id_numbers must lie in \[0, 2\)"):
        tokenizer.encode_sessions([[100]], id_numbers=2)
    with pytest.raises(ValueError, match="'suffix' is for one semantic ID"):
        make_several_quantizers(2, "rkmeans", [4, 4], "seeds", collision_policy="suffix")
    with pytest.raises(ValueError, match="sources must be one of projections, seeds"):
        make_several_quantizers(2, "rkmeans", [4, 4], "rotations")
