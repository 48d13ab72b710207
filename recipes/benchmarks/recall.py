"""How well OneRec and the baselines rank the next item, over data sets and seeds.

    python recipes/benchmarks/recall.py --sets recipes/quickstart/pipeline.yaml \
        "recipes/amazon_beauty/pipeline.yaml --data_dir BEAUTY_FOLDER" --seeds 0 1 2 --json recall.json

A set is the configuration of a recipe, of any data, or one in quotes with flags that change it; what follows the
options below is changed in all sets. Of several sets of one configuration the first has its name, the others their
flags in theirs. Each is run without alignment for every seed, in a folder `<output_dir>/<set>/seed_<seed>`, and
evaluated on the same users; complete stages are skipped, a killed one is resumed. Baselines that take no seed are
fitted once for all seeds.

Figures are means over users, then over seeds, +- the standard deviation of the seeds (n - 1). OneRec's differences are
from the best baseline of the set by that figure, of which each user's values are averaged over the seeds first; in
brackets their paired 95% bootstrap interval over users. Minutes are those of training or fitting (of a killed stage
its last run's), parameters the numbers that were fitted: popularity's are its counts, the neighbours' the similarities
that are kept. `--json FILE` has a row for every set, method and seed; null is what a run does not know.
"""

import json
import re
import shlex
import statistics
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from onerec_hf.evaluation import PolicyResults, bootstrap_interval, user_metrics
from onerec_hf.packaged_recipes import recipe_file
from onerec_hf.reporting import Table
from onerec_hf.reporting.served_report import BASELINE_NAMES
from onerec_hf.reporting.tables import number
from onerec_hf.staged_files import staged_file
from onerec_hf.stages import parse_recipe_arguments, run_evaluate, run_pretrain, run_tokenize
from onerec_hf.stages.baselines_stage import BASELINE_STAGE, BaselineFits, baseline_stage, run_baselines
from onerec_hf.stages.evaluate_stage import ROUND, SEED_STAGE
from onerec_hf.stages.evaluated_run import EvaluatedRun
from onerec_hf.stages.recipe_arguments import RecipeArguments
from onerec_hf.stages.stage_runner import read_json

ONEREC = "onerec"
NAMES = {ONEREC: "OneRec", **BASELINE_NAMES}
FIGURES = {"recall@5": "R@5", "ndcg@5": "N@5", "recall@10": "R@10", "ndcg@10": "N@10"}
COMPARED = ("recall@10", "ndcg@10")
FACTS = ("minutes", "parameters", "users_per_second")


@dataclass
class MethodRun:
    """One method's figures with one seed.

    Args:
        by_user: (users,) of each of `FIGURES`.
        facts: each of `FACTS`.
    """

    set_name: str
    method: str
    seed: int
    by_user: dict[str, np.ndarray]
    facts: dict[str, float | None]

    def row(self) -> dict[str, Any]:
        means = {name: float(self.by_user[name].mean()) for name in FIGURES}
        return {"set": self.set_name, "method": self.method, "seed": self.seed, **means, **self.facts}


def set_name(config: Path) -> str:
    """`quickstart` of recipes/quickstart/pipeline.yaml, `quickstart_debug` of debug.yaml beside it."""
    parts = [part for part in (config.resolve().parent.name, config.stem) if part and part != "pipeline"]
    return "_".join(parts) or config.stem


def named_sets(texts: Sequence[str]) -> dict[str, list[str]]:
    """Configuration and flags of each set by its name, in which further sets of one configuration have their flags.

    Raises:
        FileNotFoundError: no such configuration.
        ValueError: two sets of one name.
    """
    sets = {}
    for text in texts:
        words = shlex.split(text)
        name = set_name(recipe_file(words[0]))
        if name in sets:
            name = re.sub(r"\W+", "_", " ".join([name, *words[1:]])).strip("_")
        if name in sets:
            raise ValueError(f"two sets would be called {name}: rename one configuration's file")
        sets[name] = words
    return sets


def run_set(words: Sequence[str], seeds: Sequence[int], output_dir: Path) -> list[MethodRun]:
    """Runs all stages of a set for every seed.

    Args:
        words: the configuration's path or name, and flags.
        output_dir: gets a folder for each seed.
    """
    runs = []
    for seed in seeds:
        flags = ["--seed", str(seed), "--align_rounds", "0", "--output_dir", str(output_dir / f"seed_{seed}")]
        args = parse_recipe_arguments(["--config", *words, *flags])
        runs.append(replace(args, hub_model_id=None, hub_reward_model_id=None))
    for args in runs:
        run_tokenize(args)
    # Of all seeds before any training, which then has the memory of what is fitted.
    fits = BaselineFits(across_seeds=True)
    for args in runs:
        run_baselines(baseline_stage(args), EvaluatedRun(args, "recall", judged=False), fits)
    del fits
    for args in runs:
        run_pretrain(args)
        run_evaluate(args)
    results, users = [], None
    for args in runs:
        run = EvaluatedRun(args, "recall", judged=False)
        evaluated = list(zip(run.evaluator.cases["user_id"][:], run.evaluator.targets.tolist(), strict=True))
        users = users or evaluated
        if evaluated != users:
            raise ValueError(f"{args.output_dir} has evaluated other users than {runs[0].output_dir}: remove both.")
        results += method_runs(output_dir.name, args, run.evaluator.targets)
    return results


def method_runs(name: str, args: RecipeArguments, targets: np.ndarray) -> list[MethodRun]:
    """OneRec and the baselines of a complete run."""
    metrics = read_json(args.output_dir / "metrics.json")
    onerec = PolicyResults.load(args.output_dir / SEED_STAGE / ROUND.format(0)).by_user
    seconds = metrics["timings"]["pretrain"], metrics["model"]["num_parameters"], metrics["onerec"]["users_per_second"]
    methods = {ONEREC: (onerec, seconds)}
    for method, known in metrics["baselines"].items():
        ranked = load_file(args.output_dir / BASELINE_STAGE / f"{method}.safetensors")["ranked"]
        facts = known["fit_seconds"], known["num_parameters"], known["users_per_second"]
        methods[method] = user_metrics(ranked, targets, (5, 10)), facts
    return [
        MethodRun(name, method, args.seed, by_user, dict(zip(FACTS, (seconds / 60, *rest), strict=True)))
        for method, (by_user, (seconds, *rest)) in methods.items()
    ]


def difference(runs: Sequence[MethodRun], figure: str) -> dict[str, Any] | None:
    """OneRec's figure less that of the best baseline of one set, None without any: `baseline`, `value`, `interval`."""
    by_user = {
        method: np.mean([run.by_user[figure] for run in runs if run.method == method], axis=0)
        for method in dict.fromkeys(run.method for run in runs)
    }
    onerec = by_user.pop(ONEREC)
    if not by_user:
        return None
    best = max(by_user, key=lambda method: by_user[method].mean())
    gain = onerec - by_user[best]
    return {"baseline": best, "value": float(gain.mean()), "interval": list(bootstrap_interval(gain))}


def table(runs: Sequence[MethodRun]) -> str:
    """All sets' methods as plain text."""
    lines = []
    for name in dict.fromkeys(run.set_name for run in runs):
        of_set = [run for run in runs if run.set_name == name]
        for method in dict.fromkeys(run.method for run in of_set):
            rows = [run.row() for run in of_set if run.method == method]
            figures = [mean_and_deviation([row[figure] for row in rows]) for figure in FIGURES]
            gains = [shown_difference(difference(of_set, figure)) if method == ONEREC else "" for figure in COMPARED]
            minutes, parameters, speed = (statistics.fmean(row[fact] for row in rows) for fact in FACTS)
            facts = [number(minutes), number(round(parameters)), number(speed)]
            lines.append([name, NAMES.get(method, method), *figures, *gains, *facts])
    gains = [f"{FIGURES[figure]} less the best" for figure in COMPARED]
    return Table(["set", "method", *FIGURES.values(), *gains, "minutes", "parameters", "users/s"], lines).text()


def mean_and_deviation(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.4f}" + (f" ± {deviation:.4f}" if deviation else "")


def shown_difference(gain: dict[str, Any] | None) -> str:
    if gain is None:
        return ""
    low, high = gain["interval"]
    return f"{gain['value']:+.4f} [{low:+.4f}, {high:+.4f}] {NAMES.get(gain['baseline'], gain['baseline'])}"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--sets", nargs="+", required=True, metavar="CONFIG", help="a recipe's YAML or name, or it with flags"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/recall"))
    parser.add_argument("--json", type=Path, help="write a row for every set, method and seed here")
    options, rest = parser.parse_known_args()
    try:
        sets = named_sets(options.sets)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    runs = []
    for name, words in sets.items():
        runs += run_set([*words, *rest], options.seeds, options.output_dir / name)
        if options.json is not None:  # what there is so far
            with staged_file(options.json) as partial:
                partial.write_text(json.dumps([run.row() for run in runs], indent=2) + "\n", encoding="utf-8")
    print(table(runs))


if __name__ == "__main__":
    main()
