"""Stage `reward`: the reward model (section 3.3.1, eq 5-7) and an independent judge on the other half of the users."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate import PartialState
from datasets import Dataset
from transformers import set_seed

from ..data import Feed, exposure_runs
from ..data.schema import feedback_columns
from ..reward import (
    ExposureEncoder,
    ItemTotals,
    OneRecRewardConfig,
    OneRecRewardModel,
    RewardCollator,
    RewardPredictions,
    create_reward_model,
    fit_calibration,
    predict_rewards,
    reliability_plot,
    train_reward_model,
    user_fold,
    user_half,
)
from ..reward.reward_objectives import DURATION
from ..session_rows import index_sessions
from ..tokenization_onerec import OneRecTokenizer
from .data_stage import prepared_data
from .pretrain_stage import TRAINING_DEFAULTS, training_log
from .recipe_arguments import RecipeArguments, RewardArguments
from .stage_runner import CHECKPOINTS, Stage, read_json, run_stage, stage_dir, write_json
from .tokenize_stage import load_item_content

REWARD_MODEL, INDEPENDENT_JUDGE = "reward_model", "independent_judge"
TRAINED = "trained.json"
# The judge differs in its users and its seed and, unless it is configured, in its width.
DEFAULTS = {REWARD_MODEL: {}, INDEPENDENT_JUDGE: {"hidden_size": 96, "tower_hidden_size": 96}}
# One of so many users is kept out of training, for the calibration.
CALIBRATION_FOLDS = 10


def run_reward(args: RecipeArguments) -> Path:
    """Trains both models; returns the stage's folder with one subfolder each."""
    options = args.group(RewardArguments)

    def work(folder: Path) -> dict | None:
        tokenizer = OneRecTokenizer.from_pretrained(stage_dir(args.output_dir, "tokenize", "reward"))
        summary, exposures = {}, None
        for index, name in enumerate((REWARD_MODEL, INDEPENDENT_JUDGE)):
            if not (folder / name / TRAINED).exists():
                exposures = exposures or _Exposures(args, tokenizer)
                _train(options, folder, name, index, exposures, args.tracking(f"reward/{name}"))
            summary[name] = read_json(folder / name / TRAINED)
        return {"models": summary}

    return run_stage(Stage("reward", args.output_dir, options, ["data", "tokenize"]), work)


def known_feedback(interactions: pd.DataFrame) -> list[str]:
    """The feedback columns of interactions in which something is known."""
    return [column for column in feedback_columns(interactions) if interactions[column].notna().any()]


def require_sources(args: RecipeArguments, known: list[str]) -> None:
    """Raises ValueError if an objective of a reward model reads feedback that is not known."""
    for name in ("reward_model", "judge_model"):
        given = {field: value for field, value in getattr(args, name).items() if field == "objectives"}
        for objective in OneRecRewardConfig(**given).objectives:
            for column in (objective["source"], *((DURATION,) if objective["kind"] == "share" else ())):
                if column not in known:
                    raise ValueError(
                        f"{name}: objective '{objective['name']}' ({objective['kind']}) needs the feedback column "
                        f"'{column}', and what is known is {', '.join(known) or 'nothing'}. Give both reward models "
                        "`objectives` that the log has, or set align_rounds: 0."
                    )


class _Exposures:
    """The fitted interactions, and runs of them and of the evaluated period by catalogue index."""

    def __init__(self, args: RecipeArguments, tokenizer: OneRecTokenizer):
        prepared = prepared_data(args, "reward")
        self.tokenizer, self.data = tokenizer, prepared.args
        self.embeddings = load_item_content(args.output_dir)
        self.feed: Feed = replace(prepared.feed, interactions=prepared.split.fit)
        require_sources(args, known_feedback(self.feed.interactions))
        self.runs = index_sessions(exposure_runs(self.feed.interactions, self.feed, self.data), tokenizer)
        self.later = index_sessions(prepared.later_runs(), tokenizer)
        self.seed = args.seed

    def of_half(self, index: int) -> tuple[Feed, ItemTotals, Dataset, Dataset]:
        """What one half of the users did, totals of the items among them, their runs, and the others' later runs."""
        interactions = self.feed.interactions
        interactions = interactions[user_half(interactions["user_id"], self.seed) == index].reset_index(drop=True)
        items = self.tokenizer.item_index(interactions["item_id"])
        return (
            replace(self.feed, interactions=interactions),
            ItemTotals(interactions, items, len(self.tokenizer.item_ids)),
            _of_users(self.runs, user_half(self.runs["user_id"][:], self.seed) == index),
            _of_users(self.later, user_half(self.later["user_id"][:], self.seed) != index),
        )


def _of_users(runs: Dataset, chosen: np.ndarray) -> Dataset:
    return runs.select(np.flatnonzero(chosen))


def without_calibration_users(runs: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """The runs without a tenth of the users, drawn by seed, and those of that tenth."""
    held_out = user_fold(runs["user_id"][:], CALIBRATION_FOLDS, seed) == 0
    return _of_users(runs, ~held_out), _of_users(runs, held_out)


def calibrate(model: OneRecRewardModel, encoder: ExposureEncoder, totals: ItemTotals, runs: Dataset) -> None:
    """Fits the calibration on runs that were not trained on, single exposures and whole sessions alike."""
    lengths = {1, model.config.session_items}
    predictions = [predict_rewards(model, runs, RewardCollator(encoder, totals, length)) for length in lengths]
    fit_calibration(model, RewardPredictions.joined(predictions))


def _train(
    options: RewardArguments, folder: Path, name: str, index: int, exposures: _Exposures, tracking: dict[str, Any]
) -> None:
    """One of the two models, into its folder."""
    target, seed, tokenizer = folder / name, options.seed + index, exposures.tokenizer
    set_seed(seed)
    feed, totals, runs, unseen = exposures.of_half(index)
    train, calibration = without_calibration_users(runs, seed)
    overrides = options.reward_model if name == REWARD_MODEL else options.judge_model
    sizes = {field: getattr(exposures.data, field) for field in ("history_items", "session_items")}
    fields = {**sizes, **DEFAULTS[name], **overrides}
    model = create_reward_model(fields, feed, totals, tokenizer, exposures.embeddings)
    own = {"seed": seed, **tracking, **options.reward, "output_dir": str(folder / CHECKPOINTS / name)}
    arguments = {**TRAINING_DEFAULTS, **own}
    log = training_log(train_reward_model(model, tokenizer, totals, train, arguments))
    encoder = ExposureEncoder(model.config, tokenizer.item_token_ids)
    calibrate(model, encoder, totals, calibration)
    if PartialState().is_main_process:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        results = {"num_runs": len(train), "log": log}
        for what, length in (("sessions", model.config.session_items), ("exposures", 1)):
            # With the items' totals as of the end of the fitted period, as when sessions are scored.
            predictions = predict_rewards(model, unseen, RewardCollator(encoder, session_items=length))
            results[f"metrics_on_later_{what}"] = predictions.metrics(model.config)
            names = model.config.objective_names
            reliability_plot(predictions.probabilities, predictions.labels, names, target / f"reliability_{what}.png")
        write_json(target / TRAINED, results)
    PartialState().wait_for_everyone()
