"""Stage `preferences`: one round's preference pairs from a snapshot, as every round of `align` draws them.

Over any number of processes, resumed in parts: see `onerec_hf.alignment.session_sampler`.
"""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset

from ..alignment import PreferenceSampling, sample_preferences
from ..item_trie import ItemTrie
from ..modeling_onerec import OneRecForConditionalGeneration
from ..pretraining import index_sessions
from ..reward import SessionScorer
from ..staged_files import staged_file
from ..tokenization_onerec import OneRecTokenizer
from .data_stage import USER_HISTORIES, prepared_data
from .pretrain import MODEL
from .recipe_arguments import RecipeArguments
from .reward import REWARD_MODEL
from .stage_runner import run_stage, stage_dir

PAIRS = "pairs.parquet"
PARTS = "pairs"
# What the pairs of a snapshot depend on.
PAIR_SETTINGS = (
    "training.r_dpo",
    "training.num_candidates",
    "training.min_reward_margin",
    "training.preferences",
    "evaluation.exclude_consumed",
    "run.seed",
)

logger = get_logger(__name__)


def preference_sampling(args: RecipeArguments) -> PreferenceSampling:
    """The options of the recipes as the sampler's."""
    return PreferenceSampling(
        **{
            **args.training.preferences,
            "sample_share": args.training.r_dpo,
            "num_candidates": args.training.num_candidates,
            "min_reward_gap": args.training.min_reward_margin,
            "exclude_history": args.evaluation.exclude_consumed,
        }
    )


def draw_pairs(
    args: RecipeArguments,
    folder: Path,
    model: OneRecForConditionalGeneration,
    trie: ItemTrie,
    scorer: SessionScorer,
    users: Dataset,
    seed: int,
) -> Dataset:
    """The pairs of `folder`, drawn by all processes unless they are there."""
    state = PartialState()
    if not (folder / PAIRS).exists():
        pairs = sample_preferences(
            model,
            trie,
            scorer,
            users,
            preference_sampling(args),
            seed=seed,
            parts_dir=folder / PARTS,
            progress=state.is_main_process,
        )
        state.wait_for_everyone()  # nobody reads parts any more
        if state.is_main_process:
            with staged_file(folder / PAIRS) as partial:
                pairs.to_parquet(partial)
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(folder / PARTS, ignore_errors=True)
    return Dataset(pq.read_table(folder / PAIRS))


def sample_preference_pairs(args: RecipeArguments, stage: str = "preferences") -> Path:
    """Draws the pairs of `sample_model`, by default the seed model; returns the stage's folder with `pairs.parquet`.

    With `hub_preferences_id` they are pushed there as a data set.
    """
    source, state = args.training.sample_model, PartialState()

    def work(folder: Path) -> dict | None:
        checkpoint = source or stage_dir(args.output_dir, "pretrain", "preferences") / MODEL
        tokenizer = OneRecTokenizer.from_pretrained(checkpoint)
        pairs = draw_pairs(
            args,
            folder,
            OneRecForConditionalGeneration.from_pretrained(checkpoint).to(state.device),
            ItemTrie.from_tokenizer(tokenizer).to(state.device),
            SessionScorer.from_pretrained(
                stage_dir(args.output_dir, "reward", "preferences") / REWARD_MODEL, state.device
            ),
            index_sessions(prepared_data(args, "preferences").read(USER_HISTORIES), tokenizer),
            args.run.seed + 1,  # as the first round of align
        )
        return {"pairs": len(pairs)}

    settings = args.settings(*PAIR_SETTINGS, "training.sample_model")
    reads = ["data", "tokenize", "reward", *([] if source else ["pretrain"])]
    folder = run_stage(stage, args.output_dir, settings, reads, work)
    if args.run.hub_preferences_id is not None and state.is_main_process:
        pairs = Dataset(pq.read_table(folder / PAIRS))
        logger.info(f"Pushed: {pairs.push_to_hub(args.run.hub_preferences_id).repo_url}")
    return folder
