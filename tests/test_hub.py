"""Model cards and the Hub: the cards' code runs, and what is pushed comes back equal in another process."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard, metadata_load
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

import onerec_hf
from onerec_hf.endpoint import write_endpoint_files
from onerec_hf.reporting.model_cards import (
    alignment_table,
    onerec_card,
    push_to_hub,
    ranking_table,
    reward_model_card,
    save_model_card,
    tokenizer_card,
)
from onerec_hf.reward import OneRecRewardConfig, OneRecRewardModel, SessionScorer

RANKING = {"recall@5": 0.25, "recall@10": 0.5, "ndcg@5": 0.2, "ndcg@10": 0.3, "coverage": 0.75}
JUDGE = {"reward_mean": 1.0, "reward_max": 1.5, "swt_mean": 0.4, "swt_max": 0.6}
METRICS = {
    "dataset": {"name": "simulated", "users": 30, "items": 20, "split": {"method": "time", "test_start": None}},
    "tokenizer": {"collision_rate": 0.0, "levels": [{"perplexity": 7.5}]},
    "model": {},
    "onerec": RANKING | {"intra_session_diversity": 0.9, "illegal_rate": 0.0, "duplicate_rate": 0.0},
    "baselines": {"popularity": RANKING | {"recall@10": 0.125}, "ease": RANKING},
    "reward_models": {"reward_model": {"swt_auc": 0.625}, "independent_judge": {"swt_auc": 0.61}},
    "alignment": [
        RANKING | {"round": 0, "illegal_rate": 0.0, "judges": {"independent_judge": JUDGE}},
        RANKING | {"round": 1, "illegal_rate": 0.0, "judges": {"independent_judge": JUDGE | {"reward_mean": 1.25}}},
    ],
}
HISTORY = ["video-1", "video-7", "video-4"]


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """A run's last model with its tokenizer, its reward model and its metrics; the weights are random."""
    directory = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    codes = np.stack(np.unravel_index(rng.permutation(8**3)[:20], (8, 8, 8)), axis=1)
    codebooks = [torch.from_numpy(rng.normal(size=(8, 4))).float() for _ in range(3)]
    tokenizer = onerec_hf.OneRecTokenizer.from_semantic_ids([f"video-{i}" for i in range(20)], codes, codebooks)
    torch.manual_seed(0)
    config = onerec_hf.OneRecConfig.from_preset("debug", codebook_sizes=[8, 8, 8])
    onerec_hf.OneRecForConditionalGeneration(config).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    (directory / "model" / "training_args.bin").write_bytes(b"not for the Hub")
    reward_config = OneRecRewardConfig(codebook_sizes=[8, 8, 8], hidden_size=16, tower_hidden_size=16)
    OneRecRewardModel(reward_config).save_pretrained(directory / "reward_model")
    (directory / "metrics.json").write_text(json.dumps(METRICS))
    return directory


def code_block(card: ModelCard) -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```$", card.text, re.DOTALL | re.MULTILINE)
    return block


def test_cards_carry_the_metadata_and_the_figures_of_the_run(run_directory):
    card = onerec_card(run_directory / "model", METRICS, "owner/model")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "generative-recommendation"
    assert card.data.license == "apache-2.0"
    assert "onerec" in card.data.tags
    assert card.data.inference is False  # the Hub has no widget for the task
    assert "| recall@10 |" in card.text and "| popularity | 0.2500 | 0.1250 |" in card.text
    assert "| split method | time |" in card.text and "| split test_start | – |" in card.text
    assert "| illegal_rate | 0 |" in card.text and "| codebook_sizes | 8, 8, 8 |" in card.text
    model = AutoModelForSeq2SeqLM.from_pretrained(run_directory / "model")
    stored = sum(tensor.numel() for tensor in model.state_dict().values())
    assert f"It has {stored:,} parameters" in card.text
    assert "| 1 | 0.5000 | 0.3000 | 0 | 1.2500 | 1.5000 |" in alignment_table(METRICS["alignment"])
    assert "2502.18965" in card.text

    reward_card = reward_model_card(run_directory / "reward_model", run_directory / "model", METRICS)
    assert "| swt_auc | 0.6250 |" in reward_card.text and "swt, vtr, wtr, ltr" in reward_card.text


def test_the_hub_reads_the_models_own_figures_from_the_card(run_directory, tmp_path):
    dataset = METRICS["dataset"] | {"name": "my feed: été", "evaluation_split": "test"}
    path = save_model_card(onerec_card(run_directory / "model", METRICS | {"dataset": dataset}), tmp_path)
    [model] = metadata_load(path)["model-index"]
    assert model["name"] == "OneRec on my feed: été"
    [result] = model["results"]
    assert result["dataset"] == {"name": "my feed: été", "type": "my-feed-t-", "split": "test"}
    figures = {metric["type"]: (metric["name"], metric["value"]) for metric in result["metrics"]}
    assert figures == {
        "recall@5": ("Recall@5", 0.25),
        "recall@10": ("Recall@10", 0.5),
        "ndcg@5": ("NDCG@5", 0.2),
        "ndcg@10": ("NDCG@10", 0.3),
    }
    assert ModelCard.load(path).data.to_dict() == metadata_load(path)


def test_rounds_in_the_card_have_intervals_and_changes_and_dropped_ones_are_marked():
    change = {"judges": {"truth": {"reward_mean": {"relative": 0.25, "interval": [0.125, 0.5]}}}}
    judges = {"truth": JUDGE | {"reward_mean": 1.25, "reward_mean_interval": [1.125, 1.375]}}
    dropped = METRICS["alignment"][0] | {"round": 1, "kept": False, "judges": judges, "change": change}
    row = alignment_table([METRICS["alignment"][0] | {"judges": {"truth": JUDGE}}, dropped]).splitlines()[-1]
    assert row == "| 1 (dropped) | 0.5000 | 0.3000 | 0 | 1.2500 [1.12, 1.38] +25.0% [+12.5%, +50.0%] | 1.5000 |"


def test_alignment_is_left_out_of_the_card_of_a_run_without_it(run_directory):
    metrics = {name: value for name, value in METRICS.items() if name != "tokenizer"}
    metrics["alignment"] = [METRICS["alignment"][0] | {"judges": {}}]
    text = onerec_card(run_directory / "model", metrics).text
    assert "by round" not in text and "## Configuration" in text


def test_a_hub_dataset_is_named_in_the_metadata(run_directory):
    metrics = METRICS | {"dataset": {"name": "clicks", "hub_dataset": "owner/clicks"}}
    card = onerec_card(run_directory / "model", metrics)
    assert card.data.datasets == "owner/clicks" and card.data.eval_results[0].dataset_type == "owner/clicks"


def test_ranking_table_keeps_to_the_metrics_that_every_method_has():
    metrics = {"onerec": {"recall@5": 0.1, "illegal_rate": 0.0}, "baselines": {"ease": {"recall@5": float("nan")}}}
    assert ranking_table(metrics).splitlines() == [
        "| method | recall@5 |",
        "| --- | --- |",
        "| ease | – |",
        "| onerec | 0.1000 |",
    ]


def test_missing_metrics_and_empty_directories_are_named(run_directory, tmp_path):
    with pytest.raises(ValueError, match="no 'onerec'.*evaluate"):
        onerec_card(run_directory / "model", {"dataset": {"name": "x"}})
    with pytest.raises(ValueError, match="no 'name'"):
        onerec_card(run_directory / "model", METRICS | {"dataset": {}})
    with pytest.raises(ValueError, match="no 'truth'"):
        reward_model_card(run_directory / "reward_model", run_directory / "model", METRICS, judge="truth")
    with pytest.raises(ValueError, match="no .safetensors"):
        push_to_hub("owner/empty", ModelCard("---\nlicense: mit\n---\n"), tmp_path)


@pytest.mark.parametrize("kind", ["onerec", "tokenizer"])
def test_code_of_a_local_card_runs_in_the_models_folder(run_directory, monkeypatch, capsys, kind):
    folder = run_directory / "model"
    card = {"onerec": onerec_card, "tokenizer": tokenizer_card}[kind](folder, METRICS)
    assert save_model_card(card, folder) == folder / "README.md"
    assert (folder / "README.md").read_text().endswith(card.text[-50:])
    assert not list(folder.glob(".saving*"))
    monkeypatch.chdir(folder)
    exec(compile(code_block(card), "README.md", "exec"), {})
    assert "video-" in capsys.readouterr().out


PUSH = """
import json, sys
from pathlib import Path
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer
from onerec_hf.reporting import push_run_to_hub

run = Path(sys.argv[1])
metrics = json.loads((run / "metrics.json").read_text())
try:
    push_run_to_hub("tester/refused", run / "model", metrics, token="hf_wrong")
except HfHubHTTPError as error:
    print(error.response.status_code, "refused")
for _ in range(2):  # the second time finds both repositories and changes nothing
    models = "tester/model", run / "model", metrics, "tester/reward", run / "reward_model"
    print(push_run_to_hub(*models, private=True))
AutoModelForSeq2SeqLM.from_pretrained(run / "model").push_to_hub("tester/plain")
AutoTokenizer.from_pretrained(run / "model").push_to_hub("tester/plain")
AutoModel.from_pretrained(run / "reward_model").push_to_hub("plain-reward")
"""

LOAD = """
import json, re, sys
import torch
import onerec_hf
from huggingface_hub import ModelCard
from onerec_hf.reward import SessionScorer
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

history = json.loads(sys.argv[1])
results = {}
for repo in ("tester/model", "tester/plain"):
    tokenizer, model = AutoTokenizer.from_pretrained(repo), AutoModelForSeq2SeqLM.from_pretrained(repo)
    results[repo] = onerec_hf.recommend(model, tokenizer, [history], top_k=4)[0]
sessions = torch.arange(5)[None, None]
for repo in ("tester/reward", "tester/plain-reward"):
    scorer = SessionScorer(AutoModel.from_pretrained(repo), tokenizer)
    scores = scorer.score([{"history": tokenizer.item_index(history)}], sessions)
    results[repo] = scores.reward.item()
for repo in ("tester/model", "tester/reward"):
    (block,) = re.findall(r"^```python\\n(.*?)^```$", ModelCard.load(repo).text, re.DOTALL | re.MULTILINE)
    exec(compile(block, repo, "exec"), {})
print(json.dumps(results))
"""


def run_python(code: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_a_run_is_pushed_and_loads_by_repository_id_in_another_process(run_directory, tmp_path):
    with HubServer() as hub:
        # huggingface_hub reads its settings when it is imported, hence the subprocesses.
        environment = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": hub.token,
            "HF_HOME": str(tmp_path / "hf_home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        pushed = run_python(PUSH, environment, str(run_directory))
        assert pushed.returncode == 0, pushed.stderr
        assert f"{hub.endpoint}/tester/model/commit/" in pushed.stdout
        assert "401 refused" in pushed.stdout and "tester/refused" not in hub.repositories

        private = {name for name, repository in hub.repositories.items() if repository.private}
        assert private == {"tester/model", "tester/reward"}
        files = hub.files("tester/model")
        assert {"README.md", "config.json", "generation_config.json", "model.safetensors"} <= set(files)
        assert {"tokenizer.json", "item_index.parquet", "codebooks.safetensors"} <= set(files)
        assert "training_args.bin" not in files
        assert {"handler.py", "requirements.txt"} <= set(files)
        assert {"config.json", "model.safetensors", "item_index.parquet"} <= set(hub.files("tester/reward"))
        assert len(hub.repository("tester/model").commits) == 2, "an unchanged run made a second commit"

        loaded = run_python(LOAD, environment, json.dumps(HISTORY))
        assert loaded.returncode == 0, loaded.stderr

    results = json.loads(loaded.stdout.splitlines()[-1])
    model = AutoModelForSeq2SeqLM.from_pretrained(run_directory / "model")
    tokenizer = onerec_hf.OneRecTokenizer.from_pretrained(run_directory / "model")
    expected = onerec_hf.recommend(model, tokenizer, [HISTORY], top_k=4)[0]
    scorer = SessionScorer(OneRecRewardModel.from_pretrained(run_directory / "reward_model"), tokenizer)
    scores = scorer.score([{"history": tokenizer.item_index(HISTORY)}], torch.arange(5)[None, None])
    for repo in ("tester/model", "tester/plain"):
        assert results[repo]["items"] == expected["items"] and results[repo]["session"] == expected["session"]
        assert results[repo]["scores"] == pytest.approx(expected["scores"], rel=1e-5)
    for repo in ("tester/reward", "tester/plain-reward"):
        assert results[repo] == pytest.approx(scores.reward.item(), rel=1e-5)


def test_an_endpoint_answers_requests_as_the_recommender_does(run_directory, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(run_directory / "model", repository)
    write_endpoint_files(repository)
    request = {"inputs": [HISTORY, HISTORY[:1]], "parameters": {"top_k": 3, "blocked_items": ["video-2"]}}
    # As the platform does: by its path, with the folder.
    spec = importlib.util.spec_from_file_location("handler", repository / "handler.py")
    handler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(handler)
    endpoint = handler.EndpointHandler(path=str(repository))
    results = json.loads(json.dumps(endpoint(request)))
    model = AutoModelForSeq2SeqLM.from_pretrained(run_directory / "model")
    tokenizer = onerec_hf.OneRecTokenizer.from_pretrained(run_directory / "model")
    expected = onerec_hf.recommend(model, tokenizer, request["inputs"], top_k=3, blocked_items=["video-2"])
    assert [result["items"] for result in results] == [result["items"] for result in expected]
    assert results[0]["scores"] == pytest.approx(expected[0]["scores"], rel=1e-5)
    wrong = ({}, "inputs must be a history"), ({"inputs": [["nowhere"]]}, "nowhere")
    for body, message in (*wrong, (request | {"parameters": {"top_n": 3}}, "top_n")):
        with pytest.raises(ValueError, match=message):
            endpoint(body)


def test_revision_and_offline_reach_every_file(tmp_path, monkeypatch):
    """Of a cache as huggingface_hub lays it out, in which two revisions of each repository differ in all files."""
    expected = {}

    def weights(*models: torch.nn.Module) -> list[float]:
        return [next(iter(model.parameters())).detach().sum().item() for model in models]

    for number, revision in enumerate(("main", "old")):
        codes = np.stack(np.unravel_index(np.random.default_rng(number).permutation(8**3)[:20], (8, 8, 8)), axis=1)
        items = [f"{revision}-{item}" for item in range(20)]
        tokenizer = onerec_hf.OneRecTokenizer.from_semantic_ids(items, codes, codebook_sizes=[8, 8, 8])
        torch.manual_seed(number)
        config = onerec_hf.OneRecConfig.from_preset("debug", codebook_sizes=[8, 8, 8])
        model = onerec_hf.OneRecForConditionalGeneration(config).eval()
        reward_config = OneRecRewardConfig(codebook_sizes=[8, 8, 8], hidden_size=16, tower_hidden_size=16)
        reward_model = OneRecRewardModel(reward_config)
        for repository, saved in (("model", model), ("reward", reward_model)):
            cache, commit = tmp_path / f"models--tester--{repository}", str(number) * 40
            for part in (saved, tokenizer):
                part.save_pretrained(cache / "snapshots" / commit)
            (cache / "refs").mkdir(exist_ok=True)
            (cache / "refs" / revision).write_text(commit)
        [result] = onerec_hf.Recommender(model, tokenizer)([items[:3]], top_k=3)
        expected[revision] = items[0], result["items"], weights(model, reward_model)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = {"cache_dir": tmp_path, "local_files_only": True}
    for revision in ("old", "main"):
        model = AutoModelForSeq2SeqLM.from_pretrained("tester/model", revision=revision, **given)
        tokenizer = AutoTokenizer.from_pretrained("tester/model", revision=revision, **given)
        scorer = SessionScorer.from_pretrained("tester/reward", revision=revision, **given)
        [result] = onerec_hf.Recommender(model, tokenizer)([tokenizer.item_ids[:3].tolist()], top_k=3)
        found = scorer.tokenizer.item_ids[0], result["items"], weights(model, scorer.model)
        assert found == expected[revision]
        of_cache = {"local_files_only": True, "model_kwargs": {"cache_dir": tmp_path}}
        recommender = pipeline("generative-recommendation", "tester/model", revision=revision, **of_cache)
        assert recommender.tokenizer.item_ids[0] == expected[revision][0]
        assert weights(recommender.model) == expected[revision][2][:1]
    with pytest.raises(OSError, match="in the cached files"):
        AutoTokenizer.from_pretrained("tester/model", revision="never", **given)
    with pytest.raises(OSError) as missing:
        SessionScorer.from_pretrained("tester/other", **given)
    assert "`hf download tester/other`" in missing.value.__notes__[-1]
    next(tmp_path.glob(f"models--tester--model/snapshots/{'1' * 40}/item_index.parquet")).unlink()
    with pytest.raises(ValueError, match="holds no item_index.parquet.*`hf download tester/model`"):
        AutoTokenizer.from_pretrained("tester/model", revision="old", **given)
