"""Quantizers compared: the semantic IDs they give, and how well the same small model learns to recommend by each.

    python recipes/benchmarks/quantizer_comparison.py --output_dir runs/quantizers --kuairand_dir KUAIRAND_FOLDER \
        --amazon_beauty_dir BEAUTY_FOLDER

A cell is one quantizer on one data set: semantic IDs, a short training, Recall@10 over the validation period. Every
cell is kept in `--output_dir`; a killed run goes on after the last one, and a complete one only prints the table.
`--table` prints what there is, `--cells` and `--data_sets` choose.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import onerec_hf
from onerec_hf.evaluation import ranking_metrics
from onerec_hf.stages import RecipeArguments, parse_recipe_arguments, run_data, run_pretrain, run_tokenize
from onerec_hf.stages.data_stage import EVALUATION_CASES, prepared_data
from onerec_hf.stages.stage_runner import read_json, write_json

RECIPES = Path(__file__).parents[1]
CELLS: dict[str, dict[str, Any]] = {
    "balanced_rkmeans": {"quantizer_type": "balanced_rkmeans"},
    "balanced_rkmeans, balanced codes": {
        "quantizer_type": "balanced_rkmeans",
        "quantizer": {"code_assignment": "balanced"},
    },
    "rkmeans": {"quantizer_type": "rkmeans"},
    "rqvae": {"quantizer_type": "rqvae"},
    "balanced_rkmeans, aligned": {"quantizer_type": "balanced_rkmeans", "embedding_adaptation": {}},
}
# The same for every cell: short histories and short sessions, so that one thread trains a cell in minutes.
TRAINING = {
    "evaluation_split": "validation",
    "history_items": 20,
    "session_items": 2,
    "session_stride": 2,
    "threads": 1,
    "holdout_sessions": 0,
    "pretrain": {
        "max_steps": 320,
        "per_device_train_batch_size": 256,
        "learning_rate": 2.0e-3,
        "warmup_steps": 0.05,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.05,
        "optim": "adamw_torch_fused",
        "save_strategy": "no",
    },
}
# What a data set's own recipe has otherwise.
OF_DATA_SET = {
    "amazon_beauty": {
        "codebook_sizes": [256, 256, 256],
        "model": {"history_positions": "item", "dropout": 0.2, "attention_dropout": 0.2},
    },
}
NUM_BEAMS = 20
MAX_USERS = 5000  # evaluated, of each data set
COLUMNS = {
    "use": "codes in use",
    "entropy": "entropy [bits]",
    "reconstruction_error": "error left",
    "neighbours_kept": "neighbours kept",
    "collision_rate": "collisions",
    "recall@10": "Recall@10",
    "interval": "95% interval",
}


def quantizer_comparison(
    data_dirs: dict[str, str], output_dir: str | Path, cells: list[str] | None = None, max_users: int = MAX_USERS
) -> list[dict[str, Any]]:
    """Makes the cells that are not there yet and returns all of them, one dictionary a cell.

    Args:
        data_dirs: folder of the data by data set, "kuairand" and "amazon_beauty".
        output_dir: where the cells are kept.
        cells: names in `CELLS`; all by default.
        max_users: evaluated users.
    """
    for data_set, data_dir in data_dirs.items():
        for name in cells or CELLS:
            folder = Path(output_dir) / data_set / name.replace(", ", "-").replace(" ", "_")
            if not (folder / "cell.json").exists():
                _make_cell(data_set, data_dir, name, folder, max_users)
    return finished_cells(output_dir)


def finished_cells(output_dir: str | Path) -> list[dict[str, Any]]:
    """The cells that are there, in the order of the table."""
    found = [read_json(path) for path in Path(output_dir).glob("*/*/cell.json")]
    order = list(CELLS)
    return sorted(found, key=lambda cell: (cell["data_set"], order.index(cell["quantizer"])))


def recipe_arguments(data_set: str, data_dir: str, folder: Path, options: dict[str, Any]) -> RecipeArguments:
    """Arguments of the data set's own recipe with the comparison's training."""
    options = TRAINING | OF_DATA_SET.get(data_set, {}) | options
    flags = [
        "--config",
        str(RECIPES / data_set / "pipeline.yaml"),
        "--data_dir",
        data_dir,
        "--output_dir",
        str(folder),
    ]
    for name, value in options.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}", *map(str, values)]
    return parse_recipe_arguments(flags)


def _make_cell(data_set: str, data_dir: str, name: str, folder: Path, max_users: int) -> None:
    args = recipe_arguments(data_set, data_dir, folder, CELLS[name])
    if not (folder / "data").exists():
        # The data stage is the same for all of a data set's cells.
        shared = recipe_arguments(data_set, data_dir, folder.parent / "prepared", CELLS[name])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(run_data(shared), folder / "data.copied", dirs_exist_ok=True)
        (folder / "data.copied").rename(folder / "data")
    report = read_json(run_tokenize(args) / "stage.json")["report"]
    trained = run_pretrain(args)
    model = AutoModelForSeq2SeqLM.from_pretrained(trained / "model")
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    cases = prepared_data(args, "the comparison").read(EVALUATION_CASES)
    if max_users < len(cases):
        cases = cases.shuffle(seed=0).select(range(max_users))
    model.config.session_items = 1  # only the ranked list is looked at
    recommended = onerec_hf.recommend(
        model, tokenizer, cases["history_item_ids"][:], top_k=10, num_beams=NUM_BEAMS, batch_size=64
    )
    ranked = np.full((len(cases), 10), -1)
    for row, user in zip(ranked, recommended, strict=True):
        row[: len(user["items"])] = tokenizer.item_index(user["items"])
    targets = tokenizer.item_index(cases["next_item_id"][:])
    metrics = ranking_metrics(ranked, targets, tokenizer.num_items, (10,), interval_resamples=1000)
    stage = read_json(trained / "stage.json")
    write_json(
        folder / "cell.json",
        {
            "data_set": data_set,
            "quantizer": name,
            "num_users": len(cases),
            "num_sessions": stage["num_sessions"],
            "training_seconds": stage["seconds"],
            "report": report,
            "metrics": metrics,
        },
    )


def print_table(cells: list[dict[str, Any]]) -> str:
    """One row a cell; the figures of the levels are means over the quantized ones."""
    rows = [["data set", "quantizer", *COLUMNS.values()]]
    for cell in cells:
        report, metrics = cell["report"], cell["metrics"]
        levels = [level for level in report["levels"] if "reconstruction_error" in level]
        low, high = metrics["recall@10_interval"]
        rows.append(
            [
                cell["data_set"],
                cell["quantizer"],
                f"{np.mean([level['use'] for level in levels]):.3f}",
                " / ".join(f"{level['entropy_bits']:.2f}" for level in levels),
                f"{report['reconstruction_error']:.3f}",
                f"{report['neighbours_kept']:.3f}",
                f"{report['collision_rate_before_policy']:.3f}",
                f"{metrics['recall@10']:.4f}",
                f"{low:.3f}-{high:.3f}",
            ]
        )
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--kuairand_dir")
    parser.add_argument("--amazon_beauty_dir")
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), help="Default: all.")
    parser.add_argument("--max_users", type=int, default=MAX_USERS, help="Evaluated users.")
    parser.add_argument("--table", action="store_true", help="Make no cell, print those that are there.")
    parser.add_argument("--json", help="File for the same figures.")
    options = parser.parse_args()
    data_dirs = {"kuairand": options.kuairand_dir, "amazon_beauty": options.amazon_beauty_dir}
    data_dirs = {name: folder for name, folder in data_dirs.items() if folder is not None and not options.table}
    cells = quantizer_comparison(data_dirs, options.output_dir, options.cells, options.max_users)
    print(print_table(cells))
    if options.json:
        write_json(Path(options.json), cells)


if __name__ == "__main__":
    main()
