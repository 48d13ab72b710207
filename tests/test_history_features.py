"""Feedback, times and user features of histories: as tensors, in the encoder, and on the way to a recommendation."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from onerec_hf import ItemTrie, OneRecConfig, OneRecForConditionalGeneration, OneRecTokenizer, generate_sessions
from onerec_hf import recommend as recommend_items
from onerec_hf.history_features import encode_history_rows, time_gaps
from onerec_hf.pretraining import SessionCollator, index_sessions, user_feature_values

USER_FEATURES = {"sex": ["f", "m"], "age": ["20", "30", "40"]}
FEATURES = {"history_feedback": ["like", "view"], "time_gap_buckets": 4, "user_features": USER_FEATURES}
ROWS = [
    {
        "history": [0, 1, 3],
        "history_feedback": [[1, 0], [0, 0], [None, 1]],
        "history_timestamps": [None, 60.0, 600.0],
        "timestamp": 660.0,
        "user_features": {"sex": "m", "age": None},
        "session": [2],
    },
    {
        "history": [],
        "history_feedback": [],
        "history_timestamps": [],
        "timestamp": None,
        "user_features": {"sex": "?", "age": 30},
        "session": [1],
    },
]


@pytest.fixture
def tokenizer():
    codes = [[0, 1], [1, 0], [2, 2], [3, 1]]
    return OneRecTokenizer.from_semantic_ids(["w", "x", "y", "z"], codes, [torch.zeros(4, 2), torch.zeros(3, 2)])


def make_model(tokenizer, positions="item", features=FEATURES):
    torch.manual_seed(0)
    config = OneRecConfig.from_preset(
        "debug",
        codebook_sizes=list(tokenizer.codebook_sizes),
        history_items=3,
        session_items=1,
        history_positions=positions,
        initializer_range=0.5,
        **features,
    )
    return OneRecForConditionalGeneration(config).eval()


def test_rows_to_tensors(tokenizer):
    model = make_model(tokenizer)
    model.config.history_items = 2
    batch = SessionCollator(tokenizer, model)(ROWS)
    assert batch["input_ids"].shape == (2, 5)
    assert batch["history_feedback"].tolist() == [[[-1, -1], [0, 1]], [[0, 0], [0, 0]]]
    # 10 minutes lie in bucket 4 (7 to 15 minutes), 1 minute in bucket 2 (1 to 3).
    assert batch["history_time_gaps"].tolist() == [[4, 2], [0, 0]]
    # Ids: f 1, m 2, 20 3, 30 4, 40 5.
    assert batch["user_features"].tolist() == [[2, 0], [0, 4]]
    plain = make_model(tokenizer, features={})
    assert set(SessionCollator(tokenizer, plain)(ROWS)) == {
        "input_ids",
        "attention_mask",
        "decoder_input_ids",
        "labels",
    }


def test_time_gaps_are_octaves_of_minutes():
    minutes = np.array([-5, 0, 0.99, 1, 2.99, 3, 6.99, 7, 1e9, np.nan])
    assert time_gaps(60 * minutes, 4).tolist() == [1, 1, 1, 2, 2, 3, 3, 4, 4, 0]


def test_values_of_user_features():
    users = [{"sex": "m", "age": "9"}, {"sex": None, "age": "10"}, {"sex": "m", "age": "9"}]
    assert user_feature_values(Dataset.from_dict({"user_features": users})) == {"sex": ["m"], "age": ["10", "9"]}
    assert user_feature_values(Dataset.from_dict({"user_id": [1]})) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history_feedback": [[1, 0]]}, r"row 1: history_feedback has shape \[1, 2\], .* 3 items needs \[3, 2\]"),
        ({"history_timestamps": [1.0]}, r"row 1: history_timestamps .* needs \[3\]"),
        ({"user_features": {"sex": "f"}}, "row 1: user_features has no 'age'"),
        ({"timestamp": ...}, "row 1 has no 'timestamp', which this model needs"),
    ],
)
def test_rows_that_do_not_fit_are_named(tokenizer, change, message):
    row = {name: value for name, value in (ROWS[0] | change).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        encode_history_rows([ROWS[0], row], tokenizer, make_model(tokenizer).config)


@pytest.mark.parametrize("positions", ["token", "item"])
def test_encoder_reads_features_whatever_the_padding(tokenizer, positions):
    encoder = make_model(tokenizer, positions).get_encoder()
    batch = encode_history_rows(ROWS, tokenizer, encoder.config)
    states = encoder(**batch).last_hidden_state
    mask = encoder.position_mask(batch["attention_mask"])
    assert mask.shape == states.shape[:2] and mask[:, :2].all() and mask.sum(1).tolist()[1] == 3
    for index, row in enumerate(ROWS):
        alone = encode_history_rows([row], tokenizer, encoder.config)
        expected = encoder(**alone).last_hidden_state[0][encoder.position_mask(alone["attention_mask"])[0] > 0]
        torch.testing.assert_close(states[index][mask[index] > 0], expected, rtol=0, atol=1e-5)
    # Two items of padding after the history in place of none before it.
    one = encode_history_rows(ROWS[:1], tokenizer, encoder.config)
    after = {name: torch.cat([tensor, torch.zeros_like(tensor)], 1) for name, tensor in one.items()}
    after["user_features"] = one["user_features"]
    separator = torch.zeros(1, 1, dtype=torch.long)
    for name in ("input_ids", "attention_mask"):
        after[name] = torch.cat([one[name], separator, torch.zeros_like(one[name])], 1)
    right = encoder(**after).last_hidden_state
    expected = encoder(**one).last_hidden_state
    torch.testing.assert_close(right[:, : expected.shape[1]], expected, rtol=0, atol=1e-5)
    # Each input matters, and by the behaviour that it belongs to.
    for name, entry in (("history_feedback", (0, 0, 1)), ("history_time_gaps", (0, 1)), ("user_features", (0, 1))):
        other = {key: tensor.clone() for key, tensor in one.items()}
        other[name][entry] = 1 if name != "history_feedback" else -other[name][entry]
        assert (encoder(**other).last_hidden_state - expected).abs().max() > 1e-3, name


def test_sum_of_behaviour_embeddings(tokenizer):
    """A position is its item's embedding, a vector per known outcome, the gap's and the recency's."""
    encoder = make_model(tokenizer, "token").get_encoder()
    seen = []
    encoder.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = encode_history_rows(ROWS[:1], tokenizer, encoder.config)
    encoder(**batch)
    weight = encoder.feedback_proj.weight.T  # like holds, view holds, like does not, view does not
    first = encoder.embed_tokens.weight[5] + encoder.embed_recency.weight[2] + weight[0] + weight[3]
    torch.testing.assert_close(seen[0][0, 2], first)  # time unknown
    last = encoder.embed_tokens.weight[9 + 1] + encoder.embed_recency.weight[0] + weight[1]
    torch.testing.assert_close(seen[0][0, -1], last + encoder.embed_time_gap.weight[2])
    torch.testing.assert_close(seen[0][0, :2], encoder.embed_user_features.weight[[2, 0]])
    assert not encoder.embed_user_features.weight[0].any() and not encoder.embed_time_gap.weight[0].any()


def test_inputs_must_be_those_of_the_configuration(tokenizer):
    model = make_model(tokenizer)
    batch = encode_history_rows(ROWS, tokenizer, model.config)
    start = torch.full((2, 1), model.config.bos_token_id)
    for name in ("history_feedback", "history_time_gaps", "user_features"):
        with pytest.raises(ValueError, match=f"encoder needs {name}"):
            model(**{key: tensor for key, tensor in batch.items() if key != name}, decoder_input_ids=start)
    plain = make_model(tokenizer, features={})
    with pytest.raises(ValueError, match="takes no history_feedback"):
        plain(**batch, decoder_input_ids=start)
    cut = batch | {"history_feedback": batch["history_feedback"][:, :1]}
    with pytest.raises(ValueError, match="history_feedback covers .* one entry per item"):
        model(**cut, decoder_input_ids=start)


@pytest.mark.parametrize("positions", ["token", "item"])
def test_generate_recommend_and_reload(tokenizer, positions, tmp_path):
    model = make_model(tokenizer, positions)
    model.save_pretrained(tmp_path)
    model = OneRecForConditionalGeneration.from_pretrained(tmp_path)
    assert model.config.user_features == USER_FEATURES and model.config.time_gap_buckets == 4
    trie = ItemTrie(tokenizer.codes, tokenizer.codebook_sizes)
    batch = encode_history_rows(ROWS, tokenizer, model.config)
    found = generate_sessions(model, trie, **batch, num_items=1, num_beams=4, normalization="vocabulary")
    # Exhaustively: the log-probability of every item in a full forward.
    labels = torch.tensor(tokenizer.codes) + torch.tensor(model.config.level_offsets)
    decoder_input_ids = torch.cat([torch.full((4, 1), model.config.bos_token_id), labels[:, :1]], 1)
    with torch.no_grad():
        for user in range(2):
            inputs = {name: tensor[user : user + 1] for name, tensor in batch.items()}
            logits = model(**inputs, decoder_input_ids=decoder_input_ids).logits.log_softmax(-1)
            scores = logits.gather(-1, labels[..., None]).sum((1, 2))
            torch.testing.assert_close(found.scores[user], scores.sort(descending=True).values)
            assert found.items[user, :, 0].tolist() == scores.argsort(descending=True).tolist()
    plain = model.generate(**batch, num_beams=4, min_new_tokens=2, max_new_tokens=2)
    assert plain.shape == (2, 3)
    rows = [
        {**row, "history_item_ids": tokenizer.item_ids[np.array(row["history"], dtype=int)].tolist()} for row in ROWS
    ]
    for row in rows:
        row.pop("history")
    by_id = recommend_items(model, tokenizer, rows, top_k=4, exclude_consumed=False, normalization="vocabulary")
    assert [user["items"] for user in by_id] == [tokenizer.item_ids[row].tolist() for row in found.items[..., 0]]
    with pytest.raises(ValueError, match="row 0 has no 'history_feedback'"):
        recommend_items(model, tokenizer, [["w"]], top_k=1)


def test_training_rows_keep_the_features(tokenizer):
    sessions = Dataset.from_list(
        [
            {
                "history_item_ids": ["w", "x", "z"],
                "session_item_ids": ["y"],
                **{name: ROWS[0][name] for name in ("history_feedback", "history_timestamps", "timestamp")},
                "user_features": {"sex": "m", "age": None},
            }
        ]
    )
    model = make_model(tokenizer)
    batch = SessionCollator(tokenizer, model)(index_sessions(sessions, tokenizer).to_list())
    expected = SessionCollator(tokenizer, model)(ROWS[:1])
    assert batch.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name
    model(**batch).loss.backward()
    encoder = model.get_encoder()
    for layer in (encoder.feedback_proj, encoder.embed_time_gap, encoder.embed_user_features):
        assert layer.weight.grad.abs().sum() > 0
