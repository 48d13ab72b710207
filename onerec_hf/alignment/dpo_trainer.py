"""Preference alignment of the session generator (paper section 3.3.2, eq 8-10 and Algorithm 2) on `trl.DPOTrainer`.

The loss of a step is L_NTP + lambda L_DPO: next-token prediction on ordinary training rows mixed in, and DPO on pairs
of sessions that the previous snapshot M_t generated, with M_t as the reference. Where Algorithm 2 draws pairs for a
share r_DPO of the samples in passing, a round's pairs are drawn beforehand here (`session_sampler`) and `ntp_per_pair`
ordinary rows go with each: the paper's mix is (1 - r_DPO) / r_DPO of them, at a weight of lambda times r_DPO for L_DPO
as L_NTP and L_DPO are each averaged over their own rows.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from trl import DPOConfig, DPOTrainer

from ..history_features import HISTORY_FEATURES, encode_history_rows
from ..modeling_onerec import OneRecEncoderOutput, OneRecForConditionalGeneration
from ..pretraining import SessionCollator
from ..session_rows import rows_of, training_sessions
from ..tokenization_onerec import BOS_TOKEN_ID, IGNORE_INDEX, PAD_TOKEN_ID, OneRecTokenizer
from ..typed_arguments import typed_arguments

NTP_PREFIX = "ntp_"
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
# Losses beside TRL's own; each stands alone.
CDPO, CPO, SIMPO, SDPO = "cdpo", "cpo", "simpo", "sdpo"
SFT = "sft"  # TRL's
REFERENCE_FREE = (CPO, SIMPO, SFT)


@typed_arguments
@dataclass
class OneRecDPOConfig(DPOConfig):
    """Arguments of [`OneRecDPOTrainer`]: `trl.DPOConfig`, how L_NTP and L_DPO are mixed, and further losses.
    `max_length` has no effect: the tokenizer gives whole sessions. By default `gradient_checkpointing` is off, and
    `bf16` on where there is a CUDA device.

    `loss_type` is one of TRL's (`"sigmoid"` is DPO, `"ipo"`, `"robust"` rDPO; several may be combined), or alone

    - `"cdpo"`: conservative DPO, the cross-entropy with labels smoothed by `label_smoothing`;
    - `"cpo"`: CPO (arXiv 2401.08417), DPO without reference and `cpo_alpha` times the winner's negative log-likelihood
      per code;
    - `"simpo"`: SimPO (arXiv 2405.14734), log-probabilities per code without reference and the margin `simpo_gamma`;
    - `"sdpo"`: S-DPO (arXiv 2406.09215), the winner against all rejected sessions of its pair at once.
    """

    lambda_dpo: float = field(default=1.0, metadata={"help": "Weight of L_DPO beside L_NTP (lambda of Algorithm 2)."})
    ntp_per_pair: int = field(default=1, metadata={"help": "Ordinary training rows with each pair; 0: none."})
    cpo_alpha: float = field(default=1.0, metadata={"help": "Weight of the likelihood term of loss_type 'cpo'."})
    simpo_gamma: float = field(default=0.5, metadata={"help": "Margin of loss_type 'simpo'."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Whether activations are computed anew."})

    def __post_init__(self):
        if self.lambda_dpo < 0 or self.ntp_per_pair < 0:
            raise ValueError(
                f"lambda_dpo and ntp_per_pair must not be negative, got {self.lambda_dpo} and {self.ntp_per_pair}."
            )
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        alone = set(self.loss_type) & {CDPO, CPO, SIMPO, SDPO}
        if alone and len(self.loss_type) > 1:
            raise ValueError(f"loss_type {alone.pop()!r} stands alone, got {self.loss_type}.")
        if {CDPO, "robust"} & set(self.loss_type) and not 0 < self.label_smoothing < 0.5:
            raise ValueError(
                f"loss_type {self.loss_type} needs label_smoothing, the share of flipped labels, in (0, 0.5), got "
                f"{self.label_smoothing}."
            )
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and not self.fp16
        if self.reference_free:
            self.precompute_ref_log_probs = True  # their constants need no reference model
        super().__post_init__()

    @property
    def reference_free(self) -> bool:
        return set(self.loss_type) <= set(REFERENCE_FREE)

    def trl_losses(self) -> tuple[list[str], list[float]]:
        """`loss_type` as TRL's losses and their weights. TRL takes a reference's log-probabilities from the batch,
        where those of the reference-free losses are constants: [`PreferenceCollator`]."""
        name = self.loss_type[0]
        if name == CDPO:
            # With s and f the losses of the label as it is and flipped, robust is ((1 - e) s - e f) / (1 - 2 e), of
            # which follows (1 - e) s + e f.
            smoothing = self.label_smoothing
            return ["sigmoid", "robust"], [2 * (1 - smoothing), 2 * smoothing - 1]
        if name == CPO:
            return ["sigmoid", "sft"], [1.0, self.cpo_alpha]
        if name == SIMPO:
            return ["sigmoid_norm"], [1.0]
        return self.loss_type, self.loss_weights or [1.0] * len(self.loss_type)


class PreferenceCollator:
    """Batches of B pairs for [`OneRecDPOTrainer`] from rows of `history`, `chosen` and `rejected` (catalogue indices:
    a session and a list of K or fewer).

    `encoder_input_ids` and `encoder_attention_mask` `(B, T)`, and what else [`encode_history_rows`] makes for this
    model, hold each history once. `input_ids` `((1 + K) B, S)` are the decoder's sequences `<bos> a b c <bos> a b c`:
    all chosen sessions, all first rejected ones, all second ones; `completion_mask` is 1 on code tokens alone: like
    eq 4's loss, a session's log-probability leaves out `<bos>`, which generation never chooses. `rejected_mask`
    `(B, K)` is False where a pair has fewer than K. With an item head `session_items` `((1 + K) B, m)` are the same
    sessions by catalogue index, -1 where there is no item. With `ntp_rows` in the rows the batch also has what
    `SessionCollator` makes of those rows of `ntp_dataset`, with the prefix `ntp_`.

    Args:
        ntp_dataset: Ordinary training rows with `history` and `session`, or those of `share_histories` for a causal
            encoder.
        num_rejected: K; a pair's further ones are passed over. By default 1, whose log-probability under the reference
            has the shape `(B,)` and not `(B, K)`.
        chosen_margin: What stands for the reference's log-probability per code of the chosen sessions, 0 for the
            rejected ones, in `ref_chosen_logps` and `ref_rejected_logps`; by default these are the rows' own, if any.

    Raises:
        ValueError: For a model of several semantic IDs per item.
    """

    def __init__(
        self,
        tokenizer: OneRecTokenizer,
        model: OneRecForConditionalGeneration,
        ntp_dataset: Dataset | None = None,
        num_rejected: int | None = None,
        chosen_margin: float | None = None,
    ):
        if model.config.num_semantic_ids > 1:
            raise ValueError("Alignment is for one semantic ID per item, the model has several.")
        self.tokenizer, self.config = tokenizer, model.config
        self.ntp_dataset, self.chosen_margin = ntp_dataset, chosen_margin
        self.several, self.num_rejected = num_rejected is not None, num_rejected or 1
        self.session_collator = SessionCollator(tokenizer, model)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        encoder = encode_history_rows(rows, self.tokenizer, self.config)
        sessions = [row["chosen"] for row in rows]
        for place in range(self.num_rejected):
            # Where a pair has fewer, its first stands in, masked.
            sessions += [row["rejected"][place if place < len(row["rejected"]) else 0] for row in rows]
        labels = self.tokenizer.encode_sessions(sessions, catalogue_indices=True)
        items = {}
        if self.config.item_head != "none":
            indices = [torch.tensor(session) for session in sessions]
            items["session_items"] = pad_sequence(indices, batch_first=True, padding_value=-1)
        is_code = (labels != IGNORE_INDEX) & (labels != BOS_TOKEN_ID)
        input_ids = F.pad(labels, (1, 0), value=BOS_TOKEN_ID)
        input_ids = input_ids.masked_fill(input_ids == IGNORE_INDEX, PAD_TOKEN_ID)
        batch = {
            "encoder_input_ids": encoder.pop("input_ids"),
            "encoder_attention_mask": encoder.pop("attention_mask"),
            **encoder,
            **items,
            "input_ids": input_ids,
            "attention_mask": (input_ids != PAD_TOKEN_ID).long(),
            "completion_mask": F.pad(is_code.long(), (1, 0)),
            "rejected_mask": torch.arange(self.num_rejected) < torch.tensor([[len(row["rejected"])] for row in rows]),
        }
        if self.chosen_margin is not None:
            batch["ref_chosen_logps"] = self.chosen_margin * is_code[: len(rows)].sum(1).float()
            batch["ref_rejected_logps"] = torch.zeros(len(rows))
        elif "ref_chosen_logps" in rows[0]:
            batch["ref_chosen_logps"] = torch.tensor([row["ref_chosen_logps"] for row in rows])
            rejected = [np.atleast_1d(row["ref_rejected_logps"])[: self.num_rejected] for row in rows]
            padded = [np.pad(log_probs, (0, self.num_rejected - len(log_probs))) for log_probs in rejected]
            batch["ref_rejected_logps"] = torch.from_numpy(np.stack(padded).astype(np.float32))
            if not self.several:
                batch["ref_rejected_logps"] = batch["ref_rejected_logps"].squeeze(1)
        ntp_rows = [index for row in rows for index in row.get("ntp_rows", [])]
        if ntp_rows:
            ordinary = self.ntp_dataset.select(ntp_rows).to_list()
            batch |= {f"{NTP_PREFIX}{name}": tensor for name, tensor in self.session_collator(ordinary).items()}
        return batch


class _SessionModel:
    """Lets TRL's loss call an encoder-decoder, wrapped or not, as if it were a decoder of `input_ids`, whose rows are
    all chosen sessions, then all rejected ones. The model reads the sessions of a history in consecutive rows. With an
    item head the `log_probs` of an item's codes sum to its log-probability under the mixture."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def __call__(
        self,
        input_ids,
        attention_mask,
        encoder_input_ids,
        encoder_attention_mask,
        labels=None,
        session_items=None,
        **kwargs,
    ):
        rows = torch.arange(len(input_ids), device=input_ids.device)
        by_history = rows.view(-1, len(encoder_input_ids)).T.flatten()
        if labels is not None:
            kwargs["labels"] = labels[by_history]
        encoded, mixed = [], self._is_mixture(session_items)
        with self._encoder_outputs(encoded) if mixed else nullcontext():
            # The decoder is causal and its padding stands on the right, so it needs no mask of its own.
            outputs = self.model(
                input_ids=encoder_input_ids,
                attention_mask=encoder_attention_mask,
                decoder_input_ids=input_ids[by_history],
                with_item_states=mixed,
                **kwargs,
            )
        given = by_history.argsort()
        for name, value in outputs.items():
            if torch.is_tensor(value) and value.shape[:1] == rows.shape:
                outputs[name] = value[given]
        if mixed and outputs.get("log_probs") is not None:
            generator = self._generator()
            mask = generator.get_encoder().position_mask(encoder_attention_mask)
            outputs["log_probs"] = _mixture_log_probs(generator, outputs["log_probs"], session_items, encoded[0], mask)
        return outputs

    def _is_mixture(self, session_items: torch.LongTensor | None) -> bool:
        """Whether the item head takes part in these sessions; its own encoders run only then."""
        if session_items is None:
            return False
        share = self._generator().configured_item_share(session_items.shape[1])
        return share is None or share > 0

    def _generator(self) -> OneRecForConditionalGeneration:
        return next(part for part in self.model.modules() if isinstance(part, OneRecForConditionalGeneration))

    @contextmanager
    def _encoder_outputs(self, found: list) -> Iterator[None]:
        """Appends what the encoder gives: TRL's output has no place for the item head's states."""
        encoder = self._generator().get_encoder()
        hook = encoder.register_forward_hook(lambda *call: found.append(call[-1]))
        try:
            yield
        finally:
            hook.remove()


def _mixture_log_probs(
    model: OneRecForConditionalGeneration,
    log_probs: torch.Tensor,
    items: torch.LongTensor,
    encoded: OneRecEncoderOutput,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Log-probabilities of codes (rows, tokens - 1) in which each item's last code makes up what its log-probability
    under P(item) = g P_item + (1 - g) P_codes is more than that of its codes.

    Args:
        items: (rows, m) catalogue indices, -1 for none; row r has the history r modulo the batch.
        encoded, mask: of the batch's histories, from the encoder.
    """
    states = encoded.item_states
    levels, share = model.config.num_levels, model.item_shares(states, mask, items.shape[1])
    history = torch.arange(len(items), device=items.device)[:, None] % len(states)
    of_catalogue = F.pad(model.item_log_probs(states, mask, encoded.item_indices), (0, 1), value=-torch.inf)
    # Items that are newer than the head have no probability by it.
    of_items = of_catalogue[history, items.clamp(0, of_catalogue.shape[1] - 1)]
    of_codes = F.pad(log_probs, (0, 1)).view(*items.shape, levels + 1)
    total = of_codes[..., :levels].sum(-1)
    share = torch.as_tensor(share, dtype=total.dtype, device=total.device)
    share = share.expand(len(states))[history]
    mixed = torch.logaddexp(share.log() + of_items, (-share).log1p() + total)
    more = torch.where(items >= 0, mixed - total, 0.0)
    return (of_codes + F.pad(more[..., None], (levels - 1, 1))).flatten(1)[:, :-1]


class OneRecDPOTrainer(DPOTrainer):
    """One round of iterative preference alignment, from M_t to M_(t+1).

    Without `ExpertBalanceCallback` the experts' selection biases stay as M_t has them, so that the policy differs from
    the reference by what the loss has changed and nothing else. Checkpoints hold the policy alone: to resume, build
    the trainer again from M_t (never from a checkpoint, or the reference would be another one) and call
    `train(resume_from_checkpoint=True)`.

    >>> from onerec_hf import ItemTrie, OneRecConfig, PreferenceSampling, SessionScorer, SimulatedFeed
    >>> from onerec_hf import create_reward_model, sample_preferences
    >>> feed = SimulatedFeed.generate(users=40, items=160).feed()
    >>> tokenizer = OneRecTokenizer.fit(feed)
    >>> sizes = {"history_items": 16, "session_items": 2}
    >>> config = OneRecConfig.from_preset("debug", codebook_sizes=tokenizer.codebook_sizes, **sizes)
    >>> model = OneRecForConditionalGeneration(config)
    >>> scorer = SessionScorer(create_reward_model(sizes, feed, tokenizer), tokenizer)
    >>> trie, sampling = ItemTrie.from_tokenizer(tokenizer), PreferenceSampling(r_dpo=0.1, num_candidates=4)
    >>> pairs = sample_preferences(model, trie, scorer, feed, sampling)
    >>> args = OneRecDPOConfig("runs/align", max_steps=1, save_strategy="no", report_to="none")
    >>> trainer = OneRecDPOTrainer(model, args, pairs, tokenizer, ntp_dataset=feed)
    >>> trainer.train().global_step  # doctest: +ELLIPSIS
    {'train_runtime': ...}
    1

    Args:
        model: M_t, trained in place.
        train_dataset: Pairs from [`sample_preferences`]. With the columns `ref_chosen_logps` (numbers) and
            `ref_rejected_logps` (a list for each pair) these are the reference's log-probabilities, and there is no
            reference model.
        processing_class: The tokenizer.
        ntp_dataset: Training rows with `history` and `session` (catalogue indices), of which `args.ntp_per_pair` go
            with each pair, every row once before any comes twice; with a causal encoder rows of `share_histories` too,
            each of many sessions. Of a [`Feed`], or a log that [`feed_from_log`] reads by its default names,
            [`training_sessions`].
        ref_model: The reference. By default M_t: a frozen copy of `model`, with `peft_config` the model without its
            adapter; none where the loss is reference-free.

    Raises:
        ValueError: if there are no pairs, `args.ntp_per_pair` is above 0 without rows in `ntp_dataset`, or the model
            was trained on the catalogue of another fit.
    """

    def __init__(
        self,
        model: OneRecForConditionalGeneration,
        args: OneRecDPOConfig,
        train_dataset: Dataset,
        processing_class: OneRecTokenizer,
        ntp_dataset=None,
        ref_model: OneRecForConditionalGeneration | None = None,
        **kwargs,
    ):
        if not len(train_dataset):
            raise ValueError(
                "There is no preference pair to train on: raise r_dpo or num_candidates, or lower min_reward_margin."
            )
        ntp_dataset = rows_of(ntp_dataset, lambda feed: training_sessions(feed, processing_class, model.config))
        if args.ntp_per_pair and not ntp_dataset:
            raise ValueError(f"ntp_per_pair is {args.ntp_per_pair}, but ntp_dataset has no rows: give them, or set 0.")
        processing_class.tie(model.config)
        self._ntp_rows = len(ntp_dataset) if ntp_dataset is not None else 0
        if args.reference_free or REFERENCE_COLUMNS[0] in train_dataset.column_names:
            args.precompute_ref_log_probs, ref_model = True, None  # constants, or there already
            if parse_flag_from_env("ACCELERATE_USE_FSDP"):  # then TRL loads one, from where the model came from
                ref_model = copy.deepcopy(model)
        elif ref_model is None and kwargs.get("peft_config") is None:
            ref_model = copy.deepcopy(model)
        if ref_model is not None:
            # In evaluation mode the reference neither drops anything out nor counts towards the experts' load.
            ref_model.requires_grad_(False).eval()
        num_rejected = max(map(len, train_dataset["rejected"][:])) if SDPO in args.loss_type else None
        chosen_margin = {CPO: 0.0, SIMPO: args.simpo_gamma / args.beta}.get(args.loss_type[0])
        collator = PreferenceCollator(processing_class, model, ntp_dataset, num_rejected, chosen_margin)
        kwargs |= {"train_dataset": train_dataset, "processing_class": processing_class}
        super().__init__(model=model, ref_model=ref_model, args=args, data_collator=collator, **kwargs)
        self.loss_types, self.loss_weights = args.trl_losses()
        # TRL shall read the reference's log-probabilities from the batch, where `_compute_loss` puts them.
        self.precompute_ref_logps = True

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
        self._signature_columns = ["history", "chosen", "rejected", *HISTORY_FEATURES, "ntp_rows", *REFERENCE_COLUMNS]

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if self.args.reference_free or REFERENCE_COLUMNS[0] in dataset.column_names:
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model, inputs):
        """Reference log-probabilities of a batch's sessions: `(B,)` chosen and `(B,)` rejected, by S-DPO `(B, K)`."""
        pairs, count = _pair_inputs(inputs), len(inputs["rejected_mask"])
        log_probs = torch.cat(super().compute_ref_log_probs(_SessionModel(model), pairs))
        rejected = log_probs[count:].view(-1, count).T
        return log_probs[:count], rejected if SDPO in self.args.loss_type else rejected.squeeze(1)

    def _compute_loss(self, model, inputs, return_outputs):
        mode = "train" if self.model.training else "eval"
        inputs, outputs, policy = dict(inputs), None, _SessionModel(model)
        if not self.args.reference_free and "ref_chosen_logps" not in inputs:
            references = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs |= dict(zip(REFERENCE_COLUMNS, references, strict=True))
        if self.loss_types == [SFT]:
            dpo_loss = self._likelihood_loss(policy, inputs, mode)
        elif SDPO in self.loss_types:
            dpo_loss = self._softmax_dpo_loss(policy, inputs, mode)
        else:
            result = super()._compute_loss(policy, _pair_inputs(inputs), return_outputs)
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

    def _likelihood_loss(self, model: _SessionModel, inputs: dict[str, torch.Tensor], mode: str) -> torch.Tensor:
        """TRL's loss "sft", the chosen sessions' negative log-likelihood per code, without a forward of the others."""
        pairs, count = _pair_inputs(inputs), len(inputs["rejected_mask"])
        for column in REFERENCE_COLUMNS:
            pairs.pop(column, None)
        of_sessions = ("input_ids", "attention_mask", "completion_mask", "session_items")
        pairs |= {name: pairs[name][:count] for name in of_sessions if name in pairs}
        completion = pairs.pop("completion_mask")
        labels = pairs["input_ids"].masked_fill(completion == 0, -100)
        log_probs = model(**pairs, labels=labels, use_cache=False, fused_lm_head=True).log_probs
        chosen = log_probs.sum(1).detach()
        self._metrics[mode]["logps/chosen"].append(self.accelerator.gather(chosen).mean().item())
        return -log_probs[completion[:, 1:].bool()].mean()

    def _softmax_dpo_loss(self, model: _SessionModel, inputs: dict[str, torch.Tensor], mode: str) -> torch.Tensor:
        """S-DPO: -log sigmoid(-log sum_j exp(beta (r_j - r_0))) with the log-ratios r to the reference of the chosen
        session, 0, and of the rejected ones (eq 11 of arXiv 2406.09215)."""
        pairs, mask = _pair_inputs(inputs), inputs["rejected_mask"]
        labels = pairs["input_ids"].masked_fill(pairs.pop("completion_mask") == 0, -100)
        references = [pairs.pop(column) for column in REFERENCE_COLUMNS]
        log_probs = model(**pairs, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(1)
        chosen_log_probs, rejected_log_probs = log_probs[: len(mask)], log_probs[len(mask) :].view(-1, len(mask)).T
        chosen = self.beta * (chosen_log_probs - references[0])
        rejected = self.beta * (rejected_log_probs - references[1])
        rejected = rejected.masked_fill(~mask, -torch.inf)
        loss = -F.logsigmoid(-(rejected - chosen[:, None]).logsumexp(1)).mean()
        mean_rejected = rejected.masked_fill(~mask, 0).sum(1) / mask.sum(1)
        for name, values in (
            ("rewards/chosen", chosen),
            ("rewards/rejected", mean_rejected),
            ("rewards/margins", chosen - mean_rejected),
            ("rewards/accuracies", (chosen > rejected.amax(1)).float()),
            ("logps/chosen", chosen_log_probs),
            ("logps/rejected", rejected_log_probs[:, 0]),
        ):
            self._metrics[mode][name].append(self.accelerator.gather(values.detach()).mean().item())
        return loss

    def create_model_card(self, *args, **kwargs):
        """Does nothing: TRL's card describes a chat model. The card is made from the whole run's results."""


def _pair_inputs(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What TRL reads of a batch, without the ordinary rows."""
    return {name: tensor for name, tensor in inputs.items() if not name.startswith((NTP_PREFIX, "rejected_mask"))}
