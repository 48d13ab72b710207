"""Stage `baselines`: the methods beside OneRec, fitted on the same data and evaluated on the same users."""

import inspect
import json
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.logging import get_logger
from safetensors.numpy import save_file

from ..data import positive_mask
from ..evaluation import CUTOFFS, Baseline, CatalogueTooLargeError, ranking_metrics
from .evaluated_run import EvaluatedRun
from .recipe_arguments import BASELINES, FUSED, BaselineArguments, RecipeArguments, fused_members
from .stage_runner import Stage, completed_stage, read_json, run_stage, write_json

BASELINE_STAGE = "baselines"
SKIPPED = "skipped.json"  # why baselines could not be fitted, by name

logger = get_logger(__name__)

Options = dict[str, Any]


def baseline_stage(args: RecipeArguments, name: str = BASELINE_STAGE) -> Stage:
    return Stage(name, args.output_dir, args.group(BaselineArguments), ["data", "tokenize"])


def fitted_baselines(args: RecipeArguments) -> list[str]:
    """Those that a run has. The fused one, unless it has options, only where all of its members are among them."""
    left_out = {name for name, options in args.baselines.items() if options is False}
    if FUSED not in args.baselines and left_out & fused_members(args.baselines).keys():
        left_out.add(FUSED)
    return [name for name in BASELINES if name not in left_out]


def skipped_baselines(folder: Path) -> dict[str, str]:
    """Why, by name, a complete stage could not fit some of its baselines."""
    path = folder / SKIPPED
    return read_json(path) if path.exists() else {}


def evaluated_baselines(args: RecipeArguments, name: str = BASELINE_STAGE) -> list[str]:
    """The baselines whose results a complete stage has."""
    skipped = skipped_baselines(args.output_dir / name)
    return [baseline for baseline in fitted_baselines(args) if baseline not in skipped]


def warn_of_skipped_baselines(args: RecipeArguments) -> None:
    """Says, as soon as the size of the catalogue is known, which baselines will not fit into memory."""
    num_items = completed_stage(args.output_dir, "data")["dataset"]["num_items"]
    for name in () if baseline_stage(args).is_complete() else fitted_baselines(args):
        try:
            unfitted_baseline(name, fitting_options(args, name)).require_memory(num_items)
        except CatalogueTooLargeError as error:
            logger.warning(f"The evaluation will have to go without the baseline {name}: {error}.")


def unfitted_baseline(name: str, options: Options) -> Baseline:
    """A baseline with all of [`fitting_options`]."""
    members = {member: unfitted_baseline(member, of) for member, of in options.get("members", {}).items()}
    return BASELINES[name](**{**options, **({"members": members} if members else {})})


def fitting_options(args: RecipeArguments, name: str, options: Options | None = None) -> Options:
    """All that decides a baseline's fit on given data: its options, or other ones, with the seed where it takes one,
    and a fused one's members with theirs."""
    options = dict(args.baselines.get(name) or {}) if options is None else options
    if name == FUSED:
        members = fused_members({**args.baselines, FUSED: options})
        return {**options, "members": {member: fitting_options(args, member, of) for member, of in members.items()}}
    return {**options, "seed": args.seed} if takes_seed(name) else options


def takes_seed(name: str) -> bool:
    return "seed" in inspect.signature(BASELINES[name]).parameters


@dataclass(frozen=True)
class FittedBaseline:
    """A fitted baseline and the time that it took, its members' included [s]."""

    model: Baseline
    seconds: float


class BaselineFits:
    """Fits baselines, none twice with the same options as long as it is kept. For one data set.

    Args:
        across_seeds: whether those that take no seed are kept for other runs on the same data.
    """

    def __init__(self, across_seeds: bool = False):
        self.across_seeds = across_seeds
        self._kept: dict[tuple[str, str], FittedBaseline] = {}

    def fit(self, name: str, options: Options, run: EvaluatedRun) -> FittedBaseline:
        """The baseline fitted with all of [`fitting_options`], and kept."""
        key = _key(name, options)
        if key not in self._kept:
            self._kept[key] = self._fitted(name, options, run)
        return self._kept[key]

    def _fitted(self, name: str, options: Options, run: EvaluatedRun) -> FittedBaseline:
        seconds, changes, more = 0.0, {}, {}
        if name == FUSED:
            members = {member: self.fit(member, of, run) for member, of in options["members"].items()}
            seconds = sum(member.seconds for member in members.values())
            changes["members"] = {member: fitted.model for member, fitted in members.items()}
        elif name == "sasrec":
            more["recent"] = recent_behaviours(run)
        histories = [np.asarray(history) for history in run.fitted_histories["history"][:]]
        started = time.monotonic()
        model = BASELINES[name](**{**options, **changes}).fit(histories, len(run.tokenizer.item_ids), **more)
        return FittedBaseline(model, seconds + time.monotonic() - started)

    def keep(self, needed: Collection[tuple[str, Options]]) -> None:
        """Forgets all that is not needed any more: neither these, nor members of these, nor kept across seeds."""
        keys = {_key(*each) for each in needed}
        keys |= {_key(*member) for _, options in needed for member in options.get("members", {}).items()}
        if self.across_seeds:
            keys |= {(name, text) for name, text in self._kept if name != FUSED and not takes_seed(name)}
        self._kept = {key: fitted for key, fitted in self._kept.items() if key in keys}


def _key(name: str, options: Options) -> tuple[str, str]:
    return name, json.dumps(options, sort_keys=True)


def run_baselines(stage: Stage, run: EvaluatedRun, fits: BaselineFits | None = None) -> Path:
    """Stage `baselines`: fits and evaluates each of them; writes `<name>.json`, the metrics, `<name>.safetensors`, the
    rankings with their scores, and `skipped.json`, why the others did not fit into memory.

    Args:
        fits: holds what is fitted already.
    """
    fits = fits or BaselineFits()

    def work(folder: Path) -> None:
        missing = [name for name in fitted_baselines(run.args) if not (folder / f"{name}.json").exists()]
        skipped = {}
        for place, name in enumerate(missing if PartialState().is_main_process else ()):
            try:
                fitted = fits.fit(name, fitting_options(run.args, name), run)
            except CatalogueTooLargeError as error:
                skipped[name] = str(error)
                logger.warning(f"The baseline {name} is left out: {error}.")
                continue
            started = time.monotonic()
            ranked, scores = rank_fitted(fitted.model, run)
            seconds = time.monotonic() - started
            save_file({"ranked": ranked, "scores": scores}, folder / f"{name}.safetensors")
            targets, num_items = run.evaluator.targets, len(run.tokenizer.item_ids)
            metrics = {
                **ranking_metrics(ranked, targets, num_items, CUTOFFS, interval_resamples=1000),
                "num_parameters": fitted.model.num_parameters,
                "fit_seconds": fitted.seconds,
                "users_per_second": len(ranked) / seconds,
            }
            write_json(folder / f"{name}.json", metrics)
            fits.keep([(FUSED, fitting_options(run.args, FUSED))] if FUSED in missing[place + 1 :] else [])
        if PartialState().is_main_process:
            write_json(folder / SKIPPED, skipped)

    return run_stage(stage, work)


def rank_fitted(model: Baseline, run: EvaluatedRun) -> tuple[np.ndarray, np.ndarray]:
    """A baseline's ranking of the evaluated users, long enough for its judged sessions, and its scores."""
    options = run.evaluator.options
    return model.rank_with_scores(run.evaluator.histories, options.ranked_items, options.exclude_consumed)


def recent_behaviours(run: EvaluatedRun) -> np.ndarray | None:
    """How many of each fitted history's latest behaviours lie in the latest `recent_days`; None without these."""
    if run.args.recent_days is None:
        return None
    fit = run.prepared.split.fit
    positive = fit[positive_mask(fit, run.prepared.feed.positive_feedback)]
    since = positive["timestamp"].max() - run.args.recent_days * 86400
    counts = positive.loc[positive["timestamp"] >= since, "user_id"].value_counts()
    return counts.reindex(run.fitted_histories["user_id"][:], fill_value=0).to_numpy()
