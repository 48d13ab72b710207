"""The reward model beside gradient-boosted trees, on the same cases with the same information.

    python recipes/benchmarks/reward.py --config recipes/kuairand/preference_alignment.yaml --output_dir runs/kuairand

Reads the run's `data` and `tokenize` stages. Both methods are fitted on the exposures of the fitted period, of all
users but a tenth, on which the trees are stopped and the model is calibrated, and judge those of the evaluated period:
single exposures, and sessions as the run cuts them. The trees (lightgbm, one model for each objective; of sessions
their own) read what the model reads beside the sequence itself: the smoothed rates and counts of the user, of the item
and of the user with items of the same features, the items' embeddings and features and the user's features; of a
session the means over its items and their number. Every cell is kept in `<output_dir>/reward_benchmark`, so that a
run that was stopped goes on after the last one. `--seeds 0 1 2 --methods trees reward_model --json FILE`.
"""

import json
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import set_seed

from onerec_hf.data import DataArguments, exposure_runs
from onerec_hf.pretraining import index_sessions
from onerec_hf.reward import (
    ExposureEncoder,
    ItemTotals,
    RewardCollator,
    create_reward_model,
    objective_metrics,
    predict_rewards,
    train_reward_model,
    without_calibration_users,
)
from onerec_hf.stages.data_stage import prepared_data
from onerec_hf.stages.pretrain_stage import TRAINING_DEFAULTS
from onerec_hf.stages.recipe_arguments import parse_recipe_arguments
from onerec_hf.stages.stage_runner import read_json, stage_dir, write_json
from onerec_hf.stages.tokenize_stage import load_item_content
from onerec_hf.tokenization_onerec import OneRecTokenizer

TREES = {
    "objective": "cross_entropy",  # labels of sessions are shares
    "num_leaves": 15,
    "learning_rate": 0.05,
    "min_data_in_leaf": 100,
    "feature_fraction": 0.3,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "verbose": -1,
}
ROUNDS, PATIENCE = 600, 50
COLUMNS = ("auc", "gauc", "log_loss", "calibration_error")


class Cases:
    """The run's exposures: `train`, `held_out` and `later` runs, and the items' totals."""

    def __init__(self, args, seed: int):
        self.tokenizer = OneRecTokenizer.from_pretrained(stage_dir(args.output_dir, "tokenize", "reward benchmark"))
        self.embeddings = load_item_content(args.output_dir)
        prepared = prepared_data(args, "reward benchmark")
        self.feed = prepared.fitted_feed
        runs = index_sessions(
            exposure_runs(self.feed.interactions, self.feed, args.group(DataArguments)), self.tokenizer
        )
        self.train, self.held_out = without_calibration_users(runs, seed)
        self.later = index_sessions(prepared.later_runs(), self.tokenizer)
        self.totals = ItemTotals.of_feed(self.feed, self.tokenizer)
        sizes = {"history_items": args.history_items, "session_items": args.session_items}
        self.fields = {**sizes, **args.reward_model}

    def model(self, **fields):
        return create_reward_model(self.fields | fields, self.feed, self.tokenizer, self.embeddings, self.totals)


def reward_model_cells(args, cases: Cases, seed: int) -> dict[str, dict[str, float]]:
    set_seed(seed)
    model = cases.model()
    encoder = ExposureEncoder(model.config, cases.tokenizer.item_token_ids)
    lengths = {"exposures": 1, "sessions": model.config.session_items}
    with tempfile.TemporaryDirectory() as folder:
        arguments = {**TRAINING_DEFAULTS, "seed": seed, **args.reward, "save_strategy": "no"}
        arguments |= {"output_dir": folder}
        data = {"runs": cases.train, "calibration_dataset": cases.held_out}
        train_reward_model(model, cases.tokenizer, cases.totals, arguments=arguments, **data)
    return {
        name: predict_rewards(model, cases.later, RewardCollator(encoder, None, length)).metrics(model.config)
        for name, length in lengths.items()
    }


class TreeTables:
    """What the trees read of sessions, taken from the inputs of the reward model's own layers."""

    def __init__(self, cases: Cases):
        # No weight of this model is used: only what it makes of the past.
        self.model = cases.model(hidden_size=4, num_attention_heads=1).eval()
        self.encoder = ExposureEncoder(self.model.config, cases.tokenizer.item_token_ids)
        self.model.fusion.register_forward_pre_hook(self._keep)

    def _keep(self, module, inputs):
        self.inputs = inputs[0]

    @torch.no_grad()
    def __call__(
        self, runs, totals: ItemTotals | None, session_items: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features [S, D], labels [S, O] and users [S]."""
        config, table = self.model.config, self.model.item_table
        profile_width = len(config.user_features) * config.feature_size
        users = np.unique(np.asarray(runs["user_id"][:]), return_inverse=True)[1]
        parts, start = [], 0
        for batch in DataLoader(runs, batch_size=256, collate_fn=RewardCollator(self.encoder, totals, session_items)):
            labels, indices = batch.pop("labels"), batch["session_indices"]
            self.model(**batch)
            # After what the untrained layers made of the items: ranks, rates and, by a random projection, repetition.
            past = self.inputs[..., 3 * config.hidden_size : self.inputs.shape[-1] - profile_width]
            rows = table.rows(indices, indices.shape)
            known = [table.values[rows].float(), table.embeddings[rows]]
            items = torch.cat([past.unflatten(1, indices.shape[1:]), *known], dim=-1)
            real = indices >= 0
            means = (items * real[..., None]).sum(2) / real.sum(2).clamp(min=1)[..., None]
            # A feed without a table of users has no profiles.
            profile = batch.get("user_values", indices.new_zeros(len(indices), 0))
            profile = profile.float()[:, None].expand(-1, indices.shape[1], -1)
            owners = np.broadcast_to(users[start : start + len(indices), None], real.shape[:2])
            there = real[..., 0].numpy()
            features = torch.cat([means, profile, real.sum(2)[..., None]], dim=-1)
            parts.append((features.numpy()[there], labels.numpy()[there], owners[there]))
            start += len(indices)
        return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))


def tree_cells(cases: Cases, seed: int, threads: int) -> dict[str, dict[str, float]]:
    try:
        import lightgbm
    except ImportError:
        sys.exit("The trees need lightgbm: pip install lightgbm.")
    tables, cells = TreeTables(cases), {}
    names = tables.model.config.objective_names
    for name, length in (("exposures", 1), ("sessions", tables.model.config.session_items)):
        train, held_out = (tables(runs, cases.totals, length) for runs in (cases.train, cases.held_out))
        later = tables(cases.later, None, length)
        estimates = np.zeros_like(later[1])
        for index in range(len(names)):
            known, checked = (~np.isnan(part[1][:, index]) for part in (train, held_out))
            data = lightgbm.Dataset(train[0][known], train[1][known, index])
            check = lightgbm.Dataset(held_out[0][checked], held_out[1][checked, index], reference=data)
            trees = lightgbm.train(
                TREES | {"seed": seed, "num_threads": threads},
                data,
                ROUNDS,
                valid_sets=[check],
                callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
            )
            estimates[:, index] = trees.predict(later[0])
        cells[name] = objective_metrics(estimates, later[1], names, later[2])
    return cells


def main():
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["trees", "reward_model"])
    parser.add_argument("--json", type=Path)
    options, rest = parser.parse_known_args()
    args = parse_recipe_arguments(rest)
    folder = args.output_dir / "reward_benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    cells = {}
    for seed in options.seeds:
        cases = None
        for method in options.methods:
            path = folder / f"{method}_{seed}.json"
            if not path.exists():
                cases = cases or Cases(args, seed)
                threads = torch.get_num_threads()
                found = (
                    tree_cells(cases, seed, threads) if method == "trees" else reward_model_cells(args, cases, seed)
                )
                write_json(path, found)
            cells[method, seed] = read_json(path)
    rows = []
    for what in ("exposures", "sessions"):
        reference = next(iter(cells.values()))[what]
        for objective in [name.removesuffix("_labels") for name in reference if name.endswith("_labels")]:
            for method in options.methods:
                found = [cells[method, seed][what] for seed in options.seeds]
                row = {"cases": what, "objective": objective, "method": method}
                for column in COLUMNS:
                    values = [one[f"{objective}_{column}"] for one in found if f"{objective}_{column}" in one]
                    row[column] = [float(np.mean(values)), float(np.std(values))] if values else None
                rows.append(row)
    print(f"| cases | objective | method | {' | '.join(COLUMNS)} |\n|{'---|' * (3 + len(COLUMNS))}")
    for row in rows:
        figures = ["-" if row[column] is None else "{:.4f} ± {:.4f}".format(*row[column]) for column in COLUMNS]
        print(f"| {row['cases']} | {row['objective']} | {row['method']} | {' | '.join(figures)} |")
    if options.json:
        options.json.write_text(json.dumps({"seeds": options.seeds, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
