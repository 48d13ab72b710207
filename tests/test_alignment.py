import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from onerec_hf.alignment import OneRecDPOConfig, OneRecDPOTrainer, PreferenceCollator, sample_preferences
from onerec_hf.configuration_onerec import OneRecConfig
from onerec_hf.item_trie import ItemTrie
from onerec_hf.modeling_onerec import OneRecForConditionalGeneration
from onerec_hf.pretraining import SessionCollator
from onerec_hf.reward import OneRecRewardConfig, OneRecRewardModel, SessionScorer
from onerec_hf.session_generation import excluded_items, generate_sessions
from onerec_hf.tokenization_onerec import OneRecTokenizer

CODEBOOK_SIZES = [4, 4, 4]
NUM_ITEMS = 30


@pytest.fixture(scope="module")
def tokenizer() -> OneRecTokenizer:
    items = np.random.default_rng(0).permutation(64)[:NUM_ITEMS]
    codes = np.stack([items // 16, items // 4 % 4, items % 4], axis=1)
    return OneRecTokenizer.from_semantic_ids(np.arange(100, 100 + NUM_ITEMS), codes, codebook_sizes=CODEBOOK_SIZES)


def tiny_generator(seed: int = 0) -> OneRecForConditionalGeneration:
    """Two-item sessions, with dropout, whose output weights are large enough for codes to differ in probability."""
    torch.manual_seed(seed)
    config = OneRecConfig.from_preset(
        "debug", codebook_sizes=CODEBOOK_SIZES, history_items=6, session_items=2, dropout=0.1
    )
    model = OneRecForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    return model


def training_rows(count: int = 40) -> Dataset:
    rng = np.random.default_rng(1)
    return Dataset.from_dict(
        {
            "user_id": [f"u{row}" for row in range(count)],
            "history": [rng.choice(NUM_ITEMS, rng.integers(0, 9), replace=False).tolist() for _ in range(count)],
            "session": [rng.choice(NUM_ITEMS, 2, replace=False).tolist() for _ in range(count)],
        }
    )


def preference_pairs(count: int = 8) -> Dataset:
    rng = np.random.default_rng(2)
    rows = []
    for row in range(count):
        chosen, rejected = rng.choice(NUM_ITEMS, 4, replace=False).reshape(2, 2).tolist()
        history = rng.choice(NUM_ITEMS, 1 + row % 5, replace=False).tolist()
        rows.append({"user_id": row, "history": history, "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


class FirstCodeReward(OneRecRewardModel):
    """Stands in for a trained judge: the reward is the token ids' sum, so the oracle needs no model."""

    def forward(self, history_ids, session_ids):
        reward = session_ids.sum((-1, -2)).float()
        return SimpleNamespace(reward=reward, probabilities=reward[..., None].expand(-1, -1, 4))


@pytest.fixture(scope="module")
def judge(tokenizer) -> SessionScorer:
    config = OneRecRewardConfig(codebook_sizes=CODEBOOK_SIZES, hidden_size=8, num_attention_heads=1, session_items=2)
    return SessionScorer(FirstCodeReward(config), tokenizer)


class TestSampler:
    def test_best_and_worst_of_the_beams(self, tokenizer, judge):
        model, rows = tiny_generator().train(), training_rows(12)
        trie = ItemTrie(tokenizer.codes, CODEBOOK_SIZES)
        pairs = sample_preferences(
            model, trie, tokenizer, judge, rows, sample_share=1.0, num_candidates=6, batch_size=5, progress=False
        )
        assert model.training and pairs["user_id"][:] == rows["user_id"][:]
        assert pairs.features["user_id"] == rows.features["user_id"]
        model.eval()
        for pair in pairs:
            history = np.asarray(pair["history"], dtype=np.int64)
            encoded = tokenizer.encode_histories([history], max_items=6, catalogue_indices=True)
            beams = generate_sessions(
                model, trie, **encoded, num_beams=6, excluded=excluded_items([history], model.device)
            ).items[0]
            rewards = tokenizer.item_token_ids[beams].sum((-1, -2)).tolist()
            assert pair["candidate_rewards"] == rewards
            assert pair["chosen"] == beams[int(np.argmax(rewards))].tolist()
            assert pair["rejected"] == beams[int(np.argmin(rewards))].tolist()
            assert (pair["chosen_reward"], pair["rejected_reward"]) == (max(rewards), min(rewards))
            assert pair["mean_reward"] == pytest.approx(np.mean(rewards))
            assert not set(pair["history"]) & {*pair["chosen"], *pair["rejected"]}

    def test_features_of_histories_reach_the_model(self, tokenizer, judge):
        generator = tiny_generator()
        config = OneRecConfig(**{**generator.config.to_dict(), "history_feedback": ["like"], "time_gap_buckets": 3})
        model = OneRecForConditionalGeneration(config)
        rows = training_rows(4)
        times = [[float(place) for place in range(len(history))] for history in rows["history"]]
        features = {"history_feedback": [[[place % 2] for place in history] for history in rows["history"]]}
        features |= {"history_timestamps": times, "timestamp": [100.0] * 4}
        rows = Dataset.from_dict(rows[:] | features)
        trie = ItemTrie(tokenizer.codes, CODEBOOK_SIZES)
        pairs = sample_preferences(
            model, trie, tokenizer, judge, rows, sample_share=1.0, num_candidates=4, progress=False
        )
        assert {name: pairs[name][:] for name in features} == features
        collator = PreferenceCollator(tokenizer, model, rows)
        batch = collator(pairs.add_column("ntp_rows", [[row] for row in range(4)]).to_list())
        ordinary = SessionCollator(tokenizer, model)(rows.to_list())
        for name in ("history_feedback", "history_time_gaps"):
            assert torch.equal(batch[name], ordinary[name]) and torch.equal(batch[f"ntp_{name}"], ordinary[name])

    def test_share_and_seed(self, tokenizer, judge):
        model, rows = tiny_generator(), training_rows(40)
        trie = ItemTrie(tokenizer.codes, CODEBOOK_SIZES)

        def draw(**kwargs):
            return sample_preferences(model, trie, tokenizer, judge, rows, num_candidates=4, progress=False, **kwargs)

        drawn = draw(sample_share=0.25, seed=0)
        assert len(drawn) == 10
        assert draw(sample_share=0.25, seed=0).to_list() == drawn.to_list()
        assert draw(sample_share=0.25, seed=1)["user_id"][:] != drawn["user_id"][:]
        with pytest.raises(ValueError, match="sample_share"):
            draw(sample_share=0.0)

    def test_small_gaps_and_equal_rewards_make_no_pair(self, tokenizer, judge):
        model, rows = tiny_generator(), training_rows(10)
        trie = ItemTrie(tokenizer.codes, CODEBOOK_SIZES)
        arguments = {"sample_share": 1.0, "num_candidates": 4, "progress": False}
        pairs = sample_preferences(model, trie, tokenizer, judge, rows, **arguments)
        gaps = np.subtract(pairs["chosen_reward"][:], pairs["rejected_reward"][:])
        assert gaps.min() > 0
        largest = float(gaps.max())
        kept = sample_preferences(model, trie, tokenizer, judge, rows, min_reward_gap=largest, **arguments)
        assert len(kept) == (gaps >= largest).sum() < 10
        # The trie of two items has two sessions of two, of one reward: their sum knows no order.
        few = OneRecTokenizer.from_semantic_ids(
            [1, 2], np.array([[0, 0, 0], [1, 1, 1]]), codebook_sizes=CODEBOOK_SIZES
        )
        lonely = Dataset.from_list([{"user_id": 0, "history": []}], features=None)
        lonely = lonely.cast_column("history", rows.features["history"])
        trie = ItemTrie(few.codes, CODEBOOK_SIZES)
        assert len(sample_preferences(model, trie, few, judge, lonely, **arguments)) == 0


def dpo_arguments(output_dir, **overrides) -> OneRecDPOConfig:
    settings = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "lambda_dpo": 0.5,
        "ntp_per_pair": 2,
        "max_steps": 6,
    }
    return OneRecDPOConfig(**(settings | overrides))


def make_trainer(tokenizer, output_dir, model=None, pairs=None, **overrides) -> OneRecDPOTrainer:
    return OneRecDPOTrainer(
        model or tiny_generator(),
        dpo_arguments(output_dir, **overrides),
        train_dataset=pairs or preference_pairs(),
        processing_class=tokenizer,
        ntp_dataset=training_rows(),
    )


def session_log_probability(model, tokenizer, history, session) -> torch.Tensor:
    """Sum of the log-probabilities of a session's codes by a plain forward of one row."""
    encoded = tokenizer.encode_histories([history], max_items=6, catalogue_indices=True)
    labels = tokenizer.encode_sessions([session], catalogue_indices=True)
    decoder_input_ids = F.pad(labels, (1, 0), value=2)[:, :-1]
    log_probs = model(**encoded, decoder_input_ids=decoder_input_ids).logits.log_softmax(-1)
    return log_probs.gather(-1, labels[..., None]).squeeze(-1)[labels != 2].sum()


def batch_of(trainer) -> dict[str, torch.Tensor]:
    return trainer.data_collator(list(trainer.train_dataset))


class TestCollator:
    def test_tensors(self, tokenizer):
        model = tiny_generator()
        ntp_dataset = training_rows()
        collator = PreferenceCollator(tokenizer, model, ntp_dataset)
        batch = collator(
            [
                {"history": [1, 2], "chosen": [3, 4], "rejected": [5], "ntp_rows": [7, 9]},
                {"history": [6], "chosen": [7, 8], "rejected": [9, 10], "ntp_rows": [0, 1]},
            ]
        )
        codes = tokenizer.item_token_ids
        bos = torch.tensor([2])
        assert torch.equal(batch["input_ids"][0], torch.cat([bos, codes[3], bos, codes[4]]))
        assert torch.equal(batch["input_ids"][2], torch.cat([bos, codes[5], torch.zeros(4, dtype=torch.long)]))
        assert batch["completion_mask"][0].tolist() == [0, 1, 1, 1, 0, 1, 1, 1]
        assert batch["completion_mask"][2].tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
        assert batch["encoder_input_ids"].shape == (2, 7)
        ordinary = SessionCollator(tokenizer, model)([ntp_dataset[row] for row in (7, 9, 0, 1)])
        for name, tensor in ordinary.items():
            assert torch.equal(batch[f"ntp_{name}"], tensor)


class TestTrainer:
    def test_first_loss_is_ln_2_plus_the_mixed_in_loss(self, tokenizer, tmp_path):
        trainer = make_trainer(tokenizer, tmp_path)
        batch = batch_of(trainer)
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, batch, False)
        metrics = trainer._metrics["train"]
        assert metrics["dpo_loss"] == [pytest.approx(math.log(2), abs=1e-6)]
        ntp = {name.removeprefix("ntp_"): tensor for name, tensor in batch.items() if name.startswith("ntp_")}
        expected = tiny_generator().eval()(**ntp).loss
        assert metrics["ntp_loss"] == [pytest.approx(expected.item(), abs=1e-6)]
        torch.testing.assert_close(loss, expected + 0.5 * math.log(2))
        assert len(trainer.train_dataset["ntp_rows"][0]) == 2

    def test_loss_against_plain_log_probabilities(self, tokenizer, tmp_path):
        model, pairs = tiny_generator(), preference_pairs(2)
        reference = copy.deepcopy(model).eval()
        trainer = make_trainer(tokenizer, tmp_path, model, pairs, beta=0.7, ntp_per_pair=0, lambda_dpo=2.0)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        policy = copy.deepcopy(reference)
        policy.load_state_dict(model.state_dict())
        losses = []
        for pair in pairs:
            chosen, rejected = (
                session_log_probability(policy, tokenizer, pair["history"], pair[side])
                - session_log_probability(reference, tokenizer, pair["history"], pair[side])
                for side in ("chosen", "rejected")
            )
            losses.append(-F.logsigmoid(0.7 * (chosen - rejected)))
        loss = trainer._compute_loss(model.train(), batch_of(trainer), False)
        torch.testing.assert_close(loss, 2.0 * torch.stack(losses).mean())
        assert abs(loss.item() - 2 * math.log(2)) > 0.05

    def test_training_raises_the_margin_and_leaves_the_reference(self, tokenizer, tmp_path):
        model = tiny_generator()
        before = copy.deepcopy(model)
        trainer = make_trainer(tokenizer, tmp_path, model, max_steps=10, learning_rate=5e-3)
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
        assert history[-1]["rewards/margins"] > history[0]["rewards/margins"] + 0.05
        assert history[-1]["dpo_loss"] < history[0]["dpo_loss"]
        assert history[0]["loss"] == pytest.approx(0.5 * history[0]["dpo_loss"] + history[0]["ntp_loss"], abs=1e-3)
        reference = trainer.ref_model.model.state_dict()
        assert all(torch.equal(reference[name], tensor) for name, tensor in before.state_dict().items())
        assert any(not torch.equal(model.state_dict()[name], tensor) for name, tensor in before.state_dict().items())
        assert model.config.dropout == 0.1  # what is saved can be trained further with dropout

    def test_resumed_run_ends_where_an_uninterrupted_one_does(self, tokenizer, tmp_path):
        through = make_trainer(tokenizer, tmp_path / "through")
        through.train()
        arguments = {"save_strategy": "steps", "save_steps": 3}
        interrupted = make_trainer(tokenizer, tmp_path / "resumed", **arguments)
        interrupted.train()
        assert not (tmp_path / "resumed" / "README.md").exists()
        resumed = make_trainer(tokenizer, tmp_path / "resumed", **arguments)
        resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-3"))
        for name, tensor in through.model.state_dict().items():
            torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=0, atol=1e-7)

    def test_precomputed_reference_gives_the_same_loss(self, tokenizer, tmp_path):
        batch_losses = []
        for precompute in (False, True):
            trainer = make_trainer(tokenizer, tmp_path, precompute_ref_log_probs=precompute)
            with torch.no_grad():
                trainer.model.lm_head.weight.mul_(1.1)
            batch = batch_of(trainer)
            assert ("ref_chosen_logps" in batch) == precompute
            batch_losses.append(trainer._compute_loss(trainer.model.train(), batch, False))
        torch.testing.assert_close(*batch_losses)

    def test_what_is_missing_is_named(self, tokenizer, tmp_path):
        with pytest.raises(ValueError, match="no preference pair"):
            OneRecDPOTrainer(tiny_generator(), dpo_arguments(tmp_path), preference_pairs().select([]), tokenizer)
        with pytest.raises(ValueError, match="ntp_dataset"):
            OneRecDPOTrainer(tiny_generator(), dpo_arguments(tmp_path), preference_pairs(), tokenizer)
        with pytest.raises(ValueError, match="negative"):
            dpo_arguments(tmp_path, lambda_dpo=-1.0)
