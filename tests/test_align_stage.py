"""The stages `preferences` and `align` on a run with a random seed model and a random reward model."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file, save_file

from onerec_hf import OneRecConfig, OneRecForConditionalGeneration, OneRecTokenizer
from onerec_hf.alignment import session_sampler
from onerec_hf.evaluation.alignment_checks import RECALL, AlignmentChecks
from onerec_hf.reward import OneRecRewardConfig, OneRecRewardModel
from onerec_hf.stages import parse_recipe_arguments
from onerec_hf.stages.align_stage import Alignment, run_align
from onerec_hf.stages.data_stage import run_data
from onerec_hf.stages.preferences_stage import run_sample_preferences

align_stage = sys.modules[run_align.__module__]
ROOT = Path(__file__).parents[1]
CODEBOOK_SIZES = [8, 8, 8]
TRAINING = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "ntp_per_pair": 2,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
}


def recipe(output_dir: Path, **overrides) -> list[str]:
    options = {"config": ROOT / "recipes" / "quickstart" / "debug.yaml", "output_dir": output_dir, "r_dpo": 0.17}
    options |= {
        "align_holdout": 8,
        "num_candidates": 6,
        "max_recall_drop": 1,
        "align": json.dumps(TRAINING),
    } | overrides
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def complete(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stage.json").write_text(json.dumps({"fingerprint": folder.name, "seconds": 0}))
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A run up to the stage `reward`, whose models are not trained."""
    run = tmp_path_factory.mktemp("runs") / "prepared"
    args = parse_recipe_arguments(recipe(run))
    run_data(args)
    items = pq.read_table(run / "data" / "feed" / "items.parquet")["item_id"].to_pylist()
    places = np.random.default_rng(0).choice(8**3, len(items), replace=False)
    codes = np.stack(np.unravel_index(places, CODEBOOK_SIZES), axis=1)
    tokenizer = OneRecTokenizer.from_semantic_ids(items, codes, codebook_sizes=CODEBOOK_SIZES)
    tokenizer.save_pretrained(complete(run / "tokenize"))
    torch.manual_seed(0)
    save_file({"embeddings": torch.randn(len(items), 4)}, run / "tokenize" / "item_embeddings.safetensors")
    lengths = {"codebook_sizes": CODEBOOK_SIZES, "history_items": 16, "session_items": 3}
    generator = OneRecForConditionalGeneration(OneRecConfig.from_preset("debug", **lengths))
    scorer = OneRecRewardModel(OneRecRewardConfig(**lengths, hidden_size=16, tower_hidden_size=16))
    for model, folder in (
        (generator, complete(run / "pretrain") / "model"),
        (scorer, run / "reward" / "reward_model"),
    ):
        complete(run / "reward")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return run


@pytest.fixture(scope="module")
def undisturbed(prepared) -> Path:
    return run_align(parse_recipe_arguments(recipe(shutil.copytree(prepared, prepared.with_name("undisturbed")))))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_rounds_are_checked_before_and_after(undisturbed):
    stage = json.loads((undisturbed / "stage.json").read_text())
    assert [entry["round"] for entry in stage["rounds"]] == [1, 2]
    figures = {"session_recall@10", "illegal_rate", "diversity", "popular_share"}
    assert set(stage["seed_checks"]) == figures
    for entry in stage["rounds"]:
        assert entry["kept"] and set(entry["checks"]) == figures | {"kl_to_previous", "kl_to_seed"}
        assert entry["checks"]["illegal_rate"] == 0 < entry["checks"]["kl_to_previous"]
        # Trained on these pairs, the policy prefers the chosen more than the one before it did.
        assert entry["chosen_log_prob_drift"] > entry["rejected_log_prob_drift"]
    assert stage["rounds"][0]["checks"]["kl_to_seed"] == stage["rounds"][0]["checks"]["kl_to_previous"]
    assert stage["rounds"][1]["checks"]["kl_to_seed"] != stage["rounds"][1]["checks"]["kl_to_previous"]
    pairs = pq.read_table(undisturbed / "round_1" / "pairs.parquet")
    assert {"chosen", "rejected", "candidates", "candidate_rewards"} <= set(pairs.column_names)


def test_a_run_killed_everywhere_gives_the_pairs_and_weights_of_an_undisturbed_one(prepared, undisturbed, monkeypatch):
    args = parse_recipe_arguments(recipe(shutil.copytree(prepared, prepared.with_name("killed"))))
    partial = args.output_dir / "align.partial"

    def die(*_, **__):
        raise KeyboardInterrupt

    def dying_write(table, path):
        if path.name.startswith("part_000001"):
            path.write_bytes(b"half of the second part")
            die()
        pq.write_table(table, path)

    class DiesBehindACheckpoint(align_stage.CheckpointCompleteCallback):
        def on_save(self, arguments, state, control, **kwargs):
            super().on_save(arguments, state, control, **kwargs)
            if state.global_step == 2:
                die()

    files = type("", (), {"write_table": staticmethod(dying_write), "read_table": staticmethod(pq.read_table)})
    for owner, name, replacement, left_behind in (
        (session_sampler, "pq", files, "round_1/pairs/part_000000.parquet"),
        (align_stage, "CheckpointCompleteCallback", DiesBehindACheckpoint, "checkpoints/round_1/checkpoint-2"),
        (Alignment, "_summary", die, "round_1/model.safetensors"),
    ):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, replacement)
            run_align(args)
        assert (partial / left_behind).exists() and not (partial / "round_1" / "aligned.json").exists()
    run_align(args)
    for part in ("round_1", "round_2"):
        pairs = [pq.read_table(run / part / "pairs.parquet") for run in (undisturbed, args.output_dir / "align")]
        assert len(pairs[0]) >= 17 and pairs[0].equals(pairs[1])
    for part in ("round_1", "round_2", "model"):
        expected, found = weights(undisturbed / part), weights(args.output_dir / "align" / part)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    seed = weights(prepared / "pretrain" / "model")
    assert any((tensor - seed[name]).abs().max() > 1e-4 for name, tensor in expected.items())


def test_two_processes_give_the_pairs_and_weights_of_one(prepared, undisturbed):
    # Sixteen pairs, as whole batches of two processes with half the batch each are those of one. Without NTP, whose
    # mean over the codes of a process is not the mean over all codes.
    training = TRAINING | {"ntp_per_pair": 0, "max_steps": 4}
    runs = [shutil.copytree(prepared, prepared.with_name(name)) for name in ("one", "two")]
    run_align(parse_recipe_arguments(recipe(runs[0], align=json.dumps(training), align_rounds=1)))
    halves = json.dumps(training | {"per_device_train_batch_size": 2})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(ROOT / "recipes" / "align.py"), *recipe(runs[1], align=halves, align_rounds=1)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = (pq.read_table(run / "align" / "round_1" / "pairs.parquet") for run in runs)
    assert len(one) >= 17 and one.equals(pq.read_table(undisturbed / "round_1" / "pairs.parquet"))
    for column in ("user_id", "history", "chosen", "rejected", "candidates"):
        assert one[column].equals(two[column])
    rewards = [np.concatenate(table["candidate_rewards"].to_pylist()) for table in (one, two)]
    np.testing.assert_allclose(*rewards, rtol=1e-5)
    expected, found = (weights(run / "align" / "model") for run in runs)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


def test_a_round_that_costs_recall_is_dropped_and_the_last(prepared, monkeypatch):
    run = shutil.copytree(prepared, prepared.with_name("dropped"))
    recalls = iter([0.50, 0.46, 0.44])  # of the seed model and after each round

    def measure(self, model, references):
        return {RECALL: next(recalls), "kl_to_seed": 0.0}

    monkeypatch.setattr(AlignmentChecks, "measure", measure)
    folder = run_align(parse_recipe_arguments(recipe(run, align_rounds=3, max_recall_drop=0.1)))
    rounds = json.loads((folder / "stage.json").read_text())["rounds"]
    assert [entry["kept"] for entry in rounds] == [True, False]
    kept = weights(folder / "model")
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights(folder / "round_1").items())


def test_reference_is_the_previous_snapshot_or_the_seed_model(prepared, undisturbed):
    run = shutil.copytree(prepared, prepared.with_name("sft"))
    against_seed = run_align(parse_recipe_arguments(recipe(run, align_reference="sft")))
    for folder, starts_at_the_reference in ((undisturbed, [True, True]), (against_seed, [True, False])):
        rounds = json.loads((folder / "stage.json").read_text())["rounds"]
        losses = [entry["log"][0]["dpo_loss"] for entry in rounds]
        assert [abs(loss - math.log(2)) < 1e-5 for loss in losses] == starts_at_the_reference


def test_lora_rounds_end_in_whole_models(prepared):
    run = shutil.copytree(prepared, prepared.with_name("lora"))
    lora = json.dumps({"r": 2, "target_modules": ["q_proj", "v_proj"]})
    folder = run_align(parse_recipe_arguments(recipe(run, align_rounds=1, align_lora=lora)))
    seed, aligned = weights(prepared / "pretrain" / "model"), weights(folder / "model")
    changed = {name.split(".")[-2] for name, tensor in aligned.items() if not torch.equal(tensor, seed[name])}
    assert set(aligned) == set(seed) and changed == {"q_proj", "v_proj"}


def test_pairs_alone_are_those_of_the_first_round(prepared, undisturbed, monkeypatch):
    pushed = {}

    def push_to_hub(self, repo_id, private):
        assert private
        pushed[repo_id] = self.to_list()
        return type("", (), {"repo_url": repo_id})

    cards, made = [], []
    monkeypatch.setattr("datasets.Dataset.push_to_hub", push_to_hub)
    monkeypatch.setattr(
        "huggingface_hub.DatasetCard.push_to_hub", lambda card, repo_id, **kind: cards.append(card.text)
    )
    monkeypatch.setattr(
        f"{run_sample_preferences.__module__}.create_repo", lambda name, private, **kind: made.append(private)
    )
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: {"name": "me"})
    run = shutil.copytree(prepared, prepared.with_name("pairs"))
    folder = run_sample_preferences(parse_recipe_arguments(recipe(run)))
    pairs = pq.read_table(folder / "pairs.parquet")
    assert pairs.equals(pq.read_table(undisturbed / "round_1" / "pairs.parquet")) and not pushed
    hub = {"hub_preferences_id": "me/pairs", "hub_private_repo": True}
    run_sample_preferences(parse_recipe_arguments(recipe(run, **hub)))
    assert pushed == {"me/pairs": pairs.to_pylist()} and made == [True]
    assert len(cards) == 1 and 'load_dataset("me/pairs"' in cards[0] and "| num_candidates | 6 |" in cards[0]
    # Beside its card the folder is a data set, also with what the stage says of itself.
    loaded = load_dataset(str(folder), split="train", cache_dir=str(prepared.with_name("cache")))
    assert loaded.to_list() == pairs.to_pylist()
    assert set(re.findall(r"`(\w+)`", cards[0].split("## How")[0])) >= set(pairs.column_names)


def test_without_the_encoder_a_round_changes_the_decoder_alone(prepared, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(prepared, run)
    run_align(parse_recipe_arguments(recipe(run, align_rounds=1, align_encoder=False)))
    before, after = (load_file(run / path / "model.safetensors") for path in ("pretrain/model", "align/model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("decoder" in name for name in changed - {"lm_head.weight"}), changed
    with pytest.raises(ValueError, match="align_encoder is for whole weights"):
        parse_recipe_arguments(recipe(run, align_encoder=False, align_lora=json.dumps({"r": 2})))
