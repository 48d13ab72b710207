"""Training from shards beside training from memory: targets per CPU second, and peak memory by rows.

    python recipes/benchmarks/sharded_training.py --json sharded_training.json

Rates: trainings of the same model and steps take turns in one process, one of each before the clock starts; medians.
Seconds are the process's CPU time, reading ahead included, so that a busy machine decides little.
Memory: a process for each way and number of sessions, the most that it held beyond what it held before the data.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from transformers import Seq2SeqTrainingArguments

from onerec_hf import (
    OneRecConfig,
    OneRecForConditionalGeneration,
    OneRecPretrainer,
    OneRecTokenizer,
    ShardedRows,
    index_sessions,
)
from onerec_hf.pretraining import shared_for_training
from onerec_hf.stages.pretrain_stage import TRAINING_DEFAULTS

ITEMS, CODEBOOK = 20_000, 256
HISTORY, SESSION, SESSIONS_PER_USER = 64, 5, 20
WAYS = ("memory", "shards")


def write_shards(folder: Path, num_sessions: int, sessions_per_shard: int) -> None:
    """Users with consecutive sessions of random items, in files of `sessions_per_shard`."""
    random = np.random.default_rng(0)
    ends = np.tile(SESSION * np.arange(1, SESSIONS_PER_USER + 1), sessions_per_shard // SESSIONS_PER_USER)
    lengths = np.minimum(ends, HISTORY)
    per_user = SESSION * (SESSIONS_PER_USER + 1)
    user = np.repeat(np.arange(sessions_per_shard // SESSIONS_PER_USER), SESSIONS_PER_USER)
    for number in range(num_sessions // sessions_per_shard):
        items = random.integers(0, ITEMS, (len(user) // SESSIONS_PER_USER) * per_user)
        stop = user * per_user + ends
        history = np.concatenate([items[at - length : at] for at, length in zip(stop, lengths, strict=True)])
        session = np.concatenate([items[at : at + SESSION] for at in stop])
        offsets = np.r_[0, np.cumsum(lengths)].astype(np.int32)
        fixed = np.arange(0, len(session) + 1, SESSION, dtype=np.int32)
        columns = {
            "user_id": user + number * len(user),
            "timestamp": ends * 86400.0,
            "history_item_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(history)),
            "session_item_ids": pa.ListArray.from_arrays(pa.array(fixed), pa.array(session)),
        }
        pq.write_table(pa.table(columns), folder / f"part-{number:05}.parquet")


def rows_of(way: str, folder: Path, tokenizer: OneRecTokenizer) -> Dataset | ShardedRows:
    index = partial(index_sessions, tokenizer=tokenizer)
    return ShardedRows.from_parquet(folder, index) if way == "shards" else index(Dataset(pq.read_table(folder)))


def fixed_tokenizer() -> OneRecTokenizer:
    codes = np.stack([np.arange(ITEMS) // CODEBOOK, np.arange(ITEMS) % CODEBOOK], axis=1)
    codebooks = [torch.zeros(CODEBOOK, 2) for _ in range(2)]
    return OneRecTokenizer.from_semantic_ids(list(range(ITEMS)), codes.tolist(), codebooks)


def trainer_on(rows: Dataset | ShardedRows, tokenizer: OneRecTokenizer, args, output_dir: str) -> OneRecPretrainer:
    torch.manual_seed(0)
    sizes = {"codebook_sizes": [CODEBOOK, CODEBOOK], "history_items": HISTORY, "session_items": SESSION}
    config = OneRecConfig.from_preset(
        args.preset, history_positions="item", encoder_attention=args.encoder_attention, **sizes
    )
    options = TRAINING_DEFAULTS | {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    training_args = Seq2SeqTrainingArguments(
        output_dir,
        per_device_train_batch_size=args.batch_size,
        train_sampling_strategy="group_by_length",
        **options | {"max_steps": args.steps} if args.steps else options | {"num_train_epochs": 1},
    )
    rows, training_args = shared_for_training(rows, config, training_args)
    return OneRecPretrainer(OneRecForConditionalGeneration(config), training_args, rows, tokenizer)


def measure_rates(args) -> dict[str, float]:
    """Targets per CPU second of an epoch, by way."""
    tokenizer, seconds = fixed_tokenizer(), {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), args.sessions, args.sessions_per_shard)
        rows = {way: rows_of(way, Path(folder), tokenizer) for way in WAYS}
        for repeat in range(args.repeats + 1):
            for way in WAYS if repeat % 2 else reversed(WAYS):
                trainer = trainer_on(rows[way], tokenizer, args, f"{folder}/{way}")
                start = time.process_time()
                trainer.train()
                if repeat:
                    seconds[way].append(time.process_time() - start)
    return {way: args.sessions / statistics.median(taken) for way, taken in seconds.items()}


def peak_memory() -> float:
    """The most memory that this process has held, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def print_memory(way: str, folder: str, args) -> None:
    tokenizer = fixed_tokenizer()
    args.steps = 5
    with tempfile.TemporaryDirectory() as output_dir:
        warm = index_sessions(Dataset(pq.read_table(f"{folder}/part-00000.parquet")), tokenizer)
        trainer_on(warm, tokenizer, args, output_dir).train()
        before = peak_memory()
        rows = rows_of(way, Path(folder), tokenizer)
        trainer = trainer_on(rows, tokenizer, args, output_dir)
        for _ in trainer.get_train_dataloader():  # a whole epoch's batches are made, not trained on
            pass
        print(json.dumps(peak_memory() - before))


def measure_memory(args) -> dict[str, dict[int, float]]:
    """MiB beyond what the process held before, by way and number of sessions."""
    found = {way: {} for way in WAYS}
    for num_sessions in args.memory_sessions:
        with tempfile.TemporaryDirectory() as folder:
            write_shards(Path(folder), num_sessions, args.sessions_per_shard)
            for way in WAYS:
                command = [sys.executable, __file__, "--memory_of", way, folder]
                for name in ("batch_size", "preset", "encoder_attention"):
                    command += [f"--{name}", str(getattr(args, name))]
                output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
                found[way][num_sessions] = json.loads(output.splitlines()[-1])
    return found


def main():
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="debug", help="Of the model; a larger one hides the reading more.")
    parser.add_argument("--sessions", type=int, default=20_000, help="Of an epoch whose rate is measured.")
    parser.add_argument("--sessions_per_shard", type=int, default=5_000)
    parser.add_argument("--memory_sessions", type=int, nargs="*", default=[40_000, 400_000])
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--encoder_attention", choices=["bidirectional", "causal"], default="bidirectional")
    parser.add_argument("--repeats", type=int, default=5, help="Measured epochs of each way.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory_of", nargs=2, metavar=("WAY", "FOLDER"), help="Print one process's memory instead.")
    parser.add_argument("--json", type=Path, help="File to write the figures to.")
    args = parser.parse_args()
    args.steps = None
    torch.set_num_threads(args.threads)
    if args.memory_of:
        return print_memory(*args.memory_of, args)
    rates = measure_rates(args)
    print(rates)
    memory = measure_memory(args)
    sizes = " | ".join(f"MiB, {count:,} sessions" for count in args.memory_sessions)
    print(f"\n| | targets per CPU second | share | {sizes} |")
    print("|---|---|---|" + "---|" * len(args.memory_sessions))
    for way in WAYS:
        held = " | ".join(f"{value:.0f}" for value in memory[way].values())
        print(f"| {way} | {rates[way]:.0f} | {rates[way] / rates['memory']:.3f} | {held} |")
    if args.json:
        temporary = args.json.with_name(args.json.name + ".partial")
        temporary.write_text(
            json.dumps({"targets_per_cpu_second": rates, "memory": memory}, indent=2) + "\n", encoding="utf-8"
        )
        temporary.replace(args.json)


if __name__ == "__main__":
    main()
