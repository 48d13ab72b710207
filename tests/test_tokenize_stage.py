"""The tokenize stage with another quantizer than the default, and its pictures."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from onerec_hf.embedding_adaptation import EmbeddingAdaptation
from onerec_hf.semantic_ids import codebook_sizes_for
from onerec_hf.stages import parse_recipe_arguments, run_tokenize
from onerec_hf.stages.pretrain_stage import generator_config
from onerec_hf.stages.stage_runner import read_json
from onerec_hf.stages.tokenize_stage import ITEM_EMBEDDINGS as FILE
from onerec_hf.stages.tokenize_stage import load_item_content, semantic_id_pictures
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
    embeddings = load_file(folder / FILE)["embeddings"]
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


def test_the_content_of_items_is_all_but_their_behaviour(arguments, tmp_path):
    saved = [
        load_file(run_tokenize(arguments("--output_dir", str(tmp_path / weight), "--behaviour_weight", weight)) / FILE)
        for weight in ("0", "1")
    ]
    torch.testing.assert_close(saved[0]["content"], saved[0]["embeddings"])
    torch.testing.assert_close(load_item_content(tmp_path / "1"), saved[0]["content"])
    assert saved[1]["embeddings"].shape[1] > saved[1]["content"].shape[1]
    run = tmp_path / "former"
    (run / "tokenize").mkdir(parents=True)
    save_file({"embeddings": torch.ones(3, 2)}, run / "tokenize" / FILE)
    with pytest.raises(ValueError, match="has no content of the items: remove"):
        load_item_content(run)


def test_codes_follow_from_the_catalogue(tmp_path):
    for items in (1, 2, 5, 300, 12_101, 2**20):
        first, second, third = codebook_sizes_for(items)
        assert first == second == third <= items and first**2 >= items > (first / 2) ** 2
    config = tmp_path / "config.yaml"
    config.write_text(re.sub("codebook_sizes: .*", "", CONFIG.read_text()))
    threads = torch.get_num_threads()
    run_tokenize(parse_recipe_arguments(["--config", str(config), "--output_dir", str(tmp_path)]))
    torch.set_num_threads(threads)
    assert OneRecTokenizer.from_pretrained(tmp_path / "tokenize").codebook_sizes == (32, 32, 32)


def test_several_semantic_ids_see_other_parts_of_the_embeddings(arguments):
    several = arguments("--num_semantic_ids", "2", "--align_rounds", "0")
    folder = run_tokenize(several)
    tokenizer, stage = OneRecTokenizer.from_pretrained(folder), read_json(folder / "stage.json")
    assert tokenizer.codes.shape == (300, 6) and stage["codebook_sizes"] == [8] * 6
    assert stage["report"]["num_semantic_ids"] == 2 and stage["report"]["sources"] == "projections"
    assert tokenizer.quantizer.projections[0].shape[1] == tokenizer.quantizer.embedding_dim // 2
    assert semantic_id_pictures(folder)["item_map"].startswith(b"\x89PNG")
    config = generator_config(several, several, tokenizer, {}, None)
    assert (config.num_semantic_ids, config.num_levels, config.vocab_size) == (2, 3, len(tokenizer))


def test_wrong_options_are_refused(arguments):
    with pytest.raises(ValueError, match="num_semantic_ids set align_rounds to 0"):
        arguments("--num_semantic_ids", "2")
    with pytest.raises(ValueError, match="'suffix' is for one semantic ID"):
        arguments("--num_semantic_ids", "2", "--collision_policy", "suffix")
    with pytest.raises(ValueError, match="semantic_id_sources must be one of projections, seeds, got 'rotations'"):
        arguments("--semantic_id_sources", "rotations")
    with pytest.raises(ValueError, match="num_semantic_ids must be at least 1"):
        arguments("--num_semantic_ids", "0")
    with pytest.raises(ValueError, match="model has 'num_semantic_ids', which the option num_semantic_ids decides"):
        arguments("--model", '{"num_semantic_ids": 2}')
    with pytest.raises(ValueError, match="quantizer_type must be one of balanced_rkmeans, rkmeans, rqvae"):
        arguments("--quantizer_type", "kmeans")
    with pytest.raises(ValueError, match="--embedding_adaptation must be a JSON object"):
        arguments("--embedding_adaptation", "yes")
