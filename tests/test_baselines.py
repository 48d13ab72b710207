import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from onerec_hf.co_consumption import interaction_matrix
from onerec_hf.evaluation import (
    EASE,
    CatalogueTooLargeError,
    Fused,
    ItemKNN,
    Popularity,
    SASRec,
    baselines,
    ranking_metrics,
)
from onerec_hf.evaluation.sasrec import FullSoftmaxLoss
from onerec_hf.free_memory import free_memory


def random_histories(users=60, items=12, longest=9, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, items, size=generator.integers(1, longest)) for _ in range(users)]


def walks(users=300, items=40, seed=0):
    """Users who step round a ring of items, one ahead most of the time: order tells the next item, sets do not."""
    generator = np.random.default_rng(seed)
    steps = generator.choice([1, 7], p=[0.9, 0.1], size=(users, 12))
    return list((generator.integers(0, items, size=(users, 1)) + np.cumsum(steps, axis=1)) % items)


class TestInteractionMatrix:
    def test_counts_an_item_once_at_its_latest_place(self):
        histories = [np.array([2, 0, 2, 1]), np.array([], dtype=int), np.array([1])]
        assert interaction_matrix(histories, 3).toarray().tolist() == [[1, 1, 1], [0, 0, 0], [0, 1, 0]]
        weighted = interaction_matrix(histories, 3, half_life=1.0).toarray()
        assert weighted.tolist() == [[0.25, 1.0, 0.5], [0, 0, 0], [0, 1.0, 0]]

    def test_refuses_nothing_and_strangers(self):
        with pytest.raises(ValueError, match="no interaction"):
            Popularity().fit([np.array([], dtype=int)], 3)
        with pytest.raises(ValueError, match="history 1 holds the catalogue index 3"):
            EASE().fit([np.array([0]), np.array([1, 3])], 3)


class TestLargeCatalogues:
    HISTORIES = [np.array([1, 2, 3]), np.array([2, 3, 131_341])] * 5

    def test_ease_says_at_once_that_the_memory_is_too_little(self, monkeypatch):
        monkeypatch.setattr(baselines, "free_memory", lambda: 100 * 2**30)
        lacking = "EASE needs 257.1 GiB of memory for a catalogue of 131,342 items, and 100.0 GiB are free"
        popularity = Popularity()
        for model in (EASE(), Fused({"popularity": popularity, "ease": EASE()})):
            with pytest.raises(CatalogueTooLargeError, match=lacking):
                model.fit(self.HISTORIES, 131_342)
        assert not hasattr(popularity, "counts")  # nothing was fitted in vain
        EASE().require_memory(80_000)

    def test_a_fitted_member_needs_no_memory(self, monkeypatch):
        ease = EASE().fit([np.array([0, 1])], 3)
        monkeypatch.setattr(baselines, "free_memory", lambda: 0)
        Fused({"ease": ease}).require_memory(3)

    def test_users_are_ranked_in_smaller_batches(self, monkeypatch):
        model = Popularity().fit(self.HISTORIES, 131_342)
        asked, score = [], model.score
        monkeypatch.setattr(model, "score", lambda histories: asked.append(len(histories)) or score(histories))
        whole = model.rank(self.HISTORIES, 3)
        monkeypatch.setattr(baselines, "RANKING_BYTES", 4 * 30 * 131_342)
        assert (model.rank(self.HISTORIES, 3) == whole).all() and asked == [10, 4, 4, 2]


def test_free_memory_knows_a_limit_of_the_process():
    code = "import resource, runpy; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)); "
    code += f"print(runpy.run_path({inspect.getfile(free_memory)!r})['free_memory']())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(found.stdout.split()[-1]) < 8 << 30 and 0 < free_memory()


class TestClosedForms:
    def test_popularity_counts_users(self):
        model = Popularity().fit([np.array([0, 0, 1]), np.array([1])], 3)
        assert model.score([np.array([2]), np.array([], dtype=int)]).tolist() == [[1, 2, 0], [1, 2, 0]]

    @pytest.mark.parametrize("neighbours", [3, 100])
    def test_item_knn_equals_brute_force(self, neighbours):
        histories = random_histories()
        consumed = interaction_matrix(histories, 12).toarray()
        together = consumed.T @ consumed
        users = np.diag(together)
        similarity = together / (np.sqrt(np.outer(users, users)) + 2.0)
        np.fill_diagonal(similarity, 0)
        for row in similarity:
            row[np.argsort(-row, kind="stable")[neighbours:]] = 0
        model = ItemKNN(neighbours=neighbours, shrinkage=2.0, half_life=None).fit(histories, 12)
        np.testing.assert_allclose(model.score(histories).numpy(), consumed @ similarity, rtol=1e-5)

    def test_ease_is_the_ridge_regression_of_each_item_on_the_others(self):
        histories = random_histories()
        consumed = interaction_matrix(histories, 12).toarray().astype(np.float64)
        model = EASE(regularization=5.0, half_life=None).fit(histories, 12)
        for item in range(12):
            others = np.delete(consumed, item, axis=1)
            weights = np.linalg.solve(others.T @ others + 5.0 * np.eye(11), others.T @ consumed[:, item])
            np.testing.assert_allclose(np.delete(model.weights[:, item].numpy(), item), weights, atol=1e-5)
            assert model.weights[item, item] == 0
        np.testing.assert_allclose(model.score(histories).numpy(), consumed @ model.weights.numpy(), atol=1e-5)

    def test_recent_items_count_more(self):
        histories = [np.array([0, 1])] * 5 + [np.array([2, 3])] * 5
        for model in (ItemKNN(half_life=1.0), EASE(regularization=1.0, half_life=1.0)):
            scores = model.fit(histories, 4).score([np.array([2, 0])])[0]
            assert scores[1] > scores[3] > 0

    def test_rank_excludes_the_consumed_unless_told(self):
        histories = [np.array([0, 1, 2])] * 3 + [np.array([0, 3])]
        model = Popularity().fit(histories, 5)
        assert model.rank(histories[2:], k=4, batch_size=1).tolist() == [[3, 4, -1, -1], [1, 2, 4, -1]]
        assert model.rank(histories[:1], k=2, exclude_consumed=False).tolist() == [[0, 1]]


class TestSASRec:
    def test_loss_and_gradients_equal_cross_entropy(self):
        torch.manual_seed(0)
        states, embeddings = torch.randn(1100, 8), torch.randn(30, 8)
        targets = torch.randint(30, (1100,))
        results = []
        for loss_of in (FullSoftmaxLoss.apply, lambda s, e, t: F.cross_entropy(s @ e.T, t)):
            s, e = states.clone().requires_grad_(), embeddings.clone().requires_grad_()
            loss = loss_of(s, e, targets)
            (3 * loss).backward()
            results.append((loss.detach(), s.grad, e.grad))
        for ours, reference in zip(*results, strict=True):
            torch.testing.assert_close(ours, reference)

    def test_an_epoch_predicts_every_item_but_the_first_once(self):
        histories = [np.arange(start, start + length) for start, length in [(0, 1), (1, 2), (3, 5), (8, 4), (12, 23)]]
        lengths = np.array([len(history) for history in histories])
        flat = np.concatenate(histories)
        model = SASRec(max_length=4, batch_tokens=10)
        for seed in range(5):
            predicted = []
            every = np.ones(len(flat), dtype=bool)
            for items, targets, present in model._batches(flat, lengths, every, np.random.default_rng(seed)):
                assert items.shape[1] <= 4 and items.numel() <= 10
                assert (targets[present] == items[present] + 1).all()
                assert (present == (present.cumsum(1) == torch.arange(1, items.shape[1] + 1))).all()
                predicted += targets[present].tolist()
            assert sorted(predicted) == sorted(set(flat.tolist()) - {0, 1, 3, 8, 12})
            some, predicted = np.isin(flat, [2, 12, 20, 34]), []
            for _, targets, counted in model._batches(flat, lengths, some, np.random.default_rng(seed)):
                assert counted.any()
                predicted += targets[counted].tolist()
            assert sorted(predicted) == [2, 20, 34]

    def test_the_last_epochs_are_on_recent_items_alone(self):
        # 0 was followed by 1 as a rule, and is by 2 of late.
        histories = [np.array([0, 1, 3, 0, 1, 3, 0, 1, 3, 0, 2])] * 40
        settings = {"hidden_size": 16, "dropout": 0.0, "epochs": 10, "batch_tokens": 64, "learning_rate": 3e-3}
        before = SASRec(**settings).fit(histories, 5)
        after = SASRec(**settings, recent_epochs=10).fit(histories, 5, recent=[2] * 40)
        odds = [model.score([np.array([0, 1, 3, 0])])[0] for model in (before, after)]
        assert odds[0][1] - odds[0][2] > 0 > odds[1][1] - odds[1][2]
        steps = [step for step, _ in after.training_curve]
        assert steps == sorted(set(steps)) and steps[-1] > before.training_curve[-1][0]
        none = SASRec(**settings).fit(histories, 5, recent=[0] * 40)
        torch.testing.assert_close(none.score(histories[:1]), before.score(histories[:1]), rtol=0, atol=0)

    def test_learns_order_and_is_seeded(self):
        histories = walks()
        settings = {"hidden_size": 32, "dropout": 0.1, "epochs": 15, "batch_tokens": 256, "learning_rate": 3e-3}
        prefixes, targets = [h[:-1] for h in histories], np.array([h[-1] for h in histories])
        state = torch.random.get_rng_state()
        model = SASRec(**settings, validation_share=0.1).fit(prefixes, 40)
        assert torch.equal(state, torch.random.get_rng_state())
        recall = ranking_metrics(model.rank(prefixes, 5), targets, 40, cutoffs=(1, 5))
        assert recall["recall@1"] > 0.75 and recall["recall@5"] > 0.85
        assert len(model.validation_curve) == 15 and model.training_curve[-1][1] < model.training_curve[0][1]
        again = SASRec(**settings, validation_share=0.1).fit(prefixes, 40)
        torch.testing.assert_close(model.score(prefixes[:5]), again.score(prefixes[:5]), rtol=0, atol=0)

    def test_a_score_depends_on_neither_the_batch_nor_what_lies_before_the_window(self):
        model = SASRec(hidden_size=16, epochs=1, max_length=5).fit(walks(users=20), 40)
        long, short = np.arange(9), np.array([3, 1])
        together = model.score([long, short])
        torch.testing.assert_close(together[1:], model.score([short]))
        torch.testing.assert_close(together[:1], model.score([long[-5:]]))

    def test_a_time_budget_ends_training(self):
        model = SASRec(hidden_size=16, epochs=10_000, max_minutes=0.02).fit(walks(users=20), 40)
        assert 0 < model.training_curve[-1][0] < 10_000

    def test_says_what_is_wrong(self):
        with pytest.raises(ValueError, match="no history has two items"):
            SASRec().fit([np.array([1]), np.array([2])], 40)
        model = SASRec(hidden_size=16, epochs=1).fit(walks(users=5), 40)
        with pytest.raises(ValueError, match="history 1 is empty"):
            model.score([np.array([1]), np.array([], dtype=int)])


class TestFused:
    def fitted(self, **options):
        histories = [*random_histories(), np.arange(12), np.array([], dtype=int)]
        members = {"ease": EASE(regularization=5.0), "popularity": Popularity()}
        return Fused(members, **options).fit(histories, 12), histories

    def test_standardised_scores_equal_brute_force(self):
        model, histories = self.fitted(weights={"popularity": 0.3})
        by_member = {name: model.members[name].score(histories).double().numpy() for name in model.members}
        for row, scores in enumerate(model.score(histories).tolist()):
            others = [item for item in range(12) if item not in histories[row]] or list(range(12))
            expected = np.zeros(12)
            for name, weight in (("ease", 1.0), ("popularity", 0.3)):
                values = by_member[name][row]
                spread = values[others].std()
                expected += weight * (values - values[others].mean()) / spread if spread else 0
            np.testing.assert_allclose(scores, expected, atol=1e-4)

    def test_softmax_mixes_probabilities(self):
        weights, temperatures = {"ease": 2.0, "popularity": 0.5}, {"ease": 0.1, "popularity": 3.0}
        model, histories = self.fitted(weights=weights, combination="softmax", temperatures=temperatures)
        by_member = {name: model.members[name].score(histories).double().numpy() for name in model.members}
        for row, scores in enumerate(model.score(histories).tolist()):
            others = [item for item in range(12) if item not in histories[row]] or list(range(12))
            expected = np.zeros(12)
            for name, weight in weights.items():
                odds = np.exp(by_member[name][row] / temperatures[name])
                expected += weight * odds / odds[others].sum()
            np.testing.assert_allclose(np.exp(scores), expected, rtol=1e-4)

    def test_takes_what_is_fitted_and_leaves_out_what_weighs_nothing(self):
        model, histories = self.fitted(weights={"ease": 0.0})
        assert Fused(model.members).fit([np.array([0])], 12).members["ease"] is model.members["ease"]
        assert model.rank(histories[:9], 12).tolist() == model.members["popularity"].rank(histories[:9], 12).tolist()
        assert model.num_parameters == 12 * 11 + 12
        with pytest.raises(ValueError, match="ease was fitted on 12 items, not on 13"):
            Fused(model.members).fit(histories, 13)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weights": {"sasrec": 1.0}}, "weights has 'sasrec', which is no member; there are ease"),
            ({"weights": {"ease": -1.0}}, "weights has ease: -1.0"),
            ({"weights": {"ease": 0.0}}, "all weights are 0"),
            ({"temperatures": {"ease": 0.0}}, "temperatures has ease: 0.0"),
            ({"combination": "ranks"}, "combination must be one of standardised, softmax"),
            ({"members": {}}, "members is empty"),
        ],
    )
    def test_says_what_is_wrong(self, options, message):
        with pytest.raises(ValueError, match=message):
            Fused(**{"members": {"ease": EASE()}, **options})
