"""Models that were left in training mode, and models that several threads ask at once."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from onerec_hf import ItemTrie, OneRecConfig, OneRecForConditionalGeneration, OneRecTokenizer, Recommender
from onerec_hf.evaluation_mode import evaluation_mode
from onerec_hf.semantic_ids import ResidualQuantizer


def test_the_last_thread_gives_a_model_its_modes_back():
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
    model[1].eval()  # such as a frozen part
    entered, leave, seen = threading.Event(), threading.Event(), []

    def ask():
        with evaluation_mode(model):
            entered.set()
            assert leave.wait(30)
            seen.append((model.training, torch.is_grad_enabled()))

    thread = threading.Thread(target=ask)
    thread.start()
    assert entered.wait(30)
    with pytest.raises(RuntimeError, match="first"), evaluation_mode(model):
        raise RuntimeError("the first one to leave")
    assert not model[0].training
    leave.set()
    thread.join()
    assert seen == [(False, False)]
    assert [module.training for module in model.modules()] == [True, True, False, False]


@pytest.fixture
def trained():
    ids = [f"item {number}" for number in range(60)]
    vectors = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    tokenizer = OneRecTokenizer.fit(ids, vectors, ResidualQuantizer([8, 8, 8]))
    torch.manual_seed(0)
    sizes = {"codebook_sizes": [8, 8, 8], "history_items": 8, "session_items": 2, "dropout": 0.3}
    return OneRecForConditionalGeneration(OneRecConfig.from_preset("debug", **sizes)), tokenizer


def test_threads_are_recommended_the_same_by_a_model_in_training_mode(trained, monkeypatch):
    model, tokenizer = trained
    rng = np.random.default_rng(0)
    requests = [[f"item {item}" for item in rng.choice(60, 5, replace=False)] for _ in range(48)]
    options = {"top_k": 5, "num_beams": 8}
    expected = Recommender(model.eval(), tokenizer)(requests, **options)
    model.train()
    recommender, built = Recommender(model, tokenizer), ItemTrie.from_tokenizer
    # Slow, so that the first requests come before the trie is there.
    monkeypatch.setattr(ItemTrie, "from_tokenizer", lambda tokenizer: time.sleep(0.2) or built(tokenizer))
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda history: recommender([history], **options)[0], requests))
    assert [row["items"] for row in found] == [row["items"] for row in expected]
    assert [row["session"] for row in found] == [row["session"] for row in expected]
    assert model.training
