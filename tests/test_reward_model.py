import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassClassValidationError
from model_conformance import ModelConformanceTests

from onerec_hf import ItemTrie, OneRecConfig, OneRecForConditionalGeneration, Recommender, generate_sessions, recommend
from onerec_hf.reward import (
    ExposureEncoder,
    OneRecRewardConfig,
    OneRecRewardModel,
    SessionScorer,
)
from onerec_hf.reward.configuration_onerec_reward import DEFAULT_OBJECTIVES
from onerec_hf.session_generation import excluded_items
from onerec_hf.tokenization_onerec import OneRecTokenizer

CODEBOOK_SIZES = [4, 4, 4]


FEATURES = {
    "feedback": ["watch_time", "duration", "view"],
    "signals": ["watched", "view"],
    "num_items": 40,
    "item_embedding_size": 3,
    "taste_size": 6,
    "item_features": ["author", "tag", "tag"],
    "num_item_values": 9,
    "numeric_features": ["length"],
    "user_features": {"country": ["de", "fr", "it"], "age": ["old", "young"]},
}


class TestConformance(ModelConformanceTests):
    model_class = base_model_class = OneRecRewardModel
    offloaded = "target_attention"

    def make_config(self, **overrides):
        settings = {"codebook_sizes": CODEBOOK_SIZES, "hidden_size": 16, "tower_hidden_size": 16, "history_items": 8}
        return OneRecRewardConfig(**(settings | FEATURES | {"num_hidden_layers": 2} | overrides))

    def make_inputs(self, config, batch_size=3):
        generator = torch.Generator().manual_seed(1)
        history = torch.randint(5, 17, (batch_size, 6, 3), generator=generator)
        session = torch.randint(5, 17, (batch_size, 4, 3), generator=generator)
        history[0, :2] = history[1, -2:] = session[2, -1:] = config.pad_token_id
        labels = torch.rand(batch_size, 4, generator=generator)
        labels[1, 2] = math.nan
        signals = torch.rand(batch_size, 6, 2, generator=generator)
        signals[0, 3] = math.nan
        return {
            "history_ids": history,
            "session_ids": session,
            "labels": labels,
            "history_indices": torch.randint(-1, 45, (batch_size, 6), generator=generator),
            "session_indices": torch.randint(-1, 45, (batch_size, 4), generator=generator),
            "history_signals": signals,
            "user_totals": torch.rand(batch_size, 4, generator=generator) * 5,
            "user_values": torch.randint(0, 6, (batch_size, 2), generator=generator),
            "session_totals": torch.rand(batch_size, 4, 4, generator=generator) * 5,
        }

    def test_cross_attentions_are_the_target_attention(self):
        model = self.make_model()
        model.set_attn_implementation("eager")
        output = model(**self.make_inputs(model.config), output_attentions=True)
        (weights,) = output.cross_attentions
        assert weights.shape == (3, model.config.num_attention_heads, 4, 7)  # 6 behaviours and none at all
        assert not weights[0, :, :, 1:3].any() and not weights[1, :, :, -2:].any()
        assert len(output.attentions) == model.config.num_hidden_layers


OBJECTIVES = ["swt", "vtr", "wtr", "ltr"]


def weighted(*weights: float) -> list[dict]:
    """The default objectives with other weights."""
    return [entry | {"weight": weight} for entry, weight in zip(DEFAULT_OBJECTIVES, weights, strict=True)]


def tiny_model(**overrides) -> OneRecRewardModel:
    torch.manual_seed(0)
    settings = {"codebook_sizes": CODEBOOK_SIZES, "hidden_size": 16, "tower_hidden_size": 16, "history_items": 8}
    model = OneRecRewardModel(OneRecRewardConfig(**(settings | overrides))).eval()
    # Weights far from their start, so that no part of the model is idle.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def featured_model(**overrides) -> OneRecRewardModel:
    """A tiny model that reads feedback, features and totals."""
    model = tiny_model(**(FEATURES | overrides))
    generator = torch.Generator().manual_seed(3)
    values = torch.stack([torch.randint(0, 4, (40,), generator=generator)] * 3, dim=1)
    values[:, 1:] = torch.randint(4, 9, (40, 2), generator=generator)
    ranks = torch.linspace(-1, 1, 40)[:, None]
    embeddings = torch.randn(40, model.config.item_embedding_size, generator=generator)
    model.set_items(values, ranks, torch.rand(40, 4, generator=generator) * 20, torch.tensor([0.3, 0.6]), embeddings)
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


EMPTY = torch.zeros(0)


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

    @pytest.mark.parametrize("before", [0, 1, 3])
    @pytest.mark.parametrize("overrides", [{}, {"num_members": 1, "num_hidden_layers": 2}])
    def test_sessions_with_an_item_after_them_are_scored_as_whole_ones(self, item_token_ids, before, overrides):
        model = featured_model(**overrides)
        model.set_calibration(torch.rand(4) + 0.5, torch.randn(4), torch.randn(model.config.session_items, 4))
        random = torch.Generator().manual_seed(5)
        history, sessions, candidates = (
            torch.randint(40, shape, generator=random) for shape in ((3, 6), (3, 2, before), (3, 2, 7))
        )
        sessions[0, 1, 1:] = -1  # a session that ended early, and an item that is not there
        candidates[0, 1], candidates[2, 0, 3] = -1, -1
        whole = torch.cat([sessions[:, :, None].expand(-1, -1, 7, -1), candidates[..., None]], dim=-1).flatten(1, 2)
        codes = {
            name: item_token_ids[items.clamp(min=0)].masked_fill((items < 0)[..., None], 0)
            for name, items in (("session", sessions), ("candidate", candidates), ("whole", whole))
        }
        of_user = {"history_indices": history, "history_signals": torch.rand(3, 6, 2, generator=random)}
        of_user["user_totals"] = torch.rand(3, 4, generator=random) * 9
        values = torch.tensor([[1, 4], [0, 5], [2, 0]])
        expected = model(
            item_token_ids[history], codes["whole"], session_indices=whole, user_values=values, **of_user
        ).reward
        found = model.score_extensions(
            model.encode_behaviour(item_token_ids[history], **of_user),
            codes["session"],
            codes["candidate"],
            session_indices=sessions,
            candidate_indices=candidates,
            user_values=values,
        )
        torch.testing.assert_close(found.flatten(1), expected)

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
        one, other = model.item_encoder(pairs, EMPTY, EMPTY).sum(1)
        assert (one - other).abs().max() > 1e-2

    def test_items_of_the_same_codes_differ_by_their_embeddings(self, item_token_ids):
        model = featured_model()
        table = model.item_table
        assert table.embeddings[:-1].square().mean().item() == pytest.approx(1) and not table.embeddings[-1].any()
        for same in (table.values, table.ranks, table.totals):
            same.zero_()
        table.embeddings[1] = table.embeddings[0]
        history, sessions = item_token_ids[None, :4], item_token_ids[:1].expand(1, 3, 1, -1)
        one, twin, other = model(history, sessions, session_indices=torch.tensor([[[0], [1], [2]]])).logits[0]
        torch.testing.assert_close(one, twin)
        assert (one - other).abs().max() > 1e-3

    def test_target_attention_against_a_plain_computation(self, item_token_ids):
        model = tiny_model(num_attention_heads=2)
        layer = model.target_attention
        history, sessions = random_batch(item_token_ids, users=1, candidates=1, history=3, session=2)
        items, history = (model.item_encoder(ids, EMPTY, EMPTY) for ids in (sessions[:, 0], history))
        items, behaviour = items[0], history[0, 1:]
        states = torch.cat([layer.no_behaviour[0], layer.history_norm(behaviour)])
        attention = layer.attention
        user = torch.empty_like(items)
        for row, item in enumerate(items):
            heads = []
            for head in range(2):
                rows = slice(8 * head, 8 * head + 8)
                query = attention.q_proj.weight[rows] @ item
                scores = states @ attention.k_proj.weight[rows].T @ query / math.sqrt(8)
                scores = scores + torch.cat([torch.zeros(1), layer.recency_bias.weight[[1, 0], head]])
                heads.append(scores.softmax(0) @ (states @ attention.v_proj.weight[rows].T))
            user[row] = attention.o_proj.weight @ torch.cat(heads)
        # The first behaviour is hidden, the third is the latest.
        actual = layer(items[None], history, torch.tensor([[[-1, 1, 0]]]))[0]
        torch.testing.assert_close(actual, user)

    def test_a_session_sees_what_is_before_it(self, item_token_ids):
        """Sessions cut from one run are judged as each alone with the exposures before it, the latest 8 of them."""
        model = featured_model()
        generator = torch.Generator().manual_seed(5)
        indices = torch.randint(40, (2, 12), generator=generator)
        indices[1, 9:] = -1
        signals = torch.rand(2, 12, 2, generator=generator)
        signals[0, 4, 1] = math.nan
        before = torch.rand(2, 4, generator=generator) * 3
        values = torch.tensor([[1, 4], [0, 5]])
        sessions = torch.randint(40, (2, 3, 2), generator=generator)
        prefixes = torch.tensor([[0, 5, 11], [1, 8, 9]])

        def inputs(run, history):
            codes = item_token_ids[history.clamp(min=0)].masked_fill((history < 0)[..., None], 0)
            return {"history_ids": codes, "history_indices": history, "user_values": values[run]}

        together = model(
            **inputs([0, 1], indices),
            session_ids=item_token_ids[sessions],
            session_indices=sessions,
            history_signals=signals,
            user_totals=before,
            history_prefixes=prefixes,
        ).logits
        for run in range(2):
            for place in range(3):
                prefix = int(prefixes[run, place])
                seen = slice(max(prefix - 8, 0), prefix)
                old = signals[run, : seen.start]
                totals = before[run] + torch.cat([old.nan_to_num(0.0).sum(0), (~old.isnan()).sum(0)])
                alone = model(
                    **inputs([run], indices[run : run + 1, seen]),
                    session_ids=item_token_ids[sessions[run : run + 1, place]],
                    session_indices=sessions[run : run + 1, place],
                    history_signals=signals[run : run + 1, seen],
                    user_totals=totals[None],
                ).logits[0]
                torch.testing.assert_close(alone, together[run, place])

    def test_rates_of_the_past_by_hand(self, item_token_ids):
        model = featured_model(rate_prior=2.0, match_prior=1.0)
        seen = {}
        model.fusion.register_forward_pre_hook(lambda _, inputs: seen.update(inputs=inputs[0][0, 0, 48:]))
        model.item_table.values[:3] = torch.tensor([[1, 4, 5], [1, 6, 0], [2, 5, 7]])
        model(
            history_ids=item_token_ids[torch.tensor([[0, 2]])],
            session_ids=item_token_ids[torch.tensor([[1]])],
            history_indices=torch.tensor([[0, 2]]),
            session_indices=torch.tensor([[1]]),
            history_signals=torch.tensor([[[0.5, 1.0], [1.0, math.nan]]]),
            session_totals=torch.tensor([[[3.0, 1.0, 6.0, 4.0]]]),
        )

        def rates(sums, counts, prior):
            found = []
            for total, count, mean in zip(sums, counts, (0.3, 0.6), strict=True):
                rate = (total + prior * mean) / (count + prior)
                found.append(2 * (math.log(rate / (1 - rate)) - math.log(mean / (1 - mean))))
            return found + [math.log1p(count) / 4 for count in counts]

        expected = rates([1.5, 1.0], [2, 1], 2)  # of the user
        expected += rates([3.0, 1.0], [6, 4], 2)  # of the item
        expected += rates([0, 0], [0, 0], 1)  # the same item
        expected += rates([0.5, 1.0], [1, 1], 1)  # the same author: item 0
        expected += rates([0, 0], [0, 0], 1)  # no tag in common; 0 is no tag
        assert seen["inputs"][0].item() == pytest.approx(2 / 39 - 1)  # the rank by length
        assert seen["inputs"][[2, 8]].detach().tolist() == pytest.approx(
            [math.sin(2 * math.pi * (2 / 39 - 1)), math.cos(2 * math.pi * (2 / 39 - 1))], abs=1e-5
        )
        torch.testing.assert_close(seen["inputs"][13:33], torch.tensor(expected))

    def test_repetition_by_hand(self, item_token_ids):
        """Counts the latest behaviours and the session so far, a part of which may be behaviours."""
        model = featured_model(item_embedding_size=2, session_items=3, taste_size=0)
        seen = {}
        model.fusion.register_forward_pre_hook(lambda _, inputs: seen.update(inputs=inputs[0]))
        repetition, thresholds = model.repetition, torch.tensor([0.4, 0.9, 0.0, -0.5])
        with torch.no_grad():  # heads compare embeddings alone, each with a threshold of its own
            repetition.proj.weight.zero_()
            repetition.proj.bias.zero_()
            for head in range(repetition.num_heads):
                repetition.proj.weight[4 * head : 4 * head + 2, -2:] = torch.eye(2)
            repetition.threshold.copy_(thresholds)
            repetition.steepness.fill_(8.0)
            model.item_table.embeddings[:3] = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, -2.0]])

        def read(history, session, **kwargs):
            history, session = torch.tensor([history]), torch.tensor([session])
            ids = {"history_ids": item_token_ids[history], "session_ids": item_token_ids[session]}
            model(**ids, history_indices=history, session_indices=session, **kwargs)
            profile = len(model.config.user_features) * model.config.feature_size
            return seen["inputs"][0, :, -8 - profile : seen["inputs"].shape[-1] - profile]

        def like(cosine):
            return torch.sigmoid(8 * (cosine - thresholds))

        same, near, none, far = like(1.0), like(math.sqrt(0.5)), like(0.0), like(-math.sqrt(0.5))
        found = read([0, 0, 1, 2], [0, 1, 2])
        latest = torch.stack([same + near + none, near + same + far, none + far + same])
        torch.testing.assert_close(found[:, :4], latest)
        torch.testing.assert_close(found[:, 4:], torch.stack([0 * same, near, none + far]))
        # The third item alone, the other two being behaviours of its session.
        part = read([2, 0, 1], [2], session_offsets=torch.tensor([2]))
        torch.testing.assert_close(part[:, 4:], found[2:, 4:])

    def test_taste_by_hand(self, item_token_ids):
        """Sums of products with what was shown and liked, which grow along the taste beyond any behaviour."""
        model = featured_model(item_embedding_size=2, num_attention_heads=2, taste_size=2, match_prior=1.0)
        seen = {}
        model.fusion.register_forward_pre_hook(lambda _, inputs: seen.update(inputs=inputs[0]))
        with torch.no_grad():  # the second head compares the second dimension alone, and forgets by half
            for proj in (model.taste.q_proj, model.taste.k_proj):
                proj.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]]))
            model.taste.log_decay.copy_(torch.tensor([-torch.inf, math.log(math.log(2.0))]))
            model.item_table.embeddings[:4] = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [10.0, 10.0]])
        history, session = torch.tensor([[0, 1]]), torch.tensor([[2, 3]])
        ids = {"history_ids": item_token_ids[history], "session_ids": item_token_ids[session]}
        signals = torch.tensor([[[0.5, 1.0], [1.0, math.nan]]])  # of which the means are 0.3 and 0.6
        model(**ids, history_indices=history, session_indices=session, history_signals=signals)
        profile = len(model.config.user_features) * model.config.feature_size
        found = seen["inputs"][0, :, -6 - profile : -profile]
        scale = 4 / math.sqrt(2)
        first = [scale / 3 * total for total in (1 + 2, 2 * (0.2 + 2 * 0.7), 2 * 0.4)]
        second = [scale / 2.5 * total for total in (2, 2 * 2 * 0.7, 0)]
        torch.testing.assert_close(found[0], torch.tensor(first + second))
        torch.testing.assert_close(found[1], 10 * found[0])

    def test_unknown_items_and_users_are_judged(self, item_token_ids):
        model = featured_model()
        history, sessions = random_batch(item_token_ids)
        bare = model(history, sessions).logits
        unknown = model(
            history,
            sessions,
            history_indices=torch.full((3, 6), 40),
            session_indices=torch.full((3, 4, 5), 99),
            history_signals=torch.full((3, 6, 2), math.nan),
            user_values=torch.zeros(3, 2, dtype=torch.long),
        ).logits
        assert bare.isfinite().all()
        torch.testing.assert_close(unknown, bare)

    def test_reward_is_the_chosen_scalar(self, item_token_ids):
        model = tiny_model(objectives=weighted(1.0, 0.5, 0.0, 2.0))
        weights = torch.tensor([1.0, 0.5, 0.0, 2.0])
        output = model(*random_batch(item_token_ids))
        torch.testing.assert_close(output.reward, output.probabilities @ weights)
        model.set_calibration(torch.tensor([2.0, 1, 1, 1]), torch.tensor([0.0, 0, 0, -1]))
        calibrated = model(*random_batch(item_token_ids))
        torch.testing.assert_close(calibrated.probabilities[..., 0], torch.sigmoid(2 * output.logits[..., 0]))
        torch.testing.assert_close(calibrated.probabilities[..., 3], torch.sigmoid(output.logits[..., 3] - 1))
        model.config.scalar, model.config.objective_means = "z_score", [0.1, 0.2, 0.3, 0.4]
        model.config.objective_deviations = [0.5, 0.25, 1.0, 2.0]
        distances = (output.probabilities - torch.tensor([0.1, 0.2, 0.3, 0.4])) / torch.tensor([0.5, 0.25, 1.0, 2.0])
        torch.testing.assert_close(model.scalar(output.probabilities), distances @ weights)

    def test_class_weights_and_focal_loss_by_hand(self, item_token_ids):
        objectives = weighted(1.0, 1.0, 1.0, 1.0)
        objectives[2]["positive_weight"] = 5.0
        history, sessions = random_batch(item_token_ids)
        labels = torch.rand(3, 4)
        for gamma in (0.0, 2.0):
            model = tiny_model(objectives=objectives, focal_gamma=gamma, num_members=1)
            output = model(history, sessions[:, 0], labels=labels)
            positive = torch.tensor([1.0, 1.0, 5.0, 1.0]) * labels
            losses = -(positive * F.logsigmoid(output.logits) + (1 - labels) * F.logsigmoid(-output.logits))
            losses = losses * (output.logits.sigmoid() - labels).abs() ** gamma
            torch.testing.assert_close(output.loss, losses.mean(0).sum())

    def test_an_ensemble_is_the_mean_of_its_members(self, item_token_ids):
        model, generator = tiny_model(num_members=3), torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("_scale", "output_bias")):
                    parameter.add_(torch.randn(parameter.shape, generator=generator) / 2)
        history, sessions = random_batch(item_token_ids)
        labels = torch.rand(3, 4, 4, generator=generator)
        output = model(history, sessions, labels=labels)
        alone = []
        for number in range(3):
            member = tiny_model(num_members=1)
            member.load_state_dict(
                {
                    name: tensor[number : number + 1] if name.endswith(("put_scale", "output_bias")) else tensor
                    for name, tensor in model.state_dict().items()
                }
            )
            alone.append(member(history, sessions, labels=labels))
        logits = torch.stack([one.logits for one in alone])
        assert (logits.std(0) > 0.01).all()
        torch.testing.assert_close(output.logits, logits.mean(0))
        torch.testing.assert_close(output.loss, torch.stack([one.loss for one in alone]).mean())

    def test_loss_sums_the_objectives_over_known_labels(self, item_token_ids):
        model = tiny_model(num_members=1)
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
        model = featured_model(objectives=weighted(1.0, 0.0, 0.0, 2.0), scalar="z_score")
        model.set_calibration(torch.tensor([2.0, 1, 1, 1]), torch.tensor([0.0, 0, 0, -1]))
        model.config.objective_means, model.config.objective_deviations = [0.1] * 4, [0.5] * 4
        model.save_pretrained(tmp_path)
        loaded = OneRecRewardModel.from_pretrained(tmp_path)
        assert loaded.config.objectives == model.config.objectives and loaded.config.objective_weights == [1, 0, 0, 2]
        batch = {"session_indices": torch.arange(60).view(3, 4, 5) % 40}
        batch |= dict(zip(("history_ids", "session_ids"), random_batch(item_token_ids), strict=True))
        assert torch.equal(loaded(**batch).reward, model(**batch).reward)

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

    def test_too_long_an_extension_is_named(self, item_token_ids):
        model = tiny_model()
        history, sessions = random_batch(item_token_ids)
        with pytest.raises(ValueError, match="session_ids has 6 items, more than session_items = 5"):
            model.score_extensions(model.encode_behaviour(history), sessions, sessions)

    def test_config_errors(self):
        for objectives, message in (
            ([{"name": "x", "source": "view"}], "lacks kind"),
            ([{"name": "x", "source": "view", "kind": "binary", "wieght": 1}], "unknown fields wieght"),
            ([{"name": "x", "source": "view", "kind": "rate"}], "kind 'rate'"),
            (["swt", "swt"], "distinct"),
        ):
            with pytest.raises(StrictDataclassClassValidationError, match=message):
                OneRecRewardConfig(objectives=objectives)
        with pytest.raises(StrictDataclassClassValidationError, match="num_attention_heads"):
            OneRecRewardConfig(hidden_size=10)
        with pytest.raises(StrictDataclassClassValidationError, match="no embeddings to be compared by"):
            OneRecRewardConfig(taste_size=8)


class TestScoring:
    def test_scores_in_batches_and_blanks_empty_sessions(self, tokenizer, item_token_ids):
        model = tiny_model(objectives=weighted(1.0, 0.5, 0.0, 2.0)).train()
        rng = np.random.default_rng(0)
        rows = [{"history": rng.choice(40, length).tolist()} for length in (12, 0, 3, 5)]
        sessions = torch.from_numpy(rng.choice(40, (4, 3, 5)))
        sessions[2, 1] = -1
        scorer = SessionScorer(model, tokenizer)
        scores = scorer.score(rows, sessions, batch_size=3)
        assert model.training
        model.eval()
        for user in range(4):
            history = np.array(rows[user]["history"][-8:], dtype=np.int64)
            history_ids = item_token_ids[history][None] if user != 1 else torch.zeros(1, 1, 3, dtype=torch.long)
            expected = model(history_ids, item_token_ids[sessions[user]][None]).reward[0]
            real = torch.tensor([True, user != 2, True])
            torch.testing.assert_close(scores.reward[user][real], expected[real])
            torch.testing.assert_close(scorer.scalar(scores.probabilities[user][real]), expected[real])
            assert scores.reward[user].isnan().tolist() == (~real).tolist()

    def test_reads_exposures_in_place_of_the_history(self, tokenizer, item_token_ids):
        model = featured_model()
        rows = [
            {
                "history": [7],
                "exposed": [3, 4],
                "exposed_feedback": [5.0, 10.0, 1.0, 30.0, 20.0, math.nan],
                "feedback_totals": [1.0, 2.0, 3.0, 4.0],
                "user_profile": {"country": "fr", "age": None},
            },
            {"history": [7], "exposed": None},
        ]
        sessions = torch.tensor([[[0, 1]], [[2, -1]]])
        scores = SessionScorer(model, tokenizer).score(rows, sessions)
        expected = model(
            history_ids=item_token_ids[torch.tensor([[3, 4]])],
            session_ids=item_token_ids[sessions[:1]],
            history_indices=torch.tensor([[3, 4]]),
            session_indices=sessions[:1],
            history_signals=torch.tensor([[[0.5, 1.0], [1.0, math.nan]]]),
            user_totals=torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
            user_values=torch.tensor([[2, 0]]),
        )
        torch.testing.assert_close(scores.reward[0], expected.reward[0])
        plain = SessionScorer(model, tokenizer).score([{"history": [7]}], sessions[1:])
        torch.testing.assert_close(scores.reward[1], plain.reward[0])

    @pytest.mark.parametrize("search", ["beam", "diverse_beam"])
    def test_a_recommender_takes_the_session_of_the_highest_reward(self, tokenizer, search):
        torch.manual_seed(0)
        sizes = {"codebook_sizes": CODEBOOK_SIZES, "history_items": 6, "session_items": 3}
        generator = OneRecForConditionalGeneration(OneRecConfig.from_preset("debug", **sizes)).eval()
        scorer = SessionScorer(featured_model(objectives=weighted(1.0, 0.5, 2.0, 1.0)), tokenizer)
        rows = [
            {
                "history_item_ids": [103],
                "exposed_item_ids": [103, 104],
                "exposed_feedback": [5.0, 10.0, 1.0, 30.0, 20.0, math.nan],
                "feedback_totals": [1.0, 2.0, 3.0, 4.0],
                "user_profile": {"country": "fr", "age": None},
            },
            {"history_item_ids": [107, 120, 130]},
        ]
        judged = [{**rows[0], "history": [3], "exposed": [3, 4]}, {"history": [7, 20, 30]}]
        trie = ItemTrie.from_tokenizer(tokenizer)
        histories = [row["history"] for row in judged]
        groups = {"num_beam_groups": 4, "diversity_penalty": 0.5} if search == "diverse_beam" else {}
        found = generate_sessions(
            generator,
            trie,
            **tokenizer.encode_histories(histories, catalogue_indices=True),
            excluded=excluded_items([np.array(history) for history in histories], "cpu"),
            search=search,
            num_beams=12,
            **groups,
        ).items
        best = scorer.score(judged, found).reward.argmax(1)
        assert (best > 0).any()  # not all are the likeliest
        recommender = Recommender(generator, tokenizer, scorer)
        results = recommender(rows, top_k=5, num_beams=10 if groups else 12, search=search)
        plain = recommend(generator, tokenizer, rows, top_k=5, num_beams=10 if groups else 12)
        for user, result in enumerate(results):
            assert result["session"] == (found[user, best[user]] + 100).tolist()
            assert result["items"] == plain[user]["items"]
        extended = {
            **rows[0],
            "exposed_item_ids": [103, -1, 104],
            "exposed_feedback": [5.0, 10, 1, 0, 0, 0, 30, 20, math.nan],
        }
        skipped = recommender([extended], top_k=5, num_beams=10 if groups else 12, search=search, unknown_items="skip")
        assert skipped[0]["session"] == results[0]["session"]
        with pytest.raises(ValueError, match=r"histories\[1\] holds item id -1"):
            recommender([rows[0], extended])
        with pytest.raises(ValueError, match=r"histories\[0\] has no history_item_ids, only exposed_item_ids"):
            recommender([{"exposed_item_ids": [103]}])
        other = OneRecTokenizer.from_semantic_ids([1, 2], [[0, 0, 0], [1, 1, 1]], codebook_sizes=CODEBOOK_SIZES)
        with pytest.raises(ValueError, match="catalogue differs"):
            Recommender(generator, tokenizer, SessionScorer(scorer.model, other))

    def test_older_exposures_count_in_the_totals(self, tokenizer):
        model = featured_model()
        encoder = ExposureEncoder(model.config, tokenizer.item_token_ids)
        row = {"exposed": [1, 2, 3], "exposed_feedback": [5.0, 10.0, 1.0, 1.0, 4.0, math.nan, 0.0, 10.0, 0.0]}
        encoded = encoder([row | {"feedback_totals": [1.0, 1.0, 1.0, 1.0]}], latest=1)
        assert encoded["history_indices"].tolist() == [[3]]
        assert encoded["user_totals"].tolist() == [[1.75, 2.0, 3.0, 2.0]]
        with pytest.raises(ValueError, match="watch_time, duration, view"):
            encoder([{"exposed": [1], "exposed_feedback": [1.0]}])

    def test_save_and_load(self, tokenizer, tmp_path):
        scorer = SessionScorer(tiny_model(), tokenizer)
        scorer.model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        rows, sessions = [{"history": [1, 2]}], torch.arange(10).view(1, 2, 5)
        loaded = SessionScorer.from_pretrained(tmp_path, device="cpu")
        assert loaded.objectives == OBJECTIVES
        assert torch.equal(loaded.score(rows, sessions).reward, scorer.score(rows, sessions).reward)
        with pytest.warns(FutureWarning, match="'progress' is now called 'show_progress'"):
            assert loaded.score([], sessions[:0], progress=False).probabilities.shape == (0, 2, 4)

    def test_wrong_input_is_an_error(self, tokenizer):
        scorer = SessionScorer(tiny_model(), tokenizer)
        with pytest.raises(ValueError, match="0..39"):
            scorer.score([{"history": [40]}], torch.zeros(1, 1, 5, dtype=torch.long))
        with pytest.raises(ValueError, match="one for each"):
            scorer.score([], torch.zeros(1, 1, 5, dtype=torch.long))
