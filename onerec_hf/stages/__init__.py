"""The recipes' stages, from raw logs to the report. Each is one function of [`RecipeArguments`]."""

from .ablations import ablate
from .align import align
from .evaluate import evaluate
from .pretrain import pretrain
from .recipe_arguments import RecipeArguments, parse_recipe_arguments
from .recommend import recommend
from .reward import reward
from .sample_preferences import sample_preference_pairs
from .tokenize import tokenize


def run_pipeline(args: RecipeArguments) -> None:
    """All stages in order. With `align_rounds` 0 there is no reward model to train, and the seed model is the last."""
    tokenize(args)
    pretrain(args)
    if args.training.align_rounds:
        reward(args)
        align(args)
    recommend(args)
    evaluate(args)


__all__ = [
    "RecipeArguments",
    "ablate",
    "align",
    "evaluate",
    "parse_recipe_arguments",
    "pretrain",
    "recommend",
    "reward",
    "run_pipeline",
    "sample_preference_pairs",
    "tokenize",
]
