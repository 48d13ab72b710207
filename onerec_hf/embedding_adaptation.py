"""Adaptation of item embeddings to behaviour before they are quantized (OneRec section 3.1; QARM, arXiv 2411.11739).

Items that users take one after the other are pulled together, others pushed apart: item-to-item contrastive learning
of a small projection, with the other items of a batch as negatives. Pairs come from histories that end before the
evaluated period.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .item_embeddings import pairs_in_window
from .semantic_ids.balanced_kmeans import as_points
from .staged_files import staged_files
from .typed_arguments import typed_arguments

SETTINGS_FILE = "embedding_adaptation.json"
WEIGHTS_FILE = "embedding_adaptation.safetensors"
# What the two were called before; they are still read.
OLD_FILES = ("item_alignment.json", "item_alignment.safetensors")
ROWS_AT_ONCE = 2**16
NOT_FITTED = "this EmbeddingAdaptation is not fitted yet; call fit(embeddings, histories) first"


def cooccurring_pairs(histories: Sequence[np.ndarray], num_items: int, window: int = 2) -> np.ndarray:
    """All the pairs of [`pairs_in_window`], int64 (P, 2)."""
    return np.concatenate([np.stack(pair, axis=1) for pair in pairs_in_window(histories, num_items, window)])


def contrastive_loss(
    projected: torch.Tensor, other: torch.Tensor, pairs: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Symmetric InfoNCE of B pairs, the other pairs' items being the negatives.

    Args:
        projected, other: (B, d) unit vectors of the first and of the second item of each pair.
        pairs: (B, 2) the items; an item is not a negative of a pair that it is part of.
    """
    logits = projected @ other.T / temperature
    first, second = pairs.T
    itself = torch.eye(len(pairs), dtype=torch.bool, device=pairs.device)

    def loss(logits: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        known = (candidates == first[:, None]) | (candidates == second[:, None])
        logits = logits.masked_fill(known & ~itself, -torch.inf)
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))

    return (loss(logits, second) + loss(logits.T, first)) / 2


class AdaptationProjection(nn.Module):
    """x -> unit vector of W x + MLP(x). W starts as the principal directions and the MLP as zero."""

    def __init__(self, embedding_dim: int, dim: int, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(embedding_dim, dim)
        self.mlp = nn.Sequential(nn.Linear(embedding_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, dim))

    @torch.no_grad()
    def start_from_principal_directions(self, x: torch.Tensor) -> None:
        center = x.mean(0)
        _, directions = torch.linalg.eigh(((x - center).T @ (x - center)).double())
        weight = directions.flip(1)[:, : self.linear.out_features].T.float()
        self.linear.weight.copy_(weight)
        self.linear.bias.copy_(-weight @ center)
        self.mlp[-1].weight.zero_()
        self.mlp[-1].bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.linear(x) + self.mlp(x), dim=-1)


@typed_arguments
class EmbeddingAdaptation:
    """Contrastive projection of item embeddings, fitted on which items follow one another.

    Args:
        dim: of the adapted embeddings; at most that of the given ones.
        hidden_size: of the projection's MLP.
        window: how far apart in a history two items may stand and still be a pair.
        temperature: of the InfoNCE loss.
        num_steps, batch_size, learning_rate: of AdamW; a step takes `batch_size` pairs.
        seed: the same seed, data and device give the same projection.
    """

    def __init__(
        self,
        dim: int = 64,
        hidden_size: int = 256,
        window: int = 2,
        temperature: float = 0.1,
        num_steps: int = 500,
        batch_size: int = 1024,
        learning_rate: float = 1e-3,
        seed: int = 0,
        device: str | torch.device = "cpu",
        show_progress: bool = False,
    ):
        if dim < 1 or window < 1 or temperature <= 0 or batch_size < 2:
            raise ValueError(
                "dim and window must be positive, temperature above 0 and batch_size at least 2, got "
                f"{dim}, {window}, {temperature} and {batch_size}"
            )
        self.dim, self.hidden_size = dim, hidden_size
        self.window, self.temperature = window, temperature
        self.num_steps, self.batch_size, self.learning_rate = num_steps, batch_size, learning_rate
        self.seed, self.device, self.show_progress = seed, device, show_progress
        self.projection: AdaptationProjection | None = None

    def fit(self, embeddings, histories: Sequence[np.ndarray]) -> "EmbeddingAdaptation":
        """Fits the projection.

        Args:
            embeddings: (N, d) of the catalogue.
            histories: per user an array of catalogue indices, in order of time, before the evaluated period.

        Raises:
            ValueError: NaN in a row; an index outside [0, N), with the history; no pair anywhere.
        """
        x = as_points(embeddings, device=self.device)
        pairs = torch.from_numpy(cooccurring_pairs(histories, len(x), self.window))
        generator = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            projection = AdaptationProjection(x.shape[1], min(self.dim, x.shape[1]), self.hidden_size)
        projection.start_from_principal_directions(x.cpu())
        projection.to(x.device)
        optimizer = torch.optim.AdamW(projection.parameters(), lr=self.learning_rate, weight_decay=0.01)
        for _ in tqdm(range(self.num_steps), desc="embedding adaptation", disable=not self.show_progress):
            batch = pairs[torch.randint(len(pairs), (self.batch_size,), generator=generator)].to(x.device)
            first, second = projection(x[batch.flatten()]).view(*batch.shape, -1).unbind(1)
            loss = contrastive_loss(first, second, batch, self.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.projection = projection.requires_grad_(False)
        return self

    def transform(self, embeddings) -> np.ndarray:
        """Adapted embeddings of unit length, float32 (N, dim), of any items, new ones too.

        Raises:
            ValueError: not fitted yet, NaN in a row, or another width than the fitted embeddings.
        """
        if self.projection is None:
            raise ValueError(NOT_FITTED)
        x = as_points(embeddings)
        expected = self.projection.linear.in_features
        if x.shape[1] != expected:
            raise ValueError(f"embeddings have {x.shape[1]} dimensions, the adaptation was fitted on {expected}")
        self.projection.to(x.device)
        return torch.cat([self.projection(rows) for rows in x.split(ROWS_AT_ONCE)]).cpu().numpy()

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes `embedding_adaptation.json` and `embedding_adaptation.safetensors`, each whole or not at all."""
        if self.projection is None:
            raise ValueError(NOT_FITTED)
        names = ("dim", "hidden_size", "window", "temperature", "num_steps", "batch_size", "learning_rate", "seed")
        settings = {name: getattr(self, name) for name in names}
        weights = {name: tensor.cpu().contiguous() for name, tensor in self.projection.state_dict().items()}
        with staged_files(save_directory, last=SETTINGS_FILE) as staging:
            save_file(weights, staging / WEIGHTS_FILE, {"format": "pt"})
            (staging / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "EmbeddingAdaptation":
        """What [`save_pretrained`] wrote. Raises ValueError for a truncated or foreign file, with its name."""
        settings_path, weights_path = Path(directory) / SETTINGS_FILE, Path(directory) / WEIGHTS_FILE
        if not settings_path.exists() and (Path(directory) / OLD_FILES[0]).exists():
            settings_path, weights_path = (Path(directory) / name for name in OLD_FILES)
        try:
            adaptation = cls(**json.loads(settings_path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            problem = f"{settings_path} does not describe an EmbeddingAdaptation ({error}); save it again"
            raise ValueError(problem) from error
        try:
            weights = load_file(weights_path)
            dim, embedding_dim = weights["linear.weight"].shape
            projection = AdaptationProjection(embedding_dim, dim, adaptation.hidden_size)
            projection.load_state_dict(weights)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"{weights_path} holds no weights of this adaptation ({error}); save it again") from error
        adaptation.projection = projection.requires_grad_(False)
        return adaptation
