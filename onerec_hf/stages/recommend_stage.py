"""Stage `recommend`: histories in, sessions and ranked item ids with scores out, Parquet to Parquet.

The users are cut into parts of a fixed size, which the processes take in turn. A part is one file, written whole, so
that a killed run goes on after what it has, on any number of processes, and the result does not depend on theirs.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm

from ..history_features import HISTORY_FEATURES
from ..item_index import is_text
from ..modeling_onerec import OneRecForConditionalGeneration
from ..reward import REWARD_FEATURES, SessionScorer
from ..session_generation import Recommender
from ..staged_files import staged_file
from ..tokenization_onerec import OneRecTokenizer
from .data_stage import EVALUATION_CASES, prepared_data
from .recipe_arguments import RecipeArguments, RecommendArguments
from .stage_runner import MODEL, STAGE_FILE, OutsideInput, Stage, read_json, run_stage, stage_dir

RECOMMENDATIONS = "recommendations.parquet"
USERS_PER_PART = 256
HISTORY_COLUMNS = ("user_id", "history_item_ids")


def run_recommend(args: RecipeArguments) -> Path:
    """Recommends to every user of the histories; returns the stage's folder."""
    options = args.group(RecommendArguments)
    source = "align" if args.align_rounds else "pretrain"
    reads = [*(["data"] if options.histories is None else []), *([source] if options.recommend_model is None else [])]

    def work(folder: Path) -> dict | None:
        state = PartialState()
        checkpoint = options.recommend_model or stage_dir(args.output_dir, source, "recommend") / MODEL
        histories = Histories(args, options)
        tokenizer = OneRecTokenizer.from_pretrained(checkpoint)
        histories.check_items(tokenizer, options.unknown_items)
        model = OneRecForConditionalGeneration.from_pretrained(checkpoint).to(state.device)
        scorer = None
        if options.recommend_reward_model is not None:
            scorer = SessionScorer.from_pretrained(options.recommend_reward_model, state.device)
        recommender = Recommender(model, tokenizer, scorer)
        search = {"search": options.recommend_search}
        if options.recommend_search == "guided_beam":
            search |= {"guidance_weight": options.guidance_weight, "num_item_beams": options.num_item_beams}
        ids = pa.list_(pa.int64() if tokenizer.item_ids.dtype == np.int64 else pa.string())
        types = {"session": ids, "items": ids, "scores": pa.list_(pa.float32())}
        hidden = not state.is_main_process
        with tqdm(total=histories.num_users, desc="recommending", unit="user", disable=hidden) as bar:
            for number, batch in enumerate(histories.parts()):
                part = folder / f"part_{number:09d}.parquet"
                if number % state.num_processes == state.process_index and not part.exists():
                    found = recommender(
                        batch.to_pylist(),
                        top_k=options.top_k,
                        num_beams=options.ranking_beams,
                        exclude_consumed=options.exclude_consumed,
                        unknown_items=options.unknown_items,
                        **search,
                    )
                    columns = {name: pa.array([row[name] for row in found], kind) for name, kind in types.items()}
                    with staged_file(part) as partial:
                        pq.write_table(pa.table({"user_id": batch["user_id"], **columns}), partial)
                bar.update(len(batch))
        state.wait_for_everyone()
        if state.is_main_process:
            join_parts(folder)
        return {"num_users": histories.num_users}

    named = (options.histories, options.recommend_model, options.recommend_reward_model)
    outside = [OutsideInput(source) for source in named if source is not None]
    return run_stage(Stage("recommend", args.output_dir, options, reads, outside), work)


class Histories:
    """The users to recommend to: of a Parquet file, read part by part, or the evaluated ones of the run, of a log in
    partitions one partition after the other.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file lacks a column or holds no user.
    """

    def __init__(self, args: RecipeArguments, options: RecommendArguments):
        self.options, path, count = options, options.histories, options.evaluation_users
        if path is None:
            self.name, prepared = EVALUATION_CASES, prepared_data(args, "recommend")
            if count is None:
                self.source = prepared
                self.num_users = read_json(prepared.folder / STAGE_FILE)["dataset"]["num_evaluation_users"]
            else:
                users = prepared.read(EVALUATION_CASES)
                self.source = users.shuffle(seed=options.seed).select(range(min(count, len(users))))
                self.num_users = len(self.source)
            return
        if not Path(path).is_file():
            raise FileNotFoundError(f"histories: {path} is not a file; give a Parquet of user_id, history_item_ids.")
        try:
            self.name, self.source = path, pq.ParquetFile(path)
        except pa.ArrowException as error:
            raise ValueError(f"histories: {path} is no Parquet file, or a damaged one: {error}.") from None
        self.num_users = self.source.metadata.num_rows
        names = self.source.schema_arrow.names
        for column in HISTORY_COLUMNS:
            if column not in names:
                raise ValueError(
                    f"{path} has no column '{column}', only {', '.join(names)}: recommend reads user_id and "
                    "history_item_ids (a list of item ids, oldest first)."
                )
        if self.num_users == 0:
            raise ValueError(f"{path} holds no user.")

    def parts(self) -> Iterator[pa.RecordBatch]:
        """Record batches of at most `USERS_PER_PART` users, the same ones every time."""
        if isinstance(self.source, pq.ParquetFile):
            columns = _read_columns(self.source.schema_arrow.names, self.options)
            yield from self.source.iter_batches(USERS_PER_PART, columns=columns)
            return
        drawn = isinstance(self.source, Dataset)
        # A partition keeps what it has read for as long as it is kept.
        for users in [self.source] if drawn else (part.read(EVALUATION_CASES) for part in self.source.by_partition()):
            columns = _read_columns(users.column_names, self.options)
            table = users.with_format("arrow")[:].combine_chunks()
            yield from table.select(columns).to_batches(USERS_PER_PART)

    def check_items(self, tokenizer: OneRecTokenizer, unknown_items: str) -> None:
        """Looks every item up before any time is spent on generating. A null history is of a new user.

        Raises:
            ValueError: if a column holds no lists of ids of the catalogue's type, an item is missing, or is not in the
                catalogue while `unknown_items` is "error"; names the user.
        """
        names = {"history_item_ids": "the history", "exposed_item_ids": "the exposures"}
        for batch in self.parts():
            for column in (name for name in names if name in batch.schema.names):
                values = batch[column]
                self._check_type(column, values.type, tokenizer)
                flat = pc.list_flatten(values)
                bad = np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))
                problem = "no item id at one place; drop it."
                if not len(bad) and unknown_items == "error":
                    bad = np.flatnonzero(tokenizer.item_index(flat.to_pylist(), unknown_items="skip") < 0)
                    problem = (
                        f"which is not in the catalogue of {tokenizer.num_items} items; drop it, or pass "
                        "--unknown_items skip."
                    )
                if len(bad):
                    user = batch["user_id"][pc.list_parent_indices(values)[int(bad[0])].as_py()].as_py()
                    item = flat[int(bad[0])].as_py()
                    problem = problem if item is None else f"item id {item!r}, {problem}"
                    raise ValueError(f"{self.name}: {names[column]} of user {user!r} holds {problem}")

    def _check_type(self, column: str, kind: pa.DataType, tokenizer: OneRecTokenizer) -> None:
        needed, fits = (
            ("integers", pa.types.is_integer) if tokenizer.item_ids.dtype == np.int64 else ("strings", is_text)
        )
        values = kind.value_type if _is_list(kind) else kind
        values = values.value_type if pa.types.is_dictionary(values) else values
        if not _is_list(kind) or not (fits(values) or pa.types.is_null(values)):
            raise ValueError(
                f"{self.name}: column '{column}' holds {kind}, where lists of item ids are needed, all {needed} as in "
                "the catalogue. Convert the column."
            )


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _read_columns(names: list[str], options: RecommendArguments) -> list[str]:
    judged = ("exposed_item_ids", *REWARD_FEATURES) if options.recommend_reward_model is not None else ()
    return [name for name in (*HISTORY_COLUMNS, *HISTORY_FEATURES, *judged) if name in names]


def join_parts(folder: Path) -> None:
    """One file of all the parts, in the order of the users, without holding them all in memory."""
    parts = sorted(folder.glob("part_*.parquet"))
    schema = pq.read_schema(parts[0])
    with staged_file(folder / RECOMMENDATIONS) as partial, pq.ParquetWriter(partial, schema) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part))
    for part in parts:
        part.unlink()
