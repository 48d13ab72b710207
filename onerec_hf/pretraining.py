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

from .history_features import HISTORY_FEATURES, encode_history_rows
from .modeling_onerec import OneRecForConditionalGeneration
from .tokenization_onerec import OneRecTokenizer

CHECKPOINT_COMPLETE = "checkpoint_complete"


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
    """Sessions by catalogue index: `history` and `session` in place of `history_item_ids` and `session_item_ids` (or
    the former alone where there is no session), and `length`, the items of the history. Other columns are kept.

    Raises:
        ValueError: If an item is not in the tokenizer's catalogue.
    """
    table = sessions.with_format("arrow")[:]
    columns = {name: table[name] for name in table.column_names}
    for name in ("history", "session"):
        if f"{name}_item_ids" in columns:
            columns[name] = catalogue_index_lists(columns.pop(f"{name}_item_ids"), tokenizer.item_index)
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


class SessionCollator:
    """Rows of [`index_sessions`] to the model's inputs.

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

        BOS is masked out of the labels here, so that the trainer counts the predicted codes alone.
        """
        batch = encode_history_rows(rows, self.tokenizer, self.config)
        labels = self.tokenizer.encode_sessions(
            [row["session"] for row in rows], max_items=self.config.session_items, catalogue_indices=True
        )
        return {
            **batch,
            "decoder_input_ids": self.shift(labels),
            "labels": labels.masked_fill(labels == self.config.bos_token_id, -100),
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

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs = logs | self.expert_balance.log_entries()
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self):
        # `length` must survive for length-grouped batches; the collator reads the others.
        self._signature_columns = ["history", "session", "length", *HISTORY_FEATURES]


__all__ = [
    "CheckpointCompleteCallback",
    "ExpertBalanceCallback",
    "OneRecPretrainer",
    "SessionCollator",
    "catalogue_index_lists",
    "index_sessions",
    "latest_complete_checkpoint",
    "user_feature_values",
]
