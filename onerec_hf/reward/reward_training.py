"""Training, calibrating and judging the reward model on runs of exposures.

A row is one of [`exposure_runs`] by catalogue index: `exposed`, `exposed_feedback`, `exposed_timestamps`,
`exposed_sessions` and, where there are any, `feedback_totals` and `user_profile`. The history of a run is encoded once
for all sessions that are cut from it, each of which sees the exposures before it alone.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments

from ..data import DataArguments, Feed, as_feed, exposure_runs, feedback_columns, signal_names
from ..evaluation_mode import evaluation_mode
from ..renamed_arguments import renamed_arguments
from ..session_rows import drawn_with, index_sessions, rows_of
from ..sharded_rows import ShardedRows, ShardSampler
from ..tokenization_onerec import OneRecTokenizer
from ..training_checkpoints import CheckpointCompleteCallback, train_from_latest
from .configuration_onerec_reward import OneRecRewardConfig
from .exposure_encoding import REWARD_FEATURES, ExposureEncoder, ItemFeatures, ItemTotals, known_user_values
from .modeling_onerec_reward import OneRecRewardModel
from .reward_metrics import objective_metrics
from .reward_objectives import fitted_quantiles, objective_labels, require_known_sources

# Share of the training batches whose sessions are single exposures; the others have 2 to m items, all alike often.
SINGLE_SHARE = 0.5
CALIBRATION_STEPS = 50
CALIBRATION_FOLDS = 10  # one of so many users is kept out of training, for the calibration
TASTE_SIZE = 32  # where items have content; a saved configuration without the field is of a model without taste
LENGTH_PRIOR = 5.0


def user_half(user_ids: Sequence, seed: int = 0) -> np.ndarray:
    """[`user_fold`] of two: one for the reward model, one for the judge that must not have seen its users."""
    return user_fold(user_ids, 2, seed)


def user_fold(user_ids: Sequence, folds: int, seed: int = 0) -> np.ndarray:
    """Parts of B users, int64 `(B,)` of 0 to `folds` - 1. A user's depends on the id (an integer or string) and the
    seed alone, not on the other users, the order or the process."""
    users, inverse = np.unique(np.asarray(user_ids), return_inverse=True)
    digests = [hashlib.blake2b(f"{seed}:{user}".encode(), digest_size=8).digest() for user in users.tolist()]
    return np.array([int.from_bytes(digest, "little") % folds for digest in digests], dtype=np.int64)[inverse]


def without_calibration_users(runs: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """The runs without a tenth of the users, drawn by seed, and those of that tenth."""
    held_out = user_fold(runs["user_id"][:], CALIBRATION_FOLDS, seed) == 0
    return runs.select(np.flatnonzero(~held_out)), runs.select(np.flatnonzero(held_out))


def create_reward_model(
    config: dict[str, Any],
    feed,
    tokenizer: OneRecTokenizer,
    embeddings: torch.Tensor | np.ndarray | None = None,
    totals: ItemTotals | None = None,
    former: OneRecRewardModel | None = None,
) -> OneRecRewardModel:
    """A model to be trained on a feed's exposures: its configuration says what of the feed is read, and it holds the
    items' features and totals.

    Args:
        config: Fields of [`OneRecRewardConfig`], without those that the feed decides.
        feed: A [`Feed`], or a log that [`feed_from_log`] reads by its default names: the tokenizer's items, users, and
            the interactions to fit, from which alone quantiles of labels come.
        embeddings: (N, D) of the content of the tokenizer's items in its order, the second that [`embed_items`] gives;
            none by default. What is made of the same log, as embeddings of behaviour are, tells of a fitted user's
            items which of them went together.
        totals: Of the items, as of the end of the fitted period; by default those of the feed.
        former: A model of the same configuration that was trained on an earlier part of the log, whose first items
            are its own: what it learned is where the new one begins, values of features by the items that have them.

    Raises:
        ValueError: an objective reads feedback that the feed does not have; the feed's feedback or the embeddings are
            of other columns than the former model's.
    """
    feed = as_feed(feed)
    totals = totals or ItemTotals.of_feed(feed, tokenizer)
    embeddings = torch.zeros(tokenizer.num_items, 0) if embeddings is None else torch.as_tensor(embeddings)
    columns = list(totals.feedback)
    features = ItemFeatures.of_feed(feed).take(tokenizer.item_index(feed.items["item_id"]))
    known = OneRecRewardConfig(
        **{"taste_size": TASTE_SIZE if embeddings.shape[1] else 0, **config},
        codebook_sizes=list(tokenizer.codebook_sizes),
        vocab_size=len(tokenizer),
        feedback=columns,
        signals=signal_names(columns),
        num_items=len(tokenizer.item_ids),
        item_features=features.columns,
        item_embedding_size=embeddings.shape[1],
        numeric_features=features.numeric_columns,
        num_item_values=features.num_values,
        user_features=known_user_values(feed.users),
        catalogue_fingerprint=tokenizer.catalogue_fingerprint(),
    )
    remedy = (
        "Give the model `objectives` that the log has, such as {'name': 'ltr', 'source': 'like', 'kind': 'binary'}."
    )
    require_known_sources(known.objectives, feedback_columns(feed.interactions), "reward model", remedy)
    for objective in known.objectives:
        if objective["kind"] == "quantile" and "quantiles" not in objective and objective["source"] in columns:
            objective["quantiles"] = fitted_quantiles(feed.interactions[objective["source"]].to_numpy(np.float64))
    if former is not None:
        known.user_features, known.objectives = former.config.user_features, former.config.objectives
    model = OneRecRewardModel(known)
    signal_means = totals.signal_means.astype(np.float32)
    model.set_items(*map(torch.from_numpy, (features.values, features.ranks, totals.all(), signal_means)), embeddings)
    if former is not None:
        _take_over(model, former)
    return model


@torch.no_grad()
def _take_over(model: OneRecRewardModel, former: OneRecRewardModel) -> None:
    """Gives a model all weights of a former one. A value of a feature has the mean of the embeddings that its items'
    values had: the numbers of values follow the catalogue."""
    for name in ("feedback", "numeric_features", "item_features", "item_embedding_size"):
        if getattr(model.config, name) != getattr(former.config, name):
            raise ValueError(
                f"{name} is {getattr(model.config, name)!r} in this log, and {getattr(former.config, name)!r} in the "
                "reward model that the training goes on from."
            )
    weights, own = former.state_dict(), model.state_dict()
    for name in [name for name in weights if name.startswith("item_table.")]:
        del weights[name]
    for name in [name for name in weights if name.endswith("feature_embeddings.embeddings.weight")]:
        values, before = model.item_table.values, former.item_table.values[:-1]
        numbers, counted = values[: len(before)].flatten(), before.flatten()
        known = (numbers > 0) & (counted > 0)
        sums = torch.zeros_like(own[name]).index_add_(0, numbers[known], weights[name][counted[known]])
        counts = torch.bincount(numbers[known], minlength=len(sums))[:, None]
        unknown = weights[name][:1]
        weights[name] = torch.where(counts > 0, sums / counts.clamp(min=1), own[name])
        weights[name][:1] = unknown
    model.load_state_dict(own | weights)


def cut_sessions(groups: np.ndarray, session_items: int) -> list[tuple[int, int]]:
    """Sessions (first place, items) of a run, of `session_items` or fewer at a group's end.

    Args:
        groups: `exposed_sessions` of the run: consecutive places of one number are cut together, -1 is left out.
    """
    edges = _group_edges(groups).tolist()
    return [
        (place, min(session_items, end - place))
        for first, end in zip(edges[:-1], edges[1:], strict=True)
        if first < end and groups[first] >= 0
        for place in range(first, end, session_items)
    ]


def _group_edges(groups: np.ndarray) -> np.ndarray:
    """First places of a run's groups, and the end."""
    return np.r_[0, np.flatnonzero(np.diff(groups)) + 1, len(groups)]


@dataclass
class RewardCollator:
    """Batches of runs for [`OneRecRewardModel`].

    Args:
        encoder: Of the model's configuration and the tokenizer.
        totals: Gives the items' totals as of each session. Without them the model's own count, as of the end of its
            fitted period.
        session_items: Sessions are cut of so many items, or fewer at a group's end. By default the number is drawn for
            each batch, so that little of it is padding, by what the batch holds ([`drawn_with`]).
    """

    encoder: ExposureEncoder
    totals: ItemTotals | None = None
    session_items: int | None = None

    @property
    def whole_sessions(self) -> bool:
        """Whether sessions are cut as long as they are judged, and not as lone exposures or by chance."""
        return self.session_items == self.encoder.config.session_items

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        config = self.encoder.config
        items = np.concatenate([np.asarray(row["exposed"], dtype=np.int64) for row in rows])
        longest = self.session_items or _drawn_length(config.session_items, drawn_with(items))
        times = np.concatenate([np.asarray(row["exposed_timestamps"], dtype=np.float64) for row in rows])
        feedback = np.concatenate([np.asarray(row["exposed_feedback"], dtype=np.float64) for row in rows])
        groups = [np.asarray(row["exposed_sessions"]) for row in rows]
        cuts = [cut_sessions(run, longest) for run in groups]

        # The S sessions of all runs: the run of each, its number there, its first place there and its items.
        owner = np.repeat(np.arange(len(rows)), [len(cut) for cut in cuts])
        rank = np.concatenate([np.arange(len(cut)) for cut in cuts])
        first, length = np.array([session for cut in cuts for session in cut], dtype=np.int64).reshape(-1, 2).T
        # Their places (S, m) in the runs set one after the other, -1 where there is no item.
        starts = np.r_[0, np.cumsum([len(run) for run in groups])[:-1]][owner] + first
        offsets = np.arange(longest)
        places = np.where(offsets < length[:, None], starts[:, None] + offsets, -1)
        shape = (len(rows), int(rank.max(initial=0)) + 1)

        def by_run(values: np.ndarray, fill: float) -> torch.Tensor:
            """Values `(S, ...)` of sessions as `(B, C, ...)`, `fill` where a run has fewer sessions than others."""
            spread = np.full((*shape, *values.shape[1:]), fill, dtype=values.dtype)
            spread[owner, rank] = values
            return torch.from_numpy(spread)

        indices = by_run(np.where(places >= 0, items[places], -1), -1)
        labels = objective_labels(config.objectives, feedback.reshape(len(items), -1), config.feedback, places)
        # Whatever is cut here, sessions have up to `config.session_items` from the beginning of a group.
        begins = np.concatenate([np.repeat(edges[:-1], np.diff(edges)) for edges in map(_group_edges, groups)])[starts]
        batch = {
            **self.encoder(rows),
            "session_ids": self.encoder.codes(indices.numpy()),
            "session_indices": indices,
            "history_prefixes": by_run(first, 0),
            "session_offsets": by_run((first - begins) % config.session_items, 0),
            "labels": by_run(labels.astype(np.float32), np.nan),
        }
        if config.signals and self.totals is not None:
            totals = self.totals.before(items[places.clip(min=0)], times[starts, None])
            batch["session_totals"] = by_run(np.where(places[..., None] >= 0, totals, 0), 0)
        return batch


def _drawn_length(session_items: int, generator: np.random.Generator) -> int:
    single, length = generator.random(2)
    return 1 if single < SINGLE_SHARE or session_items == 1 else 2 + int(length * (session_items - 1))


@dataclass
class RewardPredictions:
    """Estimates for S sessions beside their labels.

    Args:
        logits: (S, O), before calibration.
        probabilities: (S, O), calibrated.
        labels: (S, O), NaN where unknown.
        users: (S,) number of each session's user.
        lengths: (S,) items of each whole session, 0 for a part of one.
    """

    logits: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray
    users: np.ndarray
    lengths: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence["RewardPredictions"]) -> "RewardPredictions":
        """All parts, one after the other."""
        return cls(*map(np.concatenate, zip(*(vars(part).values() for part in parts), strict=True)))

    def metrics(self, config: OneRecRewardConfig) -> dict[str, float | int]:
        """[`objective_metrics`] of all objectives."""
        return objective_metrics(self.probabilities, self.labels, config.objective_names, self.users)


@renamed_arguments(progress="show_progress")
def predict_rewards(
    model: OneRecRewardModel,
    dataset: Dataset,
    collator: RewardCollator,
    batch_size: int = 128,
    show_progress: bool = False,
) -> RewardPredictions:
    """Estimates for the sessions that `collator` cuts from runs; the model's training mode is left as it was."""
    users = np.unique(np.asarray(dataset["user_id"][:]), return_inverse=True)[1] if len(dataset) else np.zeros(0, int)
    none = np.zeros((0, len(model.config.objectives)), dtype=np.float32)
    parts, start = [[none, none, none, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)]], 0
    batches = DataLoader(dataset, batch_size=batch_size, collate_fn=collator)
    with evaluation_mode(model):
        for batch in tqdm(batches, desc="judging", disable=not show_progress):
            labels, lengths = batch.pop("labels"), (batch["session_indices"] >= 0).sum(-1).numpy()
            real = lengths > 0
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            output = model(**inputs, whole_sessions=collator.whole_sessions)
            logits, probabilities = (found.float().cpu().numpy() for found in (output.logits, output.probabilities))
            owners = np.broadcast_to(users[start : start + len(real), None], real.shape)
            values = (logits, probabilities, labels.numpy(), owners, lengths * collator.whole_sessions)
            parts.append([value[real] for value in values])
            start += len(real)
    return RewardPredictions(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def label_means(dataset: Dataset | Subset, collator: RewardCollator) -> dict[str, float]:
    """Mean known label of each objective over the sessions that `collator` cuts, NaN for an objective without any.

    Raises:
        ValueError: if an objective that the reward counts has no known label: its tower would stay untrained and
            add noise to every reward.
    """
    config = collator.encoder.config
    sums, counts = np.zeros(len(config.objectives)), np.zeros(len(config.objectives))
    rows = dataset
    if isinstance(dataset, Dataset):
        rows = dataset.select_columns([name for name in dataset.column_names if name.startswith("exposed")])
    # A generator of its own, as the loader draws a seed: what is trained after it draws what it would without.
    for batch in DataLoader(rows, batch_size=512, collate_fn=collator, generator=torch.Generator()):
        labels = batch["labels"].numpy().reshape(-1, len(sums))
        sums += np.nansum(labels, axis=0)
        counts += (~np.isnan(labels)).sum(0)
    means = {}
    for objective, total, count in zip(config.objectives, sums, counts, strict=True):
        means[objective["name"]] = float(total / count) if count else math.nan
        if objective["weight"] and not count:
            raise ValueError(
                f"objective '{objective['name']}' has no known label in the reward model's {len(dataset)} rows, but "
                f"its weight in the reward is {objective['weight']}: set it to 0, or leave the objective out."
            )
    return means


def fit_calibration(model: OneRecRewardModel, predictions: RewardPredictions) -> None:
    """Fits sigmoid(scale * logit + bias) of each objective to held-out labels (Platt), with further biases of whole
    sessions by their number of items, and saves it with the model; and with its configuration the means and deviations
    of the calibrated probabilities, of whole sessions if there are any. An objective with fewer than two different
    known labels keeps its probabilities."""
    config = model.config
    scale, bias = np.ones(len(config.objectives)), np.zeros(len(config.objectives))
    session_bias = np.zeros((config.session_items, len(config.objectives)))
    by_length = predictions.lengths[:, None] == np.arange(1, config.session_items + 1)
    for index in range(len(scale)):
        known = ~np.isnan(predictions.labels[:, index])
        label = predictions.labels[known, index].astype(np.float64)
        if len(label) and label.min() < label.max():
            found = _platt(predictions.logits[known, index].astype(np.float64), by_length[known], label)
            scale[index], bias[index], session_bias[:, index] = found[0], found[1], found[2:]
    model.set_calibration(*map(torch.from_numpy, (scale, bias, session_bias)))
    if len(predictions.logits):
        calibrated = 1 / (1 + np.exp(-(predictions.logits * scale + bias + by_length @ session_bias)))
        judged = by_length.any(1) if by_length.any() else slice(None)
        config.objective_means = calibrated[judged].mean(0).tolist()
        config.objective_deviations = calibrated[judged].std(0).clip(1e-6).tolist()


def _platt(logits: np.ndarray, by_length: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Scale, bias and biases by length of the smallest cross-entropy, by Newton's method. A weak prior keeps the scale
    near 1, and one of a few sessions' weight the biases by length near 0, for rare labels."""
    design = np.concatenate([logits[:, None], np.ones((len(logits), 1)), by_length], axis=1)
    prior = np.r_[1.0, 1e-9, np.full(by_length.shape[1], LENGTH_PRIOR)]
    start = np.r_[1.0, np.zeros(design.shape[1] - 1)]
    parameters = start.copy()
    for _ in range(CALIBRATION_STEPS):
        estimate = 1 / (1 + np.exp(-(design @ parameters)))
        gradient = design.T @ (estimate - labels) + prior * (parameters - start)
        curvature = (design * (estimate * (1 - estimate))[:, None]).T @ design + np.diag(prior)
        step = np.linalg.solve(curvature, gradient)
        parameters = parameters - step * min(1.0, 2.0 / (np.abs(step).max() + 1e-12))
        if np.abs(step).max() < 1e-9:
            break
    # A negative scale would turn the order round.
    return parameters if parameters[0] > 0 else start


def calibrate(model: OneRecRewardModel, encoder: ExposureEncoder, totals: ItemTotals, runs: Dataset) -> None:
    """Fits the calibration on runs that were not trained on, single exposures and whole sessions alike."""
    lengths = {1, model.config.session_items}
    predictions = [predict_rewards(model, runs, RewardCollator(encoder, totals, length)) for length in lengths]
    fit_calibration(model, RewardPredictions.joined(predictions))


def train_reward_model(
    model: OneRecRewardModel,
    tokenizer: OneRecTokenizer,
    totals: ItemTotals,
    runs: Dataset | ShardedRows,
    arguments: dict[str, Any],
    **kwargs,
) -> "OneRecRewardTrainer":
    """Trains on `runs`, or goes on after the latest checkpoint in `output_dir`; gives the trainer. `arguments` are
    those of `TrainingArguments`, the others of [`OneRecRewardTrainer`]."""
    trainer = OneRecRewardTrainer(model, TrainingArguments(**arguments), runs, tokenizer, totals, **kwargs)
    train_from_latest(trainer)
    return trainer


class OneRecRewardTrainer(Trainer):
    """`Trainer` of [`OneRecRewardModel`] on runs of exposures: from towers at their base rates to a model that is
    calibrated on users who were held out.

    >>> from onerec_hf import SimulatedFeed
    >>> feed = SimulatedFeed.generate(users=40, items=160).feed()
    >>> tokenizer = OneRecTokenizer.fit(feed)
    >>> sizes = {"hidden_size": 16, "tower_hidden_size": 16, "history_items": 16}
    >>> model = create_reward_model(sizes, feed, tokenizer)
    >>> args = TrainingArguments("runs/reward", max_steps=2, save_strategy="no", report_to="none")
    >>> OneRecRewardTrainer(model, args, feed, tokenizer).train().global_step  # doctest: +ELLIPSIS
    {'train_runtime': ...}
    2

    Args:
        train_dataset: Runs, also as [`ShardedRows`]; or a [`Feed`], or a log that [`feed_from_log`] reads by its
            default names, of whose runs a tenth of the users is held out for the calibration.
        processing_class: The tokenizer, which is not saved with the checkpoints.
        totals: Of the exposures to fit; of a feed or a log by default its own.
        calibration_dataset: Runs that are not trained on. Without them and without a log the model stays uncalibrated.
        from_base_rates: Whether the towers begin at their objectives' base rates; False for a model that was trained
            before.
    """

    def __init__(
        self,
        model: OneRecRewardModel,
        args: TrainingArguments,
        train_dataset,
        processing_class: OneRecTokenizer,
        totals: ItemTotals | None = None,
        calibration_dataset: Dataset | None = None,
        from_base_rates: bool = True,
        **kwargs,
    ):
        runs, config = rows_of(train_dataset, lambda feed: feed), model.config
        if isinstance(runs, Feed):
            data = DataArguments(history_items=config.history_items, session_items=config.session_items)
            totals = totals or ItemTotals.of_feed(runs, processing_class)
            runs = index_sessions(exposure_runs(runs.interactions, runs, data), processing_class)
            runs, held_out = without_calibration_users(runs, args.seed)
            calibration_dataset = held_out if calibration_dataset is None else calibration_dataset
        self.calibration_dataset, self.from_base_rates = calibration_dataset, from_base_rates
        collator = RewardCollator(ExposureEncoder(config, processing_class.item_token_ids), totals)
        callbacks = [CheckpointCompleteCallback(), *kwargs.pop("callbacks", [])]
        super().__init__(model, args, collator, runs, callbacks=callbacks, **kwargs)

    def train(self, *args, **kwargs):
        collator, rows = self.data_collator, self.train_dataset
        if isinstance(rows, ShardedRows):  # the beginning of a training needs no more than some shards' rates
            rows = Subset(rows, range(rows.first[: rows.shards_at_once + 1][-1]))
        rates = label_means(rows, replace(collator, session_items=1))
        if self.from_base_rates:
            self.model.set_base_rates(rates)
        output = super().train(*args, **kwargs)
        if self.calibration_dataset is not None:
            calibrate(self.model, collator.encoder, collator.totals, self.calibration_dataset)
        return output

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(rows, ShardedRows):
            return ShardSampler.for_training(rows, self.args)
        return super()._get_train_sampler(train_dataset)

    def _set_signature_columns_if_needed(self):
        # The columns that the collator reads, not the arguments of the model's forward.
        self._signature_columns = [*REWARD_FEATURES, "exposed_timestamps", "exposed_sessions"]
