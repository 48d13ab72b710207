"""The recipes' stages, from raw logs to the report. Each is one function of [`RecipeArguments`], `run_<stage>`."""

import time
import warnings
from dataclasses import replace

from accelerate.logging import get_logger

from .ablations import run_ablation
from .align_stage import run_align
from .baselines_stage import warn_of_skipped_baselines
from .data_stage import prepared_data, run_data
from .evaluate_stage import run_evaluate
from .hub_access import require_login
from .preferences_stage import run_sample_preferences
from .pretrain_stage import run_pretrain
from .recipe_arguments import RecipeArguments, parse_recipe_arguments
from .recommend_stage import run_recommend
from .reward_stage import known_feedback, require_sources, run_reward
from .search import run_search
from .time_left import minutes_left
from .tokenize_stage import run_tokenize

logger = get_logger(__name__)


def run_pipeline(args: RecipeArguments) -> None:
    """All stages in order. With `align_rounds` 0, or of a log without feedback, there is no reward model to train, and
    the seed model is the last."""
    started = time.monotonic()
    require_login(args.hub_model_id, args.hub_reward_model_id)
    run_tokenize(args)
    warn_of_skipped_baselines(args)
    if args.align_rounds:
        known = known_feedback(prepared_data(args, "reward").split.fit)
        if known:
            require_sources(args, known)  # rather than after pretraining
        else:
            logger.warning("The log has no feedback, so that there is nothing to align to: align_rounds is set to 0.")
            args = replace(args, align_rounds=0, hub_reward_model_id=None)
    aligning = [run_reward, run_align] if args.align_rounds else []
    steps = [run_pretrain, *aligning, run_recommend, run_evaluate]
    for number, step in enumerate(steps, start=2):
        minutes = (time.monotonic() - started) / 60
        name = step.__name__.removeprefix("run_")
        left = minutes_left(args)
        about = "" if left is None else f", about {left:.0f} min left"
        logger.info(f"Step {number} of {len(steps) + 1}: {name}, {minutes:.0f} min after the start{about}")
        step(args)


def run_update(args: RecipeArguments) -> None:
    """All stages of a run that goes on from `args.previous_run`, or of one run for each of `args.update_starts`.

    Raises:
        ValueError: neither is given, or the starts are not in order.
    """
    if args.update_starts is None:
        if args.previous_run is None:
            raise ValueError("update needs previous_run, the run that it goes on from, or update_starts.")
        return run_pipeline(args)
    starts, previous = args.update_starts, args.previous_run
    if sorted(set(starts)) != starts:
        raise ValueError(f"update_starts must be in order, got {', '.join(starts)}.")
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        # The last period reaches to the end of the log.
        period = {"evaluation_split": "test", "test_start": start}
        if end is not None:
            period = {"evaluation_split": "validation", "validation_start": start, "test_start": end}
        folder = args.output_dir / start.replace(":", "")
        run_pipeline(replace(args, output_dir=folder, previous_run=previous, update_since=None, **period))
        previous = str(folder)


def __getattr__(name: str):
    """A stage under its old name, most of which had no `run_`."""
    new_name = {"ablate": "run_ablation", "sample_preference_pairs": "run_sample_preferences"}.get(name, f"run_{name}")
    if new_name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is now called {new_name}", FutureWarning, stacklevel=2)
    return globals()[new_name]
