"""Ablations and Table 1 in debug size, on one run of the quickstart as far as its reward model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from killed_recipes import kill_when
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from onerec_hf.reporting import comparison_figure, comparison_table
from onerec_hf.stages import parse_recipe_arguments, run_ablation, run_align, run_pretrain, run_reward, run_tokenize
from onerec_hf.stages.evaluate_stage import run_evaluate_seed
from onerec_hf.stages.evaluated_run import EvaluatedRun

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "recipes" / "quickstart" / "debug.yaml"
STAGES = ("data", "tokenize", "pretrain", "reward", "evaluate_seed")
FLAGS = (
    "--align_rounds",
    "1",
    "--judged_users",
    "6",
    "--align_holdout",
    "8",
    "--max_recall_drop",
    "1",
    "--threads",
    "1",
)


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    args = parse_recipe_arguments(
        ["--config", str(CONFIG), "--output_dir", str(tmp_path_factory.mktemp("runs") / "run"), *FLAGS]
    )
    for stage in (run_tokenize, run_pretrain, run_reward):
        stage(args)
    run_evaluate_seed(EvaluatedRun(args, "evaluate", judged=True))
    return args


def written(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def rows_of(folder: Path) -> dict[str, dict]:
    assert "| Reward model" in (folder / "table.md").read_text()
    rows = json.loads((folder / "table.json").read_text())["rows"]
    for row in rows:
        assert set(row["judges"]) == {"reward_model", "independent_judge", "truth"}
        for judge in row["judges"].values():
            assert {f"{name}_{which}" for name in ("reward", "swt", "ltr") for which in ("mean", "max")} <= set(judge)
    return {row["name"]: row for row in rows}


def weights(folder: Path):
    return load_file(folder / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    """Up to rounding: one reference's log-probabilities were kept by the sampler, the other's are computed live."""
    one, other = weights(one), weights(other)
    return all(torch.allclose(one[name], other[name], rtol=0, atol=1e-6) for name in one)


def test_a_killed_command_goes_on_where_it_was_and_a_complete_one_does_nothing(args):
    output_dir = args.output_dir
    words = ["r_dpo", "0.05", "0.2", "--config", str(CONFIG), "--output_dir", str(output_dir), *FLAGS]
    stages = {name: written(output_dir / name) for name in STAGES}
    pairs = output_dir / "ablations" / "r_dpo" / "0.2" / "align.partial" / "round_1" / "pairs.parquet"
    kill_when(pairs.exists, ROOT / "recipes" / "ablations.py", words, output_dir.with_suffix(".log"))
    cells = output_dir / "ablations" / "r_dpo"
    before, drawn = written(cells / "0.05"), pairs.stat().st_mtime_ns
    assert (cells / "0.05" / "evaluate" / "results.safetensors").exists() and not (cells / "table.md").exists()

    rows = rows_of(run_ablation(args, "r_dpo", "0.05", "0.2"))
    assert written(cells / "0.05") == before
    assert (cells / "0.2" / "align" / "round_1" / "pairs.parquet").stat().st_mtime_ns == drawn
    assert {name: written(output_dir / name) for name in STAGES} == stages
    assert not (output_dir / "ablations" / "seed").exists()  # the run's evaluation has it

    assert list(rows) == ["seed model", "0.05", "0.2"]
    assert rows["seed model"]["kl_to_seed"] == 0 and "change" not in rows["seed model"]
    for name in ("0.05", "0.2"):
        assert rows[name]["rounds"] == 1 and rows[name]["illegal_rate"] == 0 and rows[name]["kl_to_seed"] > 0
        change = rows[name]["change"]["judges"]["truth"]["reward_mean"]
        ratio = rows[name]["judges"]["truth"]["reward_mean"] / rows["seed model"]["judges"]["truth"]["reward_mean"]
        assert change["relative"] == pytest.approx(ratio - 1) and change["interval"][0] <= change["interval"][1]
    counts = [
        pq.read_metadata(cells / cell / "align" / "round_1" / "pairs.parquet").num_rows for cell in ("0.05", "0.2")
    ]
    assert counts[0] < counts[1]

    everything = written(output_dir / "ablations" / "r_dpo" / "0.2")
    run_ablation(args, "r_dpo", "0.05", "0.2")
    assert written(output_dir / "ablations" / "r_dpo" / "0.2") == everything


def test_losses_share_their_pairs_and_table_1_has_their_cells(args):
    rows = rows_of(run_ablation(args, "losses", "dpo", "sdpo"))
    assert list(rows) == ["seed model", "dpo", "sdpo"]
    cells = args.output_dir / "ablations" / "losses"
    drawn = pq.read_table(cells / "pairs" / "pairs.parquet")
    assert max(map(len, drawn["rejected"].to_pylist())) == 4
    for cell in ("dpo", "sdpo"):
        assert pq.read_table(cells / cell / "align" / "round_1" / "pairs.parquet").equals(drawn)
    assert not same_weights(cells / "dpo" / "align" / "model", cells / "sdpo" / "align" / "model")

    before = written(cells)
    table = rows_of(run_ablation(args, "table1", "popularity", "tiger", "dpo", "ipa"))
    assert list(table) == ["Popularity", "TIGER-like", "OneRec", "OneRec + DPO", "OneRec + IPA"]
    assert written(cells) == before
    assert table["OneRec + DPO"]["judges"] == rows["dpo"]["judges"]
    for name in ("Popularity", "TIGER-like"):
        assert table[name]["recall@10"] > 0 and "reward_max" in table[name]["change"]["judges"]["independent_judge"]

    tiger = AutoModelForSeq2SeqLM.from_pretrained(
        args.output_dir / "ablations" / "table1" / "tiger" / "pretrain" / "model"
    )
    onerec = AutoModelForSeq2SeqLM.from_pretrained(args.output_dir / "pretrain" / "model")
    assert tiger.config.num_experts == 1 and tiger.config.session_items == 1
    assert tiger.num_parameters() == pytest.approx(onerec.num_parameters(), rel=0.02)


def test_the_runs_own_alignment_is_the_cell_of_its_settings_and_rounds_are_one_alignment(args):
    own = replace(args, align_rounds=2)
    run_align(own)
    rows = rows_of(run_ablation(own, "reference"))
    cells = args.output_dir / "ablations" / "reference"
    assert not (cells / "previous" / "align").exists()
    # The first round's reference is the seed model either way; its pairs were drawn by the round and beforehand.
    run, sft = args.output_dir / "align", cells / "sft" / "align"
    assert same_weights(run / "round_1", sft / "round_1") and not same_weights(run / "round_2", sft / "round_2")

    by_round = rows_of(run_ablation(args, "rounds", "1", "2"))
    assert list(by_round) == ["seed model", "1", "2"]
    assert [by_round[number]["rounds"] for number in ("1", "2")] == [1, 2]
    assert by_round["2"]["judges"] == rows["previous"]["judges"] != by_round["1"]["judges"]


@pytest.mark.parametrize("name, cells", [("num_candidates", ("4", "6")), ("ntp", ("with", "without"))])
def test_other_ablations_and_users(args, name, cells):
    evaluated = (args.output_dir / "evaluate_seed" / "stage.json").stat().st_mtime_ns
    rows = rows_of(run_ablation(replace(args, evaluation_users=20), name, *cells))
    assert list(rows) == ["seed model", *cells]
    assert (args.output_dir / "ablations" / name / "figure.png").stat().st_size > 10_000
    # The seed model is evaluated on these users too, beside the run's evaluation.
    assert (args.output_dir / "ablations" / "seed" / "results.safetensors").exists()
    assert (args.output_dir / "evaluate_seed" / "stage.json").stat().st_mtime_ns == evaluated
    first = args.output_dir / "ablations" / name / cells[0] / "align" / "model"
    assert not same_weights(first, args.output_dir / "ablations" / name / cells[1] / "align" / "model")


def test_what_there_is_not_is_said(args, tmp_path):
    with pytest.raises(ValueError, match="no ablation 'loss'; choose one of r_dpo"):
        run_ablation(args, "loss")
    with pytest.raises(ValueError, match="losses has not all of the cells dpo, kto"):
        run_ablation(args, "losses", "dpo", "kto")
    with pytest.raises(ValueError, match="align_rounds is 0"):
        run_ablation(replace(args, align_rounds=0), "ntp")
    with pytest.raises(FileNotFoundError, match="run recipes/pretrain.py|run recipes/fit_tokenizer.py"):
        run_ablation(replace(args, output_dir=str(tmp_path)), "ntp")


def test_a_table_has_a_row_by_policy_and_judge():
    figures = {
        "reward_mean": 0.5,
        "reward_mean_interval": [0.4, 0.6],
        "reward_max": 0.9,
        "vtr_mean": 0.1,
        "vtr_max": 0.7,
    }
    seed = {"name": "seed", "rounds": None, "recall@10": 0.25, "coverage": 0.5, "judges": {"a": figures, "b": figures}}
    change = {"coverage": {"relative": -0.1, "interval": [-0.2, 0.0]}, "judges": {"b": {}}}
    change["judges"]["a"] = {"reward_mean": {"relative": 0.25, "interval": [0.1, 0.375]}}
    rows = [seed, {**seed, "name": "cell", "rounds": 2, "change": change}]
    lines = comparison_table("Title", "About.", rows)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()[4:]]
    assert lines[0][6:] == ["judge", "mean reward", "max reward", "vtr"]
    row = ["0.2500", "0.5000", "–", "–", "a", "0.5000 [0.4, 0.6]", "0.9000", "0.1000 / 0.7000"]
    assert lines[2] == ["seed", "–", *row]
    assert lines[4][:4] == ["cell", "2", "0.2500", "0.5000 -10.0% [-20.0%, +0.0%]"]
    assert lines[4][6:8] == ["a", "0.5000 [0.4, 0.6] +25.0% [+10.0%, +37.5%]"]
    assert lines[5][:7] == [""] * 6 + ["b"] and lines[5][7] == "0.5000 [0.4, 0.6]"

    mean, best, recall = comparison_figure("Title", rows).axes  # of neither policy is a divergence known
    points = [(line.get_label(), *line.get_data()) for line in mean.lines if line.get_marker() == "o"]
    assert [label for label, *_ in points] == ["a", "b"]
    np.testing.assert_allclose([x for _, x, _ in points if len(x)], [[0.25]])
    assert 0.5 < points[0][2][0] < 1.5  # in the second row, beside the other judge's place
    np.testing.assert_allclose(recall.lines[-1].get_data(), [[0.25, 0.25], [0, 1]])
    assert mean.get_ylim()[0] > mean.get_ylim()[1]
    assert [label.get_text() for label in mean.get_yticklabels()] == ["seed", "cell"]
