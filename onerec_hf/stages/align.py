"""Stage `align`: rounds of Iterative Preference Alignment, M_0 to M_T (section 3.3.2, Algorithm 2)."""

import shutil
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import set_seed

from ..alignment import OneRecDPOConfig, OneRecDPOTrainer, sample_preferences
from ..item_trie import ItemTrie
from ..modeling_onerec import OneRecForConditionalGeneration
from ..pretraining import (
    CheckpointCompleteCallback,
    index_sessions,
    latest_complete_checkpoint,
)
from ..reward import SessionScorer
from ..tokenization_onerec import OneRecTokenizer
from .data_stage import PRETRAINING_SESSIONS, USER_HISTORIES, prepared_data
from .pretrain import MODEL, TRAINING_DEFAULTS, save_trained_model, training_log
from .recipe_arguments import RecipeArguments
from .reward import REWARD_MODEL
from .stage_runner import CHECKPOINTS, read_json, run_stage, stage_dir, write_json

PAIRS = "pairs.parquet"
ALIGNED = "aligned.json"


def align(args: RecipeArguments) -> Path:
    """Runs the rounds; returns the stage's folder: `round_1` to `round_T` and `model`, the last round's model."""
    options = args.training

    def work(folder: Path) -> dict | None:
        previous = stage_dir(args.output_dir, "pretrain", "align") / MODEL
        tokenizer = OneRecTokenizer.from_pretrained(previous)
        prepared = prepared_data(args, "align")
        users = index_sessions(prepared.read(USER_HISTORIES), tokenizer)
        sessions = index_sessions(prepared.read(PRETRAINING_SESSIONS), tokenizer)
        reward_model = SessionScorer.from_pretrained(
            stage_dir(args.output_dir, "reward", "align") / REWARD_MODEL, PartialState().device
        )
        rounds = []
        for number in range(1, options.align_rounds + 1):
            target = folder / f"round_{number}"
            if not (target / ALIGNED).exists():
                _run_round(args, number, previous, target, tokenizer, users, sessions, reward_model)
            rounds.append(read_json(target / ALIGNED))
            previous = target
        if PartialState().is_main_process:
            shutil.copytree(
                previous, folder / MODEL, ignore=shutil.ignore_patterns(PAIRS, ALIGNED), dirs_exist_ok=True
            )
        return {"rounds": rounds}

    settings = args.settings(
        "training.align_rounds",
        "training.r_dpo",
        "training.num_candidates",
        "training.min_reward_margin",
        "training.align",
        "evaluation.exclude_consumed",
        "run.seed",
    )
    return run_stage("align", args.output_dir, settings, ["data", "tokenize", "pretrain", "reward"], work)


def _run_round(
    args: RecipeArguments,
    number: int,
    previous: Path,
    target: Path,
    tokenizer: OneRecTokenizer,
    users: Dataset,
    sessions: Dataset,
    reward_model: SessionScorer,
) -> None:
    """One round from the snapshot in `previous` to the one in `target`: pairs first, then training."""
    options, state, seed = args.training, PartialState(), args.run.seed + number
    set_seed(seed)
    model = OneRecForConditionalGeneration.from_pretrained(previous)
    if state.is_main_process and not (target / PAIRS).exists():
        target.mkdir(parents=True, exist_ok=True)
        pairs = sample_preferences(
            model.to(state.device),
            ItemTrie.from_tokenizer(tokenizer).to(state.device),
            tokenizer,
            reward_model,
            users,
            sample_share=options.r_dpo,
            num_candidates=options.num_candidates,
            min_reward_gap=options.min_reward_margin,
            exclude_history=args.evaluation.exclude_consumed,
            seed=seed,
        )
        pairs.to_parquet(target / f"{PAIRS}.partial")
        (target / f"{PAIRS}.partial").rename(target / PAIRS)
    state.wait_for_everyone()
    pairs = Dataset.from_parquet(str(target / PAIRS))
    checkpoints = target.parent / CHECKPOINTS / target.name
    trainer = OneRecDPOTrainer(
        model=model,
        args=OneRecDPOConfig(
            **{
                **TRAINING_DEFAULTS,
                "logging_steps": 5,
                "num_train_epochs": 1,  # Algorithm 2 goes over the data once per round
                "seed": seed,
                "bf16": torch.cuda.is_available(),
                "gradient_checkpointing": False,
                **options.align,
                "output_dir": str(checkpoints),
            }
        ),
        train_dataset=pairs,
        processing_class=tokenizer,
        ntp_dataset=sessions,
        callbacks=[CheckpointCompleteCallback()],
    )
    trainer.train(resume_from_checkpoint=latest_complete_checkpoint(checkpoints))
    save_trained_model(trainer, target)
    if state.is_main_process:
        summary = {
            "round": number,
            "pairs": len(pairs),
            "mean_reward_of_candidates": sum(pairs["mean_reward"][:]) / len(pairs),
            "mean_reward_of_chosen": sum(pairs["chosen_reward"][:]) / len(pairs),
            "mean_reward_of_rejected": sum(pairs["rejected_reward"][:]) / len(pairs),
            "log": training_log(trainer.state.log_history),
        }
        write_json(target / ALIGNED, summary)
    state.wait_for_everyone()
