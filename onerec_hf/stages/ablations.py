"""Ablations of the alignment and the paper's Table 1: one command each, which writes one table.

A cell is one more alignment of the run's seed model with one setting changed, in a folder of its own below
`<output_dir>/ablations`, and the evaluation of its last kept round. Cells read the run's data, tokenizer, seed model
and reward models and redo none of them. Each step of a cell is a stage: complete ones are skipped, a killed one is
resumed by the same command. Where the run's own alignment has a cell's settings, it is the cell.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from safetensors.numpy import load_file

from ..configuration_onerec import OneRecConfig
from ..data import pretraining_sessions
from ..evaluation import PolicyResults, comparison_figure, comparison_table
from ..staged_files import staged_file
from .align import ALIGN_READS, align, align_settings
from .data_stage import PreparedData
from .evaluate import (
    BASELINE_READS,
    BASELINE_STAGE,
    ROUND,
    SEED_STAGE,
    baseline_settings,
    evaluate_baselines,
    policy_settings,
)
from .policy_evaluation import PolicyEvaluation
from .pretrain import MODEL, pretrain
from .recipe_arguments import BASELINES, RecipeArguments, TrainingStagesArguments
from .sample_preferences import sample_preference_pairs
from .stage_runner import completed_stage, is_complete, run_stage, write_json

FOLDER = "ablations"
RESULTS = "results.safetensors"
READS = ["data", "tokenize", "pretrain", "reward"]
SEED = "seed model"

# S-DPO (arXiv 2406.09215) takes a few rejected sessions; 0.1 is rDPO's usual share of flipped labels. IPO and SimPO
# count log-probabilities per code, a session of five items having 15: with these beta their first steps are about as
# large as those of DPO with its default of 0.1.
NUM_REJECTED = 4
LABEL_SMOOTHING = 0.1
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"loss_type": "sigmoid"},
    "ipo": {"loss_type": "ipo", "beta": 1.0},
    "cdpo": {"loss_type": "cdpo", "label_smoothing": LABEL_SMOOTHING},
    "rdpo": {"loss_type": "robust", "label_smoothing": LABEL_SMOOTHING},
    "cpo": {"loss_type": "cpo"},
    "simpo": {"loss_type": "simpo", "beta": 2.0},
    "sdpo": {"loss_type": "sdpo"},
}

Changes = dict[str, Any]  # fields of TrainingStagesArguments


@dataclass(frozen=True)
class Ablation:
    """
    Args:
        title, about: Of the table.
        cells: The default ones.
        changes: By cell, what it changes of the run's settings, from these settings and the cells.
        same_first_pairs: Whether the first round of all cells has the same pairs, which are drawn once then.
        cells_are_rounds: Whether the cells are rounds of one alignment.
    """

    title: str
    about: str
    cells: tuple[str, ...]
    changes: Callable[[TrainingStagesArguments, Sequence[str]], dict[str, Changes]]
    same_first_pairs: bool = False
    cells_are_rounds: bool = False


def _losses(options: TrainingStagesArguments, cells: Sequence[str]) -> dict[str, Changes]:
    shared = {
        "align_rounds": 1,
        "r_dpo": min(1.0, options.r_dpo * max(1, options.align_rounds)),
        # A loss of pairs takes the worst of them alone.
        "preferences": {"num_rejected": NUM_REJECTED, **options.preferences},
    }
    return {cell: {**shared, "align": {**options.align, "label_smoothing": 0.0, **LOSSES[cell]}} for cell in cells}


def _ntp(options: TrainingStagesArguments, cells: Sequence[str]) -> dict[str, Changes]:
    known = {"with": {}, "without": {"align": {**options.align, "ntp_per_pair": 0}}}
    return {cell: known[cell] for cell in cells}


def _rounds(options: TrainingStagesArguments, cells: Sequence[str]) -> dict[str, Changes]:
    numbers = [int(cell) for cell in cells]
    if min(numbers) < 1:
        raise ValueError("rounds count from 1")
    return {cell: {"align_rounds": max(numbers)} for cell in cells}


ABLATIONS = {
    "r_dpo": Ablation(
        "Share of users with a pair (r_DPO)",
        "r_DPO, the share of the users with a preference pair in every round.",
        ("0.01", "0.02", "0.03", "0.04", "0.05"),
        lambda options, cells: {cell: {"r_dpo": float(cell)} for cell in cells},
    ),
    "num_candidates": Ablation(
        "Number of candidates",
        "N, the sessions among which each pair is chosen.",
        ("16", "32", "64", "128"),
        lambda options, cells: {cell: {"num_candidates": int(cell)} for cell in cells},
    ),
    "losses": Ablation(
        "Preference losses",
        "One round from the seed model, which is the reference, on pairs that it has drawn once; as many pairs as all "
        "rounds of the run's alignment have.",
        tuple(LOSSES),
        _losses,
        same_first_pairs=True,
    ),
    "reference": Ablation(
        "Moving and fixed reference",
        "The reference of a round: the snapshot that it starts from (previous) or always the seed model (sft).",
        ("previous", "sft"),
        lambda options, cells: {cell: {"align_reference": cell} for cell in cells},
        same_first_pairs=True,
    ),
    "ntp": Ablation(
        "Next-token prediction beside the preference loss",
        "The run's mix of next-token prediction rows (with), or pairs alone (without).",
        ("with", "without"),
        _ntp,
        same_first_pairs=True,
    ),
    "rounds": Ablation(
        "Rounds of alignment",
        "One alignment, evaluated after each of its rounds; it ends after one that max_recall_drop does not keep.",
        ("1", "2", "3", "4", "5"),
        _rounds,
        cells_are_rounds=True,
    ),
}

TABLE_1 = "table1"
TIGER, ONEREC, IPA = "tiger", "onerec", "ipa"
TABLE_1_NAMES = {
    "popularity": "Popularity",
    "item_knn": "Item-KNN",
    "ease": "EASE",
    "sasrec": "SASRec",
    TIGER: "TIGER-like",
    ONEREC: "OneRec",
    "dpo": "OneRec + DPO",
    "ipo": "OneRec + IPO",
    "cdpo": "OneRec + cDPO",
    "rdpo": "OneRec + rDPO",
    "cpo": "OneRec + CPO",
    "simpo": "OneRec + SimPO",
    "sdpo": "OneRec + S-DPO",
    IPA: "OneRec + IPA",
}
TABLE_1_ABOUT = (
    "Sessions of methods that rank items are those with the highest sum of scores. TIGER-like: OneRec's layers with "
    "as many parameters and no mixture of experts, trained to generate the next item alone. OneRec + a loss: one "
    "round from OneRec as the fixed reference, on pairs drawn once, as many as IPA's rounds have. OneRec + IPA: all "
    "rounds, each with pairs that the previous snapshot draws and with that snapshot as the reference. Changes are "
    "from OneRec."
)


def ablate(args: RecipeArguments, name: str, *cells: str) -> Path:
    """Runs an ablation of `ABLATIONS`, or `table1`, and prints its table; returns its folder, which has `table.md`,
    `table.json` and `figure.png`.

    Args:
        args: The run's. What the cells change is changed in them alone.
        name: The ablation.
        cells: Some of its cells; of `r_dpo`, `num_candidates` and `rounds` any numbers. Default: all.

    Raises:
        FileNotFoundError: If the run lacks one of the stages that are read; the message says which recipe makes it.
        ValueError: For an ablation or a cell that there is not, or a run without rounds of alignment.
    """
    if name != TABLE_1 and name not in ABLATIONS:
        raise ValueError(f"There is no ablation {name!r}; choose one of {', '.join([*ABLATIONS, TABLE_1])}.")
    if args.training.align_rounds < 1 and name != "rounds":
        raise ValueError("align_rounds is 0: give the rounds of a cell, such as --align_rounds 1.")
    comparison = _Comparison(args)
    if name == TABLE_1:
        title, about, rows = "Table 1", TABLE_1_ABOUT, _table_1(comparison, cells)
    else:
        ablation = ABLATIONS[name]
        title, about = ablation.title, ablation.about
        rows = [comparison.row(SEED, comparison.seed)]
        rows += _aligned_rows(comparison, name, cells or ablation.cells)
    folder = args.output_dir / FOLDER / name
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        table = comparison_table(title, about, rows)
        write_json(folder / "table.json", {"title": title, "about": about, "rows": rows})
        with staged_file(folder / "table.md") as partial:
            partial.write_text(table, encoding="utf-8")
        with staged_file(folder / "figure.png") as partial:
            comparison_figure(title, rows).savefig(partial, format="png", dpi=120)
        print(table)
        print(f"Table: {folder / 'table.md'}")
    PartialState().wait_for_everyone()
    return folder


class _Comparison:
    """Policies of one run, evaluated on the same users; what they share is loaded when the first one needs it."""

    def __init__(self, args: RecipeArguments):
        self.args = args
        self.evaluation = functools.cache(lambda: PolicyEvaluation(args, FOLDER, judged=True))

    def results(
        self, stage: str, reads: Sequence[str], measure: Callable[[PolicyEvaluation], PolicyResults]
    ) -> PolicyResults:
        """A policy's results, as a stage that reads the run's and `reads`; the main process measures."""

        def work(folder: Path) -> None:
            if PartialState().is_main_process:
                measure(self.evaluation()).save(folder / RESULTS)

        settings = policy_settings(self.args)
        for unused in ("counterfactual_users", "counterfactual_clip"):
            settings.pop(unused)
        folder = run_stage(stage, self.args.output_dir, settings, [*READS, *reads], work)
        return PolicyResults.load(folder / RESULTS)

    @functools.cached_property
    def seed(self) -> PolicyResults:
        """The seed model's, as the run's evaluation has them or by itself."""
        if is_complete(SEED_STAGE, self.args.output_dir, policy_settings(self.args), READS):
            return PolicyResults.load(self.args.output_dir / SEED_STAGE / ROUND.format(0))
        return self.results(
            f"{FOLDER}/seed", [], lambda evaluation: evaluation.generator(evaluation.seed_model, SEED, is_seed=True)
        )

    def row(self, name: str, results: PolicyResults, **about: Any) -> dict[str, Any]:
        """A policy's row of the table."""
        before = None if results is self.seed else self.seed
        return {"name": name, "rounds": None, **about, **results.summary(before)}


def _aligned_rows(comparison: _Comparison, name: str, cells: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of an ablation's cells; of its rounds only as many as the alignment had."""
    ablation, args = ABLATIONS[name], comparison.args
    base, rows = f"{FOLDER}/{name}", []
    try:
        changes = ablation.changes(args.training, cells)
    except (KeyError, ValueError) as error:
        known = ", ".join(ablation.cells)
        raise ValueError(f"{name} has not all of the cells {', '.join(cells)}: give such as {known}.") from error
    for cell in cells:
        stage = base if ablation.cells_are_rounds else f"{base}/{cell}"
        aligned = _aligned(args, changes[cell], f"{stage}/align", base if ablation.same_first_pairs else None)
        number = int(cell) if ablation.cells_are_rounds else None
        if number is None or number <= len(completed_stage(args.output_dir, aligned)["rounds"]):
            row = _aligned_row(comparison, cell, aligned, f"{base}/{cell}/evaluate", number)
            rows.append({**row, "settings": changes[cell]})
    return rows


def _aligned_row(
    comparison: _Comparison, name: str, aligned: str, stage: str, number: int | None = None
) -> dict[str, Any]:
    """Row of an alignment's last kept round, or of the round of that number, kept or not."""
    rounds, source = completed_stage(comparison.args.output_dir, aligned)["rounds"], MODEL
    if number is not None:
        rounds, source = rounds[:number], f"round_{number}"
    kept = sum(entry["kept"] for entry in rounds)
    results = comparison.seed
    if kept or number is not None:
        source = comparison.args.output_dir / aligned / source
        results = comparison.results(
            stage, [aligned], lambda evaluation: evaluation.generator(evaluation.load(source), name)
        )
    return comparison.row(name, results, rounds=kept)


def _aligned(args: RecipeArguments, changes: Changes, stage: str, shared: str | None = None) -> str:
    """The stage that has aligned the seed model with changed settings: the run's own, or `stage`, run if need be.

    Args:
        shared: Folder of the first round's pairs, shared with other cells.
    """
    args = replace(
        args,
        run=replace(args.run, hub_preferences_id=None),
        training=replace(args.training, sample_model=None, **changes),
    )
    if is_complete("align", args.output_dir, align_settings(args), ALIGN_READS):
        return "align"
    pairs = f"{shared}/pairs" if shared else None
    if pairs is not None:
        sample_preference_pairs(args, pairs)
    align(args, stage, pairs)
    return stage


def _table_1(comparison: _Comparison, cells: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of Table 1, in the paper's order; OneRec is always among them.

    The paper has one row by preference loss and a last one, IPA, and does not say how they differ beside the loss
    ("DPO and its variants" against its own). Here a loss has one round and IPA the run's.
    """
    args, rows = comparison.args, []
    names = {
        name: shown
        for name, shown in TABLE_1_NAMES.items()
        if (not cells or name in cells) and args.evaluation.baselines.get(name) is not False
    }
    unknown = set(cells) - set(names)
    if unknown:
        raise ValueError(f"This run's Table 1 has no row {unknown.pop()!r}; there are {', '.join(TABLE_1_NAMES)}.")
    base = f"{FOLDER}/{TABLE_1}"
    ranked = [name for name in names if name in BASELINES]
    if ranked:
        baselines = BASELINE_STAGE
        if not is_complete(baselines, args.output_dir, baseline_settings(args), BASELINE_READS):
            baselines = f"{base}/{BASELINE_STAGE}"
            evaluate_baselines(args, comparison.evaluation, baselines)
        for name in ranked:
            source = args.output_dir / baselines / f"{name}.safetensors"
            results = comparison.results(f"{base}/{name}", [baselines], functools.partial(_baseline, source=source))
            rows.append(comparison.row(names[name], results))
    if TIGER in names:
        trained = f"{base}/{TIGER}/pretrain"
        train_tiger(args, trained)
        source = args.output_dir / trained / MODEL
        results = comparison.results(f"{base}/{TIGER}/evaluate", [trained], functools.partial(_tiger, source=source))
        rows.append(comparison.row(names[TIGER], results))
    rows.append(comparison.row(TABLE_1_NAMES[ONEREC], comparison.seed))
    losses = [name for name in names if name in LOSSES]
    if losses:
        # The cells of the ablation of the losses.
        for row in _aligned_rows(comparison, "losses", losses):
            rows.append({**row, "name": names[row["name"]]})
    if IPA in names:
        aligned = _aligned(args, {"align_reference": "previous"}, f"{base}/{IPA}/align")
        rows.append(_aligned_row(comparison, names[IPA], aligned, f"{base}/{IPA}/evaluate"))
    return rows


def _baseline(evaluation: PolicyEvaluation, source: Path) -> PolicyResults:
    return evaluation.ranking_method(**load_file(source))


def _tiger(evaluation: PolicyEvaluation, source: Path) -> PolicyResults:
    ranking = evaluation.rank(evaluation.load(source), TABLE_1_NAMES[TIGER], evaluation.judged_width)
    return evaluation.ranking_method(*ranking)


def train_tiger(args: RecipeArguments, stage: str) -> Path:
    """Trains Table 1's TIGER-like generator on the run's data and semantic IDs, as [`pretrain`] does, as a stage of
    that name.

    It generates one item, and every positive behaviour with the minimal history before it is a target. Its decoder's
    FFNs are dense and as wide as all experts together: it has as many parameters as OneRec, all of them active.
    """
    options = args.training
    size = OneRecConfig.from_preset(options.preset, **options.model)
    dense = {
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": size.num_experts * size.moe_intermediate_size,
    }
    single = replace(
        args.data,
        session_items=1,
        min_session_items=1,
        session_source="positive",
        session_cut="consecutive",
        session_stride=None,
        quality_predicates=None,
    )

    def next_items(prepared: PreparedData) -> Dataset:
        return pretraining_sessions(prepared.split.fit, prepared.feed, single)

    changed = replace(args, data=single, training=replace(options, model={**options.model, **dense}))
    return pretrain(changed, stage, next_items)
