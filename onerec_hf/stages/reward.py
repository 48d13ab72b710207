"""Stage `reward`: the reward model (section 3.3.1, eq 5-7) and an independent judge on the other half of the users."""

from pathlib import Path

import numpy as np
from accelerate import PartialState
from transformers import TrainingArguments, set_seed

from ..pretraining import CheckpointCompleteCallback, index_sessions, latest_complete_checkpoint
from ..reward import OneRecRewardConfig, OneRecRewardModel, OneRecRewardTrainer, label_means, reward_metrics, user_half
from ..tokenization_onerec import OneRecTokenizer
from .data_stage import LATER_REWARD_SESSIONS, REWARD_SESSIONS, prepared_data
from .pretrain import TRAINING_DEFAULTS, save_trained_model, training_log
from .recipe_arguments import RecipeArguments
from .stage_runner import CHECKPOINTS, read_json, run_stage, stage_dir, write_json

REWARD_MODEL, INDEPENDENT_JUDGE = "reward_model", "independent_judge"
TRAINED = "trained.json"


def reward(args: RecipeArguments) -> Path:
    """Trains both models; returns the stage's folder with one subfolder each."""

    def work(folder: Path) -> dict | None:
        tokenizer = OneRecTokenizer.from_pretrained(stage_dir(args.output_dir, "tokenize", "reward"))
        prepared = prepared_data(args, "reward")
        sessions = index_sessions(prepared.read(REWARD_SESSIONS), tokenizer)
        later = index_sessions(prepared.read(LATER_REWARD_SESSIONS), tokenizer)
        half, later_half = (user_half(table["user_id"][:], args.run.seed) for table in (sessions, later))
        summary = {}
        for index, (name, overrides) in enumerate(
            ((REWARD_MODEL, args.training.reward_model), (INDEPENDENT_JUDGE, args.training.judge_model))
        ):
            target = folder / name
            if not (target / TRAINED).exists():
                seed = args.run.seed + index
                set_seed(seed)
                train = sessions.select(np.flatnonzero(half == index))
                config = OneRecRewardConfig(
                    **{
                        "history_items": args.data.history_items,
                        "session_items": args.data.session_items,
                        **overrides,
                        "codebook_sizes": list(tokenizer.codebook_sizes),
                    }
                )
                model = OneRecRewardModel(config)
                model.set_base_rates(label_means(train, config))
                trainer = OneRecRewardTrainer(
                    model=model,
                    item_token_ids=tokenizer.item_token_ids,
                    args=TrainingArguments(
                        **{
                            **TRAINING_DEFAULTS,
                            "seed": seed,
                            **args.training.reward,
                            "output_dir": str(folder / CHECKPOINTS / name),
                        }
                    ),
                    train_dataset=train,
                    callbacks=[CheckpointCompleteCallback()],
                )
                trainer.train(resume_from_checkpoint=latest_complete_checkpoint(folder / CHECKPOINTS / name))
                save_trained_model(trainer, target)
                # Users of the other half and a later time: neither has been seen.
                unseen = later.select(np.flatnonzero(later_half != index))
                metrics = reward_metrics(model, unseen, tokenizer.item_token_ids) if len(unseen) else {}
                if PartialState().is_main_process:
                    tokenizer.save_pretrained(target)
                    log = training_log(trainer.state.log_history)
                    write_json(
                        target / TRAINED,
                        {"num_sessions": len(train), "metrics_on_later_sessions": metrics, "log": log},
                    )
                PartialState().wait_for_everyone()
            summary[name] = read_json(target / TRAINED)
        return {"models": summary}

    settings = args.settings(
        "data.history_items",
        "data.session_items",
        "training.reward_model",
        "training.judge_model",
        "training.reward",
        "run.seed",
    )
    return run_stage("reward", args.output_dir, settings, ["data", "tokenize"], work)
