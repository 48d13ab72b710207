import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassClassValidationError
from model_conformance import ModelConformanceTests
from transformers import TrainingArguments

from onerec_hf.reward import (
    OneRecRewardConfig,
    OneRecRewardModel,
    OneRecRewardTrainer,
    RewardCollator,
    SessionScorer,
    item_code_ids,
    label_means,
    objective_metrics,
    reward_metrics,
    user_half,
)
from onerec_hf.tokenization_onerec import OneRecTokenizer

CODEBOOK_SIZES = [4, 4, 4]


class TestConformance(ModelConformanceTests):
    model_class = base_model_class = OneRecRewardModel
    offloaded = "target_attention"

    def make_config(self, **overrides):
        settings = {"codebook_sizes": CODEBOOK_SIZES, "hidden_size": 16, "tower_hidden_size": 16, "history_items": 8}
        return OneRecRewardConfig(**(settings | {"num_hidden_layers": 2} | overrides))

    def make_inputs(self, config, batch_size=3):
        generator = torch.Generator().manual_seed(1)
        history = torch.randint(5, 17, (batch_size, 6, 3), generator=generator)
        session = torch.randint(5, 17, (batch_size, 4, 3), generator=generator)
        history[0, :2] = history[1, -2:] = session[2, -1:] = config.pad_token_id
        labels = torch.rand(batch_size, 4, generator=generator)
        labels[1, 2] = math.nan
        return {"history_ids": history, "session_ids": session, "labels": labels}

    def test_cross_attentions_are_the_target_attention(self):
        model = self.make_model()
        model.set_attn_implementation("eager")
        output = model(**self.make_inputs(model.config), output_attentions=True)
        (weights,) = output.cross_attentions
        assert weights.shape == (3, model.config.num_attention_heads, 4, 7)  # 6 behaviours and none at all
        assert not weights[0, :, :, 1:3].any() and not weights[1, :, :, -2:].any()
        assert len(output.attentions) == model.config.num_hidden_layers


OBJECTIVES = ["swt", "vtr", "wtr", "ltr"]


def tiny_model(**overrides) -> OneRecRewardModel:
    torch.manual_seed(0)
    settings = {"codebook_sizes": CODEBOOK_SIZES, "hidden_size": 16, "tower_hidden_size": 16, "history_items": 8}
    model = OneRecRewardModel(OneRecRewardConfig(**(settings | overrides))).eval()
    # Weights far from their start, so that no part of the model is idle.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> OneRecTokenizer:
    """40 items with distinct codes."""
    items = np.random.default_rng(1).permutation(64)[:40]
    codes = np.stack([items // 16, items // 4 % 4, items % 4], axis=1)
    return OneRecTokenizer.from_semantic_ids(np.arange(100, 140), codes, codebook_sizes=CODEBOOK_SIZES)


@pytest.fixture(scope="module")
def item_token_ids(tokenizer) -> torch.LongTensor:
    return tokenizer.item_token_ids


def random_batch(item_token_ids, users=3, candidates=4, history=6, session=5):
    generator = torch.Generator().manual_seed(2)
    return (
        item_token_ids[torch.randint(40, (users, history), generator=generator)],
        item_token_ids[torch.randint(40, (users, candidates, session), generator=generator)],
    )


class TestForward:
    def test_candidates_are_scored_as_if_one_by_one(self, item_token_ids):
        model = tiny_model()
        history, sessions = random_batch(item_token_ids)
        together = model(history, sessions)
        assert together.logits.shape == (3, 4, 4) and together.reward.shape == (3, 4)
        for candidate in range(4):
            alone = model(history, sessions[:, candidate])
            torch.testing.assert_close(alone.logits, together.logits[:, candidate])
            torch.testing.assert_close(alone.reward, together.reward[:, candidate])

    def test_padding_of_either_side_changes_nothing(self, item_token_ids):
        model = tiny_model()
        history, sessions = random_batch(item_token_ids, session=3)
        expected = model(history, sessions).logits
        for sides in ((0, 2), (2, 0)):
            padded = F.pad(history, (0, 0, *sides))
            torch.testing.assert_close(model(padded, sessions).logits, expected)
        torch.testing.assert_close(model(history, F.pad(sessions, (0, 0, 0, 2))).logits, expected)

    def test_empty_history_and_empty_session_are_finite(self, item_token_ids):
        model = tiny_model()
        history, sessions = random_batch(item_token_ids)
        history[0] = 0
        sessions[1, 0] = 0
        assert model(history, sessions).logits.isfinite().all()
        torch.testing.assert_close(model(history[1:], sessions[1:]).logits, model(history, sessions).logits[1:])

    def test_order_of_history_and_session_and_code_combination_matter(self, item_token_ids):
        model = tiny_model()
        history, sessions = random_batch(item_token_ids)
        expected = model(history, sessions).logits
        assert (model(history.flip(1), sessions).logits - expected).abs().max() > 1e-4
        assert (model(history, sessions.flip(2)).logits - expected).abs().max() > 1e-4
        # Items (a1 b1), (a2 b2) against (a1 b2), (a2 b1) in a history: the same codes, other items.
        pairs = torch.tensor([[[5, 9, 13], [6, 10, 13]], [[5, 10, 13], [6, 9, 13]]])
        one, other = model.item_encoder(pairs).sum(1)
        assert (one - other).abs().max() > 1e-2

    def test_target_attention_against_a_plain_computation(self, item_token_ids):
        model = tiny_model(num_attention_heads=2)
        layer = model.target_attention
        history, sessions = random_batch(item_token_ids, users=1, candidates=1, history=3, session=2)
        history[0, 0] = 0  # left padding
        items, behaviour = model.item_encoder(sessions[:, 0])[0], model.item_encoder(history)[0, 1:]
        states = layer.history_norm(behaviour + layer.recency_embeddings.weight[[1, 0]])
        states = torch.cat([layer.no_behaviour[0], states])
        attention = layer.attention
        user = torch.empty_like(items)
        for row, item in enumerate(items):
            heads = []
            for head in range(2):
                rows = slice(8 * head, 8 * head + 8)
                query = attention.q_proj.weight[rows] @ item
                weights = (states @ attention.k_proj.weight[rows].T @ query / math.sqrt(8)).softmax(0)
                heads.append(weights @ (states @ attention.v_proj.weight[rows].T))
            user[row] = attention.o_proj.weight @ torch.cat(heads)
        expected = layer.fusion(torch.cat([items, user, items * user], dim=-1))
        actual = layer(items[None], model.item_encoder(history), history[..., 0] != 0)[0]
        torch.testing.assert_close(actual, expected)

    def test_reward_is_the_weighted_sum(self, item_token_ids):
        model = tiny_model(objective_weights=[1.0, 0.5, 0.0, 2.0])
        output = model(*random_batch(item_token_ids))
        torch.testing.assert_close(output.reward, output.probabilities @ torch.tensor([1.0, 0.5, 0.0, 2.0]))

    def test_loss_sums_the_heads_over_known_labels(self, item_token_ids):
        model = tiny_model()
        history, sessions = random_batch(item_token_ids)
        labels = torch.rand(3, 4)
        labels[0, 1] = labels[:, 2] = math.nan
        output = model(history, sessions[:, 0], labels=labels)
        entropies = -(labels * F.logsigmoid(output.logits) + (1 - labels) * F.logsigmoid(-output.logits))
        torch.testing.assert_close(output.loss, entropies[:, [0, 1, 3]].nanmean(0).sum())
        output.loss.backward()
        assert all(not parameter.grad.any() for parameter in model.towers["wtr"].parameters())
        assert model.towers["vtr"].hidden.weight.grad.abs().sum() > 0

    def test_save_and_load(self, item_token_ids, tmp_path):
        model = tiny_model(objective_weights=[1.0, 0.0, 0.0, 2.0])
        model.save_pretrained(tmp_path)
        loaded = OneRecRewardModel.from_pretrained(tmp_path)
        assert loaded.config.objective_weights == [1.0, 0.0, 0.0, 2.0]
        batch = random_batch(item_token_ids)
        assert torch.equal(loaded(*batch).reward, model(*batch).reward)

    @pytest.mark.parametrize(
        ("history", "session", "message"),
        [
            ((2, 9, 3), (2, 5, 3), "history_items"),
            ((2, 4, 3), (2, 6, 3), "session_items"),
            ((2, 4, 2), (2, 5, 2), "levels"),
        ],
    )
    def test_wrong_shapes_are_named(self, history, session, message):
        with pytest.raises(ValueError, match=message):
            tiny_model()(torch.ones(history, dtype=torch.long), torch.ones(session, dtype=torch.long))

    def test_config_errors(self):
        with pytest.raises(StrictDataclassClassValidationError, match="one weight for each"):
            OneRecRewardConfig(objective_weights=[1.0])
        with pytest.raises(StrictDataclassClassValidationError, match="num_attention_heads"):
            OneRecRewardConfig(hidden_size=10)


def labelled_sessions(users: int = 60) -> Dataset:
    """Sessions of one or three items; watched if the first item is among the even ones."""
    rng = np.random.default_rng(0)
    sessions = [rng.choice(40, rng.choice([1, 3]), replace=False).tolist() for _ in range(users)]
    label = [float(session[0] % 2 == 0) for session in sessions]
    return Dataset.from_dict(
        {
            "history": [rng.choice(40, rng.integers(0, 12)).tolist() for _ in range(users)],
            "session": sessions,
            "swt": label,
            "vtr": [math.nan if row % 3 == 0 else 0.9 * value for row, value in enumerate(label)],
            "wtr": [1 - value for value in label],
            "ltr": [math.nan] * users,
        }
    )


class TestTraining:
    def test_overfits_a_small_set(self, item_token_ids, tmp_path):
        model = tiny_model(objective_weights=[1.0, 1.0, 1.0, 0.0], dropout=0.0)
        dataset = labelled_sessions()
        rates = label_means(dataset, model.config)
        assert math.isnan(rates["ltr"]) and 0 < rates["swt"] < 1
        model.set_base_rates(rates)
        assert model.towers["swt"].output.bias.item() == pytest.approx(math.log(rates["swt"] / (1 - rates["swt"])))
        arguments = TrainingArguments(
            tmp_path,
            max_steps=80,
            per_device_train_batch_size=60,
            learning_rate=1e-2,
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = OneRecRewardTrainer(
            model, item_token_ids, args=arguments, train_dataset=dataset, eval_dataset=dataset
        )
        trainer.train()
        evaluated = trainer.evaluate()
        metrics = reward_metrics(model, dataset, item_token_ids)
        assert metrics["swt_auc"] > 0.98 and metrics["vtr_auc"] > 0.98 and metrics["wtr_auc"] > 0.98
        assert metrics["swt_log_loss"] < 0.1 < metrics["swt_base_log_loss"]
        assert "ltr_auc" not in metrics
        assert evaluated["eval_swt_auc"] == pytest.approx(metrics["swt_auc"])

    def test_collator_tensors(self, item_token_ids):
        collator = RewardCollator(item_token_ids, tiny_model(history_items=2).config)
        rows = [
            {"history": [1, 2, 3], "session": [4, 5], "swt": 0.5, "vtr": None, "wtr": 0.0, "ltr": math.nan},
            {"history": [], "session": [6], "swt": 1.0, "vtr": 1.0, "wtr": 1.0, "ltr": 0.0},
        ]
        batch = collator(rows)
        assert torch.equal(batch["history_ids"][0], item_token_ids[[2, 3]]) and not batch["history_ids"][1].any()
        assert torch.equal(batch["session_ids"][1, 0], item_token_ids[6]) and not batch["session_ids"][1, 1].any()
        assert batch["labels"].isnan().tolist() == [[False, True, False, True], [False] * 4]
        with pytest.raises(ValueError, match="session_items"):
            collator([rows[0] | {"session": [1] * 6}])
        with pytest.raises(ValueError, match="'swt' has a label outside"):
            collator([rows[0] | {"swt": 1.5}])

    def test_weighted_objective_without_labels_is_an_error(self):
        with pytest.raises(ValueError, match="'ltr'.*objective_weights"):
            label_means(labelled_sessions(), tiny_model().config)

    def test_metrics_by_hand(self):
        config = tiny_model(objective_weights=[1.0, 0.0, 0.0, 0.0]).config
        labels = np.array([[0.0, 0.2, 0.0, math.nan], [0.0, 0.8, 0.0, math.nan], [1.0, 0.6, 0.0, math.nan]])
        probabilities = np.array([[0.1, 0.2, 0.5, 0.5], [0.3, 0.8, 0.5, 0.5], [0.2, 0.6, 0.5, 0.5]])
        metrics = objective_metrics(probabilities, labels, config)
        assert metrics["swt_auc"] == metrics["reward_auc"] == 0.5
        assert metrics["vtr_auc"] == 1.0 and metrics["vtr_calibration_error"] == pytest.approx(0.0)
        assert metrics["swt_log_loss"] == pytest.approx(-(math.log(0.9) + math.log(0.7) + math.log(0.2)) / 3)
        assert metrics["swt_calibration_error"] == pytest.approx((0.1 + 0.3 + 0.8) / 3)
        assert "wtr_auc" not in metrics and not any(name.startswith("ltr") for name in metrics)

    def test_user_half(self):
        ids = list(range(1000)) * 2
        halves = user_half(ids, seed=3)
        assert 400 < halves[:1000].sum() < 600
        assert np.array_equal(halves[:1000], halves[1000:])
        assert np.array_equal(user_half(ids[:10], seed=3), halves[:10])
        assert np.array_equal(user_half([str(user) for user in ids], seed=3), halves)
        assert not np.array_equal(user_half(ids, seed=4), halves)


class TestScoring:
    def test_scores_in_batches_and_blanks_empty_sessions(self, tokenizer, item_token_ids):
        model = tiny_model(objective_weights=[1.0, 0.5, 0.0, 2.0]).train()
        rng = np.random.default_rng(0)
        rows = [{"history": rng.choice(40, length).tolist()} for length in (12, 0, 3, 5)]
        sessions = torch.from_numpy(rng.choice(40, (4, 3, 5)))
        sessions[2, 1] = -1
        scorer = SessionScorer(model, tokenizer)
        scores = scorer.score(rows, sessions, batch_size=3)
        assert model.training
        model.eval()
        for user in range(4):
            history_ids = item_code_ids([rows[user]["history"][-8:]], item_token_ids)
            expected = model(history_ids, item_token_ids[sessions[user]][None]).reward[0]
            real = torch.tensor([True, user != 2, True])
            torch.testing.assert_close(scores.reward[user][real], expected[real])
            torch.testing.assert_close(scorer.scalar(scores.probabilities[user][real]), expected[real])
            assert scores.reward[user].isnan().tolist() == (~real).tolist()

    def test_save_and_load(self, tokenizer, tmp_path):
        scorer = SessionScorer(tiny_model(), tokenizer)
        scorer.model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        rows, sessions = [{"history": [1, 2]}], torch.arange(10).view(1, 2, 5)
        loaded = SessionScorer.from_pretrained(tmp_path, device="cpu")
        assert loaded.objectives == OBJECTIVES
        assert torch.equal(loaded.score(rows, sessions).reward, scorer.score(rows, sessions).reward)
        assert loaded.score([], sessions[:0]).probabilities.shape == (0, 2, 4)

    def test_wrong_input_is_an_error(self, tokenizer):
        scorer = SessionScorer(tiny_model(), tokenizer)
        with pytest.raises(ValueError, match="0..39"):
            scorer.score([{"history": [40]}], torch.zeros(1, 1, 5, dtype=torch.long))
        with pytest.raises(ValueError, match="one for each"):
            scorer.score([], torch.zeros(1, 1, 5, dtype=torch.long))
