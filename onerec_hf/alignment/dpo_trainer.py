"""Preference alignment of the session generator (paper section 3.3.2, eq 8-10 and Algorithm 2) on `trl.DPOTrainer`.

The loss of a step is L_NTP + lambda L_DPO: next-token prediction on ordinary training rows mixed in, and DPO on pairs
of sessions that the previous snapshot M_t generated, with M_t as the reference. Where Algorithm 2 draws pairs for a
share r_DPO of the samples in passing, a round's pairs are drawn beforehand here (`session_sampler`) and `ntp_per_pair`
ordinary rows go with each: the paper's mix is (1 - r_DPO) / r_DPO of them, at a weight of lambda times r_DPO for L_DPO
as L_NTP and L_DPO are each averaged over their own rows.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from ..history_features import HISTORY_FEATURES, encode_history_rows
from ..modeling_onerec import OneRecForConditionalGeneration
from ..pretraining import SessionCollator
from ..tokenization_onerec import BOS_TOKEN_ID, IGNORE_INDEX, PAD_TOKEN_ID, OneRecTokenizer

NTP_PREFIX = "ntp_"


@dataclass
class OneRecDPOConfig(DPOConfig):
    """
    Arguments of [`OneRecDPOTrainer`]: `trl.DPOConfig` and how L_NTP and L_DPO are mixed. `max_length` has no effect:
    the tokenizer gives whole sessions.

    Args:
        lambda_dpo (`float`, *optional*, defaults to 1.0): Weight of L_DPO beside L_NTP (lambda of Algorithm 2).
        ntp_per_pair (`int`, *optional*, defaults to 1): Ordinary training rows mixed in with each pair; 0 for none.
    """

    lambda_dpo: float = field(
        default=1.0, metadata={"help": "Weight of the DPO loss beside next-token prediction (lambda of Algorithm 2)."}
    )
    ntp_per_pair: int = field(
        default=1, metadata={"help": "Next-token prediction rows mixed in with each preference pair; 0 for none."}
    )

    def __post_init__(self):
        if self.lambda_dpo < 0 or self.ntp_per_pair < 0:
            raise ValueError(
                f"lambda_dpo and ntp_per_pair must not be negative, got {self.lambda_dpo} and {self.ntp_per_pair}."
            )
        super().__post_init__()


class PreferenceCollator:
    """
    Batches of B pairs for [`OneRecDPOTrainer`] from rows of `history`, `chosen` and `rejected` (catalogue indices).

    `encoder_input_ids` and `encoder_attention_mask` `(B, T)`, and what else [`encode_history_rows`] makes for this
    model, hold each history once. `input_ids` `(2B, S)` are the decoder's sequences `<bos> a b c <bos> a b c`, all
    chosen sessions first; `completion_mask` is 1 on code tokens
    alone: like eq 4's loss, a session's log-probability leaves out `<bos>`, which generation never chooses. With
    `ntp_rows` in the rows the batch also has what `SessionCollator` makes of those rows of `ntp_dataset`, with the
    prefix `ntp_`.

    Args:
        tokenizer (`OneRecTokenizer`): Gives the layout of histories and sessions.
        model (`OneRecForConditionalGeneration`): Gives n and m.
        ntp_dataset (`Dataset`, *optional*): Ordinary training rows with `history` and `session`.
    """

    def __init__(
        self,
        tokenizer: OneRecTokenizer,
        model: OneRecForConditionalGeneration,
        ntp_dataset: Dataset | None = None,
    ):
        self.tokenizer = tokenizer
        self.config = model.config
        self.ntp_dataset = ntp_dataset
        self.session_collator = SessionCollator(tokenizer, model)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        encoder = encode_history_rows(rows, self.tokenizer, self.config)
        labels = self.tokenizer.encode_sessions(
            [row["chosen"] for row in rows] + [row["rejected"] for row in rows], catalogue_indices=True
        )
        is_code = (labels != IGNORE_INDEX) & (labels != BOS_TOKEN_ID)
        input_ids = F.pad(labels, (1, 0), value=BOS_TOKEN_ID)
        input_ids = input_ids.masked_fill(input_ids == IGNORE_INDEX, PAD_TOKEN_ID)
        batch = {
            "encoder_input_ids": encoder.pop("input_ids"),
            "encoder_attention_mask": encoder.pop("attention_mask"),
            **encoder,
            "input_ids": input_ids,
            "attention_mask": (input_ids != PAD_TOKEN_ID).long(),
            "completion_mask": F.pad(is_code.long(), (1, 0)),
        }
        for column in ("ref_chosen_logps", "ref_rejected_logps"):
            if column in rows[0]:
                batch[column] = torch.tensor([row[column] for row in rows])
        ntp_rows = [index for row in rows for index in row.get("ntp_rows", [])]
        if ntp_rows:
            ordinary = self.ntp_dataset.select(ntp_rows).to_list()
            batch |= {f"{NTP_PREFIX}{name}": tensor for name, tensor in self.session_collator(ordinary).items()}
        return batch


class _SessionScorer:
    """Lets TRL's loss call an encoder-decoder, wrapped or not, as if it were a decoder of `input_ids`."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def __call__(self, input_ids, attention_mask, encoder_input_ids, encoder_attention_mask, **kwargs):
        # The decoder is causal and its padding stands on the right, so it needs no mask of its own.
        return self.model(
            input_ids=encoder_input_ids, attention_mask=encoder_attention_mask, decoder_input_ids=input_ids, **kwargs
        )


class OneRecDPOTrainer(DPOTrainer):
    """
    One round of iterative preference alignment, from M_t to M_(t+1).

    Without `ExpertBalanceCallback` the experts' selection biases stay as M_t has them, so that the policy differs from
    the reference by what the loss has changed and nothing else. Checkpoints hold the policy alone: to resume, build
    the trainer again from M_t (never from a checkpoint, or the reference would be another one) and call
    `train(resume_from_checkpoint=True)`.

    Args:
        model (`OneRecForConditionalGeneration`): M_t, trained in place.
        args (`OneRecDPOConfig`): Training arguments.
        train_dataset (`Dataset`): Pairs from [`sample_preferences`].
        processing_class (`OneRecTokenizer`): The model's tokenizer.
        ntp_dataset (`Dataset`, *optional*): Training rows with `history` and `session` (catalogue indices), of which
            `args.ntp_per_pair` go with each pair, every row once before any comes twice.
        ref_model (`OneRecForConditionalGeneration`, *optional*): The reference; a frozen copy of `model` by default.
        kwargs: `DPOTrainer`'s other arguments.

    Raises:
        ValueError: if there are no pairs, or `args.ntp_per_pair` is above 0 without rows in `ntp_dataset`.
    """

    def __init__(
        self,
        model: OneRecForConditionalGeneration,
        args: OneRecDPOConfig,
        train_dataset: Dataset,
        processing_class: OneRecTokenizer,
        ntp_dataset: Dataset | None = None,
        ref_model: OneRecForConditionalGeneration | None = None,
        **kwargs,
    ):
        if not len(train_dataset):
            raise ValueError(
                "There is no preference pair to train on: raise sample_share or num_candidates, or lower "
                "min_reward_gap."
            )
        if args.ntp_per_pair and not ntp_dataset:
            raise ValueError(f"ntp_per_pair is {args.ntp_per_pair}, but ntp_dataset has no rows: give them, or set 0.")
        self._ntp_rows = len(ntp_dataset) if ntp_dataset is not None else 0
        if ref_model is None:
            ref_model = copy.deepcopy(model)
        # In evaluation mode the reference neither drops anything out nor counts towards the experts' load.
        ref_model.requires_grad_(False).eval()
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=PreferenceCollator(processing_class, model, ntp_dataset),
            train_dataset=train_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.ref_model = _SessionScorer(self.ref_model)

    def _prepare_dataset(self, dataset: Dataset, processing_class, args: OneRecDPOConfig, dataset_name: str):
        # Pairs are catalogue indices already. Which ordinary rows go with which pair is fixed here, rather than drawn
        # by the collator, so that a resumed run sees the same ones.
        if not args.ntp_per_pair or "ntp_rows" in dataset.column_names:
            return dataset
        rng = np.random.default_rng(args.seed)
        needed = len(dataset) * args.ntp_per_pair
        passes = [rng.permutation(self._ntp_rows) for _ in range(-(-needed // self._ntp_rows))]
        rows = np.concatenate(passes)[:needed].reshape(len(dataset), args.ntp_per_pair)
        return dataset.add_column("ntp_rows", rows.tolist())

    def _set_signature_columns_if_needed(self):
        self._signature_columns = [
            "history",
            "chosen",
            "rejected",
            *HISTORY_FEATURES,
            "ntp_rows",
            "ref_chosen_logps",
            "ref_rejected_logps",
        ]

    def compute_ref_log_probs(self, model, inputs):
        """Reference log-probabilities of a batch's sessions, `(B,)` chosen and `(B,)` rejected."""
        # While the base class precomputes them the reference is not wrapped yet.
        scorer = model if isinstance(model, _SessionScorer) else _SessionScorer(model)
        return super().compute_ref_log_probs(scorer, _without_ntp(inputs))

    def _compute_loss(self, model, inputs, return_outputs):
        mode = "train" if self.model.training else "eval"
        result = super()._compute_loss(_SessionScorer(model), _without_ntp(inputs), return_outputs)
        dpo_loss, outputs = result if return_outputs else (result, None)
        loss = self.args.lambda_dpo * dpo_loss
        self._metrics[mode]["dpo_loss"].append(self.accelerator.gather(dpo_loss.detach()).mean().item())
        ntp_inputs = {
            name.removeprefix(NTP_PREFIX): tensor for name, tensor in inputs.items() if name.startswith(NTP_PREFIX)
        }
        if ntp_inputs:
            ntp_loss = model(**ntp_inputs).loss
            loss = ntp_loss + loss
            self._metrics[mode]["ntp_loss"].append(self.accelerator.gather(ntp_loss.detach()).mean().item())
        return (loss, outputs) if return_outputs else loss

    def create_model_card(self, *args, **kwargs):
        """Does nothing: TRL's card describes a chat model. The card is made from the whole run's results."""


def _without_ntp(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in inputs.items() if not name.startswith(NTP_PREFIX)}
