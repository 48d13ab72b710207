"""Hyper-parameters of OneRec and the baselines, searched on the validation split with equal budgets.

    python recipes/search.py --config recipes/quickstart/pipeline.yaml --methods item_knn ease sasrec fused onerec \
        --trials 20 --minutes 60 --output_dir runs/search

Every method has as many trials and minutes, whichever end first; its first trial has the recipe's own settings. The
test split is never read. Writes `<output_dir>/<method>/trials.csv` and `<output_dir>/best.yaml`, whose options take
the place of those of the recipe. A killed search is resumed, and a larger budget goes on with it. Any option of the
recipe can be given too.
"""

import argparse
from pathlib import Path

from onerec_hf.packaged_recipes import SEARCH_SPACES
from onerec_hf.stages import parse_recipe_arguments, run_search
from onerec_hf.stages.search import Budget
from onerec_hf.stages.search_space import METHODS

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--space",
        type=Path,
        default=SEARCH_SPACES,
        help="YAML of the searched fields by method; without it, recipes/search_spaces.yaml",
    )
    parser.add_argument("--methods", nargs="+", required=True, choices=METHODS)
    parser.add_argument("--trials", type=int, default=20, help="finished trials of each method")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="minutes of each method; the last trial is finished"
    )
    options, rest = parser.parse_known_args()
    best = run_search(
        parse_recipe_arguments(rest), options.space, options.methods, Budget(options.trials, options.minutes)
    )
    print(f"Best options: {best}")
