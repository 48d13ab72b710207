"""Stage `align`: rounds of Iterative Preference Alignment, M_0 to M_T (section 3.3.2, Algorithm 2).

Before and after every round the policy is checked on sessions held out of training. A round after which
`session_recall@10` has fallen by more than `max_recall_drop` of the seed model's is the last one and is not kept.
"""

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import set_seed

from ..alignment import OneRecDPOConfig, OneRecDPOTrainer
from ..alignment.dpo_trainer import REFERENCE_COLUMNS
from ..evaluation import popular_items
from ..evaluation.alignment_checks import RECALL, AlignmentChecks, session_recall
from ..item_trie import ItemTrie
from ..modeling_onerec import OneRecForConditionalGeneration
from ..pretraining import CPU_EXPERTS
from ..reward import SessionScorer
from ..session_rows import index_sessions
from ..shared_histories import share_histories
from ..staged_files import staged_file
from ..tokenization_onerec import OneRecTokenizer
from ..training_checkpoints import CheckpointCompleteCallback, train_from_latest
from .data_stage import USER_HISTORIES, prepared_data
from .preferences_stage import PAIRS, draw_pairs
from .pretrain_stage import (
    TRAINING_DEFAULTS,
    recent_sessions,
    session_parts,
    training_log,
)
from .recipe_arguments import AlignArguments, PretrainArguments, RecipeArguments, lora_config
from .reward_stage import REWARD_MODEL
from .stage_runner import CHECKPOINTS, MODEL, Stage, read_json, run_stage, stage_dir, write_json
from .tokenize_stage import load_item_embeddings

ALIGNED = "aligned.json"
SEED_CHECKS = "seed_checks.json"

logger = get_logger(__name__)


def run_align(args: RecipeArguments, stage: str = "align", first_pairs: str | None = None) -> Path:
    """Runs the rounds; returns the stage's folder: `round_1` to `round_T` and `model`, the last kept one's model.

    Args:
        stage: the stage's name, another one to align the run's seed model once more.
        first_pairs: the stage that has drawn the first round's pairs ([`run_sample_preferences`] of the seed model
            with the same settings), for alignments that share them. By default the round draws them.
    """

    def work(folder: Path) -> dict | None:
        alignment = Alignment(args, folder, args.output_dir / first_pairs / PAIRS if first_pairs else None)
        last_kept, rounds = alignment.seed_model, []
        for number in range(1, args.align_rounds + 1):
            rounds.append(alignment.round(number, last_kept))
            if not rounds[-1]["kept"]:
                break
            last_kept = folder / f"round_{number}"
        if PartialState().is_main_process:
            ignored = shutil.ignore_patterns(PAIRS, ALIGNED)
            shutil.copytree(last_kept, folder / MODEL, ignore=ignored, dirs_exist_ok=True)
        return {"rounds": rounds, "seed_checks": alignment.seed_checks()}

    return run_stage(align_stage(args, stage, first_pairs), work)


def align_stage(args: RecipeArguments, name: str = "align", first_pairs: str | None = None) -> Stage:
    reads = ["data", "tokenize", "pretrain", "reward", *([first_pairs] if first_pairs else [])]
    return Stage(name, args.output_dir, args.group(AlignArguments), reads)


@dataclass
class Alignment:
    """What all rounds share, loaded when a round needs it, and one round."""

    args: RecipeArguments
    folder: Path
    first_pairs: Path | None = None

    def __post_init__(self):
        self.device, self.options = PartialState().device, self.args.group(AlignArguments)
        self.seed_model = stage_dir(self.args.output_dir, "pretrain", "align") / MODEL
        self.tokenizer = OneRecTokenizer.from_pretrained(self.seed_model)
        self.lora = lora_config(self.options.align_lora)

    @cached_property
    def trie(self) -> ItemTrie:
        return ItemTrie.from_tokenizer(self.tokenizer).to(self.device)

    @cached_property
    def users(self) -> Dataset:
        return index_sessions(prepared_data(self.args, "align").read(USER_HISTORIES), self.tokenizer)

    @cached_property
    def scorer(self) -> SessionScorer:
        folder = stage_dir(self.args.output_dir, "reward", "align")
        return SessionScorer.from_pretrained(folder / REWARD_MODEL, self.device)

    @cached_property
    def sessions(self) -> dict[str, Dataset]:
        prepared = prepared_data(self.args, "align")
        return session_parts(prepared, self.tokenizer, self.args.group(PretrainArguments))

    @cached_property
    def checks(self) -> AlignmentChecks:
        held_out = self.sessions["test"]
        consumed = np.concatenate([np.zeros(0, np.int64), *map(np.asarray, self.users["history"][:])])
        return AlignmentChecks(
            held_out.select(range(min(self.options.align_holdout, len(held_out)))),
            popular_items(consumed, self.trie.num_items),
            self.tokenizer,
            self.trie,
            load_item_embeddings(self.args.output_dir),
            exclude_consumed=self.options.exclude_consumed,
            seed=self.options.seed,
        )

    def model(self, checkpoint: Path) -> OneRecForConditionalGeneration:
        return OneRecForConditionalGeneration.from_pretrained(checkpoint).to(self.device)

    def seed_checks(self) -> dict[str, float]:
        """The seed model's figures; the main process measures them once."""
        path = self.folder / SEED_CHECKS
        if PartialState().is_main_process and not path.exists():
            write_json(path, self.checks.measure(self.model(self.seed_model), {}))
        PartialState().wait_for_everyone()
        return read_json(path)

    def round(self, number: int, previous: Path) -> dict[str, Any]:
        """One round from the snapshot in `previous`: pairs, training, checks; what its summary says.

        A killed round goes on after the parts of pairs, the checkpoint or the model that it has.
        """
        target, state = self.folder / f"round_{number}", PartialState()
        if not (target / ALIGNED).exists():
            seed = self.options.seed + number
            target.mkdir(parents=True, exist_ok=True)
            model = self.model(previous)
            if number == 1 and self.first_pairs and state.is_main_process and not (target / PAIRS).exists():
                with staged_file(target / PAIRS) as partial:
                    shutil.copyfile(self.first_pairs, partial)
            state.wait_for_everyone()
            pairs = draw_pairs(self.options, target, model, self.trie, self.scorer, self.users, seed)
            log = self._train(model, pairs, target, seed)
            before = self.seed_checks()
            if state.is_main_process:
                summary = self._summary(number, previous, target, pairs, before)
                write_json(target / ALIGNED, summary | {"log": log})
            state.wait_for_everyone()
        return read_json(target / ALIGNED)

    def _train(self, model: OneRecForConditionalGeneration, pairs: Dataset, target: Path, seed: int) -> list[dict]:
        """Trains from M_(t-1) to M_t, saved in `target` as a whole model, adapters merged; the training's log."""
        options = self.options
        checkpoints = self.folder / CHECKPOINTS / target.name
        training_args = OneRecDPOConfig(
            **{
                **TRAINING_DEFAULTS,
                "logging_steps": 5,
                "num_train_epochs": 1,  # Algorithm 2 goes over the data once per round
                "seed": seed,
                **self.args.tracking(f"{self.folder.name.partition('.')[0]}/{target.name}"),
                **options.align,
                "output_dir": str(checkpoints),
            }
        )
        ordinary = self.sessions["train"]
        if self.args.recent_days is not None:
            ordinary = recent_sessions(ordinary, self.args.recent_days)
        if model.config.encoder_attention == "causal" and training_args.ntp_per_pair:
            # A pair's ordinary rows are one row of as many targets, whose histories are encoded once.
            ordinary = share_histories(ordinary, model.config.history_items, training_args.ntp_per_pair)
            training_args.ntp_per_pair = 1
        if options.align_reference == "previous":
            # The snapshot that drew the pairs is the reference: it has said already how likely they are.
            drawn = ("chosen_log_prob", "rejected_log_probs")
            pairs = pairs.rename_columns(dict(zip(drawn, REFERENCE_COLUMNS, strict=True)))
        set_seed(seed)  # of an adapter's weights
        if training_args.use_cpu:
            model.set_experts_implementation(CPU_EXPERTS)
        if not options.align_encoder:
            model.get_encoder().requires_grad_(False)
        trainer = OneRecDPOTrainer(
            model=model,
            args=training_args,
            train_dataset=pairs,
            processing_class=self.tokenizer,
            ntp_dataset=ordinary,
            ref_model=self.model(self.seed_model) if options.align_reference == "sft" else None,
            peft_config=self.lora,
            callbacks=[CheckpointCompleteCallback()],
        )
        train_from_latest(trainer)
        if not options.align_lora:
            trainer.save_model(str(target))
            (target / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
        elif PartialState().is_main_process:
            trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(target)
            self.tokenizer.save_pretrained(target)
        PartialState().wait_for_everyone()
        return training_log(trainer.state.log_history)

    def _summary(
        self, number: int, previous: Path, target: Path, pairs: Dataset, seed_checks: dict[str, float]
    ) -> dict[str, Any]:
        """The round's figures, and whether it is kept."""
        model, former = self.model(target), self.model(previous)
        references = {"previous": former, "seed": self.model(self.seed_model)}
        after = self.checks.measure(model, references)
        rows = pairs.to_list()
        drift = self.checks.pair_log_probs(model, rows) - self.checks.pair_log_probs(former, rows)
        kept = True
        if after:
            seed_recall = session_recall(seed_checks)
            lowest = (1 - self.options.max_recall_drop) * seed_recall
            kept = after[RECALL] >= lowest
            logger.info(
                f"[align] round {number}: held-out {RECALL} {after[RECALL]:.4f}, of the seed model "
                f"{seed_recall:.4f}; KL to it {after['kl_to_seed']:.3f}"
            )
            if not kept:
                logger.warning(
                    f"[align] round {number} is dropped and the last one: its {RECALL} is below {lowest:.4f}, which "
                    "max_recall_drop allows. A lower learning_rate, more ntp_per_pair or fewer rounds keep more."
                )
        return {
            "round": number,
            "kept": kept,
            "pairs": len(pairs),
            "mean_reward_of_candidates": float(np.mean(pairs["mean_reward"][:])),
            "mean_reward_of_chosen": float(np.mean(pairs["chosen_reward"][:])),
            "mean_reward_of_rejected": float(np.mean(pairs["rejected_reward"][:])),
            "chosen_log_prob_drift": float(drift[:, 0].mean()),
            "rejected_log_prob_drift": float(drift[:, 1].mean()),
            "checks": after,
        }
