"""Session-wise next-token prediction (eq 3 and 4) on transformers' `Seq2SeqTrainer`."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from .configuration_onerec import OneRecConfig
from .data import Feed
from .history_features import HISTORY_FEATURES, encode_history_rows
from .modeling_onerec import OneRecForConditionalGeneration
from .renamed_arguments import renamed_arguments
from .session_rows import (
    catalogue_index_lists,
    drawn_with,
    index_sessions,
    rows_of,
    training_sessions,
    user_feature_values,
)
from .sharded_rows import ShardedRows, ShardSampler, order_seed, torch_generator
from .shared_histories import share_histories
from .tokenization_onerec import OneRecTokenizer
from .training_checkpoints import (
    CHECKPOINT_COMPLETE,
    CheckpointCompleteCallback,
    latest_complete_checkpoint,
    train_from_latest,
)

TARGETS_PER_ROW = 16  # with a causal encoder: of histories of similar length, so that batches are alike
CPU_EXPERTS = "eager"  # the fastest of transformers' experts implementations to train with on a CPU


def shared_for_training(
    sessions: Dataset | ShardedRows, config: OneRecConfig, args: Seq2SeqTrainingArguments
) -> tuple[Dataset | ShardedRows, Seq2SeqTrainingArguments]:
    """Sessions and arguments as they are, or for a causal encoder rows of [`share_histories`] and, as the batch size
    counts targets, a smaller one of rows; of sharded rows those of each shard."""
    if config.encoder_attention != "causal":
        return sessions, args
    targets_per_row = min(TARGETS_PER_ROW, args.per_device_train_batch_size)
    args = copy.copy(args)
    args.per_device_train_batch_size //= targets_per_row
    share = partial(share_histories, history_items=config.history_items, targets_per_row=targets_per_row)
    return sessions.then(share) if isinstance(sessions, ShardedRows) else share(sessions), args


class SessionCollator:
    """Rows of [`index_sessions`], or of [`share_histories`], to the model's inputs.

    Of several semantic IDs one is drawn for each target session at each time, each ID as often as the others in a
    batch: so a step costs what it does with one ID. The draws follow from what the batch holds ([`drawn_with`]).

    Args:
        sessions_continue_histories: Whether a session's items are such as histories hold. Then the item head learns to
            predict those of a shared history's last session too, whose targets before them do not see them.

    Raises:
        ValueError: If the model was trained on the semantic IDs of another fit.
    """

    def __init__(
        self,
        tokenizer: OneRecTokenizer,
        model: OneRecForConditionalGeneration,
        sessions_continue_histories: bool = False,
    ):
        tokenizer.require_trained_with(model.config)
        self.tokenizer = tokenizer
        self.config = model.config
        self.continues_histories = sessions_continue_histories and model.config.item_head != "none"
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
            if self.continues_histories:
                rows = [self._continued(row) for row in rows]
            sessions = [session for row in rows for session in row["sessions"]]
            counts = torch.tensor([len(row["sessions"]) for row in rows])
            shared["target_histories"] = torch.arange(len(rows)).repeat_interleave(counts)
            shared["target_prefixes"] = torch.tensor([items for row in rows for items in row["prefixes"]])
        batch = encode_history_rows(rows, self.tokenizer, self.config)
        if self.config.item_head != "none":
            batch["item_targets"] = self._item_targets(rows, batch["history_item_indices"].shape[1])
        labels = self.tokenizer.encode_sessions(
            sessions,
            max_items=self.config.session_items,
            catalogue_indices=True,
            id_numbers=self._drawn_ids(sessions),
        )
        return {
            **batch,
            "decoder_input_ids": self.shift(labels),
            "labels": labels.masked_fill(labels == self.config.bos_token_id, -100),
            **shared,
        }

    def _drawn_ids(self, sessions: list[list[int]]) -> np.ndarray | int:
        """Numbers (sessions,) of the semantic IDs that the target sessions are written in."""
        num_ids = self.config.num_semantic_ids
        if num_ids == 1:
            return 0
        generator = drawn_with(np.concatenate(sessions))
        return (generator.permutation(len(sessions)) + generator.integers(num_ids)) % num_ids

    def _continued(self, row: dict[str, Any]) -> dict[str, Any]:
        """A shared history with the items of its last session behind it, all but the last, and `next_item`, that one.

        Where the history is cut, as many of its oldest behaviours leave it as the target with the shortest prefix can
        do without.
        """
        history, session = list(row["history"]), row["sessions"][-1]
        kept = min(len(history), self.config.history_items)
        room = self.config.history_items - kept
        added = min(len(session) - 1, room + max(min(row["prefixes"]) - 1, 0))
        continued = {
            "history": history + session[:added],
            "prefixes": [items - max(added - room, 0) for items in row["prefixes"]],
            "next_item": session[added],
        }
        if self.config.history_feedback:
            unknown = [[None] * len(self.config.history_feedback)]
            continued["history_feedback"] = [*row["history_feedback"], *unknown * added]
        return row | continued

    def _item_targets(self, rows: list[dict[str, Any]], width: int) -> torch.LongTensor:
        """The item after each behaviour of the rows' histories (batch, width), laid out like them: the next one, and
        after the last the first item of the session that follows it, or `next_item`; -100 in front."""
        labels = torch.full((len(rows), width), -100)
        for label, row in zip(labels, rows, strict=True):
            last = row["session"] if "session" in row else row["sessions"][-1]
            following = [*row["history"], row.get("next_item", last[0])][1:][-width:]
            label[width - len(following) :] = torch.tensor(following)
        return labels


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


class _LengthGroupedByEpoch(LengthGroupedSampler):
    """Another order in every epoch that follows from the seed and the epoch alone: the same for every process, and for
    a training that is resumed. The trainer's own follows from torch's generator, which processes share no longer once
    their batches drew for dropout, and which is restored only after the order was drawn."""

    def __init__(self, sampler: LengthGroupedSampler, trainer: Trainer):
        # As a list: a data set's column reads its table for every single length that is looked at.
        super().__init__(sampler.batch_size, lengths=sampler.lengths[:])
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        epoch = int(self.trainer.state.epoch or 0)
        self.generator = torch_generator(np.random.default_rng([order_seed(self.trainer.args), epoch]))
        return super().__iter__()


class OneRecPretrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` on sessions with their histories, with the experts balanced after every step. The model is tied
    to the tokenizer's catalogue, as another fit's codes would be other items to it.

    >>> from transformers import Seq2SeqTrainingArguments
    >>> from onerec_hf import OneRecConfig, SimulatedFeed
    >>> feed = SimulatedFeed.generate(users=40, items=160).feed()
    >>> tokenizer = OneRecTokenizer.fit(feed)
    >>> config = OneRecConfig.from_preset("debug", codebook_sizes=tokenizer.codebook_sizes, history_items=16)
    >>> args = Seq2SeqTrainingArguments("runs/pretrain", max_steps=2, save_strategy="no", report_to="none")
    >>> trainer = OneRecPretrainer(OneRecForConditionalGeneration(config), args, feed, tokenizer)
    >>> trainer.train().global_step  # doctest: +ELLIPSIS
    {'train_runtime': ...}
    2

    Args:
        train_dataset, eval_dataset: Rows of [`index_sessions`] or [`share_histories`]; or a [`Feed`], or a log that
            [`feed_from_log`] reads by its default names, of which the rows are [`training_sessions`], shared where the
            encoder is causal. The first may also be sessions by item id that do not fit in memory, in the columns of
            [`pretraining_sessions`], with a user's in one shard: a `datasets.IterableDataset` from
            `load_dataset(..., streaming=True)`, shared likewise, whose rows are counted by reading them once; or
            [`ShardedRows`], whose `from_parquet` counts without reading. Their epochs are as those of a table, with
            shards in random order and the rows of a few shards shuffled together.
        processing_class: The tokenizer.
        sessions_continue_histories: See [`SessionCollator`]; those of a feed or a log do.
    """

    @renamed_arguments(tokenizer="processing_class")
    def __init__(
        self,
        model: OneRecForConditionalGeneration,
        args: Seq2SeqTrainingArguments,
        train_dataset,
        processing_class: OneRecTokenizer,
        eval_dataset=None,
        sessions_continue_histories: bool = False,
        **kwargs,
    ):
        if args.device.type == "cpu":
            model.set_experts_implementation(CPU_EXPERTS)
        self.expert_balance = ExpertBalanceCallback()
        kwargs["callbacks"] = [self.expert_balance, CheckpointCompleteCallback(), *kwargs.get("callbacks", [])]
        processing_class.tie(model.config)

        def sessions(feed: Feed) -> Dataset:
            return training_sessions(feed, processing_class, model.config)

        rows = {"train_dataset": rows_of(train_dataset, sessions), "eval_dataset": rows_of(eval_dataset, sessions)}
        continues = sessions_continue_histories
        if isinstance(train_dataset, IterableDataset):
            streamed = ShardedRows(train_dataset, partial(index_sessions, tokenizer=processing_class))
            rows["train_dataset"], args = shared_for_training(streamed, model.config, args)
        elif rows["train_dataset"] is not train_dataset:
            rows["train_dataset"], args = shared_for_training(rows["train_dataset"], model.config, args)
            continues = True
        collator = SessionCollator(processing_class, model, continues)
        super().__init__(
            model=model, args=args, data_collator=collator, processing_class=processing_class, **rows, **kwargs
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(rows, ShardedRows):
            return ShardSampler.for_training(rows, self.args)
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return _LengthGroupedByEpoch(sampler, self)
        return sampler

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs = logs | self.expert_balance.log_entries()
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self):
        # `length` must survive for length-grouped batches; the collator reads the others.
        self._signature_columns = ["history", "session", "length", "rows", *HISTORY_FEATURES]


__all__ = [
    "CHECKPOINT_COMPLETE",
    "CheckpointCompleteCallback",
    "ExpertBalanceCallback",
    "OneRecPretrainer",
    "SessionCollator",
    "catalogue_index_lists",
    "index_sessions",
    "latest_complete_checkpoint",
    "share_histories",
    "train_from_latest",
    "user_feature_values",
]
