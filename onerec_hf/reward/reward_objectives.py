"""What the reward model estimates: the objectives' labels of sessions, from the feedback on their items."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

DURATION = "duration"
NUM_QUANTILES = 100


def objective_labels(
    objectives: Sequence[Mapping[str, Any]], feedback: np.ndarray, columns: Sequence[str], items: np.ndarray
) -> np.ndarray:
    """[`session_label`] of each of O objectives, `(S, O)`; arguments and errors as there."""
    return np.stack([session_label(objective, feedback, columns, items) for objective in objectives], axis=-1)


def session_label(
    objective: Mapping[str, Any], feedback: np.ndarray, columns: Sequence[str], items: np.ndarray
) -> np.ndarray:
    """One objective's labels `(S,)` in [0, 1] of S sessions, NaN where the feedback on one of the items is unknown.

    - `binary`: the mean over the items of whether the source is more than 0;
    - `share`: the sum of the source, of each item at most its duration, over the sum of the durations (of watch time
      the session's watched share, the paper's swt);
    - `quantile`: the mean over the items of the source's quantile in the fitted period, after the objective's saved
      `quantiles`.

    Args:
        objective: `name`, `source`, `kind` and, for `quantile`, `quantiles`, as [`OneRecRewardConfig`] has them.
        feedback: (R, F) feedback on R exposures.
        columns: The F feedback columns' names.
        items: (S, m) sessions as rows of `feedback`, -1 where there is no item.

    Raises:
        ValueError: if the feedback lacks a column that the objective needs.
    """
    source = _column(objective, objective["source"], feedback, columns)
    real = items >= 0
    values = np.where(real, source[items], 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        if objective["kind"] == "share":
            duration = np.where(real, _column(objective, DURATION, feedback, columns)[items], 0.0)
            total = duration.sum(1)
            return np.where(total > 0, np.minimum(values, duration).sum(1) / total, np.nan)
        if objective["kind"] == "quantile":
            bounds = np.asarray(objective["quantiles"])
            known = np.where(np.isnan(values), np.nan, np.searchsorted(bounds, values) / len(bounds))
        else:
            known = np.where(np.isnan(values), np.nan, values > 0)
        return np.where(real, known, 0.0).sum(1) / real.sum(1)


def _column(objective: Mapping[str, Any], name: str, feedback: np.ndarray, columns: Sequence[str]) -> np.ndarray:
    if name not in columns:
        raise ValueError(
            f"objective '{objective['name']}' ({objective['kind']}) needs the feedback column '{name}', and there are "
            f"{', '.join(columns) or 'none'}: name another source, or leave the objective out of `objectives`."
        )
    return feedback[:, list(columns).index(name)].astype(np.float64)


def fitted_quantiles(values: np.ndarray) -> list[float]:
    """Bounds of `NUM_QUANTILES` equally frequent parts of the known values, for objectives of kind `quantile`."""
    known = values[~np.isnan(values)]
    if not known.size:
        return []
    return np.quantile(known, np.arange(1, NUM_QUANTILES) / NUM_QUANTILES).tolist()


def require_known_sources(
    objectives: Sequence[Mapping[str, Any]], known: Sequence[str], name: str, remedy: str
) -> None:
    """Raises ValueError if an objective of the model `name` reads feedback that is not known."""
    for objective in objectives:
        for column in (objective["source"], *((DURATION,) if objective["kind"] == "share" else ())):
            if column not in known:
                raise ValueError(
                    f"{name}: objective '{objective['name']}' ({objective['kind']}) needs the feedback column "
                    f"'{column}', and what is known is {', '.join(known) or 'nothing'}. {remedy}"
                )
