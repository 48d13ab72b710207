"""The one session that each user is given, by how it is searched for and chosen, in the eyes of every judge.

    python recipes/benchmarks/served_sessions.py --config recipes/quickstart/pipeline.yaml --output_dir runs/quickstart

Reads the stages up to `align` of a run. The likeliest session is what `recommend` gives by default; with a reward
model (`--recommend_reward_model`) it gives the one of highest reward among those found. Beside them stand the first
items of the ranked list, and those of baselines' (`--ranked popularity ease`). Changes are from the first row, with
paired 95% bootstrap intervals over users. `--judged_users` sets their number, `--models seed aligned` the policies,
`--num_beams` the sessions found, `--json FILE` keeps the figures.
"""

import json
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch

from onerec_hf.evaluation import REWARD, relative_change
from onerec_hf.reporting import Table
from onerec_hf.reporting.tables import relative_with_interval
from onerec_hf.session_generation import Recommender
from onerec_hf.stages.baselines_stage import rank_baseline
from onerec_hf.stages.evaluated_run import EvaluatedRun
from onerec_hf.stages.pretrain_stage import MODEL
from onerec_hf.stages.recipe_arguments import parse_recipe_arguments
from onerec_hf.stages.reward_stage import REWARD_MODEL

STAGES = {"seed": "pretrain", "aligned": "align"}


def main():
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--ranked", nargs="*", default=["popularity", "ease"])
    parser.add_argument("--num_beams", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options, rest = parser.parse_known_args()
    args = parse_recipe_arguments(rest)
    run = EvaluatedRun(args, "align", judged=True)
    evaluation = run.evaluator
    tokenizer, width = evaluation.tokenizer, args.session_items
    rows = [
        {
            **row,
            "history_item_ids": tokenizer.item_ids[row["history"]].tolist(),
            "exposed_item_ids": None if row.get("exposed") is None else tokenizer.item_ids[row["exposed"]].tolist(),
        }
        for row in evaluation.judged_rows
    ]
    rewards: dict[str, dict[str, np.ndarray]] = {}

    def judge(name: str, sessions: torch.LongTensor) -> None:
        rewards[name] = {key: values[REWARD][:, 0] for key, values in evaluation.judge(sessions[:, None]).items()}

    def indexed(sessions: list[list]) -> torch.LongTensor:
        full = torch.full((len(sessions), width), -1)
        for place, session in enumerate(sessions):
            full[place, : len(session)] = torch.from_numpy(tokenizer.item_index(session))
        return full

    for name in options.models:
        model = run.load(args.output_dir / STAGES[name] / MODEL)
        recommenders = {
            "likeliest": Recommender(model, tokenizer),
            "highest reward": Recommender(model, tokenizer, evaluation.scorers[REWARD_MODEL]),
        }
        for search in ("beam", "diverse_beam"):
            for title, recommender in recommenders.items():
                found = recommender(
                    rows,
                    top_k=width,
                    num_beams=options.num_beams,
                    search=search,
                    exclude_consumed=evaluation.options.exclude_consumed,
                    show_progress=True,
                )
                sessions = indexed([row["session"] for row in found])
                judge(f"{name}: {title} of {options.num_beams} by {search}", sessions)
        judge(f"{name}: first {width} ranked items", indexed([row["items"] for row in found]))
    for name in options.ranked:
        ranked, _ = rank_baseline(name, run)
        judge(f"{name}: first {width} ranked items", torch.from_numpy(ranked[evaluation.judged, :width]).long())
    before = next(iter(rewards.values()))
    figures = []
    for name, judged in rewards.items():
        row = {"session": name}
        for key, values in judged.items():
            relative, interval = relative_change(before[key], values)
            row[key] = {"reward": float(np.nanmean(values)), "relative": relative, "interval": interval}
        figures.append(row)
    cells = [
        [row["session"], *(f"{row[key]['reward']:.3f}  {relative_with_interval(row[key])}" for key in before)]
        for row in figures
    ]
    print(Table(["session", *before], cells).text())
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
