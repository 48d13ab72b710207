"""What alignment gains and costs, over runs of one recipe with several seeds.

    for seed in 0 1 2; do
      onerec pipeline --config kuairand/preference_alignment --seed $seed --output_dir runs/kuairand_$seed
    done
    python recipes/benchmarks/headline.py runs/kuairand_0 runs/kuairand_1 runs/kuairand_2 --json headline.json

Reads each run's metrics.json. Every figure compares the round that the run ends in, the last one that was kept, with
the seed model on the same users: by run, with its 95% bootstrap interval over users, then the mean over the runs
and its spread (standard deviation, n - 1). A bar on a figure holds if the mean over the runs meets it; that of the
truth if every run's interval lies above 0, and that of the illegal rate if every run meets it. A run that kept no
round has gained and lost nothing, and so misses the bars on the gains.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from onerec_hf.evaluation import last_kept
from onerec_hf.reporting import Table
from onerec_hf.reporting.alignment_report import KL, judge_change
from onerec_hf.reporting.tables import number, relative_with_interval, signed_percent

UNCHANGED = {"relative": 0.0, "interval": [0.0, 0.0]}
JUDGED = {"independent_judge": "independent judge", "truth": "truth", "reward_model": "reward model (trains)"}
# Of means over the runs; the truth's bar is on the interval of each.
LOWEST = {
    "independent judge, mean": 0.04,
    "independent judge, max": 0.04,
    "Recall@10, change": -0.02,
    "coverage, change": -0.10,
}
ABOVE_ZERO = ("truth, mean", "truth, max")


def run_figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """A run's figures by name: numbers, or changes with `relative` and `interval`; a judge that it lacks is left out.

    Args:
        metrics: of the run's metrics.json.

    Raises:
        ValueError: if the run has no rounds of alignment.
    """
    alignment = metrics.get("alignment") or []
    if len(alignment) < 2:
        raise ValueError("has no rounds of alignment: set align_rounds to 1 or more and run the pipeline again.")
    seed, final = alignment[0], last_kept(alignment)
    figures: dict[str, Any] = {"rounds kept": final["round"]}
    for judge, name in JUDGED.items():
        for kind in ("mean", "max"):
            if f"reward_{kind}" in seed["judges"].get(judge, {}):
                change = UNCHANGED if final is seed else judge_change(final, judge, f"reward_{kind}")
                if change is not None:
                    figures[f"{name}, {kind}"] = change
    figures |= {"Recall@10, seed model": seed["recall@10"], "Recall@10, final": final["recall@10"]}
    for name, title in (("recall@10", "Recall@10, change"), ("coverage", "coverage, change")):
        change = UNCHANGED if final is seed else final["change"].get(name)
        if change is not None:
            figures[title] = change
    figures["illegal rate"] = final["illegal_rate"]
    if final.get(KL) is not None:
        figures["KL to the seed model [nats]"] = final[KL]
    return figures


def summary(runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures over all runs, those first that have a bar.

    Args:
        runs: name -> [`run_figures`].

    Returns:
        A row by figure: `name`, `values` and `intervals` by run (None where a run lacks it), `mean`, `spread` (None
        of a single run), `bar` ("" for none) and `holds` (None without a bar).
    """
    names = dict.fromkeys(name for figures in runs.values() for name in figures)
    rows = []
    for name in sorted(names, key=lambda name: not _bar(name)):
        found = [figures.get(name) for figures in runs.values()]
        values = [figure["relative"] if isinstance(figure, dict) else figure for figure in found]
        intervals = [figure["interval"] if isinstance(figure, dict) else None for figure in found]
        known = [value for value in values if value is not None]
        mean, complete = statistics.fmean(known), len(known) == len(values)
        holds = None
        if name in ABOVE_ZERO:
            holds = complete and all(interval[0] > 0 for interval in intervals)
        elif name in LOWEST:
            holds = complete and mean >= LOWEST[name]
        elif name == "illegal rate":
            holds = complete and not any(values)
        rows.append(
            {
                "name": name,
                "values": values,
                "intervals": intervals,
                "mean": mean,
                "spread": statistics.stdev(known) if len(known) > 1 else None,
                "bar": _bar(name),
                "holds": holds,
            }
        )
    return rows


def _bar(name: str) -> str:
    if name in ABOVE_ZERO:
        return "above 0, each run's interval"
    if name in LOWEST:
        return f"at least {LOWEST[name]:+.0%}"
    return "0 in every run" if name == "illegal rate" else ""


def table(runs: list[str], rows: list[dict[str, Any]]) -> str:
    """The rows of [`summary`] as plain text."""
    lines = []
    for row in rows:
        cells = [
            number(value) if interval is None else relative_with_interval({"relative": value, "interval": interval})
            for value, interval in zip(row["values"], row["intervals"], strict=True)
        ]
        shown = signed_percent if any(row["intervals"]) else number
        mean = shown(row["mean"]) + ("" if row["spread"] is None else f" ± {shown(row['spread']).lstrip('+')}")
        verdict = {None: "", True: "holds", False: "MISSED"}[row["holds"]]
        lines.append([row["name"], *cells, mean, row["bar"], verdict])
    return Table(["", *runs, "mean ± spread", "bar", ""], lines).text()


def read_run(folder: Path) -> dict[str, Any]:
    """The figures of the run in a folder.

    Raises:
        ValueError: naming the folder, if it holds no evaluated run, or one without alignment.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no metrics.json: run recipes/evaluate.py on it first.")
    try:
        return run_figures(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    try:
        runs = {str(folder): read_run(folder) for folder in arguments.runs}
    except ValueError as error:
        parser.error(str(error))
    rows = summary(runs)
    print(table([Path(name).name for name in runs], rows))
    if "truth, mean" not in {row["name"] for row in rows}:
        print("No simulated truth in these runs: its bar does not apply.")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"runs": list(runs), "figures": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
