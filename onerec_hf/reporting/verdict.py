"""What a run comes to, in a few sentences: is it better, than what, by how much, with what certainty.

All of it reads metrics.json (see `metrics_schema`), and says worse where a run is worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.policy_results import last_kept
from ..evaluation.served_sessions import CASCADE, ONEREC
from ..evaluation.session_judges import REWARD
from .alignment_report import judges_of, shown_name
from .served_report import BASELINE_NAMES, served_name
from .tables import number, relative_with_interval

RECALL = "recall@10"

Figures = Mapping[str, Any]


def difference_interval(ours: float, interval: Sequence[float], other: float, others: Sequence[float]) -> list[float]:
    """Ends of the 95% interval of `ours - other` from the intervals of both (MOVER, Zou and Donner 2008), as if they
    were of different users; of the same ones, who agree more than strangers, it is too wide rather than too narrow."""
    low = math.hypot(ours - interval[0], others[1] - other)
    high = math.hypot(interval[1] - ours, other - others[0])
    return [ours - other - low, ours - other + high]


def verdict_word(interval: Sequence[float] | None, difference: float) -> str:
    """Better or worse where the interval excludes 0, else level; without an interval nothing is certain."""
    if interval is None:
        return "higher" if difference > 0 else "lower" if difference < 0 else "equal"
    return "better" if interval[0] > 0 else "worse" if interval[1] < 0 else "level"


def verdict_sentences(metrics: Figures) -> list[str]:
    """The next item against the best baseline, what alignment has changed, the served session against the best
    cascade, and on whom all of it was measured; what the run did not have is left out."""
    alignment = metrics.get("alignment", [])
    aligned = len(alignment) > 1 and last_kept(alignment) is not alignment[0]
    found = [_next_item(metrics, aligned), _alignment(alignment) if aligned else "", _served(metrics)]
    found = [sentence for sentence in found if sentence]
    return [*found, _measured_on(metrics.get("dataset", {}))] if found else []


def _next_item(metrics: Figures, aligned: bool) -> str:
    onerec, name = metrics.get("onerec", {}), "OneRec after alignment" if aligned else "OneRec"
    if onerec.get(RECALL) is None:
        return ""
    baselines = {key: row for key, row in metrics.get("baselines", {}).items() if row.get(RECALL) is not None}
    if not baselines:
        return (
            f"Next item: Recall@10 of {name} is {number(onerec[RECALL])}; no baseline was fitted to compare it with."
        )
    best = max(baselines, key=lambda key: baselines[key][RECALL])
    other = f"the best baseline, {BASELINE_NAMES.get(best, best)}"
    return _compared(
        f"Next item: {name}",
        other,
        "Recall@10",
        (onerec[RECALL], onerec.get(f"{RECALL}_interval")),
        (baselines[best][RECALL], baselines[best].get(f"{RECALL}_interval")),
    )


def _compared(name: str, other: str, figure: str, ours: tuple, theirs: tuple) -> str:
    """The sentence on two measured values, each with its interval or None."""
    difference, interval = ours[0] - theirs[0], None
    if ours[1] is not None and theirs[1] is not None:
        interval = difference_interval(*ours, *theirs)
    word = verdict_word(interval, difference)
    joined = {"level": "is level with", "equal": "is equal to"}.get(word, f"is {word} than")
    certainty = "no interval, so nothing is certain"
    if interval is not None:
        says = "includes" if word == "level" else "excludes"
        certainty = f"95% interval {interval[0]:+.3g} to {interval[1]:+.3g}, which {says} 0"
    return (
        f"{name} {joined} {other}: {figure} {number(ours[0])} against {number(theirs[0])}, a difference of "
        f"{difference:+.3g} ({certainty})."
    )


def _alignment(alignment: Sequence[Figures]) -> str:
    """What the last kept round has changed of the seed model, by the judge that is nearest to the truth."""
    entry = last_kept(alignment)
    change = entry.get("change", {})
    rewards = {judge: figures.get("reward_mean") for judge, figures in change.get("judges", {}).items()}
    parts = []
    judge = _last_judge([judge for judge in rewards if rewards[judge] is not None])
    if judge is not None:
        word = verdict_word(rewards[judge]["interval"], rewards[judge]["relative"])
        parts.append(
            f"by {_spoken(judge)} the generated sessions are {_than(word, 'before')}: mean reward "
            f"{relative_with_interval(rewards[judge])}"
        )
    if RECALL in change:
        word = verdict_word(change[RECALL]["interval"], change[RECALL]["relative"])
        parts.append(f"the next item is {_than(word, 'before')}: Recall@10 {relative_with_interval(change[RECALL])}")
    return f"Alignment: {'; '.join(parts)} (paired by user)." if parts else ""


def _than(word: str, other: str) -> str:
    return f"level with {other}" if word == "level" else f"{word} than {other}"


def _served(metrics: Figures) -> str:
    """OneRec's best session of the last kept round against the best cascade's, both chosen by the reward model, that
    a product would choose by, and compared by the judge that is nearest to the truth."""
    served = [entry for entry in metrics.get("served", []) if entry.get("judges")]
    judges = judges_of(served)
    judge, rounds = _last_judge(judges), [entry["round"] for entry in served if entry["method"] == ONEREC]
    cascades = [entry for entry in served if entry["method"] == CASCADE and entry["retriever"] != ONEREC]
    if judge is None or not rounds or not cascades:
        return ""
    ours = [entry for entry in served if entry["method"] == ONEREC and entry["round"] == max(rounds)]
    ours, other = (max(entries, key=lambda entry: _reward(entry, judges[0])[0]) for entries in (ours, cascades))
    sentence = _compared(
        f"Served session, by {_spoken(judge)}: {served_name(ours)},",
        f"the best cascade, {served_name(other)}",
        "mean reward",
        _reward(ours, judge),
        _reward(other, judge),
    )
    return sentence + ("" if judge == judges[0] else " Both were chosen by the reward model.")


def _reward(entry: Figures, judge: str) -> tuple[float, Sequence[float] | None]:
    found = entry["judges"].get(judge, {})
    return found.get(REWARD, -math.inf), found.get("interval")


def _last_judge(judges: Sequence[str]) -> str | None:
    """The truth where there is one, else the independent judge, else the one that trains."""
    ordered = judges_of([{"judges": dict.fromkeys(judges)}])
    return ordered[-1] if ordered else None


def _spoken(judge: str) -> str:
    return f"the {shown_name(judge).lower()}"


def _measured_on(dataset: Figures) -> str:
    """Users and period of the evaluation."""
    split, users = dataset.get("split", {}), dataset.get("num_evaluated_users")
    judged = dataset.get("num_judged_users")
    text = "Measured on " + (f"{users:,} users" if users is not None else "the evaluated users")
    text += f" ({judged:,} of them for sessions)" if judged else ""
    begins, ends = split.get("evaluation_start"), split.get("evaluation_end") or split.get("data_end")
    if begins:
        text += (
            f", whose behaviour from {begins[:10]}" + (f" to {ends[:10]}" if ends else " on") + " was not trained on"
        )
    return f"{text}."
