"""Folders that were made to do harm, or are damaged: loading them runs nothing, reads nothing outside of them and says
what is wrong with which of them."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

from onerec_hf import OneRecConfig, OneRecForConditionalGeneration, OneRecTokenizer, Recommender
from onerec_hf.data import DataError, load_saved_feed, read_table
from onerec_hf.embedding_adaptation import EmbeddingAdaptation
from onerec_hf.reward import OneRecRewardConfig, OneRecRewardModel, SessionScorer
from onerec_hf.semantic_ids import ResidualQuantizer, load_quantizer
from onerec_hf.stages import parse_recipe_arguments
from onerec_hf.stages.search_space import read_space
from onerec_hf.stages.stage_runner import completed_stage

WEIGHTS = "model.safetensors"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "item_index.parquet"),
    *("codebooks.safetensors", "quantizer.json", "semantic_id_report.json"),
)


class Payload:
    """Of which a pickle, once it is read, makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def reward_model() -> OneRecRewardModel:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "tower_hidden_size": 4, "num_hidden_layers": 1}
    return OneRecRewardModel(OneRecRewardConfig(codebook_sizes=[4, 4], history_items=4, session_items=2, **sizes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folders `generator` and `reward`, each with the tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    tokenizer = OneRecTokenizer.fit(range(9), torch.randn(9, 4), ResidualQuantizer([4, 4]))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 4, "num_attention_heads": 2}
    sizes |= {"encoder_layers": 1, "decoder_layers": 1, "num_experts": 2, "history_items": 4, "session_items": 2}
    config = OneRecConfig.from_preset("debug", codebook_sizes=[4, 4], **sizes)
    for name, model in (("generator", OneRecForConditionalGeneration(config)), ("reward", reward_model())):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    shutil.copytree(saved / "generator", tmp_path / "odd" / "generator")
    shutil.copytree(saved / "reward", tmp_path / "odd" / "reward")
    return tmp_path / "odd"


LOADERS = {
    "generator": (OneRecForConditionalGeneration.from_pretrained, AutoModelForSeq2SeqLM.from_pretrained),
    "reward": (OneRecRewardModel.from_pretrained, AutoModel.from_pretrained, SessionScorer.from_pretrained),
}


def change_json(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", WEIGHTS])
def test_a_pickle_in_the_place_of_weights_is_not_run(folder, tmp_path, kind, name):
    (folder / kind / WEIGHTS).unlink()
    (folder / kind / name).write_bytes(pickle.dumps({"weight": Payload(tmp_path / "ran")}))
    for loader in LOADERS[kind]:
        with pytest.raises(ValueError, match=f"odd/{kind} cannot be loaded"):
            loader(folder / kind)
    torch.save({"weight": Payload(tmp_path / "ran")}, folder / kind / name)
    for loader in LOADERS[kind]:
        with pytest.raises(ValueError, match=f"odd/{kind} cannot be loaded"):
            loader(folder / kind)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_a_pickle_in_the_place_of_a_tokenizers_file_is_not_run(folder, tmp_path, name):
    (folder / "generator" / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(ValueError, match="odd/generator|tokenizer_config.json"):
        OneRecTokenizer.from_pretrained(folder / "generator")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_the_place_of_other_weights_is_not_run(folder, tmp_path):
    payload = pickle.dumps(Payload(tmp_path / "ran"))
    (folder / "generator" / "codebooks.safetensors").write_bytes(payload)
    with pytest.raises(ValueError, match="codebooks.safetensors cannot be read"):
        load_quantizer(folder / "generator")
    for name in ("embedding_adaptation.json", "embedding_adaptation.safetensors"):
        (folder / name).write_bytes(payload if name.endswith("s") else b"{}")
    with pytest.raises(ValueError, match="embedding_adaptation.safetensors holds no weights"):
        EmbeddingAdaptation.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", LOADERS)
def test_code_in_the_folder_is_not_run_without_consent(folder, tmp_path, kind):
    (folder / kind / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass X: pass\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM")
    change_json(folder / kind / "config.json", auto_map=dict.fromkeys(names, "evil.X"))
    change_json(folder / kind / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.X", None]})
    for loader in (*LOADERS[kind], OneRecTokenizer.from_pretrained, AutoTokenizer.from_pretrained):
        loader(folder / kind)  # the package's own classes
    for name in ("config.json", "tokenizer_config.json"):
        change_json(folder / kind / name, model_type="evil", tokenizer_class="Evil")
    for loader in (AutoModel.from_pretrained, AutoTokenizer.from_pretrained):
        with pytest.raises(ValueError, match="trust_remote_code"):
            loader(folder / kind)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", LOADERS)
def test_shards_outside_of_the_folder_are_refused(folder, kind):
    (folder / kind / WEIGHTS).rename(folder / WEIGHTS)
    index = folder / kind / "model.safetensors.index.json"
    for name in (f"../{WEIGHTS}", str(folder / WEIGHTS), f"part/../../{WEIGHTS}", "..", "", 5, None):
        weight_map = dict.fromkeys(load_file(folder / WEIGHTS), name)
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for loader in LOADERS[kind]:
            with pytest.raises(ValueError, match="model.safetensors.index.json names .* as a file of weights"):
                loader(folder / kind)
    variant = index.rename(index.with_suffix(".fp16.json"))
    with pytest.raises(ValueError, match="model.safetensors.index.fp16.json names .* as a file of weights"):
        LOADERS[kind][0](folder / kind, variant="fp16")
    variant.unlink()
    for text in ("{", "{}", "[]", '{"weight_map": []}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="model.safetensors.index.json is no index"):
            LOADERS[kind][0](folder / kind)
    with pytest.raises(ValueError, match="model.safetensors.index.json is no index"):
        LOADERS[kind][0](folder, subfolder=kind)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("damage", ["header", "truncated", "empty", "wrong shape"])
def test_damaged_weights_are_named(folder, kind, damage):
    path = folder / kind / WEIGHTS
    data = path.read_bytes()
    if damage == "wrong shape":
        tensors = load_file(path)
        save_file(tensors | {next(iter(tensors)): torch.zeros(3, 5)}, path, {"format": "pt"})
    else:
        odd = {"header": (2**62).to_bytes(8, "little") + data[8:], "truncated": data[:-5], "empty": b""}
        path.write_bytes(odd[damage])
    for loader in LOADERS[kind]:
        with pytest.raises(ValueError, match=f"odd/{kind} cannot be loaded"):
            loader(folder / kind)


def test_a_device_without_memory_is_not_taken_for_damage(saved):
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta device context"):
        AutoModelForSeq2SeqLM.from_pretrained(saved / "generator")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("encoder_layers", value) for value in (10**9, -1)),
        *(("context_key_value_sets", 10**9), ("context_key_value_sets", -1), ("context_key_value_heads", 1)),
        *(("hidden_size", value) for value in ("8", 0, None, 10**12)),
        *(("num_attention_heads", 0), ("num_attention_heads", -2), ("session_items", 0), ("history_items", -1)),
        *(
            ("pad_token_id", -7),
            ("pad_token_id", None),
            ("decoder_start_token_id", 10**6),
            ("sep_token_id", 13),
            ("hidden_act", "nope"),
        ),
        *(("rms_norm_eps", -1.0), ("catalogue_fingerprint", "x"), ("catalogue_fingerprint", "9" * 5000 + "-x")),
        *(("dtype", "nope"), ("id2label", 5), ("codebook_sizes", [4, 0]), ("codebook_sizes", 5)),
    ],
)
def test_a_configuration_that_no_model_has_is_refused(folder, field, value):
    change_json(folder / "generator" / "config.json", **{field: value})
    with pytest.raises(ValueError, match="odd/generator cannot be loaded"):
        OneRecForConditionalGeneration.from_pretrained(folder / "generator")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("num_hidden_layers", value) for value in (10**9, -1)),
        *(("hidden_size", "8"), ("num_attention_heads", 0), ("feature_size", -5), ("num_items", -1), ("dropout", 7.0)),
        *(("objectives", [5]), ("objectives", [{"name": "swt"}]), ("pad_token_id", -7), ("num_members", 0)),
        *(("num_members", 10**9), ("history_items", 0), ("layer_norm_eps", -1.0), ("signals", [5])),
    ],
)
def test_a_reward_configuration_that_no_model_has_is_refused(folder, field, value):
    change_json(folder / "reward" / "config.json", **{field: value})
    with pytest.raises(ValueError, match="odd/reward cannot be loaded"):
        OneRecRewardModel.from_pretrained(folder / "reward")


@pytest.mark.parametrize("text", ["[]", "5", "null", '{"added_tokens": 5}', "\xff\0"])
@pytest.mark.parametrize("name", [name for name in TOKENIZER_FILES if name.endswith(".json")])
def test_json_of_something_else_is_named(folder, name, text):
    (folder / "generator" / name).write_bytes(text.encode("latin-1"))
    if name == "semantic_id_report.json" and text.startswith("{"):
        OneRecTokenizer.from_pretrained(folder / "generator")
        return
    with pytest.raises(ValueError, match="odd/generator|tokenizer_config.json"):
        OneRecTokenizer.from_pretrained(folder / "generator")


@pytest.mark.parametrize("kind", LOADERS)
def test_weights_that_are_not_finite_give_no_recommendations(folder, kind):
    tensors = load_file(folder / kind / WEIGHTS)
    name = "lm_head.weight" if kind == "generator" else next(name for name in tensors if "towers" in name)
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, folder / kind / WEIGHTS, {"format": "pt"})
    if kind == "reward":
        with pytest.raises(ValueError, match="reward model's scores are NaN"):
            scorer = SessionScorer.from_pretrained(folder / kind)
            scorer.score([{"history": [0]}], torch.tensor([[[1, 2], [-1, -1]]]))
        return
    model, tokenizer = (
        cls.from_pretrained(folder / kind) for cls in (OneRecForConditionalGeneration, OneRecTokenizer)
    )
    with pytest.raises(ValueError, match="model's scores are NaN"):
        Recommender(model, tokenizer)([[1, 2]], top_k=3)


@pytest.mark.parametrize("text", ["", "[]", '{"num_beams": "x"}', '{"num_beams": -1}'])
def test_a_damaged_generation_configuration_is_named(folder, text):
    (folder / "generator" / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match="generation_config.json|odd/generator"):
        model = OneRecForConditionalGeneration.from_pretrained(folder / "generator")
        Recommender(model, OneRecTokenizer.from_pretrained(folder / "generator"))([[1, 2]], top_k=3)


PAYLOAD = "!!python/object/apply:os.mkdir [{path}]"


def test_yaml_runs_nothing(folder, tmp_path):
    path, payload = folder / "odd.yaml", PAYLOAD.format(path=tmp_path / "ran")
    for text in (f"name: {payload}\n", payload, f"{payload}: 5\n", f"interactions: {{columns: {payload}}}\n"):
        path.write_text(text)
        with pytest.raises(DataError, match="odd.yaml: not valid YAML"):
            read_table(folder, path)
        with pytest.raises(ValueError, match="odd.yaml: not valid YAML"):
            parse_recipe_arguments(["--config", str(path), "--output_dir", str(tmp_path / "run")])
        with pytest.raises(ValueError, match="odd.yaml: not valid YAML"):
            read_space(path, ["ease"], parse_recipe_arguments(["--output_dir", str(tmp_path / "run")]))
        (folder / "child.yaml").write_text("base: odd.yaml\n")
        with pytest.raises(ValueError, match="odd.yaml: not valid YAML"):
            parse_recipe_arguments(["--config", str(folder / "child.yaml"), "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "ran").exists()


def test_a_stages_damaged_files_are_named(folder):
    (folder / "data").mkdir()
    for text in ("", "{", "[]", "5", "{}", "\udcff"):
        (folder / "data" / "stage.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match="data/stage.json"):
            completed_stage(folder, "data")


def test_a_damaged_saved_feed_is_named(folder):
    pickled = pickle.dumps(Payload(folder / "ran"))
    whole = {"name": "x", "positive_feedback": [], "multi_categorical_columns": []}
    for content in (b"", b"[]", b"{}", b"\xff", pickled, json.dumps(whole).encode(), json.dumps({"a": 1}).encode()):
        (folder / "feed.json").write_bytes(content)
        (folder / "interactions.parquet").write_bytes(pickled)
        with pytest.raises(DataError, match="odd: holds no saved feed that can be read"):
            load_saved_feed(folder)
    assert not (folder / "ran").exists()


def test_a_mapping_of_aliases_of_aliases_is_refused_at_once(folder):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
    (folder / "log.csv").write_text("uid,item,time\n1,1,1\n2,2,2\n")
    columns = {"user_id": "uid", "item_id": "item", "timestamp": "time"}
    sound = {"name": "x", "timezone": "UTC", "positive_feedback": ["view"]}
    sound["interactions"] = {
        "file": "log.csv",
        "columns": columns,
        "timestamp_unit": "s",
        "feedback": {"view": "time"},
    }
    text = yaml.safe_dump(sound)
    for value in ("name: x", "timezone: UTC", "- view", "timestamp_unit: s", "file: log.csv", "user_id: uid"):
        path = folder / "mapping.yaml"
        key = value.split()[0]
        path.write_text(f"{bomb}{text.replace(value, f'{key} *a11')}")
        with pytest.raises(DataError, match="mapping.yaml"):
            read_table(folder, path)
