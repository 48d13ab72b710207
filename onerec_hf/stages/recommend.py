"""Stage `recommend`: histories in, sessions and ranked item ids with scores out, Parquet to Parquet."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset

from ..modeling_onerec import OneRecForConditionalGeneration
from ..session_generation import Recommender
from ..tokenization_onerec import OneRecTokenizer
from .data_stage import EVALUATION_CASES, prepared_data
from .pretrain import MODEL
from .recipe_arguments import RecipeArguments
from .stage_runner import run_stage, stage_dir

RECOMMENDATIONS = "recommendations.parquet"
USERS_PER_CHUNK = 256


def recommend(args: RecipeArguments) -> Path:
    """Recommends to every user of the histories; returns the stage's folder."""
    source = "align" if args.training.align_rounds else "pretrain"

    def work(folder: Path) -> dict | None:
        if not PartialState().is_main_process:
            return None
        checkpoint = stage_dir(args.output_dir, source, "recommend") / MODEL
        model = OneRecForConditionalGeneration.from_pretrained(checkpoint).to(PartialState().device)
        tokenizer = OneRecTokenizer.from_pretrained(checkpoint)
        recommender = Recommender(model, tokenizer)
        users = read_histories(args)
        parts = []
        for start in range(0, len(users), USERS_PER_CHUNK):
            part = folder / f"part_{start:09d}.parquet"
            chunk = users[start : start + USERS_PER_CHUNK]
            if not part.exists():
                found = recommender(
                    chunk["history_item_ids"],
                    top_k=args.evaluation.top_k,
                    num_beams=args.evaluation.ranking_beams,
                    exclude_seen=args.evaluation.exclude_consumed,
                    show_progress=True,
                )
                table = pa.table(
                    {"user_id": chunk["user_id"], **{key: [row[key] for row in found] for key in found[0]}}
                )
                pq.write_table(table, part.with_suffix(".partial"))
                part.with_suffix(".partial").rename(part)
            parts.append(part)
        pq.write_table(pa.concat_tables([pq.read_table(part) for part in parts]), folder / RECOMMENDATIONS)
        for part in parts:
            part.unlink()
        return {"num_users": len(users)}

    settings = args.settings(
        "evaluation.histories",
        "evaluation.top_k",
        "evaluation.ranking_beams",
        "evaluation.exclude_consumed",
        "evaluation.evaluation_users",
        "run.seed",
    )
    return run_stage("recommend", args.output_dir, settings, ["data", source], work)


def read_histories(args: RecipeArguments) -> Dataset:
    """`user_id` and `history_item_ids`, from the file that is given or of the evaluated users.

    Raises:
        ValueError: If the file lacks one of the columns.
    """
    path = args.evaluation.histories
    if path is None:
        users = prepared_data(args, "recommend").read(EVALUATION_CASES)
        count = args.evaluation.evaluation_users
        return users if count is None else users.shuffle(seed=args.run.seed).select(range(min(count, len(users))))
    table = pq.read_table(path)
    for column in ("user_id", "history_item_ids"):
        if column not in table.column_names:
            raise ValueError(
                f"{path} has no column '{column}', only {', '.join(table.column_names)}: recommend reads user_id and "
                "history_item_ids (a list of item ids, oldest first)."
            )
    return Dataset(table)
