"""Stage `pretrain`: session-wise next-token prediction to the seed model M_0 (section 3.2, eq 4)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import Seq2SeqTrainingArguments, set_seed

from ..configuration_onerec import OneRecConfig
from ..data import DataArguments
from ..data.readers import part_name
from ..evaluation.policy_inputs import generation_inputs
from ..item_memory import remember_items
from ..item_trie import ItemTrie
from ..modeling_onerec import OneRecForConditionalGeneration
from ..pretraining import OneRecPretrainer, shared_for_training
from ..session_generation import fit_item_gate
from ..session_rows import index_sessions, user_feature_values
from ..sharded_rows import ShardedRows
from ..tokenization_onerec import OneRecTokenizer
from ..training_checkpoints import train_from_latest, whole_model
from .data_stage import PRETRAINING_SESSIONS, PreparedData, prepared_data
from .previous_run import PreviousRun
from .recipe_arguments import PretrainArguments, RecipeArguments, require_held_out
from .stage_runner import CHECKPOINTS, MODEL, Stage, last_model_stage, run_stage, stage_dir
from .tokenize_stage import load_item_content

TIME_GAP_BUCKETS = 20  # octaves of minutes: the last one holds gaps of a year and more
USERS_PER_HELD_OUT = 20  # for an item gate, at least: one in so many is held out
SESSIONS_PER_HELD_OUT = 10  # otherwise
HELD_OUT_SHARDS = 8  # at most: reading more would only take longer

LEAST_STEPS = 16  # of an epoch, as far as the smallest batch goes
SMALLEST_BATCH, LARGEST_BATCH = 16, 256

GATE_BATCH = 128

TRAINING_DEFAULTS = {
    "report_to": "none",
    "save_total_limit": 2,
    "save_strategy": "epoch",
    "logging_steps": 50,
    # Told so, the trainer joins the processes of any launcher on the CPU too.
    "use_cpu": not torch.accelerator.is_available(),
    "dataloader_pin_memory": torch.accelerator.is_available(),
    # The experts' load is counted in buffers of every process, which must not be overwritten by the first one's.
    "ddp_broadcast_buffers": False,
    # Experts are slices of one parameter, so that every parameter is used in every step.
    "ddp_find_unused_parameters": False,
}


def fitting_batch_size(num_sessions: int) -> int:
    """Where no batch size is given: the largest power of two that leaves an epoch `LEAST_STEPS`, within bounds.

    >>> [fitting_batch_size(num_sessions) for num_sessions in (300, 2000, 100_000)]
    [16, 64, 256]
    """
    largest = max(num_sessions // LEAST_STEPS, 1)
    return min(max(2 ** (largest.bit_length() - 1), SMALLEST_BATCH), LARGEST_BATCH)


def training_log(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trainer's log rows that are figures, for the report's curves."""
    return [{name: value for name, value in row.items() if isinstance(value, (int, float))} for row in log_history]


def parted_sessions(sessions: Dataset, options: PretrainArguments) -> dict[str, Dataset]:
    """Sessions that are trained on (`train`, in their own order, in which a user's stand together) and those held out
    of all training (`test`).

    For an item gate the latest sessions of some users are held out, of whom nothing is trained on: with an item head
    every behaviour of a history is a target too, so that a user's other sessions would give the answer away.
    """
    random = np.random.default_rng(options.seed)
    if not options.model.get("item_gate", False):
        holdout = min(options.holdout_sessions, len(sessions) // SESSIONS_PER_HELD_OUT)
        shuffled = random.permutation(len(sessions))
        return {"train": sessions.select(np.sort(shuffled[holdout:])), "test": sessions.select(shuffled[:holdout])}
    users = np.asarray(sessions.with_format("arrow")[:]["user_id"].to_pandas())
    last = np.flatnonzero(np.r_[users[1:] != users[:-1], True])
    drawn = random.permutation(last)[: min(options.holdout_sessions, len(last) // USERS_PER_HELD_OUT)]
    held_out = np.isin(users, users[drawn])
    return {"train": sessions.select(np.flatnonzero(~held_out)), "test": sessions.select(drawn)}


def recent_sessions(sessions: Dataset, days: float) -> Dataset:
    """The sessions of the latest `days` days, in their order; those without a time are not among them."""
    times = np.asarray(sessions["timestamp"][:], dtype=np.float64)
    latest = np.fmax.reduce(times, initial=-np.inf)
    return sessions.select(np.flatnonzero(times >= latest - days * 86400))


def parted_shards(
    folder: Path, tokenizer: OneRecTokenizer, options: PretrainArguments
) -> tuple[dict[str, Dataset | ShardedRows], pyarrow.dataset.Expression | None]:
    """As [`parted_sessions`] of sessions in shards, and which rows of their files are trained on.

    Whole users are held out, of a few shards that lie evenly among all and alone are read for it.
    """
    index = partial(index_sessions, tokenizer=tokenizer)
    rows = ShardedRows.from_parquet(folder, index)
    shards = np.unique(np.linspace(0, len(rows.num_rows) - 1, HELD_OUT_SHARDS).round().astype(int))
    random = np.random.default_rng(options.seed)
    latest_alone = options.model.get("item_gate", False)
    held_out, users = [], []
    for number in shards.tolist():
        table = rows.shard(number)
        ids = table["user_id"].to_pandas().to_numpy() if table.num_rows else np.zeros(0)
        starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]]) if len(ids) else np.zeros(0, dtype=int)
        ends = np.r_[starts[1:], len(ids)].astype(int)[: len(starts)]
        most = len(starts) // USERS_PER_HELD_OUT if latest_alone else len(ids) // SESSIONS_PER_HELD_OUT
        begins = ends - 1 if latest_alone else starts
        drawn = random.permutation(len(starts))
        drawn = drawn[np.cumsum((ends - begins)[drawn]) <= min(options.holdout_sessions // len(shards), most)]
        places = [np.arange(begins[user], ends[user]) for user in drawn]
        held_out.append(table.take(pa.array(np.concatenate([np.zeros(0, dtype=int), *places]))))
        users.append(table["user_id"].take(pa.array(starts[drawn])).combine_chunks())
    test = Dataset(pa.concat_tables(held_out))
    if not len(test):
        return {"train": rows, "test": test}, None
    kept = ~pyarrow.dataset.field("user_id").isin(pa.chunked_array(users).combine_chunks())
    return {"train": ShardedRows.from_parquet(folder, index, kept), "test": test}, kept


def sessions_in_shards(prepared: PreparedData) -> Path | None:
    """The folder of the sessions' shards where the log is in partitions, else None."""
    folder = (prepared.folder / PRETRAINING_SESSIONS).with_suffix("")
    return folder if folder.is_dir() else None


def session_parts(
    prepared: PreparedData, tokenizer: OneRecTokenizer, options: PretrainArguments
) -> dict[str, Dataset]:
    """The sessions that pretraining is given (`train`) and those that it held out (`test`), in memory: of a log in
    partitions the former are those of `prepared.partitions`."""
    shards = sessions_in_shards(prepared)
    if shards is None:
        return parted_sessions(index_sessions(prepared.read(PRETRAINING_SESSIONS), tokenizer), options)
    parts, kept = parted_shards(shards, tokenizer, options)
    trained = _files_of(shards, prepared.partitions).to_table(filter=kept)
    return {**parts, "train": index_sessions(Dataset(trained), tokenizer)}


def _files_of(shards: Path, partitions: Sequence[int] | None = None) -> pyarrow.dataset.Dataset:
    files = shards if partitions is None else [shards.parent / part_name(shards.name, index) for index in partitions]
    return pyarrow.dataset.dataset(files, format="parquet")


def recent_shards(
    folder: Path, tokenizer: OneRecTokenizer, kept: pyarrow.dataset.Expression | None, days: float
) -> ShardedRows:
    """As [`recent_sessions`] of the kept rows of shards, of which their times alone are read before."""
    batches = _files_of(folder).to_batches(columns=["timestamp"], filter=kept)
    latest = [np.fmax.reduce(batch["timestamp"].to_numpy(zero_copy_only=False), initial=-np.inf) for batch in batches]
    recent = pyarrow.dataset.field("timestamp") >= max(latest, default=-np.inf) - days * 86400
    index = partial(index_sessions, tokenizer=tokenizer)
    return ShardedRows.from_parquet(folder, index, recent if kept is None else kept & recent)


def sharded_user_feature_values(folder: Path, kept: pyarrow.dataset.Expression | None) -> dict[str, list[str]]:
    """As [`user_feature_values`] of the kept rows of shards, of which that column alone is read."""
    files = _files_of(folder)
    if "user_features" not in files.schema.names:
        return {}
    batches = files.to_batches(columns=["user_features"], filter=kept)
    values = [user_feature_values(Dataset(pa.Table.from_batches([batch]))) for batch in batches]
    return {name: sorted(set().union(*(found[name] for found in values))) for name in values[0]}


def run_pretrain(
    args: RecipeArguments, stage: str = "pretrain", sessions_of: Callable[[PreparedData], Dataset] | None = None
) -> Path:
    """Trains M_0; returns the stage's folder, whose `model` has the tokenizer with it.

    Args:
        stage: the stage's name, another one to train another model of the run's data.
        sessions_of: cuts other sessions than those of the `data` stage.
    """
    options, data, previous = args.group(PretrainArguments), args.group(DataArguments), PreviousRun.of(args)
    if previous is not None:
        previous.require_same("pretrain", options, ("preset", "model"))

    def work(folder: Path) -> dict | None:
        set_seed(options.seed)
        tokenizer = OneRecTokenizer.from_pretrained(stage_dir(args.output_dir, "tokenize", stage))
        prepared = prepared_data(args, stage)
        shards = None if sessions_of else sessions_in_shards(prepared)
        if shards is not None:
            parts, kept = parted_shards(shards, tokenizer, options)
            user_features = sharded_user_feature_values(shards, kept)
        else:
            cut = sessions_of(prepared) if sessions_of else prepared.read(PRETRAINING_SESSIONS)
            parts = parted_sessions(index_sessions(cut, tokenizer), options)
            user_features = user_feature_values(parts["train"])
        with_item_head = options.model.get("item_head", "none") != "none"
        content = load_item_content(args.output_dir) if with_item_head else None
        config = generator_config(options, data, tokenizer, user_features, content)
        recent = {}
        if options.recent_days is not None and previous is None:
            recent = {
                name: recent_shards(shards, tokenizer, kept, options.recent_days)
                if isinstance(sessions, ShardedRows)
                else recent_sessions(sessions, options.recent_days)
                for name, sessions in parts.items()
            }
            if not len(recent["train"]):
                raise ValueError(f"recent_days is {options.recent_days}, but no session has a time: leave it out.")
        if previous is None:
            changes = {}
            model = OneRecForConditionalGeneration(config)
            if config.item_content_size:
                model.set_item_content(content)
        else:
            changes = options.pretrain_update
            model = continued_generator(previous.generator(), config, content)
        positive = data.session_source == "positive"
        changes = args.tracking(stage) | changes
        trainer = train_generator(model, tokenizer, parts, options, folder / CHECKPOINTS, positive, **changes)
        model = whole_model(trainer, OneRecForConditionalGeneration, folder / CHECKPOINTS / "whole")
        results = {"log": training_log(trainer.state.log_history), "num_sessions": len(parts["train"])}
        if recent:
            last = folder / CHECKPOINTS / "recent"
            changes = args.tracking(f"{stage}/recent") | options.pretrain_recent
            trainer = train_generator(model, tokenizer, recent, options, last, positive, **changes)
            model = whole_model(trainer, OneRecForConditionalGeneration, folder / CHECKPOINTS / "whole")
            log = training_log(trainer.state.log_history)
            results |= {"recent_log": log, "num_recent_sessions": len(recent["train"])}
        if model.config.item_gate:
            results["item_gate"] = fit_gate(model, tokenizer, parts["test"])
        if model.config.item_memory:  # after the gate, whose held-out users are remembered too
            remember_items(model, prepared.fitted_feed.positive_histories())
        if PartialState().is_main_process:
            model.save_pretrained(folder / MODEL)
            tokenizer.save_pretrained(folder / MODEL)
        PartialState().wait_for_everyone()
        return results

    outside = [] if previous is None else previous.input(last_model_stage(previous.folder))
    described = options
    if not options.model.get("item_memory"):  # of a sample nothing else is made here
        described = replace(options, sampled_interactions=PretrainArguments.sampled_interactions)
    return run_stage(Stage(stage, args.output_dir, described, ["data", "tokenize"], outside), work)


def continued_generator(
    checkpoint: Path, config: OneRecConfig, content: torch.Tensor | None
) -> OneRecForConditionalGeneration:
    """An earlier model with the items that came since, whose vectors of the item head are made of their content.

    Args:
        config: what a new model of the data would have.
        content: (N, item_content_size) of all items, where there is an item head.

    Raises:
        ValueError: the sizes of histories or sessions are others than the model's.
    """
    model = OneRecForConditionalGeneration.from_pretrained(checkpoint)
    for name in ("history_items", "session_items", "history_feedback", "time_gap_buckets", "item_content_size"):
        if getattr(model.config, name) != getattr(config, name):
            raise ValueError(
                f"{name} is {getattr(config, name)!r} in this data, and {getattr(model.config, name)!r} in "
                f"{checkpoint}, which the run goes on from."
            )
    if content is not None:
        model.add_items(content[model.config.num_items :])
    model.config.catalogue_fingerprint = config.catalogue_fingerprint
    return model


def fit_gate(model: OneRecForConditionalGeneration, tokenizer: OneRecTokenizer, held_out: Dataset) -> dict[str, float]:
    """Fits the item gate to the first items of held-out sessions; every process does the same."""
    trie = ItemTrie.from_tokenizer(tokenizer).to(model.device)

    def batches() -> Iterator[tuple[dict[str, torch.Tensor | None], torch.LongTensor]]:
        for start in range(0, len(held_out), GATE_BATCH):
            rows = held_out.select(range(start, min(start + GATE_BATCH, len(held_out)))).to_list()
            following = torch.tensor([row["session"][0] for row in rows], device=model.device)
            yield generation_inputs(model, tokenizer, rows), following

    return fit_item_gate(model, trie, batches())


def generator_config(
    options: PretrainArguments,
    data: DataArguments,
    tokenizer: OneRecTokenizer,
    user_features: dict[str, list[str]],
    content: torch.Tensor | None,
) -> OneRecConfig:
    """Configuration of the generator that is trained on sessions with these values of users' columns, with an item
    head of items with this content."""
    item_head = {}
    if content is not None:
        item_head = {"num_items": len(content), "item_content_size": content.shape[1]}
    return OneRecConfig.from_preset(
        options.preset,
        **{
            "history_items": data.history_items,
            "session_items": data.session_items,
            # Better and faster than the paper's tokens on the same budget: recipes/kuairand/README.md.
            "history_positions": "item",
            "history_feedback": data.history_feedback or [],
            "time_gap_buckets": TIME_GAP_BUCKETS if data.history_timestamps else 0,
            "user_features": user_features,
            "codebook_sizes": list(tokenizer.codebook_sizes),
            "num_semantic_ids": tokenizer.num_semantic_ids,
            "catalogue_fingerprint": tokenizer.catalogue_fingerprint(),
            **item_head,
            **options.model,
        },
    )


def train_generator(
    model: OneRecForConditionalGeneration,
    tokenizer: OneRecTokenizer,
    parts: dict[str, Dataset | ShardedRows],
    options: PretrainArguments,
    folder: Path,
    sessions_continue_histories: bool,
    **changes: Any,
) -> OneRecPretrainer:
    """Trains on the sessions of `parts["train"]`, after the latest checkpoint in `folder`; returns the trainer.

    Args:
        parts: `train` and `test`, what is held out.
        sessions_continue_histories: See [`SessionCollator`].
        changes: fields of `options.pretrain` that differ.
    """
    rows, held_out = parts["train"], parts["test"]
    if not len(held_out):
        why = f"of {len(rows)} sessions none is held out: a tenth of them at most is (holdout_sessions)"
        require_held_out({**options.pretrain, **changes}, "pretrain", why)
    training_args = Seq2SeqTrainingArguments(
        **{
            **TRAINING_DEFAULTS,
            "train_sampling_strategy": "group_by_length",
            "eval_strategy": "epoch" if len(held_out) else "no",
            "per_device_train_batch_size": fitting_batch_size(len(rows)),
            **options.pretrain,
            **changes,
            "seed": options.seed,
            "output_dir": str(folder),
        }
    )
    rows, training_args = shared_for_training(rows, model.config, training_args)
    held_out = held_out if len(held_out) else None
    trainer = OneRecPretrainer(model, training_args, rows, tokenizer, held_out, sessions_continue_histories)
    train_from_latest(trainer)
    return trainer
