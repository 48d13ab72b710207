"""Training and judging the reward model: batches, users' halves, trainer and metrics.

A row has the columns `history` and `session` (lists of catalogue indices, the history oldest first) and one label
column for each objective, a share in [0, 1] or NaN where unknown.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import EvalPrediction, Trainer

from .configuration_onerec_reward import OneRecRewardConfig
from .modeling_onerec_reward import OneRecRewardModel
from .session_scoring import item_code_ids

CALIBRATION_BINS = 10


def user_half(user_ids: Sequence, seed: int = 0) -> np.ndarray:
    """
    Split users into two halves, one for the reward model and one for the judge that must not have seen its users.
    A user's half depends on the id and the seed alone, not on the other users, the order or the process.

    Args:
        user_ids (`Sequence`): B user ids, integers or strings, repeats allowed.
        seed (`int`): Another seed gives another split.

    Returns:
        `np.ndarray` of shape `(B,)` and type int64, 0 or 1.
    """
    users, inverse = np.unique(np.asarray(user_ids), return_inverse=True)
    halves = [hashlib.blake2b(f"{seed}:{user}".encode(), digest_size=1).digest()[0] & 1 for user in users.tolist()]
    return np.asarray(halves, dtype=np.int64)[inverse]


def label_means(dataset: Dataset, config: OneRecRewardConfig) -> dict[str, float]:
    """
    Mean known label of each objective, NaN for an objective without any.

    Raises:
        ValueError: if an objective that the reward counts has no known label: its tower would stay untrained and
            add noise to every reward.
    """
    means = {}
    for objective, weight in zip(config.objectives, config.objective_weights, strict=True):
        values = np.asarray(dataset[objective][:], dtype=np.float64)
        known = values[~np.isnan(values)]
        means[objective] = float(known.mean()) if known.size else math.nan
        if weight and not known.size:
            raise ValueError(
                f"Column '{objective}' of the reward model's sessions has no known label in its {len(values)} rows, "
                f"but its weight in the reward is {weight}: set it to 0 in objective_weights."
            )
    return means


@dataclass
class RewardCollator:
    """
    Batches of rows for [`OneRecRewardModel`].

    Args:
        item_token_ids (`torch.LongTensor` of shape `(N, L)`): The tokenizer's code token ids of each item.
        config (`OneRecRewardConfig`): Gives the longest history (the latest items are kept), the longest session
            and the objectives, each of them a label column.

    Raises:
        ValueError: on a session longer than `config.session_items` (its labels are of the whole session, so it
            cannot be cut) or a label outside [0, 1].
    """

    item_token_ids: torch.LongTensor
    config: OneRecRewardConfig

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        config = self.config
        for row in rows:
            if not 1 <= len(row["session"]) <= config.session_items:
                raise ValueError(
                    f"A session has {len(row['session'])} items, the reward model takes 1 to session_items = "
                    f"{config.session_items}: cut sessions before labelling them, or raise session_items."
                )
        # Arrow has two unknowns, null (None) and NaN.
        labels = torch.tensor(
            [[math.nan if row[name] is None else row[name] for name in config.objectives] for row in rows]
        )
        for objective, outside in zip(config.objectives, ((labels < 0) | (labels > 1)).any(0).tolist(), strict=True):
            if outside:
                raise ValueError(f"Column '{objective}' has a label outside [0, 1]: labels are shares.")
        return {
            "history_ids": item_code_ids(
                [row["history"][-config.history_items :] for row in rows], self.item_token_ids, config.pad_token_id
            ),
            "session_ids": item_code_ids([row["session"] for row in rows], self.item_token_ids, config.pad_token_id),
            "labels": labels,
        }


def _above_median_auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    if labels.min() == labels.max():
        return None
    median = np.median(labels)
    # Where the median is the largest label, having it is what sets a session apart.
    positive = labels > median if labels.max() > median else labels == median
    return float(roc_auc_score(positive, scores))


def objective_metrics(
    probabilities: np.ndarray, labels: np.ndarray, config: OneRecRewardConfig
) -> dict[str, float | int]:
    """
    Quality of the estimates of each objective over its known labels.

    For an objective x: `x_auc`, the chance that a session with a label above the median has a higher estimate than
    one without (where few sessions have any follow, that is any against none; where the median is the largest label,
    the largest against less); `x_log_loss` and `x_base_log_loss`, the cross-entropy of the estimate and of always
    answering the mean label [nats]; `x_calibration_error`, the mean gap between estimate and label over ten bins of
    equal size; `x_label_mean`, `x_estimate_mean` and `x_labels` (count). `reward_auc` is the same AUC for the weighted
    sum, over sessions where every weighted label is known. A figure that is undefined (no known label, all labels
    equal) is left out.

    Args:
        probabilities (`np.ndarray` of shape `(S, O)`): Estimates for S sessions.
        labels (`np.ndarray` of shape `(S, O)`): Labels in [0, 1], NaN where unknown.
        config (`OneRecRewardConfig`): Names and weights of the objectives.
    """
    metrics: dict[str, float | int] = {}
    for index, objective in enumerate(config.objectives):
        known = ~np.isnan(labels[:, index])
        if not known.any():
            continue
        label = labels[known, index].astype(np.float64)
        estimate = probabilities[known, index].astype(np.float64).clip(1e-7, 1 - 1e-7)
        base = float(np.clip(label.mean(), 1e-7, 1 - 1e-7))
        auc = _above_median_auc(estimate, label)
        if auc is not None:
            metrics[f"{objective}_auc"] = auc
        metrics[f"{objective}_log_loss"] = float(
            -(label * np.log(estimate) + (1 - label) * np.log(1 - estimate)).mean()
        )
        metrics[f"{objective}_base_log_loss"] = float(
            -(label.mean() * np.log(base) + (1 - label.mean()) * np.log(1 - base))
        )
        bins = np.array_split(np.argsort(estimate, kind="stable"), min(CALIBRATION_BINS, len(label)))
        metrics[f"{objective}_calibration_error"] = float(
            sum(abs(estimate[rows].mean() - label[rows].mean()) * len(rows) for rows in bins) / len(label)
        )
        metrics[f"{objective}_label_mean"] = float(label.mean())
        metrics[f"{objective}_estimate_mean"] = float(estimate.mean())
        metrics[f"{objective}_labels"] = int(known.sum())
    weights = np.asarray(config.objective_weights)
    counted = weights != 0
    known = ~np.isnan(labels[:, counted]).any(1)
    if counted.any() and known.any():
        auc = _above_median_auc(
            probabilities[known][:, counted] @ weights[counted], labels[known][:, counted] @ weights[counted]
        )
        if auc is not None:
            metrics["reward_auc"] = auc
    return metrics


@torch.no_grad()
def reward_metrics(
    model: OneRecRewardModel,
    dataset: Dataset,
    item_token_ids: torch.LongTensor,
    batch_size: int = 256,
    progress: bool = False,
) -> dict[str, float | int]:
    """
    [`objective_metrics`] of a reward model on labelled sessions; on sessions later than, and users other than, those
    it was trained on they say whether it can judge. The model's training mode is left as it was.
    """
    was_training = model.training
    model.eval()
    collator = RewardCollator(item_token_ids, model.config)
    probabilities, labels = [], []
    for batch in tqdm(
        DataLoader(dataset, batch_size=batch_size, collate_fn=collator), desc="judging", disable=not progress
    ):
        labels.append(batch.pop("labels"))
        output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        probabilities.append(output.probabilities.float().cpu())
    model.train(was_training)
    return objective_metrics(torch.cat(probabilities).numpy(), torch.cat(labels).numpy(), model.config)


class OneRecRewardTrainer(Trainer):
    """
    `Trainer` of [`OneRecRewardModel`] on rows of `history`, `session` and label columns; evaluation gives
    [`objective_metrics`] with the prefix `eval_`.

    Args:
        model (`OneRecRewardModel`): Model to train.
        item_token_ids (`torch.LongTensor` of shape `(N, L)`): The tokenizer's code token ids of each item.
        kwargs: `Trainer`'s other arguments.
    """

    def __init__(self, model: OneRecRewardModel, item_token_ids: torch.LongTensor, **kwargs):
        self._reward_config = model.config
        super().__init__(
            model=model,
            data_collator=RewardCollator(item_token_ids, model.config),
            compute_metrics=self._compute_metrics,
            **kwargs,
        )

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float | int]:
        probabilities = 1 / (1 + np.exp(-prediction.predictions.astype(np.float64)))
        return objective_metrics(probabilities, prediction.label_ids, self._reward_config)

    def _set_signature_columns_if_needed(self):
        # The columns that the collator reads, not the arguments of the model's forward.
        self._signature_columns = ["history", "session", *self._reward_config.objectives]
