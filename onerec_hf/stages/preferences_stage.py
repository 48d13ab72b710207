"""Stage `preferences`: one round's preference pairs from a snapshot, as every round of `align` draws them.

Over any number of processes, resumed in parts: see `onerec_hf.alignment.session_sampler`.
"""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset
from huggingface_hub import DatasetCard, create_repo

from ..alignment import PreferenceSampling, sample_preferences
from ..item_trie import ItemTrie
from ..modeling_onerec import OneRecForConditionalGeneration
from ..reporting.model_cards import preferences_card, save_model_card
from ..reward import SessionScorer
from ..session_rows import index_sessions
from ..staged_files import staged_file
from ..tokenization_onerec import OneRecTokenizer
from .data_stage import USER_HISTORIES, prepared_data
from .hub_access import require_login
from .recipe_arguments import SAMPLING_OPTIONS, PreferenceArguments, RecipeArguments, SamplePreferencesArguments
from .reward_stage import REWARD_MODEL
from .stage_runner import MODEL, OutsideInput, Stage, completed_stage, run_stage, stage_dir

PAIRS = "pairs.parquet"
PARTS = "pairs"

logger = get_logger(__name__)


def draw_pairs(
    options: PreferenceArguments,
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
        own = {name: getattr(options, name) for name in SAMPLING_OPTIONS}
        sampling = PreferenceSampling(**own, **options.preferences)
        progress = {"parts_dir": folder / PARTS, "show_progress": state.is_main_process}
        pairs = sample_preferences(model, trie, scorer, users, sampling, seed=seed, **progress)
        state.wait_for_everyone()  # nobody reads parts any more
        if state.is_main_process:
            with staged_file(folder / PAIRS) as partial:
                pairs.to_parquet(partial)
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(folder / PARTS, ignore_errors=True)
    return Dataset(pq.read_table(folder / PAIRS))


def run_sample_preferences(args: RecipeArguments, stage: str = "preferences") -> Path:
    """Draws the pairs of `sample_model`, by default the seed model; returns the stage's folder with `pairs.parquet`.

    With `hub_preferences_id` they are pushed there as a data set.
    """
    require_login(args.hub_preferences_id)
    options, state = args.group(SamplePreferencesArguments), PartialState()
    source = options.sample_model

    def work(folder: Path) -> dict | None:
        checkpoint = source or stage_dir(args.output_dir, "pretrain", "preferences") / MODEL
        model = OneRecForConditionalGeneration.from_pretrained(checkpoint).to(state.device)
        tokenizer = OneRecTokenizer.from_pretrained(checkpoint)
        trie = ItemTrie.from_tokenizer(tokenizer).to(state.device)
        reward_model = stage_dir(args.output_dir, "reward", "preferences") / REWARD_MODEL
        scorer = SessionScorer.from_pretrained(reward_model, state.device)
        users = index_sessions(prepared_data(args, "preferences").read(USER_HISTORIES), tokenizer)
        seed = options.seed + 1  # as the first round of align
        pairs = draw_pairs(options, folder, model, trie, scorer, users, seed)
        if state.is_main_process:
            save_model_card(card(len(pairs)), folder)
        return {"pairs": len(pairs)}

    def card(num_pairs: int) -> DatasetCard:
        sampling = {name: getattr(options, name) for name in SAMPLING_OPTIONS} | options.preferences
        known = completed_stage(args.output_dir, "data")["dataset"]
        return preferences_card(num_pairs, sampling, known, args.hub_preferences_id)

    reads = ["data", "tokenize", "reward", *([] if source else ["pretrain"])]
    outside = [OutsideInput(source)] if source else []
    folder = run_stage(Stage(stage, args.output_dir, options, reads, outside), work)
    if args.hub_preferences_id is not None and state.is_main_process:
        # The card first: what it says of the files gives way to what is pushed.
        pairs = Dataset(pq.read_table(folder / PAIRS))
        repository, private = args.hub_preferences_id, args.hub_private_repo
        create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        card(len(pairs)).push_to_hub(repository, repo_type="dataset")
        logger.info(f"Pushed: {pairs.push_to_hub(repository, private=private).repo_url}")
    return folder
