"""A causal encoder: one encoding of a history gives every target what encoding its own prefix would have given."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from model_conformance import LAZY_DECODER
from transformers import Seq2SeqTrainingArguments

from onerec_hf import ItemTrie, OneRecConfig, OneRecForConditionalGeneration, OneRecTokenizer, generate_sessions
from onerec_hf.pretraining import OneRecPretrainer, SessionCollator, index_sessions, share_histories

ITEMS = 12


@pytest.fixture(scope="module")
def tokenizer():
    codes = [[item % 4, item // 4] for item in range(ITEMS)]
    return OneRecTokenizer.from_semantic_ids(list(range(ITEMS)), codes, [torch.zeros(4, 2), torch.zeros(3, 2)])


def causal_model(tokenizer, positions="token", **overrides):
    torch.manual_seed(0)
    settings = {"encoder_layers": 2, "decoder_layers": 2, "history_items": 6, "session_items": 2} | overrides
    config = OneRecConfig.from_preset(
        "debug",
        codebook_sizes=list(tokenizer.codebook_sizes),
        history_positions=positions,
        encoder_attention="causal",
        initializer_range=0.3,
        **settings,
    )
    return OneRecForConditionalGeneration(config).eval()


def feed(users, behaviours, stride, history_items, seed=0):
    """Sessions of two consecutive behaviours, with the latest `history_items` behaviours before them."""
    generator = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        run = generator.integers(0, ITEMS, behaviours).tolist()
        for start in range(1, behaviours, stride):
            history, session = run[max(0, start - history_items) : start], run[start : start + 2]
            rows.append({"user_id": user, "history_item_ids": history, "session_item_ids": session})
    return Dataset.from_list(rows)


def targets_of(shared):
    """(user, prefix, session) of every target, whatever rows they stand in."""
    return [
        (row["user_id"], tuple(row["history"][:items]), tuple(session))
        for packed in shared
        for row in packed["rows"]
        for items, session in zip(row["prefixes"], row["sessions"], strict=True)
    ]


@pytest.mark.parametrize("overrides", [{}, LAZY_DECODER], ids=["encoder", "lazy decoder"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["token", "item"])
def test_one_pass_equals_separate_passes(tokenizer, positions, attention, overrides):
    model = causal_model(tokenizer, positions, **overrides)
    model.set_attn_implementation(attention)
    sessions = index_sessions(feed(users=3, behaviours=7, stride=2, history_items=6), tokenizer)
    collate = SessionCollator(tokenizer, model)
    shared = share_histories(sessions, history_items=6, targets_per_row=4)
    batch = collate(list(shared))
    assert len(batch["labels"]) == len(sessions) > len(batch["input_ids"])

    together = model(**batch)
    together.loss.backward()
    one_pass = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    apart = [{"history": list(prefix), "session": list(session)} for _, prefix, session in targets_of(shared)]
    separate = model(**collate(apart))
    separate.loss.backward()

    torch.testing.assert_close(together.logits, separate.logits, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(one_pass[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("positions", ["token", "item"])
def test_padding_and_batch_do_not_change_the_output(tokenizer, positions):
    model = causal_model(tokenizer, positions)
    collate = SessionCollator(tokenizer, model)
    alone = collate([{"history": [3, 1, 4], "session": [5]}])
    expected = model(**alone).logits
    left = collate([{"history": [3, 1, 4], "session": [5]}, {"history": [1, 5, 9, 2, 6], "session": [5]}])
    torch.testing.assert_close(model(**left).logits[:1], expected, atol=1e-5, rtol=1e-5)
    pads = torch.zeros(1, 2 * model.config.tokens_per_item, dtype=torch.long)
    right = alone | {name: torch.cat([alone[name], pads], 1) for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**right).logits, expected, atol=1e-5, rtol=1e-5)
    empty = collate([{"history": [], "session": [5]}, {"history": [1, 5], "session": [5]}])
    assert model(**empty).logits.isfinite().all()


def test_a_later_behaviour_changes_no_earlier_state(tokenizer):
    model = causal_model(tokenizer)
    encoder = model.get_encoder()
    states = [
        encoder(**tokenizer.encode_histories([history]), recency_in_output=False).last_hidden_state
        for history in ([3, 1, 4], [3, 1, 4, 7])
    ]
    torch.testing.assert_close(states[1][:, : states[0].shape[1]], states[0])


def test_generation_is_the_loss_of_the_same_model(tokenizer):
    """The log-probability that the search gives a session is the one that the shared pass gives it as a target."""
    model = causal_model(tokenizer)
    trie = ItemTrie(tokenizer.codes, tokenizer.codebook_sizes)
    encoded = tokenizer.encode_histories([[3, 1, 4]])
    found = generate_sessions(model, trie, **encoded, num_items=1, num_beams=ITEMS, normalization="vocabulary")
    best = int(found.items[0, 0, 0])
    shared = {"rows": [{"history": [3, 1, 4, best], "sessions": [[best], [0]], "prefixes": [3, 4]}]}
    batch = SessionCollator(tokenizer, model)([shared])
    log_probs = model(**batch).logits.log_softmax(-1)[0]
    total = sum(log_probs[place, token] for place, token in enumerate(batch["labels"][0].tolist()))
    torch.testing.assert_close(total, found.scores[0, 0], atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    behaviours=st.integers(2, 24),
    stride=st.integers(1, 3),
    n=st.integers(1, 9),
    per_row=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_shared_histories_hold_every_target_once(tokenizer, behaviours, stride, n, per_row, seed):
    sessions = index_sessions(feed(4, behaviours, stride, n, seed), tokenizer)
    shared = share_histories(sessions, n, per_row)
    found = sorted(targets_of(shared))
    rows = [(row["user_id"], tuple(row["history"]), tuple(row["session"])) for row in sessions]
    assert len(found) == len(rows)
    matched = 0
    for user, history, session in rows:
        # A prefix is the history, or what is left of it without its oldest behaviours, at most half of n.
        fitting = [
            entry
            for entry in found
            if entry[0] == user
            and entry[2] == session
            and entry[1] == history[len(history) - len(entry[1]) :]
            and len(history) - len(entry[1]) <= (n // 2 if len(history) == n else 0)
        ]
        matched += bool(fitting)
        if fitting:
            found.remove(fitting[0])
    assert matched == len(rows) and not found


def test_a_user_is_encoded_once_while_the_history_is_whole(tokenizer):
    sessions = index_sessions(feed(users=5, behaviours=9, stride=2, history_items=8), tokenizer)
    shared = share_histories(sessions, history_items=8, targets_per_row=8)
    assert [len(packed["rows"]) for packed in shared] == [2, 2, 1]
    assert shared["length"][:] == [7, 7, 7]
    assert [row["prefixes"] for row in shared[0]["rows"]] == [[1, 3, 5, 7]] * 2


def test_other_histories_are_not_joined(tokenizer):
    """The same user's history may be something else, as where behaviours are filtered; then nothing is shared."""
    sessions = Dataset.from_dict(
        {
            "user_id": [1, 1, 2],
            "history": [[1, 2], [1, 3, 4], [1, 3, 4, 5]],
            "session": [[7], [8], [9]],
            "length": [2, 3, 4],
        }
    )
    shared = share_histories(sessions, 8, 1)
    assert sorted(targets_of(shared)) == [(1, (1, 2), (7,)), (1, (1, 3, 4), (8,)), (2, (1, 3, 4, 5), (9,))]


def test_wrong_use_is_refused(tokenizer):
    with pytest.raises(StrictDataclassClassValidationError, match="encoder_attention must be"):
        OneRecConfig(encoder_attention="both")
    model = causal_model(tokenizer)
    model.config.encoder_attention = "bidirectional"
    rows = [{"rows": [{"history": [1, 2], "sessions": [[3]], "prefixes": [1]}]}]
    with pytest.raises(ValueError, match="encoder_attention='causal'"):
        model(**SessionCollator(tokenizer, model)(rows))


@pytest.mark.parametrize("overrides", [{}, LAZY_DECODER], ids=["encoder", "lazy decoder"])
def test_the_trainer_learns_from_shared_histories(tokenizer, tmp_path, overrides):
    generator = np.random.default_rng(0)
    runs = [(start + np.arange(6)) % ITEMS for start in generator.integers(0, ITEMS, 32)]
    rows = [
        {"user_id": user, "history_item_ids": run[:cut].tolist(), "session_item_ids": run[cut : cut + 2].tolist()}
        for user, run in enumerate(runs)
        for cut in range(1, 5)
    ]
    sessions = index_sessions(Dataset.from_list(rows), tokenizer)
    trainer = OneRecPretrainer(
        model=causal_model(tokenizer, "item", **overrides).train(),
        processing_class=tokenizer,
        args=Seq2SeqTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=40,
            learning_rate=2e-2,
            lr_scheduler_type="constant",
            train_sampling_strategy="group_by_length",
            per_device_train_batch_size=4,
            per_device_eval_batch_size=64,
            save_strategy="no",
            logging_steps=20,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=share_histories(sessions, history_items=6, targets_per_row=8),
        eval_dataset=sessions,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    # Rows of single targets and of shared histories are the same task.
    assert trainer.evaluate()["eval_loss"] < before / 2
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < before / 2
