"""SASRec (Kang & McAuley, 2018) trained with cross-entropy over the full catalogue at every position.

A causal transformer over item embeddings whose last state is multiplied with the same embeddings. Two departures from
the paper make it the strong baseline it can be: the loss is a softmax over all items instead of one sampled negative,
and positions are counted back from the item that predicts, as a learned bias of the attention by distance, so that
every prefix of a history trains what the whole history uses.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..co_consumption import flatten_histories
from ..item_head import FullSoftmaxLoss
from ..typed_arguments import typed_arguments
from .baselines import Baseline
from .ranking_metrics import ranking_metrics

_BATCHES_PER_BUCKET = 16


class SASRecModel(nn.Module):
    """Pre-norm causal transformer with tied item embeddings.

    Args:
        num_items, hidden_size, num_layers: size N of the catalogue, width d, blocks.
        num_heads: attention heads, a divisor of the width.
        dropout: of embeddings, attention and both residual branches.
        max_length: longest sequence T.
    """

    def __init__(
        self, num_items: int, hidden_size: int, num_layers: int, num_heads: int, dropout: float, max_length: int
    ):
        super().__init__()
        self.item_embeddings = nn.Embedding(num_items, hidden_size)
        blocks = [SASRecBlock(hidden_size, num_heads, dropout, max_length) for _ in range(num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_size)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """Map right-padded catalogue indices (B, T) to states (B, T, d); what stands at pads is meaningless."""
        states = self.dropout(self.item_embeddings(items))
        for block in self.blocks:
            states = block(states)
        return self.norm(states)


class SASRecBlock(nn.Module):
    """Causal self-attention with a learned bias by distance, then a feed-forward network."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float, max_length: int):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.distance_bias = nn.Parameter(torch.zeros(num_heads, max_length))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.GELU(),
            nn.Linear(4 * hidden_size, hidden_size),
            nn.Dropout(dropout),
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        batch, length, width = states.shape
        heads = self.query_key_value(self.attention_norm(states)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        places = torch.arange(length, device=states.device)
        distance = places[:, None] - places
        # Pads stand right of all items, so causality alone keeps them out of every item's view.
        bias = self.distance_bias[:, distance.clamp_min(0)].masked_fill(distance < 0, -torch.inf)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None], dropout_p=dropout)
        attended = self.output(attended.transpose(1, 2).reshape(batch, length, width))
        states = states + F.dropout(attended, self.dropout, self.training)
        return states + self.feed_forward(states)


@typed_arguments
@dataclass(eq=False)
class SASRec(Baseline):
    """Full-softmax SASRec with the interface of all baselines.

    >>> histories = [(start + np.arange(6)) % 8 for start in range(8)]
    >>> model = SASRec(hidden_size=16, epochs=40, learning_rate=1e-2, dropout=0.0).fit(histories, num_items=8)
    >>> model.rank([np.array([2, 3, 4])], k=1).tolist()
    [[5]]

    Args:
        hidden_size, num_layers, num_heads, dropout, max_length: see `SASRecModel`.
        learning_rate: peak, reached after a warm-up of 5% and followed by a cosine to 0.
        weight_decay: AdamW's.
        batch_tokens: items of a batch, pads included.
        epochs: passes over all histories.
        recent_epochs: passes after these, with a schedule of their own, over the recent items of the histories that
            `fit` was told of.
        max_minutes: end sooner, with the schedule compressed to end there too; the result then depends on the
            machine's speed. None: no limit.
        validation_share: share of users whose last item is held out; the epoch with the best NDCG@10 on them is kept.
            0: the last epoch is kept.
        seed: of everything random here; the caller's random state is left as it was.
        device: where to train and score; None: a GPU where there is one.

    After `fit`: `training_curve`, (step, loss) at regular steps; `validation_curve`, (step, NDCG@10) by epoch.
    """

    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 2
    dropout: float = 0.3
    max_length: int = 50
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    batch_tokens: int = 1024
    epochs: int = 20
    recent_epochs: int = 2
    max_minutes: float | None = None
    validation_share: float = 0.0
    seed: int = 0
    device: str | None = None

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share must be in [0, 1), got {self.validation_share}")
        if min(self.max_length, self.batch_tokens, self.epochs) < 1:
            raise ValueError("max_length, batch_tokens and epochs must be at least 1")
        self.device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def fit(self, histories: Sequence[np.ndarray], num_items: int, recent: Sequence[int] | None = None) -> SASRec:
        """As `Baseline.fit`.

        Args:
            recent: how many of each history's latest items are recent, for `recent_epochs`.
        """
        self.num_items = num_items
        random = np.random.default_rng(self.seed)
        held_out = np.zeros(len(histories), dtype=bool)
        if self.validation_share:
            eligible = np.flatnonzero([len(history) >= 2 for history in histories])
            chosen = random.permutation(eligible)[: max(1, round(self.validation_share * len(eligible)))]
            held_out[chosen] = True
        training = [history[:-1] if held else history for history, held in zip(histories, held_out, strict=True)]
        validation = [history for history, held in zip(histories, held_out, strict=True) if held]
        _, flat = flatten_histories(training, num_items)
        lengths = np.array([len(history) for history in training], dtype=np.int64)
        if not len(lengths) or lengths.max() < 2:
            raise ValueError("no history has two items: there is nothing to predict")

        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            sizes = self.hidden_size, self.num_layers, self.num_heads, self.dropout, self.max_length
            self.model = SASRecModel(num_items, *sizes).to(self.device)
            self.training_curve: list[tuple[int, float]] = []
            self.validation_curve: list[tuple[int, float]] = []
            places = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            self._train(flat, lengths, np.ones(len(flat), dtype=bool), self.epochs, validation, random)
            if recent is not None and self.recent_epochs:
                # A held-out item is the latest of its history.
                latest = np.maximum(np.asarray(recent) - held_out, 0)
                counted = places >= np.repeat(lengths - latest, lengths)
                if counted[places > 0].any():
                    self._train(flat, lengths, counted, self.recent_epochs, validation, random)
        self.model.eval()
        return self

    def _train(
        self,
        flat: np.ndarray,
        lengths: np.ndarray,
        counted: np.ndarray,
        epochs: int,
        validation: list[np.ndarray],
        random: np.random.Generator,
    ) -> None:
        """`epochs` passes over histories one after the other, with the loss on the items that are `counted`."""
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim == 2]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim != 2]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.98))
        steps_per_epoch = sum(1 for _ in self._batches(flat, lengths, counted, np.random.default_rng(self.seed)))
        total_steps = steps_per_epoch * epochs
        log_every = max(1, min(steps_per_epoch, total_steps // 200))
        before = self.training_curve[-1][0] if self.training_curve else 0
        best_value, best_state = -math.inf, None
        started = time.monotonic()
        step, recent, progress = 0, [], 0.0
        with tqdm(total=total_steps, desc="SASRec") as bar:
            for _ in range(epochs):
                self.model.train()
                for items, targets, present in self._batches(flat, lengths, counted, random):
                    for group in optimizer.param_groups:
                        group["lr"] = self.learning_rate * _warmup_cosine(progress)
                    states = self.model(items.to(self.device))[present.to(self.device)]
                    targets = targets[present].to(self.device)
                    loss = FullSoftmaxLoss.apply(states, self.model.item_embeddings.weight, targets)
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                    optimizer.step()
                    step += 1
                    recent.append(loss.detach())
                    bar.update()
                    if step % log_every == 0:
                        mean_loss = float(torch.stack(recent).mean())
                        self.training_curve.append((before + step, mean_loss))
                        recent = []
                        bar.set_postfix(loss=f"{mean_loss:.3f}")
                    progress = step / total_steps
                    if self.max_minutes is not None:
                        progress = max(progress, (time.monotonic() - started) / (60 * self.max_minutes))
                        if progress >= 1:
                            break
                if validation:
                    value = self._validate(validation)
                    self.validation_curve.append((before + step, value))
                    bar.set_postfix(ndcg=f"{value:.4f}")
                    if value > best_value:
                        best_value, best_state = value, copy.deepcopy(self.model.state_dict())
                if progress >= 1:
                    break
        if recent:
            self.training_curve.append((before + step, float(torch.stack(recent).mean())))
        if best_state is not None:
            self.model.load_state_dict(best_state)

    def _batches(
        self, flat: np.ndarray, lengths: np.ndarray, counted: np.ndarray, random: np.random.Generator
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """One epoch of (items, targets, whether a target counts), each (B, T), batched by length and right padded.

        A history of more than `max_length` transitions is cut into windows from a random first cut, so that over the
        epochs every item is predicted from every length of context.
        """
        transitions = np.maximum(lengths - 1, 0)
        history_starts = np.cumsum(lengths) - lengths
        cut = random.integers(1, self.max_length + 1, len(lengths))
        first = np.where(transitions > self.max_length, cut, transitions)
        pieces = np.where(transitions > 0, 1 + -(-(transitions - first) // self.max_length), 0)
        history = np.repeat(np.arange(len(lengths)), pieces)
        number = np.arange(len(history)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        offset = np.where(number > 0, first[history] + (number - 1) * self.max_length, 0)
        size = np.where(number > 0, np.minimum(transitions[history] - offset, self.max_length), first[history])
        start = history_starts[history] + offset
        before = np.concatenate([[0], np.cumsum(counted)])
        some = before[start + size + 1] > before[start + 1]
        start, size = start[some], size[some]

        order = random.permutation(len(start))
        mean_rows = max(1, self.batch_tokens // max(1, round(size.mean())))
        batches = []
        for bucket_start in range(0, len(order), mean_rows * _BATCHES_PER_BUCKET):
            bucket = order[bucket_start : bucket_start + mean_rows * _BATCHES_PER_BUCKET]
            bucket = bucket[np.argsort(-size[bucket], kind="stable")]
            position = 0
            while position < len(bucket):
                rows = max(1, self.batch_tokens // size[bucket[position]])
                batches.append(bucket[position : position + rows])
                position += rows
        for index in random.permutation(len(batches)):
            windows = batches[index]
            columns = np.arange(size[windows].max())
            present = columns < size[windows, None]
            places = np.where(present, start[windows, None] + columns, 0)
            following = (places + 1).clip(max=len(flat) - 1)
            parts = flat[places], flat[following], present & counted[following]
            yield tuple(torch.from_numpy(part) for part in parts)

    def _validate(self, validation: list[np.ndarray]) -> float:
        self.model.eval()
        targets = np.array([history[-1] for history in validation])
        # A repeated item is a legitimate target here, so nothing is excluded.
        ranked = self.rank([history[:-1] for history in validation], 10, exclude_consumed=False)
        return ranking_metrics(ranked, targets, self.num_items, cutoffs=(10,))["ndcg@10"]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @torch.inference_mode()
    def score(self, histories: Sequence[np.ndarray]) -> torch.Tensor:
        """Scores of the whole catalogue from the latest `max_length` items: (B, N).

        Raises:
            ValueError: a history is empty; names the first.
        """
        recent = [np.asarray(history, dtype=np.int64)[-self.max_length :] for history in histories]
        lengths = torch.tensor([len(history) for history in recent])
        if len(recent) and lengths.min() < 1:
            raise ValueError(f"history {int(lengths.argmin())} is empty: SASRec needs at least one item")
        items = torch.zeros(len(recent), int(lengths.max()) if len(recent) else 1, dtype=torch.long)
        rows, flat = flatten_histories(recent, self.num_items)
        items[torch.arange(items.shape[1]) < lengths[:, None]] = torch.from_numpy(flat)
        states = self.model(items.to(self.device))
        last = states[torch.arange(len(recent)), (lengths - 1).to(self.device)]
        return (last @ self.model.item_embeddings.weight.T).float().cpu()


def _warmup_cosine(progress: float, warmup: float = 0.05) -> float:
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))
