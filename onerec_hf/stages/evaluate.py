"""Stage `evaluate`: item-level ranking on the full catalogue beside tuned baselines, and generated sessions before and
after every round under judges that the alignment has not seen."""

import math
import platform
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors.torch import load_file
from tqdm.auto import tqdm

from .. import __version__
from ..data import Feed
from ..evaluation import (
    duplicate_rate,
    illegal_rate,
    intra_session_diversity,
    print_table,
    ranking_metrics,
    write_report,
)
from ..history_features import encode_history_rows
from ..item_trie import ItemTrie
from ..model_cards import onerec_card, push_run_to_hub, reward_model_card, save_model_card, tokenizer_card
from ..modeling_onerec import OneRecForConditionalGeneration
from ..pretraining import index_sessions
from ..reward import SessionScorer
from ..semantic_ids.semantic_id_report import code_use
from ..session_generation import excluded_items, generate_sessions
from ..tokenization_onerec import OneRecTokenizer
from .data_stage import EVALUATION_CASES, USER_HISTORIES, prepared_data
from .pretrain import MODEL
from .recipe_arguments import BASELINES, RecipeArguments
from .reward import INDEPENDENT_JUDGE, REWARD_MODEL
from .stage_runner import completed_stage, read_json, run_stage, stage_dir, write_json
from .tokenize import ITEM_EMBEDDINGS, semantic_id_pictures

STAGES = ("data", "tokenize", "pretrain", "reward", "align")
CUTOFFS = (5, 10, 50)
NUM_EXAMPLES = 6


def evaluate(args: RecipeArguments) -> Path:
    """Writes `metrics.json` and `report.html` into the run's folder; returns the stage's folder."""
    aligned = args.training.align_rounds > 0
    reads = [name for name in STAGES if aligned or name not in ("reward", "align")]

    def work(folder: Path) -> dict | None:
        if not PartialState().is_main_process:
            return None
        evaluation = Evaluation(args, folder, aligned)
        results = evaluation.run()
        write_json(folder / "metrics.json", results["metrics"])
        write_report(folder / "report.html", **results)
        return None

    settings = args.settings("evaluation", "training.align_rounds", "run.seed")
    for unused in ("histories", "recommend_model", "unknown_items", "top_k"):
        settings.pop(unused)
    folder = run_stage("evaluate", args.output_dir, settings, reads, work)
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


class Evaluation:
    """One evaluation; every part's result is kept in `folder`, so that a killed run goes on behind the last one."""

    def __init__(self, args: RecipeArguments, folder: Path, aligned: bool):
        self.args, self.options, self.folder, self.aligned = args, args.evaluation, folder, aligned
        self.device = PartialState().device
        prepared = prepared_data(args, "evaluate")
        self.feed: Feed = prepared.feed()
        self.tokenizer = OneRecTokenizer.from_pretrained(stage_dir(args.output_dir, "tokenize", "evaluate"))
        self.trie = ItemTrie.from_tokenizer(self.tokenizer).to(self.device)
        self.embeddings = load_file(args.output_dir / "tokenize" / ITEM_EMBEDDINGS)["embeddings"]
        cases = prepared.read(EVALUATION_CASES)
        if self.options.evaluation_users is not None and self.options.evaluation_users < len(cases):
            cases = cases.shuffle(seed=args.run.seed).select(range(self.options.evaluation_users))
        self.cases = index_sessions(cases, self.tokenizer)
        self.histories = [np.asarray(history) for history in self.cases["history"][:]]
        self.targets = self.tokenizer.item_index(cases["next_item_id"][:])
        judged = np.random.default_rng(args.run.seed).permutation(len(self.cases))[: self.options.judged_users]
        self.judged = np.sort(judged)
        self.fitted_histories: Dataset = index_sessions(prepared.read(USER_HISTORIES), self.tokenizer)

    def kept(self, name: str, compute) -> Any:
        """A part's result, from its file if a former run got so far."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_json(path, compute())
        return read_json(path)

    def run(self) -> dict[str, Any]:
        baselines = {
            name: self.kept(f"baseline_{name}", lambda name=name: self.baseline(name))
            for name in BASELINES
            if self.options.baselines.get(name) is not False
        }
        rounds = [self.kept("round_0", lambda: self.model_round(0, self.args.output_dir / "pretrain" / MODEL))]
        if self.aligned:
            for number in range(1, self.args.training.align_rounds + 1):
                source = self.args.output_dir / "align" / f"round_{number}"
                rounds.append(
                    self.kept(f"round_{number}", lambda number=number, source=source: self.model_round(number, source))
                )
        stages = {name: completed_stage(self.args.output_dir, name) for name in STAGES}
        stages = {name: stage for name, stage in stages.items() if stage is not None}
        model = OneRecForConditionalGeneration.from_pretrained(final_model(self.args)).to(self.device)
        metrics = {
            "dataset": stages["data"]["dataset"]
            | {
                "evaluation_split": self.args.data.evaluation_split,
                "num_evaluated_users": len(self.cases),
                "num_judged_users": len(self.judged),
                "exclude_consumed": self.options.exclude_consumed,
            },
            "tokenizer": stages["tokenize"]["report"],
            "model": {
                "num_parameters": model.num_parameters(),
                "num_pretraining_sessions": stages["pretrain"]["num_sessions"],
                "config": model.config.to_diff_dict(),
            },
            "onerec": rounds[-1]["ranking"]
            | {name: value for name, value in rounds[-1].items() if name not in ("ranking", "judges", "round")},
            "baselines": baselines,
            "alignment": [
                {"round": entry["round"]}
                | entry["ranking"]
                | {name: value for name, value in entry.items() if name not in ("ranking", "round")}
                for entry in rounds
            ],
            "timings": {name: stage["seconds"] for name, stage in stages.items()},
            "environment": environment(),
        }
        if self.aligned:
            metrics["reward_models"] = {
                name: {"num_sessions": entry["num_sessions"], **entry["metrics_on_later_sessions"]}
                for name, entry in stages["reward"]["models"].items()
            }
        write_cards(self.args, metrics)
        return {
            "metrics": metrics,
            "training_curves": training_curves(stages),
            "code_use": code_use(self.tokenizer.codes, self.tokenizer.codebook_sizes),
            **semantic_id_pictures(self.args.output_dir / "tokenize"),
            "examples": self.examples(model),
            "settings": {name: asdict(getattr(self.args, name)) for name in ("run", "data", "tokenize", "training")}
            | {"evaluation": asdict(self.options)},
        }

    def baseline(self, name: str) -> dict[str, Any]:
        options = self.options.baselines.get(name) or {}
        if name == "sasrec":
            options = {"seed": self.args.run.seed, **options}
        fitted = [np.asarray(history) for history in self.fitted_histories["history"][:]]
        model = BASELINES[name](**options).fit(fitted, self.trie.num_items)
        ranked = model.rank(self.histories, max(CUTOFFS), exclude_consumed=self.options.exclude_consumed)
        return ranking_metrics(ranked, self.targets, self.trie.num_items, CUTOFFS, interval_resamples=1000)

    def batches(self, rows: np.ndarray, tokens_per_batch: int):
        """Rows in batches of about `tokens_per_batch` history tokens, similar lengths together."""
        lengths = np.array([len(self.histories[row]) for row in rows]).clip(1, self.args.data.history_items)
        order, start = np.argsort(lengths, kind="stable"), 0
        while start < len(order):
            size = max(1, tokens_per_batch // int(lengths[order[min(start + 64, len(order) - 1)]]))
            yield rows[order[start : start + size]]
            start += size

    def inputs(self, model: OneRecForConditionalGeneration, rows: np.ndarray) -> dict[str, torch.Tensor]:
        histories = [self.histories[row] for row in rows]
        cases = self.cases.select(rows).to_list()
        batch = encode_history_rows(cases, self.tokenizer, model.config).to(self.device)
        excluded = None
        if self.options.exclude_consumed:
            excluded = excluded_items(histories, self.device)
        return {**batch, "excluded": excluded}

    def model_round(self, number: int, source: Path) -> dict[str, Any]:
        """Ranking over all evaluated users, sessions over the judged ones."""
        model = OneRecForConditionalGeneration.from_pretrained(source).to(self.device).eval()
        width = max(CUTOFFS)
        beams = max(self.options.ranking_beams, width)
        ranked = np.full((len(self.cases), width), -1)
        with tqdm(total=len(self.cases), desc=f"ranking, round {number}") as bar:
            for rows in self.batches(np.arange(len(self.cases)), 1024):
                found = generate_sessions(
                    model, self.trie, **self.inputs(model, rows), num_items=1, num_beams=beams, num_return=width
                )
                items = found.items[..., 0].cpu().numpy()
                ranked[rows, : items.shape[1]] = items
                bar.update(len(rows))
        ranking = ranking_metrics(ranked, self.targets, self.trie.num_items, CUTOFFS, interval_resamples=1000)

        count = self.options.judged_sessions
        sessions = torch.full((len(self.judged), count, model.config.session_items), -1)
        codes = torch.full((*sessions.shape, self.tokenizer.num_levels), -1)
        place = np.full(len(self.cases), -1)
        place[self.judged] = np.arange(len(self.judged))
        with tqdm(total=len(self.judged), desc=f"sessions, round {number}") as bar:
            for rows in self.batches(self.judged, 512):
                found = generate_sessions(model, self.trie, **self.inputs(model, rows), num_beams=count)
                sessions[place[rows], : found.items.shape[1]] = found.items.cpu()
                codes[place[rows], : found.items.shape[1]] = found.token_ids.cpu() - torch.tensor(
                    model.config.level_offsets
                )
                bar.update(len(rows))
        made = (sessions >= 0).all(-1)
        return {
            "round": number,
            "ranking": ranking,
            "illegal_rate": illegal_rate(codes[made], self.tokenizer.codes),
            "duplicate_rate": duplicate_rate(sessions),
            "intra_session_diversity": intra_session_diversity(sessions, self.embeddings),
            "session_coverage": len(torch.unique(sessions[sessions >= 0])) / self.trie.num_items,
            "judges": self.judge(sessions) if self.aligned else {},
        }

    def judge(self, sessions: torch.LongTensor) -> dict[str, dict[str, float]]:
        """Mean and max over a user's sessions, averaged over users, by judge and head."""
        rows = self.cases.select(self.judged).to_list()
        judges = {}
        for name in (REWARD_MODEL, INDEPENDENT_JUDGE):
            scorer = SessionScorer.from_pretrained(self.args.output_dir / "reward" / name, self.device)
            scores = scorer.score(rows, sessions)
            heads = {head: scores.probabilities[..., index].numpy() for index, head in enumerate(scorer.objectives)}
            judges[name] = mean_and_max({"reward": scores.reward.numpy(), **heads})
        if self.feed.world is not None:
            item_ids = np.asarray(self.tokenizer.item_ids)
            users = np.asarray(self.cases["user_id"][:])[self.judged]
            known = (sessions >= 0).all(-1).numpy()
            # The world answers for whole sessions alone; a row without one is blanked below.
            asked = np.where(known[..., None], sessions.numpy(), sessions[:, :1].numpy())
            truth = self.feed.world.expected_feedback(users, item_ids[asked])
            truth = {head: np.where(known, truth[head], np.nan) for head in scorer.objectives}
            reward = scorer.scalar(torch.from_numpy(np.stack(list(truth.values()), axis=-1)))
            truth = {"reward": reward.numpy(), **truth}
            judges["truth"] = mean_and_max(truth)
        return judges

    def examples(self, model: OneRecForConditionalGeneration) -> list[dict[str, Any]]:
        """A few users' latest behaviours beside what is recommended to them."""
        model.eval()
        rows = self.judged[np.linspace(0, len(self.judged) - 1, min(NUM_EXAMPLES, len(self.judged))).astype(int)]
        item_ids = np.asarray(self.tokenizer.item_ids)
        examples = []
        for row in rows:
            found = generate_sessions(
                model, self.trie, **self.inputs(model, np.array([row])), num_items=1, num_beams=64, num_return=10
            )
            history = self.histories[row][-10:]
            recommended = found.items[0, :, 0].cpu().numpy()
            examples.append(
                {
                    "user": str(self.cases["user_id"][int(row)]),
                    "next_item": str(item_ids[self.targets[row]]),
                    "history": [{"item": str(item_ids[item]), "label": self.feed.item_name(item)} for item in history],
                    "recommendations": [
                        {
                            "item": str(item_ids[item]),
                            "label": self.feed.item_name(item),
                            "score": float(score),
                        }
                        for item, score in zip(recommended, found.scores[0].tolist(), strict=True)
                        if item >= 0
                    ],
                }
            )
        return examples


def mean_and_max(values: dict[str, np.ndarray]) -> dict[str, float]:
    """`<name>_mean` and `<name>_max` of arrays (users, sessions): over a user's sessions, then averaged over users."""
    result = {}
    for name, array in values.items():
        result[f"{name}_mean"] = float(np.nanmean(np.nanmean(array, axis=1)))
        result[f"{name}_max"] = float(np.nanmean(np.nanmax(array, axis=1)))
    return result


def training_curves(stages: dict[str, dict]) -> dict[str, list[tuple[float, float]]]:
    """Losses by step of every training stage."""
    logs = {"pretraining": stages["pretrain"]["log"]}
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
