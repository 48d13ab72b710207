"""Ablations of the alignment and the paper's Table 1: one command each, which writes one table.

A cell is one more alignment of the run's seed model with one setting changed, in a folder of its own below
`<output_dir>/ablations`, and the evaluation of its last kept round. Cells read the run's data, tokenizer, seed model
and reward models and redo none of them. Each step of a cell is a stage: complete ones are skipped, a killed one is
resumed by the same command. Where the run's own alignment has a cell's settings, it is the cell.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors.numpy import load_file

from ..configuration_onerec import OneRecConfig
from ..data import DataArguments, pretraining_sessions
from ..evaluation import PolicyResults
from ..reporting import comparison_figure, comparison_table
from ..reporting.served_report import BASELINE_NAMES
from ..staged_files import staged_file
from .align_stage import align_stage, run_align
from .baselines_stage import BASELINE_STAGE, baseline_stage, fitted_baselines, run_baselines, skipped_baselines
from .evaluate_stage import ROUND, SEED_STAGE, seed_stage
from .evaluated_run import EvaluatedRun
from .preferences_stage import run_sample_preferences
from .pretrain_stage import run_pretrain
from .recipe_arguments import BASELINES, PolicyArguments, RecipeArguments
from .stage_runner import MODEL, Stage, completed_stage, run_stage, write_json

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

Changes = dict[str, Any]  # options of the recipe


@dataclass(frozen=True)
class Ablation:
    """
    Args:
        title, about: of the table.
        cells: the default ones.
        changes: by cell, what it changes of the run's settings, from these settings and the cells.
        same_first_pairs: whether the first round of all cells has the same pairs, which are drawn once then.
        cells_are_rounds: whether the cells are rounds of one alignment.
    """

    title: str
    about: str
    cells: tuple[str, ...]
    changes: Callable[[RecipeArguments, Sequence[str]], dict[str, Changes]]
    same_first_pairs: bool = False
    cells_are_rounds: bool = False


def _losses(options: RecipeArguments, cells: Sequence[str]) -> dict[str, Changes]:
    shared = {
        "align_rounds": 1,
        "r_dpo": min(1.0, options.r_dpo * max(1, options.align_rounds)),
        # A loss of pairs takes the worst of them alone.
        "preferences": {"num_rejected": NUM_REJECTED, **options.preferences},
    }
    return {cell: {**shared, "align": {**options.align, "label_smoothing": 0.0, **LOSSES[cell]}} for cell in cells}


def _ntp(options: RecipeArguments, cells: Sequence[str]) -> dict[str, Changes]:
    known = {"with": {}, "without": {"align": {**options.align, "ntp_per_pair": 0}}}
    return {cell: known[cell] for cell in cells}


def _rounds(options: RecipeArguments, cells: Sequence[str]) -> dict[str, Changes]:
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
TABLE_1_NAMES = {**BASELINE_NAMES, TIGER: "TIGER-like", ONEREC: "OneRec"} | {
    name.lower().replace("-", ""): f"OneRec + {name}"
    for name in ("DPO", "IPO", "cDPO", "rDPO", "CPO", "SimPO", "S-DPO", "IPA")
}
TABLE_1_ABOUT = (
    "Sessions of methods that rank items are those with the highest sum of scores. TIGER-like: OneRec's layers with "
    "as many parameters and no mixture of experts, trained to generate the next item alone. OneRec + a loss: one "
    "round from OneRec as the fixed reference, on pairs drawn once, as many as IPA's rounds have. OneRec + IPA: all "
    "rounds, each with pairs that the previous snapshot draws and with that snapshot as the reference. Changes are "
    "from OneRec."
)


def run_ablation(args: RecipeArguments, name: str, *cells: str) -> Path:
    """Runs an ablation of `ABLATIONS`, or `table1`, and prints its table; returns its folder, which has `table.md`,
    `table.json` and `figure.png`.

    Args:
        args: the run's. What the cells change is changed in them alone.
        name: the ablation.
        cells: some of its cells; of `r_dpo`, `num_candidates` and `rounds` any numbers. Default: all.

    Raises:
        FileNotFoundError: if the run lacks one of the stages that are read; the message says which recipe makes it.
        ValueError: for an ablation or a cell that there is not, or a run without rounds of alignment.
    """
    if name != TABLE_1 and name not in ABLATIONS:
        raise ValueError(f"There is no ablation {name!r}; choose one of {', '.join([*ABLATIONS, TABLE_1])}.")
    if args.align_rounds < 1 and name != "rounds":
        raise ValueError("align_rounds is 0: give the rounds of a cell, such as --align_rounds 1.")
    comparison = _Comparison(args)
    if name == TABLE_1:
        title, about, rows = "Table 1", TABLE_1_ABOUT, _table_1(comparison, cells)
    else:
        ablation = ABLATIONS[name]
        title, about, seed = ablation.title, ablation.about, comparison.row(SEED, comparison.seed)
        rows = [seed, *_aligned_rows(comparison, name, cells or ablation.cells)]
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
        self.args, self.run = args, EvaluatedRun(args, FOLDER, judged=True)

    def results(
        self, stage: str, reads: Sequence[str], measure: Callable[[EvaluatedRun], PolicyResults]
    ) -> PolicyResults:
        """A policy's results, as a stage that reads the run's and `reads`; the main process measures."""

        def work(folder: Path) -> None:
            if PartialState().is_main_process:
                measure(self.run).save(folder / RESULTS)

        arguments = self.args.group(PolicyArguments)
        folder = run_stage(Stage(stage, self.args.output_dir, arguments, [*READS, *reads]), work)
        return PolicyResults.load(folder / RESULTS)

    @cached_property
    def seed(self) -> PolicyResults:
        """The seed model's, as the run's evaluation has them or by itself."""
        if seed_stage(self.args, judged=True).is_complete():
            return PolicyResults.load(self.args.output_dir / SEED_STAGE / ROUND.format(0))
        return self.results(
            f"{FOLDER}/seed", [], lambda run: run.evaluator.generator(run.seed_model, run.seed_model, SEED)
        )

    def row(self, name: str, results: PolicyResults, **about: Any) -> dict[str, Any]:
        """A policy's row of the table."""
        return {"name": name, "rounds": None, **about, **results.summary(None if results is self.seed else self.seed)}


def _aligned_rows(comparison: _Comparison, name: str, cells: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of an ablation's cells; of its rounds only as many as the alignment had."""
    ablation, args = ABLATIONS[name], comparison.args
    base, rows = f"{FOLDER}/{name}", []
    try:
        changes = ablation.changes(args, cells)
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
            stage, [aligned], lambda run: run.evaluator.generator(run.load(source), run.seed_model, name)
        )
    return comparison.row(name, results, rounds=kept)


def _aligned(args: RecipeArguments, changes: Changes, stage: str, shared: str | None = None) -> str:
    """The stage that has aligned the seed model with changed settings: the run's own, or `stage`, run if need be; in
    the folder `shared` are the first round's pairs, shared with other cells."""
    args = replace(args, hub_preferences_id=None, sample_model=None, **changes)
    if align_stage(args).is_complete():
        return "align"
    pairs = f"{shared}/pairs" if shared else None
    if pairs is not None:
        run_sample_preferences(args, pairs)
    run_align(args, stage, pairs)
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
        if (not cells or name in cells) and (name not in BASELINES or name in fitted_baselines(args))
    }
    unknown = set(cells) - set(names)
    if unknown:
        raise ValueError(f"This run's Table 1 has no row {unknown.pop()!r}; there are {', '.join(TABLE_1_NAMES)}.")
    base = f"{FOLDER}/{TABLE_1}"
    ranked = [name for name in names if name in BASELINES]
    if ranked:
        baselines = BASELINE_STAGE
        if not baseline_stage(args).is_complete():
            baselines = f"{base}/{BASELINE_STAGE}"
            run_baselines(baseline_stage(args, baselines), comparison.run)
        skipped = skipped_baselines(args.output_dir / baselines)
        for name in (name for name in ranked if name not in skipped):
            file = args.output_dir / baselines / f"{name}.safetensors"
            results = comparison.results(
                f"{base}/{name}", [baselines], lambda run, file=file: run.evaluator.ranking_method(**load_file(file))
            )
            rows.append(comparison.row(names[name], results))
    if TIGER in names:
        trained = f"{base}/{TIGER}/pretrain"
        source = train_tiger(args, trained) / MODEL
        results = comparison.results(f"{base}/{TIGER}/evaluate", [trained], lambda run: _ranked_by_tiger(run, source))
        rows.append(comparison.row(names[TIGER], results))
    rows.append(comparison.row(TABLE_1_NAMES[ONEREC], comparison.seed))
    # The cells of the ablation of the losses.
    losses = [name for name in names if name in LOSSES]
    rows += [{**row, "name": names[row["name"]]} for row in _aligned_rows(comparison, "losses", losses)]
    if IPA in names:
        aligned = _aligned(args, {"align_reference": "previous"}, f"{base}/{IPA}/align")
        rows.append(_aligned_row(comparison, names[IPA], aligned, f"{base}/{IPA}/evaluate"))
    return rows


def _ranked_by_tiger(run: EvaluatedRun, source: Path) -> PolicyResults:
    ranking = run.evaluator.rank(run.load(source), run.evaluator.options.ranked_items, TABLE_1_NAMES[TIGER])
    return run.evaluator.ranking_method(*ranking)


def train_tiger(args: RecipeArguments, stage: str) -> Path:
    """Trains Table 1's TIGER-like generator on the run's data and semantic IDs, as [`run_pretrain`] does, as a
    stage of that name.

    It generates one item, and every positive behaviour with the minimal history before it is a target. Its decoder's
    FFNs are dense and as wide as all experts together: it has as many parameters as OneRec, all of them active.
    """
    size = OneRecConfig.from_preset(args.preset, **args.model)
    width = size.num_experts * size.moe_intermediate_size
    dense = {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": width}
    cut = {"session_items": 1, "min_session_items": 1, "session_source": "positive", "session_cut": "consecutive"}
    single = replace(args, model={**args.model, **dense}, **cut, session_stride=None, quality_predicates=None)
    arguments = single.group(DataArguments)
    return run_pretrain(single, stage, lambda data: pretraining_sessions(data.split.fit, data.feed, arguments))
