"""Batch recommending, Parquet to Parquet: sharded over processes, resumable, with errors at the door."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from onerec_hf import OneRecConfig, OneRecForConditionalGeneration, OneRecTokenizer, Recommender
from onerec_hf.reward import OneRecRewardConfig, OneRecRewardModel, SessionScorer
from onerec_hf.semantic_ids import ResidualQuantizer
from onerec_hf.stages import parse_recipe_arguments, run_recommend
from onerec_hf.stages.recipe_arguments import RecommendArguments
from onerec_hf.stages.recommend_stage import Histories

ROOT = Path(__file__).parents[1]
NUM_USERS = 600


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    embeddings = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    tokenizer = OneRecTokenizer.fit([f"item {i}" for i in range(60)], embeddings, ResidualQuantizer([8, 8, 8]))
    torch.manual_seed(0)
    model = OneRecForConditionalGeneration(OneRecConfig.from_preset("debug", history_items=8, session_items=2))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    path = tmp_path_factory.mktemp("histories") / "histories.parquet"
    generator = np.random.default_rng(1)
    lists = [[f"item {i}" for i in generator.choice(60, generator.integers(0, 12), False)] for _ in range(NUM_USERS)]
    pq.write_table(pa.table({"history_item_ids": lists, "user_id": np.arange(NUM_USERS) * 7}), path)
    return path


def arguments(checkpoint, histories, output_dir, *flags):
    return [
        str(ROOT / "recipes" / "recommend.py"),
        *("--recommend_model", str(checkpoint), "--histories", str(histories), "--output_dir", str(output_dir)),
        *("--top_k", "5", "--ranking_beams", "8", "--threads", "1", *flags),
    ]


def start(command: list[str]) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def finish(process: subprocess.Popen, returncode: int = 0) -> str:
    output = process.communicate()[0]
    assert process.returncode == returncode, output[-3000:]
    return output


def test_two_processes_give_what_a_killed_and_resumed_one_gives(checkpoint, histories, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = start(launch + arguments(checkpoint, histories, tmp_path / "two"))

    command = [sys.executable, *arguments(checkpoint, histories, tmp_path / "one")]
    killed = start(command)
    first = tmp_path / "one" / "recommend.partial" / "part_000000000.parquet"
    while not first.exists():
        assert killed.poll() is None, finish(killed)
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "one" / "recommend").exists()
    # If the resumed run made this part again, the mark in it would be gone.
    marked = pq.read_table(first)
    marked = marked.set_column(0, "user_id", pa.array(np.full(len(marked), -1)))
    pq.write_table(marked, first)
    assert "resumed" in finish(start(command))
    finish(two)

    results = [pq.read_table(tmp_path / name / "recommend" / "recommendations.parquet") for name in ("one", "two")]
    assert results[0]["user_id"].to_pylist()[: len(marked)] == [-1] * len(marked)
    assert results[1]["user_id"].to_pylist() == (np.arange(NUM_USERS) * 7).tolist()
    for column in ("session", "items"):
        assert results[0][column] == results[1][column]
    scores = [np.array(result["scores"].to_pylist()) for result in results]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)
    seen = pq.read_table(histories)["history_item_ids"].to_pylist()
    for items, history in zip(results[1]["items"].to_pylist(), seen, strict=True):
        assert len(set(items)) == 5 and not set(items) & set(history)


def test_wrong_histories_are_refused_before_any_work(checkpoint, tmp_path):
    path = tmp_path / "histories.parquet"
    pq.write_table(pa.table({"user_id": ["a", "b"], "history_item_ids": [["item 1"], ["item 2", "item 99"]]}), path)
    words = arguments(checkpoint, path, tmp_path / "run")[1:]
    with pytest.raises(ValueError, match="the history of user 'b' holds item id 'item 99'.*--unknown_items skip"):
        run_recommend(parse_recipe_arguments(words))
    run_recommend(parse_recipe_arguments([*words, "--unknown_items", "skip"]))
    assert len(pq.read_table(tmp_path / "run" / "recommend" / "recommendations.parquet")) == 2


ITEMS = ["item 1", "item 2"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([ITEMS, None, []]), None),
        (pa.array([ITEMS], pa.large_list(pa.large_string())), None),
        (pa.array([ITEMS], pa.list_(pa.string(), 2)), None),
        (pa.ListArray.from_arrays([0, 2], pa.array(ITEMS).dictionary_encode()), None),
        (pa.array([None], pa.list_(pa.null())), None),
        (pa.array([ITEMS, ["item 1", None]]), "the history of user 1 holds no item id at one place"),
        (pa.array(['["item 1"]']), "'history_item_ids' holds string, where lists of item ids are needed, all strings"),
        (pa.array([[1, 2]]), "'history_item_ids' holds list<.*int64>"),
        (pa.array([[1.0]]), "'history_item_ids' holds list<.*double>"),
        (pa.array([[b"item 1"]]), "'history_item_ids' holds list<.*binary>"),
    ],
)
def test_histories_of_any_type_of_list_are_checked(checkpoint, tmp_path, column, message):
    path = tmp_path / "histories.parquet"
    pq.write_table(pa.table({"user_id": np.arange(len(column)), "history_item_ids": column}), path)
    options = RecommendArguments(histories=str(path))
    histories, tokenizer = Histories(None, options), OneRecTokenizer.from_pretrained(checkpoint)
    if message is None:
        histories.check_items(tokenizer, "error")
        return
    for unknown_items in ("error", "skip"):
        with pytest.raises(ValueError, match=f"histories.parquet: .*{message}"):
            histories.check_items(tokenizer, unknown_items)


def test_histories_that_are_no_parquet_file_are_named(tmp_path):
    (tmp_path / "users.csv").write_text("user_id,history_item_ids\n1,item 1\n")
    with pytest.raises(ValueError, match="users.csv is no Parquet file"):
        Histories(None, RecommendArguments(histories=str(tmp_path / "users.csv")))


def test_sessions_that_the_reward_model_chooses(checkpoint, tmp_path):
    tokenizer = OneRecTokenizer.from_pretrained(checkpoint)
    torch.manual_seed(1)
    judge = OneRecRewardModel(OneRecRewardConfig(codebook_sizes=tokenizer.codebook_sizes, hidden_size=8)).eval()
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    rows = [
        {"user_id": "a", "history_item_ids": ["item 1"], "exposed_item_ids": ["item 1", "item 5"]},
        {"user_id": "b", "history_item_ids": ["item 2", "item 99"], "exposed_item_ids": None},
    ]
    path = tmp_path / "histories.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    chosen = ("--recommend_reward_model", str(tmp_path / "judge"), "--recommend_search", "diverse_beam")
    flags = (*chosen, "--unknown_items", "skip")
    finish(start([sys.executable, *arguments(checkpoint, path, tmp_path / "run", *flags)]))
    found = pq.read_table(tmp_path / "run" / "recommend" / "recommendations.parquet")
    model = OneRecForConditionalGeneration.from_pretrained(checkpoint).eval()
    options = {"top_k": 5, "num_beams": 8, "search": "diverse_beam", "unknown_items": "skip"}
    expected = Recommender(model, tokenizer, SessionScorer(judge, tokenizer))(rows, **options)
    assert found["session"].to_pylist() == [row["session"] for row in expected]
    assert found["session"].to_pylist() != [row["session"] for row in Recommender(model, tokenizer)(rows, **options)]
