"""How long the rest of a run will take, told from what its complete stages took."""

from .recipe_arguments import RecipeArguments
from .stage_runner import completed_stage

# Their parts of a run's time on 2 CPU cores, roughly: between those of the quickstart and of KuaiRand-Pure.
USUAL_SHARES = {
    "data": 0.01,
    "tokenize": 0.02,
    "pretrain": 0.25,
    "reward": 0.1,
    "align": 0.08,
    "recommend": 0.05,
    "baselines": 0.1,
    "evaluate_seed": 0.03,
    "serve": 0.3,
    "evaluate": 0.06,
}
ALIGNED_ALONE = ("reward", "align", "serve")  # stages that a run without alignment has not


def minutes_left(args: RecipeArguments) -> float | None:
    """Minutes that the stages of a run take that are not complete, at the pace of those that are: right to a factor
    of two or so. None before the first training is complete, of which the pace is told."""
    names = [name for name in USUAL_SHARES if args.align_rounds or name not in ALIGNED_ALONE]
    complete = {name: done["seconds"] for name in names if (done := completed_stage(args.output_dir, name))}
    if "pretrain" not in complete:
        return None
    left = sum(USUAL_SHARES[name] for name in names if name not in complete)
    return left * sum(complete.values()) / sum(USUAL_SHARES[name] for name in complete) / 60
