"""Stage `evaluate`: item-level ranking on the full catalogue beside tuned baselines, and generated sessions before and
after every round under judges that the alignment has not seen.

Stages of their own go before it: `baselines` and `evaluate_seed`, with the seed model's results, so that another
alignment of the same seed model is evaluated without them; and `serve`, the sessions that users are given.
"""

import math
import platform
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState

from .. import __version__
from ..endpoint import write_endpoint_files
from ..evaluation import PolicyOnLog, PolicyResults, last_kept
from ..modeling_onerec import OneRecForConditionalGeneration
from ..reporting import (
    onerec_card,
    print_table,
    push_run_to_hub,
    results_table,
    reward_model_card,
    run_summary,
    save_model_card,
    tokenizer_card,
)
from ..reporting.report import write_report
from ..reporting.tables import fact_rows
from ..semantic_ids.semantic_id_report import code_use
from ..session_generation import generate_sessions
from ..staged_files import staged_file
from .baselines_stage import (
    BASELINE_STAGE,
    baseline_stage,
    evaluated_baselines,
    run_baselines,
    skipped_baselines,
)
from .evaluated_run import EvaluatedRun
from .hub_access import require_login
from .recipe_arguments import EvaluateArguments, RecipeArguments
from .reward_stage import REWARD_MODEL
from .serve_stage import SERVE_STAGE, run_serve, served_entries
from .stage_runner import MODEL, Stage, completed_stage, full_disk_named, read_json, run_stage, write_json
from .tokenize_stage import semantic_id_pictures

STAGES = ("data", "tokenize", "pretrain", "reward", "align")
SEED_STAGE = "evaluate_seed"
NUM_EXAMPLES, EXAMPLES = 6, "examples.json"
RESULTS = ("metrics.json", "results.csv", "report.html")  # copied into the run's folder
ROUND_ALONE = ("round", "kept", "judges", "change", "on_log")  # of an entry of "alignment", not of "onerec"
ROUND, ROUND_ON_LOG = "round_{}.safetensors", "round_{}_on_log.safetensors"


def run_evaluate(args: RecipeArguments) -> Path:
    """Writes `metrics.json`, `results.csv` and `report.html` into the run's folder; returns the stage's folder."""
    require_login(args.hub_model_id, args.hub_reward_model_id)
    aligned = args.align_rounds > 0
    reads = [name for name in STAGES if aligned or name not in ("reward", "align")]
    run = EvaluatedRun(args, "evaluate", aligned)
    run_baselines(baseline_stage(args), run)
    run_evaluate_seed(run)
    if aligned:
        run_serve(run)
        reads.append(SERVE_STAGE)

    def work(folder: Path) -> None:
        if PartialState().is_main_process:
            results = run_results(folder, run)
            write_json(folder / "metrics.json", results["metrics"])
            write_json(folder / EXAMPLES, results["examples"])
            results_table(results["metrics"]).to_csv(folder / "results.csv", index=False)
            write_report(folder / "report.html", **results)

    reads += [BASELINE_STAGE, SEED_STAGE]
    folder = run_stage(Stage("evaluate", args.output_dir, args.group(EvaluateArguments), reads), work)
    if PartialState().is_main_process:
        with full_disk_named(args.output_dir):
            present = [name for name in RESULTS if (folder / name).exists()]  # runs before have no results.csv
            for name in present:
                with staged_file(args.output_dir / name) as partial:
                    shutil.copy2(folder / name, partial)
        metrics = read_json(folder / "metrics.json")
        examples = read_json(folder / EXAMPLES) if (folder / EXAMPLES).exists() else []  # none of runs before
        print(print_table(metrics) if args.verbose else run_summary(metrics, examples))
        print(f"Report: {args.output_dir / 'report.html'}" + " (--verbose prints its tables)" * (not args.verbose))
        track_evaluation(args, metrics)
        model_id, reward_id = args.hub_model_id, args.hub_reward_model_id
        if model_id is not None:
            reward_dir = args.output_dir / "reward" / REWARD_MODEL if reward_id else None
            repositories = (model_id, final_model(args), metrics, reward_id, reward_dir)
            urls = push_run_to_hub(*repositories, private=args.hub_private_repo)
            print("\n".join(f"Pushed: {url}" for url in urls))
    return folder


def track_evaluation(args: RecipeArguments, metrics: dict[str, Any]) -> None:
    """Logs the last model's and the baselines' figures to `report_to`, as the run `evaluate` beside the trainings."""
    tracked = args.tracking("evaluate")
    if tracked:
        folder = args.output_dir / "tensorboard"
        accelerator = Accelerator(
            log_with=tracked["report_to"], project_dir=folder, cpu=PartialState().device.type == "cpu"
        )
        init = {"trackio": {"name": tracked["run_name"]}, "wandb": {"name": tracked["run_name"]}}
        accelerator.init_trackers(
            "evaluate" if tracked["report_to"] == "tensorboard" else tracked["project"], init_kwargs=init
        )
        rows = fact_rows({name: metrics[name] for name in ("onerec", "baselines")}, "/", nested_lists=False)
        accelerator.log({name: value for name, value in rows if isinstance(value, (int, float))})
        accelerator.end_training()


def final_model(args: RecipeArguments) -> Path:
    """The checkpoint that the run ends in."""
    return args.output_dir / ("align" if args.align_rounds else "pretrain") / MODEL


def seed_stage(args: RecipeArguments, judged: bool) -> Stage:
    reads = ["data", "tokenize", "pretrain", *(["reward"] if judged else [])]
    return Stage(SEED_STAGE, args.output_dir, args.group(EvaluateArguments), reads)


def run_evaluate_seed(run: EvaluatedRun) -> Path:
    """Stage `evaluate_seed`: the results of round 0."""

    def work(folder: Path) -> None:
        if PartialState().is_main_process:
            round_results(0, run.args.output_dir / "pretrain" / MODEL, folder, run)

    return run_stage(seed_stage(run.args, run.judged), work)


def round_results(number: int, source: Path, folder: Path, run: EvaluatedRun) -> PolicyResults:
    """Results of one round's model, from the files in `folder` as far as a former run got."""
    path, on_log, name = folder / ROUND.format(number), folder / ROUND_ON_LOG.format(number), f"round {number}"
    if not path.exists() or run.log is not None and not on_log.exists():
        model = run.load(source) if number else run.seed_model
        if run.log is not None and not on_log.exists():
            run.evaluator.on_log(model, run.log, name).save(on_log)
        if not path.exists():
            run.evaluator.generator(model, run.seed_model, name).save(path)
    return PolicyResults.load(path)


def round_entries(folder: Path, run: EvaluatedRun) -> list[dict[str, Any]]:
    """The metrics' "alignment": every round's summary, the seed model's first."""
    output_dir = run.args.output_dir
    seed = PolicyResults.load(output_dir / SEED_STAGE / ROUND.format(0))
    entries = [{"round": 0, "kept": True, **seed.summary()}]
    for done in completed_stage(output_dir, "align")["rounds"] if run.judged else ():
        number = done["round"]
        results = round_results(number, output_dir / "align" / f"round_{number}", folder, run)
        entries.append({"round": number, "kept": done["kept"], **results.summary(seed)})
    if run.log is not None:
        seed_on_log = PolicyOnLog.load(output_dir / SEED_STAGE / ROUND_ON_LOG.format(0))
        entries[0]["on_log"] = run.log.feedback.estimates(seed_on_log)
        for entry in entries[1:]:
            on_log = PolicyOnLog.load(folder / ROUND_ON_LOG.format(entry["round"]))
            entry["on_log"] = run.log.feedback.estimates(on_log, seed_on_log)
    return entries


def run_metrics(
    entries: list[dict[str, Any]], run: EvaluatedRun, stages: dict[str, dict], model: OneRecForConditionalGeneration
) -> dict[str, Any]:
    """metrics.json, which `reporting.metrics_schema` describes."""
    args, baselines = run.args, run.args.output_dir / BASELINE_STAGE
    metrics = {
        "dataset": {
            **stages["data"]["dataset"],
            "evaluation_split": args.evaluation_split,
            "num_evaluated_users": len(run.evaluator.cases),
            "num_judged_users": len(run.evaluator.judged),
            "exclude_consumed": args.exclude_consumed,
            **sampled_users(run),
        },
        "tokenizer": stages["tokenize"]["report"],
        "model": {
            "num_parameters": model.num_parameters(),
            "num_pretraining_sessions": stages["pretrain"]["num_sessions"],
            "config": model.config.to_diff_dict(),
        },
        "onerec": {name: value for name, value in last_kept(entries).items() if name not in ROUND_ALONE},
        "baselines": {name: read_json(baselines / f"{name}.json") for name in evaluated_baselines(args)},
        "skipped_baselines": skipped_baselines(baselines),
        "alignment": entries,
        "timings": {name: stage["seconds"] for name, stage in stages.items()},
        "environment": environment(),
    }
    if run.judged:
        metrics["served"] = served_entries(run)
    if len(entries) > 1:
        metrics["reward_models"] = {
            name: {"num_runs": entry["num_runs"]}
            | entry["metrics_on_later_sessions"]
            | {"exposures": entry["metrics_on_later_exposures"]}
            for name, entry in stages["reward"]["models"].items()
        }
    return metrics


def sampled_users(run: EvaluatedRun) -> dict[str, int]:
    """How much of a log in partitions was read, where it was not all of it."""
    interactions = run.prepared.feed.interactions
    if run.prepared.partitions is None:
        return {}
    return {"num_sampled_interactions": len(interactions), "num_sampled_users": interactions["user_id"].nunique()}


def run_results(folder: Path, run: EvaluatedRun) -> dict[str, Any]:
    """The report's arguments; writes the model cards beside the checkpoints that they describe."""
    args = run.args
    completed = {
        name: completed_stage(args.output_dir, name) for name in (*STAGES, BASELINE_STAGE, SEED_STAGE, SERVE_STAGE)
    }
    stages = {name: stage for name, stage in completed.items() if stage is not None}
    model = run.load(final_model(args))
    metrics = run_metrics(round_entries(folder, run), run, stages, model)
    write_cards(args, metrics)
    return {
        "metrics": metrics,
        "training_curves": training_curves(stages),
        "code_use": code_use(run.tokenizer.codes, run.tokenizer.codebook_sizes),
        **semantic_id_pictures(args.output_dir / "tokenize"),
        "reliability_plots": {
            name: {path.stem.removeprefix("reliability_"): path.read_bytes() for path in plots}
            for name in metrics.get("reward_models", {})
            if (plots := sorted((args.output_dir / "reward" / name).glob("reliability_*.png")))
        },
        "examples": recommendation_examples(model, run),
        "settings": asdict(args),
    }


def recommendation_examples(model: OneRecForConditionalGeneration, run: EvaluatedRun) -> list[dict[str, Any]]:
    """A few users' latest behaviours beside what is recommended to them."""
    evaluator, judged = run.evaluator, run.evaluator.judged
    item_ids, examples = np.asarray(run.tokenizer.item_ids), []

    def shown(item: int) -> dict[str, str]:
        return {"item": str(item_ids[item]), "label": run.prepared.feed.item_name(item)}

    for row in judged[np.linspace(0, len(judged) - 1, min(NUM_EXAMPLES, len(judged))).astype(int)]:
        inputs = evaluator.inputs(model, evaluator.cases.select([row]).to_list())
        found = generate_sessions(model, evaluator.trie, **inputs, num_items=1, num_beams=64, num_return=10)
        scored = zip(found.items[0, :, 0].tolist(), found.scores[0].tolist(), strict=True)
        examples.append(
            {
                "user": str(evaluator.cases["user_id"][int(row)]),
                "next_item": str(item_ids[evaluator.targets[row]]),
                "history": [shown(item) for item in evaluator.histories[row][-10:]],
                "recommendations": [{**shown(item), "score": score} for item, score in scored if item >= 0],
            }
        )
    return examples


def training_curves(stages: dict[str, dict]) -> dict[str, list[tuple[float, float]]]:
    """Losses by step of every training stage."""
    logs = {"pretraining": stages["pretrain"]["log"]}
    if "recent_log" in stages["pretrain"]:
        logs["pretraining, recent sessions"] = stages["pretrain"]["recent_log"]
    logs |= {name: entry["log"] for name, entry in stages.get("reward", {}).get("models", {}).items()}
    logs |= {f"alignment round {entry['round']}": entry["log"] for entry in stages.get("align", {}).get("rounds", [])}
    curves = {}
    for name, log in logs.items():
        for key, label in (("loss", name), ("eval_loss", f"{name}, held out"), ("dpo_loss", f"{name}, DPO")):
            points = [(row["step"], row[key]) for row in log if key in row and math.isfinite(row[key])]
            if points:
                curves[label] = points
    return curves


def environment() -> dict[str, Any]:
    packages = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpus": torch.cuda.device_count(),
        "onerec_hf": __version__,
        **{package: version(package) for package in packages},
    }


def write_cards(args: RecipeArguments, metrics: dict[str, Any]) -> None:
    """Model cards of the run beside the checkpoints, and beside the generator what an inference endpoint runs."""
    model, tokenizer = final_model(args), args.output_dir / "tokenize"
    write_endpoint_files(model)
    save_model_card(onerec_card(model, metrics), model)
    save_model_card(tokenizer_card(tokenizer, metrics), tokenizer)
    if args.align_rounds:
        reward = args.output_dir / "reward" / REWARD_MODEL
        save_model_card(reward_model_card(reward, reward, metrics), reward)
