"""Stage `evaluate`: item-level ranking on the full catalogue beside tuned baselines, and generated sessions before and
after every round under judges that the alignment has not seen.

Two stages of their own go before it, so that another alignment of the same seed model is evaluated without them:
`baselines`, and `evaluate_seed` with the seed model's results.
"""

import functools
import math
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.numpy import save_file

from .. import __version__
from ..data import positive_mask
from ..evaluation import PolicyResults, SASRec, last_kept, print_table, ranking_metrics, write_report
from ..model_cards import onerec_card, push_run_to_hub, reward_model_card, save_model_card, tokenizer_card
from ..modeling_onerec import OneRecForConditionalGeneration
from ..semantic_ids.semantic_id_report import code_use
from ..session_generation import generate_sessions
from .policy_evaluation import CUTOFFS, PolicyEvaluation, load_on_log, save_on_log
from .pretrain import MODEL
from .recipe_arguments import BASELINES, RecipeArguments
from .reward import REWARD_MODEL
from .stage_runner import completed_stage, read_json, run_stage, write_json
from .tokenize import semantic_id_pictures

STAGES = ("data", "tokenize", "pretrain", "reward", "align")
BASELINE_STAGE, SEED_STAGE = "baselines", "evaluate_seed"
BASELINE_READS = ["data", "tokenize"]
NUM_EXAMPLES = 6
ROUND, ROUND_ON_LOG = "round_{}.safetensors", "round_{}_on_log.safetensors"


def evaluate(args: RecipeArguments) -> Path:
    """Writes `metrics.json` and `report.html` into the run's folder; returns the stage's folder."""
    aligned = args.training.align_rounds > 0
    reads = [name for name in STAGES if aligned or name not in ("reward", "align")]
    # Made when a stage first needs it: a complete run needs none.
    evaluation = functools.cache(lambda: PolicyEvaluation(args, "evaluate", aligned))
    evaluate_baselines(args, evaluation)
    evaluate_seed(args, aligned, evaluation)

    def work(folder: Path) -> dict | None:
        if not PartialState().is_main_process:
            return None
        results = run_results(args, folder, evaluation())
        write_json(folder / "metrics.json", results["metrics"])
        write_report(folder / "report.html", **results)
        return None

    settings = policy_settings(args) | args.settings("training.align_rounds")
    folder = run_stage("evaluate", args.output_dir, settings, [*reads, BASELINE_STAGE, SEED_STAGE], work)
    if PartialState().is_main_process:
        for name in ("metrics.json", "report.html"):
            shutil.copy2(folder / name, args.output_dir / f"{name}.partial")
            (args.output_dir / f"{name}.partial").replace(args.output_dir / name)
        metrics = read_json(folder / "metrics.json")
        print(print_table(metrics))
        print(f"Report: {args.output_dir / 'report.html'}")
        if args.run.hub_model_id is not None:
            reward_id = args.run.hub_reward_model_id
            urls = push_run_to_hub(
                args.run.hub_model_id,
                final_model(args),
                metrics,
                reward_id,
                args.output_dir / "reward" / REWARD_MODEL if reward_id else None,
            )
            print("\n".join(f"Pushed: {url}" for url in urls))
    return folder


def final_model(args: RecipeArguments) -> Path:
    """The checkpoint that the run ends in."""
    return args.output_dir / ("align" if args.training.align_rounds else "pretrain") / MODEL


def policy_settings(args: RecipeArguments) -> dict[str, Any]:
    """What a policy's results depend on beside the stages that are read."""
    settings = args.settings("evaluation", "run.seed", "data.session_items")
    for unused in ("baselines", "histories", "recommend_model", "unknown_items", "top_k"):
        settings.pop(unused)
    return settings


def evaluate_baselines(
    args: RecipeArguments, evaluation: Callable[[], PolicyEvaluation], stage: str = BASELINE_STAGE
) -> Path:
    """Stage `baselines`: fits and evaluates each of them; writes `<name>.json`, the metrics, and `<name>.safetensors`,
    the rankings with their scores."""

    def work(folder: Path) -> dict | None:
        if not PartialState().is_main_process:
            return None
        for name in BASELINES:
            if args.evaluation.baselines.get(name) is not False and not (folder / f"{name}.json").exists():
                run = evaluation()
                ranked, scores = rank_baseline(name, args, run)
                save_file({"ranked": ranked, "scores": scores}, folder / f"{name}.safetensors")
                metrics = ranking_metrics(ranked, run.targets, run.trie.num_items, CUTOFFS, interval_resamples=1000)
                write_json(folder / f"{name}.json", metrics)
        return None

    return run_stage(stage, args.output_dir, baseline_settings(args), BASELINE_READS, work)


def baseline_settings(args: RecipeArguments) -> dict[str, Any]:
    """What the baselines' results depend on beside the stages that are read."""
    return args.settings(
        "evaluation.baselines",
        "evaluation.exclude_consumed",
        "evaluation.evaluation_users",
        "evaluation.judged_sessions",
        "data.session_items",
        "training.recent_days",
        "run.seed",
    )


def rank_baseline(name: str, args: RecipeArguments, evaluation: PolicyEvaluation) -> tuple[np.ndarray, np.ndarray]:
    """A baseline's ranking of the evaluated users, long enough for its judged sessions, and its scores."""
    options = args.evaluation.baselines.get(name) or {}
    fitted = [np.asarray(history) for history in evaluation.fitted_histories["history"][:]]
    num_items = evaluation.trie.num_items
    if name == "sasrec":
        recent = recent_behaviours(args, evaluation)
        model = SASRec(**{"seed": args.run.seed, **options}).fit(fitted, num_items, recent)
    else:
        model = BASELINES[name](**options).fit(fitted, num_items)
    width = evaluation.judged_width
    return model.rank_with_scores(evaluation.histories, width, exclude_consumed=args.evaluation.exclude_consumed)


def recent_behaviours(args: RecipeArguments, evaluation: PolicyEvaluation) -> np.ndarray | None:
    """How many of each fitted history's latest behaviours lie in the latest `recent_days`; None without these."""
    if args.training.recent_days is None:
        return None
    fit = evaluation.prepared.split.fit
    positive = fit[positive_mask(fit, evaluation.feed.positive_feedback)]
    since = positive["timestamp"].max() - args.training.recent_days * 86400
    counts = positive.loc[positive["timestamp"] >= since, "user_id"].value_counts()
    return counts.reindex(evaluation.fitted_histories["user_id"][:], fill_value=0).to_numpy()


def evaluate_seed(args: RecipeArguments, judged: bool, evaluation: Callable[[], PolicyEvaluation]) -> Path:
    """Stage `evaluate_seed`: the results of round 0."""

    def work(folder: Path) -> None:
        if PartialState().is_main_process:
            round_results(0, args.output_dir / "pretrain" / MODEL, folder, evaluation())

    reads = ["data", "tokenize", "pretrain", *(["reward"] if judged else [])]
    return run_stage(SEED_STAGE, args.output_dir, policy_settings(args), reads, work)


def round_results(number: int, source: Path, folder: Path, evaluation: PolicyEvaluation) -> PolicyResults:
    """Results of one round's model, from the files in `folder` as far as a former run got."""
    path, on_log = folder / ROUND.format(number), folder / ROUND_ON_LOG.format(number)
    log = evaluation.log
    if not path.exists() or log is not None and not on_log.exists():
        model = evaluation.load(source) if number else evaluation.seed_model
        if log is not None and not on_log.exists():
            save_on_log(evaluation.on_log(model, f"round {number}"), on_log)
        if not path.exists():
            evaluation.generator(model, f"round {number}", is_seed=number == 0).save(path)
    return PolicyResults.load(path)


def run_results(args: RecipeArguments, folder: Path, evaluation: PolicyEvaluation) -> dict[str, Any]:
    """The report's arguments."""
    run = args.output_dir
    rounds = completed_stage(run, "align")["rounds"] if evaluation.judged_run else []
    seed = PolicyResults.load(run / SEED_STAGE / ROUND.format(0))
    entries = [{"round": 0, "kept": True, **seed.summary()}]
    for done in rounds:
        number = done["round"]
        results = round_results(number, run / "align" / f"round_{number}", folder, evaluation)
        entries.append({"round": number, "kept": done["kept"], **results.summary(seed)})
    if evaluation.log is not None:
        seed_on_log = load_on_log(run / SEED_STAGE / ROUND_ON_LOG.format(0))
        feedback = evaluation.log.feedback
        entries[0]["on_log"] = feedback.estimates(seed_on_log)
        for entry in entries[1:]:
            on_log = load_on_log(folder / ROUND_ON_LOG.format(entry["round"]))
            entry["on_log"] = feedback.estimates(on_log, seed_on_log)
    stages = {name: completed_stage(run, name) for name in STAGES}
    stages = {name: stage for name, stage in stages.items() if stage is not None}
    model = evaluation.load(final_model(args))
    metrics = {
        "dataset": stages["data"]["dataset"]
        | {
            "evaluation_split": args.data.evaluation_split,
            "num_evaluated_users": len(evaluation.cases),
            "num_judged_users": len(evaluation.judged),
            "exclude_consumed": args.evaluation.exclude_consumed,
        },
        "tokenizer": stages["tokenize"]["report"],
        "model": {
            "num_parameters": model.num_parameters(),
            "num_pretraining_sessions": stages["pretrain"]["num_sessions"],
            "config": model.config.to_diff_dict(),
        },
        "onerec": {
            name: value
            for name, value in last_kept(entries).items()
            if name not in ("round", "kept", "judges", "change", "on_log")
        },
        "baselines": {
            name: read_json(run / BASELINE_STAGE / f"{name}.json")
            for name in BASELINES
            if args.evaluation.baselines.get(name) is not False
        },
        "alignment": entries,
        "timings": {name: completed_stage(run, name)["seconds"] for name in (*stages, BASELINE_STAGE, SEED_STAGE)},
        "environment": environment(),
    }
    if rounds:
        metrics["reward_models"] = {
            name: {"num_runs": entry["num_runs"]}
            | entry["metrics_on_later_sessions"]
            | {"exposures": entry["metrics_on_later_exposures"]}
            for name, entry in stages["reward"]["models"].items()
        }
    write_cards(args, metrics)
    return {
        "metrics": metrics,
        "training_curves": training_curves(stages),
        "code_use": code_use(evaluation.tokenizer.codes, evaluation.tokenizer.codebook_sizes),
        **semantic_id_pictures(run / "tokenize"),
        "reliability_plots": {
            name: {path.stem.removeprefix("reliability_"): path.read_bytes() for path in plots}
            for name in metrics.get("reward_models", {})
            if (plots := sorted((run / "reward" / name).glob("reliability_*.png")))
        },
        "examples": recommendation_examples(model, evaluation),
        "settings": {name: asdict(getattr(args, name)) for name in ("run", "data", "tokenize", "training")}
        | {"evaluation": asdict(args.evaluation)},
    }


def recommendation_examples(
    model: OneRecForConditionalGeneration, evaluation: PolicyEvaluation
) -> list[dict[str, Any]]:
    """A few users' latest behaviours beside what is recommended to them."""
    judged, feed = evaluation.judged, evaluation.feed
    rows = judged[np.linspace(0, len(judged) - 1, min(NUM_EXAMPLES, len(judged))).astype(int)]
    item_ids = np.asarray(evaluation.tokenizer.item_ids)
    examples = []
    for row in rows:
        inputs = evaluation.inputs(model, evaluation.cases.select([row]).to_list())
        found = generate_sessions(model, evaluation.trie, **inputs, num_items=1, num_beams=64, num_return=10)
        history = evaluation.histories[row][-10:]
        recommended = found.items[0, :, 0].cpu().numpy()
        examples.append(
            {
                "user": str(evaluation.cases["user_id"][int(row)]),
                "next_item": str(item_ids[evaluation.targets[row]]),
                "history": [{"item": str(item_ids[item]), "label": feed.item_name(item)} for item in history],
                "recommendations": [
                    {"item": str(item_ids[item]), "label": feed.item_name(item), "score": float(score)}
                    for item, score in zip(recommended, found.scores[0].tolist(), strict=True)
                    if item >= 0
                ],
            }
        )
    return examples


def training_curves(stages: dict[str, dict]) -> dict[str, list[tuple[float, float]]]:
    """Losses by step of every training stage."""
    logs = {"pretraining": stages["pretrain"]["log"]}
    if "recent_log" in stages["pretrain"]:
        logs["pretraining, recent sessions"] = stages["pretrain"]["recent_log"]
    for name, entry in stages.get("reward", {}).get("models", {}).items():
        logs[name] = entry["log"]
    for entry in stages.get("align", {}).get("rounds", []):
        logs[f"alignment round {entry['round']}"] = entry["log"]
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
    """Model cards of the run, beside the checkpoints that they describe."""
    save_model_card(onerec_card(final_model(args), metrics), final_model(args))
    save_model_card(tokenizer_card(args.output_dir / "tokenize", metrics), args.output_dir / "tokenize")
    if args.training.align_rounds:
        folder = args.output_dir / "reward" / REWARD_MODEL
        save_model_card(reward_model_card(folder, folder, metrics), folder)
