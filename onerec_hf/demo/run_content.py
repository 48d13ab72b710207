"""What the page shows, read from the folder of a run."""

from pathlib import Path

import pandas as pd

from ..data import DataArguments
from ..stages.baselines_stage import BASELINE_STAGE
from ..stages.data_stage import EVALUATION_CASES, PreparedData
from ..stages.recipe_arguments import StageArguments
from ..stages.reward_stage import REWARD_MODEL
from ..stages.stage_runner import MODEL, SETTINGS, last_model_stage, read_json, stage_dir
from .content import DemoContent, fit_baselines, load_models


def content_of_run(run: str | Path) -> DemoContent:
    """The run's last model, its reward model where it has one, its catalogue and its evaluated users, and baselines
    fitted on what the run has fitted.

    Raises:
        FileNotFoundError: there is no such run, or the generator is not trained yet.
    """
    run = Path(run).expanduser()
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is no folder: give demo the output_dir of a run, such as runs/quickstart.")
    model = stage_dir(run, last_model_stage(run), "demo") / MODEL
    recommender, scorer = load_models(model, run / "reward" / REWARD_MODEL)
    folder = stage_dir(run, "data", "demo")
    prepared = PreparedData(folder, DataArguments(**read_json(folder / SETTINGS)["arguments"]))
    prepared = prepared.sampled(StageArguments.sampled_interactions)
    feed, num_items = prepared.feed, recommender.tokenizer.num_items
    image = None if feed.image_column is None else feed.items[feed.image_column]
    items = pd.DataFrame({"name": [feed.item_name(item) for item in range(len(feed.items))], "image": image})
    settings = run / BASELINE_STAGE / SETTINGS
    options = read_json(settings)["arguments"]["baselines"] if settings.exists() else {}
    baselines = fit_baselines(prepared.fitted_feed.positive_histories(), num_items, options)
    users = prepared.read(EVALUATION_CASES).remove_columns("next_item_id")
    return DemoContent(recommender, scorer, items, users, baselines, feed.world)
