"""Session-wise next-token prediction (eq 3 and 4) on transformers' `Seq2SeqTrainer`."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import Seq2SeqTrainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from .history_features import HISTORY_FEATURES, encode_history_rows
from .modeling_onerec import OneRecForConditionalGeneration
from .tokenization_onerec import OneRecTokenizer

CHECKPOINT_COMPLETE = "checkpoint_complete"
CPU_EXPERTS = "eager"  # the fastest of transformers' experts implementations to train with on a CPU


def catalogue_index_lists(column: pa.ChunkedArray, item_index: Callable[[pd.Series], np.ndarray]) -> pa.Array:
    """Lists of item ids as lists of catalogue indices, without a Python object per item.

    Args:
        item_index (`Callable`): Catalogue indices of item ids, such as [`OneRecTokenizer.item_index`].
    """
    flat = pa.array(item_index(pc.list_flatten(column).to_pandas()))
    lengths = pc.list_value_length(column).to_numpy().astype(np.int64)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, flat)


def index_sessions(sessions: Dataset, tokenizer: OneRecTokenizer) -> Dataset:
    """Rows by catalogue index: `history`, `session` and `exposed` in place of those of `history_item_ids`,
    `session_item_ids` and `exposed_item_ids` that there are, and `length`, the items of the history. Other columns are
    kept.

    Raises:
        ValueError: If an item is not in the tokenizer's catalogue.
    """
    table = sessions.with_format("arrow")[:]
    columns = {name: table[name] for name in table.column_names}
    for name in ("history", "session", "exposed"):
        if f"{name}_item_ids" in columns:
            columns[name] = catalogue_index_lists(columns.pop(f"{name}_item_ids"), tokenizer.item_index)
    if "history" in columns:
        columns["length"] = pc.list_value_length(columns["history"])
    return Dataset(pa.table(columns))


def user_feature_values(sessions: Dataset) -> dict[str, list[str]]:
    """`OneRecConfig.user_features` of sessions with a column `user_features`: the values that occur, by column."""
    if "user_features" not in sessions.column_names:
        return {}
    column = sessions.with_format("arrow")[:]["user_features"]
    return {
        name: sorted(pc.unique(pc.struct_field(column, name)).drop_null().to_pylist())
        for name in sessions.features["user_features"]
    }


def share_histories(sessions: Dataset, history_items: int, targets_per_row: int = 16) -> Dataset:
    """Sessions of [`index_sessions`] for a causal encoder, which encodes a history once for the targets after each of
    its prefixes.

    Consecutive sessions of a user whose histories continue one another share the last one's history. Where histories
    are cut to the latest `history_items`, a target may thus lose its oldest behaviours, at most half of
    `history_items`. Histories of similar length with about `targets_per_row` targets in all are packed in a row, so
    that the work of a batch hardly varies.

    Args:
        sessions (`Dataset`): A user's sessions stand together, in order of time.
        history_items (`int`): n, the latest behaviours of a history that are kept.
        targets_per_row (`int`): Divide the batch size by it to keep the targets of a batch.

    Returns:
        `Dataset`: `rows`, per history the columns of its last session and, in place of `session`, `sessions` and
        `prefixes`, the items of the history before each; and `length`, the items of the longest history.
    """
    table = sessions.with_format("arrow")[:].combine_chunks()
    history, lengths = table["history"].combine_chunks(), np.asarray(sessions["length"][:], dtype=np.int64)
    history = pc.list_flatten(history).to_numpy()
    kept = np.minimum(lengths, history_items)
    shift = _continued_histories(history, np.cumsum(lengths) - kept, kept, _same_user(table))
    # The end of each history in its user's run of behaviours; a chain of continued histories starts a run.
    chain = np.cumsum(shift < 0)
    starts = np.flatnonzero(shift < 0)
    dropped = np.cumsum(np.maximum(shift, 0))
    end = dropped - np.repeat(dropped[starts], np.diff(np.r_[starts, len(kept)])) + kept
    block = np.maximum(-(-(end - history_items) // max(history_items // 2, 1)), 0)
    group = np.cumsum((np.diff(chain, prepend=-1) != 0) | (np.diff(block, prepend=-1) != 0)) - 1
    last = np.r_[np.flatnonzero(np.diff(group)), len(group) - 1]
    prefixes = kept[last][group] - (end[last][group] - end)

    counts = np.bincount(group)
    shared = table.take(last)
    columns = {name: shared[name].combine_chunks() for name in shared.column_names if name != "session"}
    offsets = pa.array(np.r_[0, np.cumsum(counts)].astype(np.int32))
    columns["sessions"] = pa.ListArray.from_arrays(offsets, table["session"].combine_chunks())
    columns["prefixes"] = pa.ListArray.from_arrays(offsets, pa.array(prefixes))
    by_length = np.argsort(kept[last], kind="stable")
    bins = (np.cumsum(counts[by_length]) - 1) // targets_per_row
    first = np.flatnonzero(np.diff(bins, prepend=-1))
    rows = pa.StructArray.from_arrays(list(columns.values()), names=list(columns)).take(pa.array(by_length))
    packed = pa.ListArray.from_arrays(pa.array(np.r_[first, len(bins)].astype(np.int32)), rows)
    longest = kept[last][by_length][np.r_[first[1:], len(bins)] - 1]
    return Dataset(pa.table({"rows": packed, "length": longest}))


def _same_user(table: pa.Table) -> np.ndarray:
    """Whether each row has the user of the row before it."""
    users = table["user_id"].combine_chunks()
    return np.r_[False, pc.equal(users[1:], users[:-1]).to_numpy(zero_copy_only=False)]


def _continued_histories(
    flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray, same_user: np.ndarray
) -> np.ndarray:
    """By how many behaviours each history begins later than the one before it which it continues; -1 if it does not.

    Args:
        flat (`np.ndarray`): The histories' catalogue indices, one behind the other; history i is
            `flat[starts[i] : starts[i] + lengths[i]]`.
    """
    shift = np.full(len(starts), -1)
    candidates = np.flatnonzero(same_user)
    candidates = candidates[(lengths[candidates - 1] > 0) & (lengths[candidates] >= lengths[candidates - 1])]
    longest = int(lengths.max(initial=0))
    for step in range(longest // 2 + 1):
        # Only a history that is cut can begin later; most are settled by the first step.
        overlap = lengths[candidates - 1] - step
        possible = candidates[(overlap > 0) & (flat[starts[candidates]] == flat[starts[candidates - 1] + step])]
        overlap = lengths[possible - 1] - step
        pair = np.repeat(np.arange(len(possible)), overlap)
        within = np.arange(len(pair)) - np.repeat(np.cumsum(overlap) - overlap, overlap)
        differs = flat[starts[possible][pair] + within] != flat[starts[possible - 1][pair] + step + within]
        found = possible[np.bincount(pair[differs], minlength=len(possible)) == 0]
        shift[found] = step
        candidates = candidates[shift[candidates] < 0]
        if not len(candidates):
            break
    return shift


class SessionCollator:
    """Rows of [`index_sessions`], or of [`share_histories`], to the model's inputs.

    Args:
        tokenizer ([`OneRecTokenizer`]): Lays out both sequences.
        model ([`OneRecForConditionalGeneration`]): Gives n, m and the shift of the labels.
    """

    def __init__(self, tokenizer: OneRecTokenizer, model: OneRecForConditionalGeneration):
        self.tokenizer = tokenizer
        self.config = model.config
        self.shift = model.prepare_decoder_input_ids_from_labels

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """What [`encode_history_rows`] makes; `decoder_input_ids` and `labels` (batch, session tokens).

        Where histories are shared, there is a row of the latter two for each target, and `target_histories` and
        `target_prefixes` (targets,). BOS is masked out of the labels here, so that the trainer counts the predicted
        codes alone.
        """
        shared = {}
        sessions = [row["session"] for row in rows] if "session" in rows[0] else []
        if not sessions:
            rows = [row for packed in rows for row in packed["rows"]]
            sessions = [session for row in rows for session in row["sessions"]]
            counts = torch.tensor([len(row["sessions"]) for row in rows])
            shared["target_histories"] = torch.arange(len(rows)).repeat_interleave(counts)
            shared["target_prefixes"] = torch.tensor([items for row in rows for items in row["prefixes"]])
        batch = encode_history_rows(rows, self.tokenizer, self.config)
        labels = self.tokenizer.encode_sessions(sessions, max_items=self.config.session_items, catalogue_indices=True)
        return {
            **batch,
            "decoder_input_ids": self.shift(labels),
            "labels": labels.masked_fill(labels == self.config.bos_token_id, -100),
            **shared,
        }


class ExpertBalanceCallback(TrainerCallback):
    """Moves the routers' selection biases after every optimizer step; `load` is what the last one found."""

    def __init__(self):
        self.load: dict[str, torch.Tensor] = {}

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        # Wrapped by DDP or FSDP the model keeps its parameters under `module`.
        unwrapped = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
        self.load = unwrapped.model.update_expert_bias()

    def log_entries(self) -> dict[str, float | str]:
        """The load of the last step as trackers take it: numbers, and a line of all experts' loads for each layer."""
        entries = {name: round(value.item(), 4) for name, value in self.load.items() if value.dim() == 0}
        for layer, loads in enumerate(self.load["expert_load"].tolist() if self.load else []):
            entries[f"expert_load_layer_{layer}"] = " ".join(f"{load:.2f}" for load in loads)
        return entries


class CheckpointCompleteCallback(TrainerCallback):
    """Marks a checkpoint once every file of it is written; only marked ones are resumed from."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / CHECKPOINT_COMPLETE).touch()


def latest_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The latest whole checkpoint below `output_dir`; half-written ones, left by a kill, are removed."""
    complete = []
    for checkpoint in Path(output_dir).glob("checkpoint-*"):
        if (checkpoint / CHECKPOINT_COMPLETE).exists():
            complete.append(checkpoint)
        else:
            shutil.rmtree(checkpoint, ignore_errors=True)
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


class OneRecPretrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` on rows of [`index_sessions`], with the experts balanced after every step."""

    def __init__(self, model: OneRecForConditionalGeneration, tokenizer: OneRecTokenizer, args, **kwargs):
        if args.use_cpu:
            model.set_experts_implementation(CPU_EXPERTS)
        self.expert_balance = ExpertBalanceCallback()
        callbacks = [self.expert_balance, CheckpointCompleteCallback(), *kwargs.pop("callbacks", [])]
        super().__init__(
            model=model,
            args=args,
            data_collator=SessionCollator(tokenizer, model),
            processing_class=tokenizer,
            callbacks=callbacks,
            **kwargs,
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            # A data set's column reads its table for every single length that the sampler looks at.
            sampler.lengths = sampler.lengths[:]
        return sampler

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs = logs | self.expert_balance.log_entries()
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self):
        # `length` must survive for length-grouped batches; the collator reads the others.
        self._signature_columns = ["history", "session", "length", "rows", *HISTORY_FEATURES]


__all__ = [
    "CheckpointCompleteCallback",
    "ExpertBalanceCallback",
    "OneRecPretrainer",
    "SessionCollator",
    "catalogue_index_lists",
    "index_sessions",
    "latest_complete_checkpoint",
    "share_histories",
    "user_feature_values",
]
