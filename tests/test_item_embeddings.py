import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from onerec_hf.item_embeddings import (
    behaviour_embeddings,
    feature_embeddings,
    fuse_embeddings,
    term_embeddings,
    text_embeddings,
)


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


class TestTextEmbeddings:
    @pytest.fixture
    def encoder(self, tmp_path):
        words = ["[PAD]", "[UNK]", "red", "blue", "shoe", "hat"]
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
            tmp_path
        )
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=6, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
        BertModel(config).eval().save_pretrained(tmp_path)
        return tmp_path

    def test_mean_pooling_ignores_padding_and_batches(self, encoder):
        texts = ["red shoe", None, "blue", "  ", "red shoe hat blue hat", float("nan")]
        embeddings, present = text_embeddings(texts, str(encoder), batch_size=2, show_progress=False)
        assert present.tolist() == [True, False, True, False, True, False]
        assert embeddings.dtype == np.float32 and not embeddings[~present].any()
        model = BertModel.from_pretrained(encoder).eval()
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([[2, 4]])).last_hidden_state.mean(1)[0].numpy()
        assert np.allclose(embeddings[0], expected, atol=1e-5)
        alone, _ = text_embeddings(texts, str(encoder), batch_size=1, show_progress=False)
        assert np.allclose(embeddings, alone, atol=1e-5)

    def test_no_text(self):
        with pytest.raises(ValueError, match="none of the 2 texts"):
            text_embeddings([None, ""], "unused")


class TestTermEmbeddings:
    def test_titles_of_like_words_are_near(self):
        texts = ["Red shoe, size 7", "red SHOE", None, "blue hat", "hat blue 7", "unique"]
        embeddings, present = term_embeddings(texts)
        assert embeddings.dtype == np.float32 and embeddings.shape == (6, 5)  # red, shoe, 7, blue, hat
        assert present.tolist() == [True, True, False, True, True, False] and not embeddings[~present].any()
        # As many dimensions as words keep the inner products of the weights: rows of unit length.
        likeness = embeddings @ embeddings.T
        assert np.allclose(np.diag(likeness)[present], 1, atol=1e-5) and abs(likeness[1, 3]) < 1e-5
        idf = 1 + np.log(7 / 3)  # every word stands in two of the six texts
        assert np.isclose(likeness[0, 1], 2 * idf**2 / (np.sqrt(3) * np.sqrt(2) * idf**2), atol=1e-5)
        assert term_embeddings(texts, dim=2)[0].shape == (6, 2)

    def test_no_shared_word_says_nothing(self):
        for texts in (["one", "two"], [None, ""]):
            embeddings, present = term_embeddings(texts)
            assert embeddings.shape == (2, 1) and not present.any()


class TestBehaviourEmbeddings:
    def test_items_of_one_taste_are_near(self):
        rng = np.random.default_rng(0)
        histories = [rng.integers(0, 10, size=8) + 10 * (user % 2) for user in range(200)]
        embeddings, present = behaviour_embeddings(histories, num_items=22, dim=4)
        assert embeddings.shape == (22, 4) and present.tolist() == [True] * 20 + [False] * 2
        assert not embeddings[20:].any()
        assert cosine(embeddings[0], embeddings[1]) > 0.8 > cosine(embeddings[0], embeddings[11])
        again, _ = behaviour_embeddings(histories, num_items=22, dim=4)
        assert np.array_equal(embeddings, again)

    def test_windows_stay_within_a_user(self):
        # 0-1 and 2-3 co-occur; 1 and 2 stand side by side only across two users.
        embeddings, present = behaviour_embeddings([np.array([0, 1]), np.array([2, 3])], 5, dim=5, window=3)
        assert present.tolist() == [True] * 4 + [False]
        gram = embeddings @ embeddings.T
        assert abs(gram[1, 2]) < 1e-5 and gram[0, 0] > 0.1

    def test_pmi_against_brute_force(self):
        histories = [np.array([0, 1, 2, 1]), np.array([2, 0, 3])]
        counts = np.zeros((4, 4))
        for history in histories:
            for i in range(len(history)):
                for j in range(len(history)):
                    if i != j and abs(i - j) <= 2 and history[i] != history[j]:
                        counts[history[i], history[j]] += 1
        context = counts.sum(0) ** 0.75
        context *= counts.sum() / context.sum()
        with np.errstate(divide="ignore"):
            pmi = np.log(counts * counts.sum() / np.outer(counts.sum(1), context))
        left, singular, _ = np.linalg.svd(np.maximum(pmi, 0))
        embeddings, _ = behaviour_embeddings(histories, 4, dim=4, window=2)
        assert np.allclose(embeddings @ embeddings.T, left @ np.diag(singular) @ left.T, atol=1e-5)

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"histories\[1\] holds 9"):
            behaviour_embeddings([np.array([0, 1]), np.array([2, 9])], 5)
        with pytest.raises(ValueError, match="no two different items"):
            behaviour_embeddings([np.array([1]), np.array([2, 2])], 5)


class TestFeatureEmbeddings:
    def test_columns_and_missing_values(self):
        items = pd.DataFrame(
            {
                "author": ["x", "x", "y", "y", None, "rare"],
                "tags": ["1,2", [1, 2], "3", "3, 2", None, ""],
                "seconds": [1.0, 1.0, 1000.0, np.nan, np.nan, 10.0],
            }
        )
        embeddings, present = feature_embeddings(items, ["author"], ["tags"], ["seconds"], dim=16)
        assert present.tolist() == [True] * 4 + [False, True]  # the rare author has a duration
        assert np.isfinite(embeddings).all() and not embeddings[4].any()
        assert np.allclose(embeddings[0], embeddings[1])
        assert cosine(embeddings[0], embeddings[2]) < 0.2 < cosine(embeddings[2], embeddings[3])
        projected, _ = feature_embeddings(items, ["author"], ["tags"], ["seconds"], dim=3)
        assert projected.shape == (6, 3)

    def test_bad_input(self):
        items = pd.DataFrame({"a": ["x", "y"], "n": [1.0, np.inf]})
        with pytest.raises(ValueError, match="no column 'b'"):
            feature_embeddings(items, ["b"])
        with pytest.raises(ValueError, match="column 'n' row 1 is infinite"):
            feature_embeddings(items, numeric_columns=["n"])
        with pytest.raises(ValueError, match="column 'a' is .*, not numeric"):
            feature_embeddings(items, numeric_columns=["a"])
        with pytest.raises(ValueError, match="tells items apart"):
            feature_embeddings(items, ["a"])


class TestFusion:
    def sources(self):
        rng = np.random.default_rng(0)
        first = rng.normal(size=(200, 6)) * np.array([100, 10, 1, 1, 1, 1]) + 5
        second = first[:, :3] @ rng.normal(size=(3, 4)) + 0.01 * rng.normal(size=(200, 4))
        return first, second

    def test_whitened_sources_weigh_what_they_are_told(self):
        first, second = self.sources()
        everywhere = np.ones(200, dtype=bool)
        fused = fuse_embeddings([(first, everywhere, 1.0), (second, everywhere, 0.5)], "whiten")
        assert fused.dtype == np.float32 and fused.shape[0] == 200
        assert np.square(fused[:, :6]).sum(1).mean() == pytest.approx(1, rel=1e-3)
        assert np.square(fused[:, 6:]).sum(1).mean() == pytest.approx(0.25, rel=1e-3)
        assert np.allclose(np.cov(fused[:, :6].T), np.eye(6) / 6, atol=5e-3)

    @pytest.mark.parametrize("normalisation", ["whiten", "l2"])
    def test_a_missing_source_is_predicted_from_the_other(self, normalisation):
        first, second = self.sources()
        everywhere, partly = np.ones(200, dtype=bool), np.arange(200) >= 50
        complete = fuse_embeddings([(first, everywhere, 1), (second, everywhere, 1)], normalisation)
        holey = np.where(partly[:, None], second, np.nan)
        fused = fuse_embeddings([(first, everywhere, 1), (holey, partly, 1)], normalisation)
        assert np.isfinite(fused).all()
        wanted, got = complete[:50, 6:], fused[:50, 6:]
        assert np.square(got - wanted).sum() < 0.6 * np.square(wanted - complete[:, 6:].mean(0)).sum()

    @pytest.mark.parametrize("normalisation", ["whiten", "l2"])
    def test_an_item_without_any_source_gets_a_typical_vector(self, normalisation):
        first, _ = self.sources()
        present = np.arange(200) > 0
        fused = fuse_embeddings([(first, present, 1.0)], normalisation)
        distances = np.square(fused[1:] - fused[1:].mean(0)).sum(1)
        assert np.array_equal(fused[0], fused[1 + distances.argmin()]) and fused.any(1).all()

    @pytest.mark.parametrize("normalisation", ["whiten", "l2"])
    def test_in_blocks_of_items(self, normalisation, monkeypatch):
        first, second = self.sources()
        known = np.random.default_rng(1).random((2, 200)) > 0.2
        sources = [(first, known[0], 1.0), (second, known[1], 0.5)]
        whole = fuse_embeddings(sources, normalisation)
        assert not known.any(0).all()
        monkeypatch.setattr("onerec_hf.item_embeddings.ITEMS_AT_ONCE", 37)
        np.testing.assert_allclose(fuse_embeddings(sources, normalisation), whole, atol=1e-6)
        first[70, 2] = np.inf
        with pytest.raises(ValueError, match="source 0: row 70 holds"):
            fuse_embeddings([(first, known[0] | True, 1.0)], normalisation)

    def test_bad_input(self):
        first, second = self.sources()
        first[7, 2] = np.nan
        everywhere = np.ones(200, dtype=bool)
        with pytest.raises(ValueError, match="source 1: row 7 holds NaN"):
            fuse_embeddings([(second, everywhere, 1.0), (first, everywhere, 1.0)])
        with pytest.raises(ValueError, match="knows 0 items"):
            fuse_embeddings([(second, ~everywhere, 1.0)])
        with pytest.raises(ValueError, match="source 1: embeddings of shape"):
            fuse_embeddings([(second, everywhere, 1.0), (second[:9], everywhere[:9], 1.0)])
