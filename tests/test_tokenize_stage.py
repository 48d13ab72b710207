"""The tokenize stage with another quantizer than the default, and its pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from onerec_hf.embedding_adaptation import EmbeddingAdaptation
from onerec_hf.stages import parse_recipe_arguments, run_tokenize
from onerec_hf.stages.stage_runner import read_json
from onerec_hf.stages.tokenize_stage import semantic_id_pictures
from onerec_hf.tokenization_onerec import OneRecTokenizer

CONFIG = Path(__file__).parents[1] / "recipes" / "quickstart" / "debug.yaml"


@pytest.fixture
def arguments(tmp_path):
    threads = torch.get_num_threads()
    yield lambda *flags: parse_recipe_arguments(["--config", str(CONFIG), "--output_dir", str(tmp_path), *flags])
    torch.set_num_threads(threads)


def test_rqvae_on_adapted_embeddings_with_pictures(arguments):
    flags = ("--quantizer_type", "rqvae", "--quantizer", '{"num_steps": 30}', "--collision_policy", "suffix")
    folder = run_tokenize(arguments(*flags, "--embedding_adaptation", '{"num_steps": 3, "dim": 12}'))
    embeddings = load_file(folder / "item_embeddings.safetensors")["embeddings"]
    assert embeddings.shape == (300, 12) and torch.allclose(embeddings.norm(dim=1), torch.ones(300), atol=1e-5)
    assert EmbeddingAdaptation.from_pretrained(folder).num_steps == 3
    tokenizer = OneRecTokenizer.from_pretrained(folder)
    assert tokenizer.num_levels == 4 and len(np.unique(tokenizer.codes, axis=0)) == 300
    report = read_json(folder / "stage.json")["report"]
    assert report["quantizer_type"] == "rqvae" and report["num_steps"] == 30 and 0 < report["neighbours_kept"] <= 1
    pictures = semantic_id_pictures(folder)
    assert pictures["item_map"].startswith(b"\x89PNG") and (folder / "semantic_ids" / "semantic_ids.html").exists()
    # Sampled items are named by what the feed knows of them.
    assert sum(row["num_items"] for row in pictures["code_samples"]) == 300
    assert all(isinstance(name, str) and name for row in pictures["code_samples"] for name in row["items"])


def test_wrong_options_are_refused(arguments):
    with pytest.raises(ValueError, match="quantizer_type must be one of balanced_rkmeans, rkmeans, rqvae"):
        arguments("--quantizer_type", "kmeans")
    with pytest.raises(ValueError, match="--embedding_adaptation must be a JSON object"):
        arguments("--embedding_adaptation", "yes")
