import math

import numpy as np
import pytest
import torch

from onerec_hf import item_alignment
from onerec_hf.embedding_adaptation import EmbeddingAdaptation, contrastive_loss, cooccurring_pairs


def test_pairs_by_hand():
    histories = [np.array([4, 5, 4, 6]), np.array([], dtype=int), np.array([7]), [8, 9]]
    pairs = sorted(map(tuple, cooccurring_pairs(histories, 10, window=2).tolist()))
    assert pairs == [(4, 5), (4, 6), (5, 4), (5, 6), (8, 9)]


class TestContrastiveLoss:
    def test_by_hand(self):
        first = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        second = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
        loss = contrastive_loss(first, second, torch.tensor([[0, 1], [2, 3]]), temperature=0.5)
        logits = [[1.2, 0.0], [1.6, 2.0]]

        def cross_entropy(row, target):
            return math.log(sum(math.exp(value) for value in row)) - row[target]

        rows = sum(cross_entropy(row, i) for i, row in enumerate(logits)) / 2
        columns = sum(cross_entropy(column, i) for i, column in enumerate(zip(*logits, strict=True))) / 2
        assert loss.item() == pytest.approx((rows + columns) / 2, rel=1e-5)

    def test_an_item_is_not_a_negative_of_its_own_pairs(self):
        vectors = torch.nn.functional.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=1)
        # All three pairs are of the items 0 and 1: no negative is left.
        pairs = torch.tensor([[0, 1], [0, 1], [1, 0]])
        assert contrastive_loss(vectors, vectors, pairs, 0.1).item() == pytest.approx(0, abs=1e-6)


def neighbourly(num_groups=6, size=8, seed=0):
    """Items whose content says little of the group in which users stay."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(num_groups), size)
    x = np.concatenate([0.4 * rng.normal(size=(num_groups, 10))[groups], rng.normal(size=(len(groups), 10))], axis=1)
    histories = [rng.permutation(np.flatnonzero(groups == group))[:6] for group in rng.integers(0, num_groups, 300)]
    return x.astype(np.float32), groups, histories


class TestEmbeddingAdaptation:
    def test_items_that_follow_one_another_come_together(self):
        x, groups, histories = neighbourly()
        adapted = EmbeddingAdaptation(dim=8, num_steps=150, batch_size=64).fit(x, histories).transform(x)
        assert adapted.shape == (48, 8) and adapted.dtype == np.float32
        assert np.allclose(np.linalg.norm(adapted, axis=1), 1, atol=1e-5)

        def nearest_in_group(x):
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
            likeness = x @ x.T - 9 * np.eye(len(x))
            return (groups[likeness.argmax(1)] == groups).mean()

        assert nearest_in_group(adapted) > 0.95 > 0.7 > nearest_in_group(x)

    def test_starts_from_the_principal_directions(self):
        x, _, histories = neighbourly()
        start = EmbeddingAdaptation(dim=20, num_steps=0).fit(x, histories).transform(x)
        centred = x - x.mean(0)
        centred /= np.linalg.norm(centred, axis=1, keepdims=True)
        assert np.allclose(start @ start.T, centred @ centred.T, atol=1e-4)

    def test_seeded_and_saved(self, tmp_path):
        x, _, histories = neighbourly()
        first = EmbeddingAdaptation(dim=4, num_steps=5, batch_size=16, seed=1).fit(x, histories)
        again = EmbeddingAdaptation(dim=4, num_steps=5, batch_size=16, seed=1).fit(x, histories)
        assert np.array_equal(first.transform(x), again.transform(x))
        first.save_pretrained(tmp_path)
        assert np.array_equal(EmbeddingAdaptation.from_pretrained(tmp_path).transform(x), first.transform(x))
        weights = (tmp_path / "embedding_adaptation.safetensors").read_bytes()
        (tmp_path / "embedding_adaptation.safetensors").write_bytes(weights[:100])
        with pytest.raises(ValueError, match="embedding_adaptation.safetensors holds no weights"):
            EmbeddingAdaptation.from_pretrained(tmp_path)
        (tmp_path / "embedding_adaptation.json").write_text('{"foreign": 1}')
        with pytest.raises(ValueError, match="embedding_adaptation.json does not describe an EmbeddingAdaptation"):
            EmbeddingAdaptation.from_pretrained(tmp_path)

    def test_what_was_saved_as_item_alignment_is_read(self, tmp_path):
        x, _, histories = neighbourly()
        fitted = item_alignment.ItemAlignment(dim=4, num_steps=1, batch_size=16).fit(x, histories)
        fitted.save_pretrained(tmp_path)
        for path in list(tmp_path.iterdir()):
            path.rename(path.with_stem("item_alignment"))
        assert np.array_equal(EmbeddingAdaptation.from_pretrained(tmp_path).transform(x), fitted.transform(x))

    def test_bad_input(self):
        x, _, histories = neighbourly()
        with pytest.raises(ValueError, match="not fitted yet"):
            EmbeddingAdaptation().transform(x)
        with pytest.raises(ValueError, match=r"histories\[1\] holds 48, which is not a catalogue index"):
            EmbeddingAdaptation().fit(x, [histories[0], np.array([48])])
        with pytest.raises(ValueError, match="no two different items"):
            EmbeddingAdaptation().fit(x, [np.array([3, 3]), np.array([4])])
        fitted = EmbeddingAdaptation(num_steps=1, batch_size=4).fit(x, histories)
        with pytest.raises(ValueError, match="19 dimensions, the adaptation was fitted on 20"):
            fitted.transform(x[:, :19])
        x[5, 0] = np.inf
        with pytest.raises(ValueError, match="row 5 holds NaN"):
            fitted.transform(x)
