"""Batches for pretraining, expert balance while training, and which checkpoint a run is resumed from."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Seq2SeqTrainingArguments

from onerec_hf import (
    OneRecConfig,
    OneRecForConditionalGeneration,
    OneRecTokenizer,
    Recommender,
    pretraining,
    session_rows,
    shared_histories,
    training_checkpoints,
)
from onerec_hf.pretraining import OneRecPretrainer, SessionCollator
from onerec_hf.session_rows import index_sessions
from onerec_hf.stages.pretrain_stage import fitting_batch_size, recent_sessions, train_generator
from onerec_hf.stages.recipe_arguments import PretrainArguments
from onerec_hf.training_checkpoints import CHECKPOINT_COMPLETE, latest_complete_checkpoint


@pytest.fixture
def tokenizer():
    codes = [[0, 1], [1, 0], [2, 2], [3, 1]]
    return OneRecTokenizer.from_semantic_ids(["w", "x", "y", "z"], codes, [torch.zeros(4, 2), torch.zeros(3, 2)])


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = OneRecConfig.from_preset(
        "debug", codebook_sizes=list(tokenizer.codebook_sizes), history_items=2, session_items=2
    )
    return OneRecForConditionalGeneration(config)


def test_sessions_by_catalogue_index(tokenizer):
    sessions = Dataset.from_dict(
        {"user_id": [7, 8], "history_item_ids": [["w", "z"], []], "session_item_ids": [["y"], ["x", "w"]]}
    )
    indexed = index_sessions(sessions.select([1, 0]), tokenizer)
    assert indexed[:] == {"user_id": [8, 7], "history": [[], [0, 3]], "session": [[1, 0], [2]], "length": [0, 2]}
    unknown = Dataset.from_dict({"history_item_ids": [["w", "nobody"]]})
    with pytest.raises(ValueError, match="nobody"):
        index_sessions(unknown, tokenizer)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (session_rows, ["catalogue_index_lists", "index_sessions", "user_feature_values"]),
        (shared_histories, shared_histories.__all__),
        (training_checkpoints, [name for name in training_checkpoints.__all__ if name != "whole_model"]),
    ],
)
def test_names_of_before_are_found_in_pretraining(module, names):
    for name in names:
        assert getattr(pretraining, name) is getattr(module, name) and name in pretraining.__all__


def test_histories_that_continue_nothing_beside_a_long_one():
    histories = [[9] * 9, [5], [6]]
    rows = [{"user_id": len(h), "history": h, "session": [1], "length": len(h)} for h in histories]
    rows = shared_histories.share_histories(Dataset.from_list(rows), history_items=9)[0]["rows"]
    assert [(row["history"], row["prefixes"]) for row in rows] == [([5], [1]), ([6], [1]), ([9] * 9, [9])]


def test_recent_sessions_are_those_of_the_latest_days():
    day = 86400.0
    sessions = Dataset.from_dict({"timestamp": [float("nan"), 0.0, 9 * day, 7 * day, 10 * day], "place": range(5)})
    assert recent_sessions(sessions, 3)["place"][:] == [2, 3, 4]
    assert recent_sessions(sessions, 0.5)["place"][:] == [4]
    assert len(recent_sessions(sessions.select([0]), 3)) == len(recent_sessions(sessions.select([]), 3)) == 0


def test_collator_lays_out_both_sequences(tokenizer, model):
    rows = [{"history": [0, 1, 3], "session": [2, 0, 1]}, {"history": [2], "session": [3]}]
    batch = SessionCollator(tokenizer, model)(rows)
    # Level 0 starts at id 5, level 1 at id 9; the latest two behaviours and the first two session items are kept.
    assert batch["input_ids"].tolist() == [[6, 9, 3, 8, 10], [0, 0, 0, 7, 11]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [0, 0, 0, 1, 1]]
    assert batch["decoder_input_ids"].tolist() == [[2, 7, 11, 2, 5], [2, 8, 10, 0, 0]]
    assert batch["labels"].tolist() == [[7, 11, -100, 5, 10], [8, 10, -100, -100, -100]]


def test_training_learns_balances_and_resumes_exactly(tokenizer, model, tmp_path):
    generator = np.random.default_rng(0)
    rows = [{"history": [item], "session": [(item + 1) % 4, (item + 2) % 4]} for item in generator.integers(0, 4, 64)]
    dataset = Dataset.from_list(rows).add_column("length", [1] * 64)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def train(folder, steps, resume=False):
        model.load_state_dict(state)
        trainer = OneRecPretrainer(
            model=model,
            processing_class=tokenizer,
            args=Seq2SeqTrainingArguments(
                output_dir=str(folder),
                max_steps=steps,
                lr_scheduler_type="constant",
                learning_rate=2e-2,
                per_device_train_batch_size=16,
                save_steps=30,
                logging_steps=30,
                seed=0,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=dataset,
        )
        trainer.train(resume_from_checkpoint=latest_complete_checkpoint(folder) if resume else None)
        logs = [row for row in trainer.state.log_history if "loss" in row]
        return logs, {name: tensor.clone() for name, tensor in model.state_dict().items()}

    logs, once = train(tmp_path / "once", 60)
    assert logs[-1]["loss"] < logs[0]["loss"] / 2
    assert {"expert_load_max", "dead_experts", "expert_load_layer_0"} <= set(logs[-1])
    assert once["model.decoder.layers.0.moe.gate.expert_bias"].abs().max() > 0
    train(tmp_path / "twice", 30)
    _, resumed = train(tmp_path / "twice", 60, resume=True)
    for name, tensor in once.items():
        torch.testing.assert_close(resumed[name], tensor, msg=name)


@pytest.fixture
def parts(tokenizer):
    rows = {"user_id": range(12), "history": [[0, 1]] * 12, "session": [[2, 3]] * 12, "length": [2] * 12}
    return {"train": Dataset.from_dict(rows), "test": Dataset.from_dict(rows).select([])}


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 16},
            "12 training rows do not fill one batch of 16 .* lower per_device_train_batch_size",
        ),
        ({"eval_strategy": "steps", "eval_steps": 1}, "pretrain.eval_strategy is 'steps', but of 12 sessions none"),
    ],
)
def test_a_training_that_would_do_nothing_is_refused(tokenizer, model, parts, tmp_path, options, message):
    given = PretrainArguments(pretrain={"save_strategy": "no", "max_steps": 1, "disable_tqdm": True, **options})
    with pytest.raises(ValueError, match=message):
        train_generator(model, tokenizer, parts, given, tmp_path, False)


def test_a_trained_model_goes_with_the_tokenizer_that_it_was_trained_with(tokenizer, model, parts, tmp_path):
    other = OneRecTokenizer.from_semantic_ids(
        ["w", "x", "y", "z"], [[1, 0], [0, 1], [2, 2], [3, 1]], tokenizer.codebooks
    )
    given = PretrainArguments(pretrain={"save_strategy": "no", "max_steps": 1, "disable_tqdm": True})
    train_generator(model, tokenizer, parts, given, tmp_path, False)
    Recommender(model, tokenizer)
    arguments = Seq2SeqTrainingArguments(output_dir=str(tmp_path), report_to="none")
    for use in (
        lambda: Recommender(model, other),
        lambda: OneRecPretrainer(model, arguments, parts["train"], other),
    ):
        with pytest.raises(ValueError, match="trained on other items or semantic IDs"):
            use()


def test_only_whole_checkpoints_are_resumed_from(tmp_path):
    assert latest_complete_checkpoint(tmp_path) is None
    for step in (5, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 100:
            (tmp_path / f"checkpoint-{step}" / CHECKPOINT_COMPLETE).touch()
    assert latest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert not (tmp_path / "checkpoint-100").exists()


def test_a_batch_that_is_not_given_follows_from_the_sessions():
    sizes = {sessions: fitting_batch_size(sessions) for sessions in (1, 300, 1023, 1024, 4096, 10**6)}
    assert sizes == {1: 16, 300: 16, 1023: 32, 1024: 64, 4096: 256, 10**6: 256}
