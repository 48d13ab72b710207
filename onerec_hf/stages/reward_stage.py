"""Stage `reward`: the reward model (section 3.3.1, eq 5-7) and an independent judge on the other half of the users."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import set_seed

from ..data import Feed, exposure_runs, feedback_columns
from ..data.readers import saved_partitions
from ..reward import (
    ExposureEncoder,
    ItemTotals,
    OneRecRewardConfig,
    OneRecRewardModel,
    RewardCollator,
    create_reward_model,
    predict_rewards,
    reliability_plot,
    train_reward_model,
    user_half,
    without_calibration_users,
)
from ..reward.reward_objectives import require_known_sources
from ..session_rows import index_sessions
from ..sharded_rows import ShardedRows
from ..tokenization_onerec import OneRecTokenizer
from ..training_checkpoints import whole_model
from .data_stage import FEED, PreparedData, prepared_data
from .pretrain_stage import TRAINING_DEFAULTS, training_log
from .previous_run import PreviousRun
from .recipe_arguments import RecipeArguments, RewardArguments
from .stage_runner import CHECKPOINTS, Stage, read_json, run_stage, stage_dir, write_json
from .tokenize_stage import load_item_content

REWARD_MODEL, INDEPENDENT_JUDGE = "reward_model", "independent_judge"
TRAINED = "trained.json"
# The judge differs in its users and its seed and, unless it is configured, in its width.
DEFAULTS = {REWARD_MODEL: {}, INDEPENDENT_JUDGE: {"hidden_size": 96, "tower_hidden_size": 96}}


def run_reward(args: RecipeArguments) -> Path:
    """Trains both models; returns the stage's folder with one subfolder each."""
    options, previous = args.group(RewardArguments), PreviousRun.of(args)
    if previous is not None:
        previous.require_same("reward", options, ("reward_model", "judge_model"))

    def work(folder: Path) -> dict | None:
        tokenizer = OneRecTokenizer.from_pretrained(stage_dir(args.output_dir, "tokenize", "reward"))
        summary, exposures = {}, None
        for index, name in enumerate((REWARD_MODEL, INDEPENDENT_JUDGE)):
            if not (folder / name / TRAINED).exists():
                exposures = exposures or _Exposures(args, tokenizer)
                _train(options, folder, name, index, exposures, args.tracking(f"reward/{name}"))
            summary[name] = read_json(folder / name / TRAINED)
        return {"models": summary}

    outside = [] if previous is None else previous.input("reward")
    return run_stage(Stage("reward", args.output_dir, options, ["data", "tokenize"], outside), work)


def known_feedback(interactions: pd.DataFrame) -> list[str]:
    """The feedback columns of interactions in which something is known."""
    return [column for column in feedback_columns(interactions) if interactions[column].notna().any()]


def require_sources(args: RecipeArguments, known: list[str]) -> None:
    """Raises ValueError if an objective of a reward model reads feedback that is not known."""
    for name in ("reward_model", "judge_model"):
        given = {field: value for field, value in getattr(args, name).items() if field == "objectives"}
        remedy = "Give both reward models `objectives` that the log has, or set align_rounds: 0."
        require_known_sources(OneRecRewardConfig(**given).objectives, known, name, remedy)


@dataclass(frozen=True)
class _FittedRuns:
    """Runs of the fitted exposures of one half of the users, without those that are held out for the calibration:
    called with a row of [`_partition_numbers`], of the users of that partition."""

    prepared: PreparedData
    tokenizer: OneRecTokenizer
    half: int
    half_seed: int
    seed: int

    def __call__(self, numbers: Dataset) -> Dataset:
        feed = replace(self.prepared, partitions=(numbers["partition"][0],)).fitted_feed
        runs = index_sessions(exposure_runs(feed.interactions, feed, self.prepared.args), self.tokenizer)
        own = runs.select(np.flatnonzero(user_half(runs["user_id"][:], self.half_seed) == self.half))
        return without_calibration_users(own, self.seed)[0]


def _partition_numbers(partitions: list[int]) -> Iterator[dict[str, int]]:
    for number in partitions:
        yield {"partition": number}


def sharded_runs(prepared: PreparedData, tokenizer: OneRecTokenizer, half: int, half_seed: int, seed: int):
    """The runs of all partitions that the model of a half of the users is trained on, as [`ShardedRows`]."""
    numbers = list(range(saved_partitions(prepared.folder / FEED)))
    shards = IterableDataset.from_generator(_partition_numbers, gen_kwargs={"partitions": numbers})
    return ShardedRows(shards, _FittedRuns(prepared, tokenizer, half, half_seed, seed))


class _Exposures:
    """The fitted interactions, and runs of them and of the evaluated period by catalogue index."""

    def __init__(self, args: RecipeArguments, tokenizer: OneRecTokenizer):
        self.prepared = prepared = prepared_data(args, "reward")
        self.tokenizer, self.data = tokenizer, prepared.args
        self.embeddings = load_item_content(args.output_dir)
        self.feed = prepared.fitted_feed
        require_sources(args, known_feedback(self.feed.interactions))
        self.runs = index_sessions(exposure_runs(self.feed.interactions, self.feed, self.data), tokenizer)
        self.later = index_sessions(prepared.later_runs(), tokenizer)
        self.seed = args.seed

    def of_half(self, index: int) -> tuple[Feed, ItemTotals, Dataset, Dataset]:
        """What one half of the users did, totals of the items among them, their runs, and the others' later runs."""
        interactions = self.feed.interactions
        interactions = interactions[user_half(interactions["user_id"], self.seed) == index].reset_index(drop=True)
        feed = replace(self.feed, interactions=interactions)
        return (
            feed,
            ItemTotals.of_feed(feed, self.tokenizer),
            self.runs.select(np.flatnonzero(user_half(self.runs["user_id"][:], self.seed) == index)),
            self.later.select(np.flatnonzero(user_half(self.later["user_id"][:], self.seed) != index)),
        )


def _train(
    options: RewardArguments, folder: Path, name: str, index: int, exposures: _Exposures, tracking: dict[str, Any]
) -> None:
    """One of the two models, into its folder."""
    target, seed, tokenizer = folder / name, options.seed + index, exposures.tokenizer
    set_seed(seed)
    feed, totals, runs, unseen = exposures.of_half(index)
    train, calibration = without_calibration_users(runs, seed)
    if exposures.prepared.partitions is not None:  # a sample alone is in memory
        train = sharded_runs(exposures.prepared, tokenizer, index, options.seed, seed)
    overrides = options.reward_model if name == REWARD_MODEL else options.judge_model
    sizes = {field: getattr(exposures.data, field) for field in ("history_items", "session_items")}
    fields = {**sizes, **DEFAULTS[name], **overrides}
    previous = PreviousRun.of(options)
    former = previous and OneRecRewardModel.from_pretrained(previous.stage("reward") / name)
    model = create_reward_model(fields, feed, tokenizer, exposures.embeddings, totals, former)
    changes = options.reward_update if former else {}
    checkpoints = folder / CHECKPOINTS / name
    own = {"seed": seed, **tracking, **options.reward, **changes, "output_dir": str(checkpoints)}
    given = {"calibration_dataset": calibration, "from_base_rates": former is None}
    arguments = {**TRAINING_DEFAULTS, **own}
    trainer = train_reward_model(model, tokenizer, totals, train, arguments, **given)
    model = whole_model(trainer, OneRecRewardModel, checkpoints / "whole")
    encoder = ExposureEncoder(model.config, tokenizer.item_token_ids)
    if PartialState().is_main_process:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        results = {"num_runs": len(train), "log": training_log(trainer.state.log_history)}
        for what, length in (("sessions", model.config.session_items), ("exposures", 1)):
            # With the items' totals as of the end of the fitted period, as when sessions are scored.
            predictions = predict_rewards(model, unseen, RewardCollator(encoder, session_items=length))
            results[f"metrics_on_later_{what}"] = predictions.metrics(model.config)
            names = model.config.objective_names
            reliability_plot(predictions.probabilities, predictions.labels, names, target / f"reliability_{what}.png")
        write_json(target / TRAINED, results)
    PartialState().wait_for_everyone()
