"""What the page shows of a run, read from the run or from the folder of a Space."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import sparse

from ..data import SessionSimulator
from ..evaluation import EASE, Baseline, ItemKNN, Popularity
from ..history_features import HISTORY_FEATURES
from ..modeling_onerec import OneRecForConditionalGeneration
from ..reward import SessionScorer
from ..session_generation import Recommender
from ..tokenization_onerec import OneRecTokenizer

BASELINES = {"popularity": Popularity, "item_knn": ItemKNN, "ease": EASE}
EASE_ITEMS = 10_000  # of a larger catalogue it takes more than half a minute, and 400 MB
MODEL, REWARD_MODEL, ITEMS, USERS = "model", "reward_model", "items.parquet", "users.parquet"
SPACE_USERS = 24

logger = logging.getLogger(__name__)


@dataclass
class DemoContent:
    """Models, catalogue and users of the page. Nothing of it changes, so that threads may share it.

    Args:
        recommender: without a scorer.
        scorer: the reward model, where the run has one.
        items: by catalogue index `name` and `image`, the picture's URL or null.
        users: rows as of [`Recommender`] with `user_id`.
        baselines: fitted ones by name.
        world: knows the truth about these users, where they are simulated.
    """

    recommender: Recommender
    scorer: SessionScorer | None
    items: pd.DataFrame
    users: Dataset
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    world: SessionSimulator | None = None

    @property
    def tokenizer(self) -> OneRecTokenizer:
        return self.recommender.tokenizer

    @cached_property
    def guided(self) -> Recommender | None:
        """What the reward model guides."""
        return None if self.scorer is None else Recommender(self.recommender.model, self.tokenizer, self.scorer)

    @cached_property
    def user_ids(self) -> dict[str, int]:
        """The users' rows by their ids as text."""
        return {str(user): row for row, user in enumerate(self.users["user_id"][:])}

    @cached_property
    def words(self) -> pd.Series:
        """What items are searched by."""
        ids = pd.Series(self.tokenizer.item_ids).astype(str)
        return (self.items["name"] + " " + ids).str.lower()

    def user_row(self, user: str) -> dict[str, Any]:
        """Raises ValueError where there is no such user."""
        if user not in self.user_ids:
            examples = ", ".join(list(self.user_ids)[:3])
            raise ValueError(
                f"There is no user {user!r} among these {len(self.user_ids)}: take one such as {examples}."
            )
        return self.users[self.user_ids[user]]

    def new_row(self) -> dict[str, Any]:
        """Of a user of whom nothing is known, with the columns that the model reads."""
        config = self.recommender.model.config
        row: dict[str, Any] = {"user_id": None, "history_item_ids": []}
        if config.history_feedback:
            row["history_feedback"] = []
        if config.time_gap_buckets:
            known = self.users["timestamp"][:]
            row |= {"history_timestamps": [], "timestamp": max(known, default=0.0)}
        if config.user_features:
            row["user_features"] = dict.fromkeys(config.user_features)
        return row

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads what [`save`] wrote."""
        folder = Path(folder)
        recommender, scorer = load_models(folder / MODEL, folder / REWARD_MODEL)
        return cls(
            recommender,
            scorer,
            pd.read_parquet(folder / ITEMS),
            Dataset(pq.read_table(folder / USERS)),
            {name: load_baseline(path) for name in BASELINES if (path := folder / f"{name}.safetensors").exists()},
        )

    def save(self, folder: Path) -> int:
        """Writes all but the world, and of the users a few, without what says who they are; returns their number."""
        self.recommender.model.save_pretrained(folder / MODEL)
        self.tokenizer.save_pretrained(folder / MODEL)
        if self.scorer is not None:
            self.scorer.model.save_pretrained(folder / REWARD_MODEL)
            self.scorer.tokenizer.save_pretrained(folder / REWARD_MODEL)
        self.items.to_parquet(folder / ITEMS)
        places = np.unique(np.linspace(0, len(self.users) - 1, min(SPACE_USERS, len(self.users))).astype(int))
        rows = [anonymous(self.users[int(place)], number) for number, place in enumerate(places, 1)]
        Dataset.from_list(rows).to_parquet(folder / USERS)
        for name, baseline in self.baselines.items():
            save_baseline(baseline, folder / f"{name}.safetensors")
        return len(rows)


def load_models(model: Path, reward_model: Path) -> tuple[Recommender, SessionScorer | None]:
    """The generator, and the reward model where there is one, on this process' device."""
    device = PartialState().device
    generator = OneRecForConditionalGeneration.from_pretrained(model).to(device).eval()
    scorer = SessionScorer.from_pretrained(reward_model, device) if reward_model.is_dir() else None
    return Recommender(generator, OneRecTokenizer.from_pretrained(model)), scorer


def anonymous(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A user's history under a number, without exposures and profile; times count from the recommendation's."""
    kept = {name: row[name] for name in ("history_item_ids", *HISTORY_FEATURES) if name in row}
    if "user_features" in kept:
        kept["user_features"] = dict.fromkeys(kept["user_features"])
    if "timestamp" in kept:
        times = kept.get("history_timestamps", [])
        kept["history_timestamps"] = [None if time is None else time - kept["timestamp"] for time in times]
        kept["timestamp"] = 0.0
    return {"user_id": str(number), **kept}


def fit_baselines(histories: list[np.ndarray], num_items: int, options: Mapping[str, Any]) -> dict[str, Baseline]:
    """The baselines that a page can wait for, with a run's options by name, of which False leaves one out."""
    fitted = {}
    for name, kind in BASELINES.items():
        if options.get(name) is False:
            continue
        if name == "ease" and num_items > EASE_ITEMS:
            logger.warning(f"EASE is left out: {num_items:,} items, more than {EASE_ITEMS:,}, take too long to fit.")
            continue
        fitted[name] = kind(**(options.get(name) or {})).fit(histories, num_items)
    return fitted


def save_baseline(baseline: Baseline, path: Path) -> None:
    """What the scores are made of, as safetensors."""
    about = {"name": next(name for name, kind in BASELINES.items() if kind is type(baseline))}
    if isinstance(baseline, Popularity):
        tensors = {"counts": baseline.counts}
    else:
        about["half_life"] = "" if baseline.half_life is None else str(baseline.half_life)
        if isinstance(baseline, EASE):
            tensors = {"weights": baseline.weights}
        else:
            kept = baseline.similarity.tocsr()
            tensors = {name: torch.from_numpy(getattr(kept, name)) for name in ("data", "indices", "indptr")}
    save_file(tensors, path, metadata=about)


def load_baseline(path: Path) -> Baseline:
    """What [`save_baseline`] wrote."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    kind = BASELINES[about["name"]]
    if kind is Popularity:
        baseline = Popularity()
        baseline.counts = tensors["counts"]
        baseline.num_items = len(baseline.counts)
        return baseline
    baseline = kind(half_life=float(about["half_life"]) if about["half_life"] else None)
    if kind is EASE:
        baseline.weights = tensors["weights"]
        baseline.num_items = len(baseline.weights)
    else:
        parts = (tensors[name].numpy() for name in ("data", "indices", "indptr"))
        baseline.num_items = len(tensors["indptr"]) - 1
        baseline.similarity = sparse.csr_array(tuple(parts), shape=(baseline.num_items,) * 2)
    return baseline
