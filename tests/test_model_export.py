"""Export to a folder that loads with `trust_remote_code` in a process that cannot import this package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import onerec_hf
from onerec_hf.history_features import encode_history_rows
from onerec_hf.model_export import export_remote_code, flat_modules
from onerec_hf.reward import OneRecRewardConfig, OneRecRewardModel

LOAD = """
import importlib, json, sys
sys.modules["onerec_hf"] = None  # every import of the package fails from here on
import torch
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

generator, reward, mixture = sys.argv[1:4]
history, results = json.loads(sys.argv[4]), {}
for folder in (generator, reward):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer.encode_histories([history])
model = AutoModelForSeq2SeqLM.from_pretrained(generator, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules")
results["tokens"] = model.generate(**inputs, num_beams=4, max_new_tokens=7, min_new_tokens=7).tolist()
recommender = pipeline("generative-recommendation", model=generator, trust_remote_code=True)
results["recommended"] = recommender(history, top_k=4, num_beams=8)
reward_model = AutoModel.from_pretrained(reward, trust_remote_code=True).eval()
codes = torch.as_tensor(tokenizer.item_token_ids)[None, :2]
results["reward"] = reward_model(codes, codes).reward.tolist()
recommender = pipeline("generative-recommendation", model=mixture, trust_remote_code=True)
results["mixed"] = recommender(history, top_k=4, num_beams=8)
package = type(recommender).__module__.rpartition(".")[0]
names = {
    "history_features": "encode_history_rows",
    "item_trie": "ItemTrie",
    "session_generation": "generate_with_trie",
    "session_generation_generation": "stream_sessions",
}
parts = {name: getattr(importlib.import_module(f"{package}.{module}"), name) for module, name in names.items()}
results |= searched(recommender.model, recommender.tokenizer, history, **parts)
print(json.dumps(results))
"""
# Run in both processes.
SEARCHED = """
def searched(model, tokenizer, history, encode_history_rows, ItemTrie, generate_with_trie, stream_sessions):
    rows = [{"history": tokenizer.item_index(history)}]
    encoded, trie = encode_history_rows(rows, tokenizer, model.config), ItemTrie.from_tokenizer(tokenizer)
    options = {"custom_generate": generate_with_trie, "trie": trie, "num_beams": 4, "num_return_sequences": 3}
    return {
        "generated": model.generate(**encoded, **options, item_share=0.8).tolist(),
        "streamed": [list(item) for item in stream_sessions(model, trie, **encoded, num_beams=4)],
    }
"""
HISTORY = ["b", "c"]


@pytest.fixture
def exported(tmp_path):
    torch.manual_seed(0)
    codes = np.stack(np.unravel_index(np.random.default_rng(0).permutation(8**3)[:12], (8, 8, 8)), axis=1)
    codebooks = [torch.randn(8, 4) for _ in range(3)]
    tokenizer = onerec_hf.OneRecTokenizer.from_semantic_ids(list("abcdefghijkl"), codes, codebooks)
    config_of_items = {"history_positions": "item", "session_items": 2}
    config = onerec_hf.OneRecConfig.from_preset("debug", **config_of_items)
    model = onerec_hf.OneRecForConditionalGeneration(config).eval()
    reward_model = OneRecRewardModel(OneRecRewardConfig(codebook_sizes=[8, 8, 8], hidden_size=16)).eval()
    item_head = {
        "item_head": "encoder",
        "num_items": 12,
        "item_content_size": 4,
        "item_encoders": ["shared", "learned"],
        "item_memory": 2,
    }
    causal = {"encoder_attention": "causal", "encoder_positions": "distance", "initializer_range": 0.3}
    config = onerec_hf.OneRecConfig.from_preset("debug", **config_of_items, **causal, **item_head)
    mixture = onerec_hf.OneRecForConditionalGeneration(config).eval()
    mixture.set_item_content(torch.randn(12, 4))
    mixture.item_memory.set_neighbours(torch.arange(24).view(12, 2) % 12, torch.rand(12, 2))
    for name, exported_model in (("generator", model), ("reward", reward_model), ("mixture", mixture)):
        assert export_remote_code(exported_model, tokenizer, tmp_path / name) == tmp_path / name
    return model, reward_model, tokenizer, mixture


def test_loads_where_the_package_cannot_be_imported(exported, tmp_path):
    model, reward_model, tokenizer, mixture = exported
    command = [sys.executable, "-c", SEARCHED + LOAD, "generator", "reward", "mixture", json.dumps(HISTORY)]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    results = json.loads(ran.stdout.splitlines()[-1])

    inputs = tokenizer.encode_histories([HISTORY])
    tokens = model.generate(**inputs, num_beams=4, max_new_tokens=7, min_new_tokens=7)
    assert results["tokens"] == tokens.tolist()
    expected = onerec_hf.recommend(model, tokenizer, [HISTORY], top_k=4, num_beams=8)[0]
    assert results["recommended"]["items"] == expected["items"]
    codes = torch.as_tensor(tokenizer.item_token_ids)[None, :2]
    torch.testing.assert_close(torch.tensor(results["reward"]), reward_model(codes, codes).reward)
    mixed = onerec_hf.recommend(mixture, tokenizer, [HISTORY], top_k=4, num_beams=8)[0]
    assert (results["mixed"]["items"], results["mixed"]["session"]) == (mixed["items"], mixed["session"])
    names = {}
    exec(SEARCHED, names)
    parts = (encode_history_rows, onerec_hf.ItemTrie, onerec_hf.generate_with_trie, onerec_hf.stream_sessions)
    expected = names["searched"](mixture, tokenizer, HISTORY, *parts)
    assert {name: results[name] for name in expected} == expected


def test_a_folder_is_replaced_and_holds_nothing_half_written(exported, tmp_path):
    model, _, tokenizer, _ = exported
    before = {path.name: path.read_bytes() for path in (tmp_path / "generator").iterdir()}
    export_remote_code(model, tokenizer, tmp_path / "generator")
    assert {path.name: path.read_bytes() for path in (tmp_path / "generator").iterdir()} == before
    assert not any(name.startswith(".") or name.endswith((".bin", ".pt", ".pkl")) for name in before)
    # What is saved by the package itself stays free of code.
    model.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_modules_are_flat_siblings():
    sources = flat_modules(["reward.modeling_onerec_reward"])
    assert "configuration_onerec.py" in sources and "reward_configuration_onerec_reward.py" in sources
    assert "from .reward_configuration_onerec_reward import" in sources["reward_modeling_onerec_reward.py"]
    for source in sources.values():
        assert not re.search(r"^\s*(from|import)\s+(\.\.|onerec_hf)", source, re.MULTILINE)


def test_other_models_are_refused(exported, tmp_path):
    with pytest.raises(TypeError, match="OneRecModel"):
        export_remote_code(exported[0].model, exported[2], tmp_path / "other")


def test_whole_module_imports_are_refused(tmp_path, monkeypatch):
    (tmp_path / "module.py").write_text("from . import sibling\n")
    monkeypatch.setattr("onerec_hf.model_export.PACKAGE_DIRECTORY", Path(tmp_path))
    with pytest.raises(ValueError, match="module.py, line 1"):
        flat_modules(["module"])
