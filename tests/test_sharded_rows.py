"""Training from shards: every row once in an epoch, on one and two processes, and an exact resume within a shard."""

import json
import os
import pickle
import socket
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import Seq2SeqTrainingArguments, TrainerCallback

from onerec_hf import (
    OneRecConfig,
    OneRecForConditionalGeneration,
    OneRecPretrainer,
    OneRecTokenizer,
    ShardedRows,
    index_sessions,
    share_histories,
)
from onerec_hf.sharded_rows import ShardSampler
from onerec_hf.stages.data_stage import PreparedData
from onerec_hf.stages.pretrain_stage import parted_shards, recent_shards, session_parts, sharded_user_feature_values
from onerec_hf.stages.recipe_arguments import PretrainArguments

ITEMS, BATCH, SHARDS = 30, 4, 6


@pytest.fixture(scope="module")
def tokenizer():
    codes = [[item // 6, item % 6] for item in range(ITEMS)]
    return OneRecTokenizer.from_semantic_ids(list(range(ITEMS)), codes, [torch.zeros(6, 2), torch.zeros(6, 2)])


@pytest.fixture(scope="module")
def sessions() -> Dataset:
    random, rows = np.random.default_rng(0), []
    for user in range(23):
        behaviours = random.integers(0, ITEMS, 40).tolist()
        first = int(random.integers(1, 4))
        for session in range(int(random.integers(1, 8))):
            end = first + 2 * session
            row = {"user_id": user, "timestamp": float(100 * user + session)}
            row |= {"history_item_ids": behaviours[:end], "session_item_ids": behaviours[end : end + 2]}
            rows.append(row | {"user_features": {"sex": "fm"[user % 2]}})
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def folder(sessions, tmp_path_factory) -> Path:
    """Uneven shards of whole users, the last of them empty."""
    folder = tmp_path_factory.mktemp("pretraining_sessions")
    shard_of = np.minimum(np.asarray(sessions["user_id"][:]) ** 2 // 100, SHARDS - 2)
    for number in range(SHARDS):
        part = sessions.select(np.flatnonzero(shard_of == number))
        part.to_parquet(str(folder / f"part-{number:05}.parquet"))
    return folder


def model_of(tokenizer, **overrides) -> OneRecForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"codebook_sizes": list(tokenizer.codebook_sizes), "history_items": 8, "session_items": 2}
    return OneRecForConditionalGeneration(OneRecConfig.from_preset("debug", **sizes | overrides))


def arguments(folder, **options) -> Seq2SeqTrainingArguments:
    common = {"per_device_train_batch_size": BATCH, "report_to": "none", "disable_tqdm": True, "seed": 3}
    common |= {"use_cpu": True, "dataloader_pin_memory": False, "save_strategy": "no", "learning_rate": 1e-2}
    common |= {"train_sampling_strategy": "group_by_length", "ddp_find_unused_parameters": False}
    return Seq2SeqTrainingArguments(str(folder), **common | options)


def key(row) -> str:
    return json.dumps([row["history"], row["session"]])


def test_rows_are_those_of_the_table_and_each_is_asked_for_once(sessions, tokenizer, folder):
    index = partial(index_sessions, tokenizer=tokenizer)
    table, rows = index(sessions), ShardedRows.from_parquet(folder, index)
    assert rows.num_rows[-1] == 0 and len(rows) == len(table) == sum(rows.num_rows)
    numbers = np.random.default_rng(1).permutation(len(table)).tolist()
    assert pickle.loads(pickle.dumps(rows)).__getitems__(numbers) == table.__getitems__(numbers)
    with pytest.raises(IndexError):
        rows[len(rows)]
    orders = []
    for epoch in (0, 1, 0):
        rows.set_epoch(epoch)
        orders.append(list(ShardSampler(rows, BATCH, True, seed=5)))
        assert sorted(orders[-1]) == list(range(len(table)))
    assert orders[0] == orders[2] != orders[1]
    with pytest.raises(ValueError, match="no Parquet file"):
        ShardedRows.from_parquet(folder / "nothing", index)


def test_batches_hold_rows_of_similar_length(tokenizer, folder):
    rows = ShardedRows.from_parquet(folder, partial(index_sessions, tokenizer=tokenizer))

    def padding(by_length: bool) -> float:
        lengths = np.array([row["length"] for row in rows.__getitems__(list(ShardSampler(rows, BATCH, by_length, 0)))])
        longest = [lengths[start : start + BATCH].max() for start in range(0, len(lengths), BATCH)]
        return sum(longest) * BATCH / lengths.sum() - 1

    assert padding(True) < 0.7 * padding(False)


class Seen:
    """Collator that notes what it is given."""

    def __init__(self, collator):
        self.collator, self.batches = collator, []

    def __call__(self, rows):
        self.batches.append([key(row) for row in rows])
        return self.collator(rows)


@pytest.mark.parametrize("encoder_attention", ["bidirectional", "causal"])
def test_a_stream_is_trained_on_whole(sessions, tokenizer, folder, tmp_path, encoder_attention):
    files = sorted(map(str, folder.glob("*.parquet")))
    stream = load_dataset("parquet", data_files=files, split="train", streaming=True)
    model = model_of(tokenizer, encoder_attention=encoder_attention)
    trainer = OneRecPretrainer(model, arguments(tmp_path, num_train_epochs=1), stream, tokenizer)
    found = []
    for row in (trainer.train_dataset[number] for number in range(len(trainer.train_dataset))):
        histories = row["rows"] if "rows" in row else [row]
        found += chain.from_iterable(history.get("sessions", [history.get("session")]) for history in histories)
    assert Counter(map(tuple, found)) == Counter(map(tuple, sessions["session_item_ids"][:]))
    if encoder_attention == "causal":
        first = load_dataset("parquet", data_files=files[0], split="train")
        expected = share_histories(index_sessions(first, tokenizer), 8, BATCH)
        assert len(expected) == trainer.train_dataset.num_rows[0] and expected[0] == trainer.train_dataset[0]
        assert trainer.args.per_device_train_batch_size == 1
    steps = -(-len(trainer.train_dataset) // trainer.args.per_device_train_batch_size)
    assert trainer.train().global_step == trainer.state.max_steps == steps


@pytest.mark.parametrize("way", ["shards", "memory"])
def test_training_resumes_exactly_within_an_epoch(sessions, tokenizer, folder, tmp_path, way):
    index = partial(index_sessions, tokenizer=tokenizer)
    rows = ShardedRows.from_parquet(folder, index) if way == "shards" else index(sessions)
    epoch = -(-len(rows) // BATCH)

    def train(name, stop=None, resume=None):
        model = model_of(tokenizer)
        args = arguments(tmp_path / name, num_train_epochs=2, save_strategy="steps", save_steps=epoch + 3)
        trainer = OneRecPretrainer(model, args, rows, tokenizer)
        if stop:
            trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.max_steps == 2 * epoch
        return trainer.state.global_step, model.state_dict()

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    steps, once = train("once")
    assert steps == 2 * epoch
    assert train("twice", Stop())[0] == epoch + 3  # in the second epoch
    _, resumed = train("twice", resume=str(tmp_path / "twice" / f"checkpoint-{epoch + 3}"))
    for name, tensor in once.items():
        assert torch.equal(resumed[name], tensor), name


def train_on_two(rank: int, port: int, folder: str, output: str, tokenizer) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    rows = ShardedRows.from_parquet(folder, partial(index_sessions, tokenizer=tokenizer))
    table = index_sessions(Dataset.from_parquet(sorted(map(str, Path(folder).glob("*.parquet")))), tokenizer)
    found = {}
    for name, data in {"shards": rows, "memory": table}.items():
        args = arguments(f"{output}/{name}", num_train_epochs=2, ddp_broadcast_buffers=False, ddp_backend="gloo")
        trainer = OneRecPretrainer(model_of(tokenizer), args, data, tokenizer)
        trainer.data_collator = Seen(trainer.data_collator)
        trainer.train()
        weights = sum(tensor.double().sum().item() for tensor in trainer.model.state_dict().values())
        found[name] = [trainer.data_collator.batches, trainer.state.global_step, weights]
    Path(output, f"rank{rank}.json").write_text(json.dumps(found))
    # Not by destroying the group: gloo's threads may then wait for the interpreter's lock, and this one for them.
    os._exit(0)


def test_two_processes_share_an_epoch_as_those_of_a_table(sessions, tokenizer, folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_on_two, (port, str(folder), str(tmp_path), tokenizer), nprocs=2)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    every = Counter(key(row) for row in index_sessions(sessions, tokenizer))
    steps = -(-len(sessions) // (2 * BATCH))
    for name in ("shards", "memory"):
        assert ranks[0][name][2] == ranks[1][name][2]
        for epoch in (0, 1):
            own = slice(epoch * steps, (epoch + 1) * steps)
            batches = [batch for rank in ranks for batch in rank[name][0][own]]
            assert len(batches) == 2 * steps and {len(batch) for batch in batches} == {BATCH}
            given = Counter(chain.from_iterable(batches))
            # Whatever is more than a row each fills the last batches, from the epoch's first one.
            assert not every - given and (given - every).total() == 2 * steps * BATCH - len(sessions)
    assert ranks[0]["shards"][1] == ranks[0]["memory"][1] == 2 * steps


@pytest.mark.parametrize("gate", [False, True])
def test_held_out_users_and_recent_sessions_of_shards(sessions, tokenizer, tmp_path, gate):
    shards = tmp_path / "pretraining_sessions"
    shards.mkdir()
    for number in range(2):  # 46 users in each
        for_user = [
            row | {"user_id": row["user_id"] + 23 * copy} for copy in (2 * number, 2 * number + 1) for row in sessions
        ]
        Dataset.from_list(for_user).to_parquet(str(shards / f"part-{number:05}.parquet"))
    options = PretrainArguments(holdout_sessions=20, model={"item_gate": gate, "item_head": "content"} if gate else {})
    parts, kept = parted_shards(shards, tokenizer, options)
    again, _ = parted_shards(shards, tokenizer, options)
    assert parts["test"][:] == again["test"][:]
    whole = Dataset.from_parquet(sorted(map(str, shards.glob("*.parquet"))))
    trained = [parts["train"][number] for number in range(len(parts["train"]))]
    in_memory = session_parts(PreparedData(tmp_path, None), tokenizer, options)
    assert in_memory["test"][:] == parts["test"][:] and in_memory["train"].to_list() == trained
    held_out = set(parts["test"]["user_id"][:])
    assert held_out and not held_out & {row["user_id"] for row in trained}
    counts = Counter(whole["user_id"][:])
    expected = len(held_out) if gate else sum(counts[user] for user in held_out)
    assert len(parts["test"]) == expected <= 20
    assert len(trained) == len(whole) - sum(counts[user] for user in held_out)
    recent = recent_shards(shards, tokenizer, kept, days=500 / 86400)
    latest = max(row["timestamp"] for row in trained)
    assert len(recent) == sum(row["timestamp"] >= latest - 500 for row in trained) > 0
    assert all(recent[number]["timestamp"] >= latest - 500 for number in range(len(recent)))
    assert sharded_user_feature_values(shards, kept) == {"sex": ["f", "m"]}
