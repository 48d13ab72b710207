"""What all quantizers of item embeddings share: semantic IDs, the collision policy, new items, files.

A quantizer holds one codebook per level. An item's latent vector (its embedding, or what a network makes of it) is
quantized level by level: r^1 = latent; s^l = argmin_k ||r^l - c_k^l||^2; r^(l+1) = r^l - c^l_(s^l) (section 3.1).
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from onerec_hf.semantic_ids.balanced_kmeans import Residuals, as_points, nearest_centroid
from onerec_hf.semantic_ids.collisions import (
    COLLISION_POLICIES,
    collision_summary,
    move_to_free_ids,
    raise_on_collision,
    rank_among_equals,
    require_enough_ids,
)
from onerec_hf.staged_files import staged_files
from onerec_hf.typed_arguments import typed_arguments

QUANTIZER_FILE = "quantizer.json"
CODEBOOKS_FILE = "codebooks.safetensors"
NUMBERS_AT_ONCE = 2**25  # distances held in memory while neighbours are looked for
ITEMS_AT_ONCE = 2**18  # in passes over the embeddings that make copies


@dataclass
class SemanticIds:
    """Codes of N items: codes int64 array (N, L), codebooks (K_l, d) of the quantized levels, K_l of all L levels.

    `quantizer` is the fitted one, which gives new items their codes.
    """

    codes: np.ndarray
    codebooks: list[torch.Tensor]
    codebook_sizes: tuple[int, ...]
    report: dict
    quantizer: "Quantizer"


@typed_arguments
class Quantizer:
    """Base of the quantizers: [`ResidualQuantizer`], [`RQVAE`] and [`SeveralQuantizers`] of these.

    Args:
        codebook_sizes: K_l, one per quantized level; the paper has 3 levels of 8192.
        collision_policy: what happens to items with equal codes.
            "nearest_free": where items that share a prefix (all codes but the last) collide, the prefix's last codes
            are matched to its items one to one at the least total distance; items for which a prefix has no code left
            go to the next-nearest prefix with room.
            "suffix": one more level is added, which counts the items with equal codes. "share": they keep the same
            ID. "error": ValueError. All but "share" make item and ID one to one.
        suffix_size: codes of the level that "suffix" adds. None: twice what the fitted items need, so that new items
            find room.
        seed: of everything that is drawn. The same seed, data and device give the same codes.
        device: where it is fitted. Codes and codebooks are handed back on the CPU.

    Attributes after `fit` or `from_pretrained`: codebooks (L tensors (K_l, d)), embedding_dim, id_sizes (K_l of all
    levels, the suffix level included), fitted_error (mean squared error of the fitted items' nearest codes).
    """

    quantizer_type: str
    num_semantic_ids = 1
    # Names of the constructor arguments, and attributes, that are saved.
    setting_names: tuple[str, ...] = ("codebook_sizes", "collision_policy", "suffix_size", "seed")

    def __init__(
        self,
        codebook_sizes: Sequence[int],
        collision_policy: str = "nearest_free",
        suffix_size: int | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        show_progress: bool = False,
    ):
        if not codebook_sizes or min(codebook_sizes) < 1:
            raise ValueError(f"codebook_sizes must be positive integers, got {list(codebook_sizes)}")
        if collision_policy not in COLLISION_POLICIES:
            raise ValueError(
                f"collision_policy must be one of {', '.join(COLLISION_POLICIES)}, got {collision_policy!r}"
            )
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        self.collision_policy, self.suffix_size, self.seed = collision_policy, suffix_size, seed
        self.device, self.show_progress = device, show_progress
        self.codebooks: list[torch.Tensor] = []
        self.id_sizes = self.codebook_sizes
        self.fitted_error: float | None = None

    # What a kind of quantizer defines

    def _fit_codebooks(self, x: torch.Tensor) -> torch.Tensor:
        """Fits on embeddings (N, d): sets `codebooks` and `embedding_dim`, returns codes LongTensor (N, L)."""
        raise NotImplementedError

    # Whether the codes that `_fit_codebooks` returns are the nearest ones.
    codes_are_nearest = True

    def _fit_report(self, num_items: int) -> dict[str, Any]:
        """What the report says of fitting to so many items beside the settings."""
        return {}

    def _latents(self, x: torch.Tensor) -> torch.Tensor:
        """What the codebooks quantize, (N, latent d), of embeddings (N, d)."""
        return x

    def _embeddings(self, latents: torch.Tensor) -> torch.Tensor:
        """The way back from latents to embeddings."""
        return latents

    def _weights(self) -> dict[str, torch.Tensor]:
        """Tensors that are saved; those of the codebooks are `level_0`, `level_1`, ..."""
        return {f"level_{level}": codebook for level, codebook in enumerate(self.codebooks)}

    def _load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        self.codebooks = [weights[f"level_{level}"] for level in range(len(self.codebook_sizes))]

    # The interface

    def fit(self, embeddings) -> SemanticIds:
        """Codebooks and codes of item embeddings (N, d) (array or tensor), row = catalogue index.

        Raises:
            ValueError: NaN in a row, all rows equal, a codebook larger than the catalogue, fewer IDs than items, or a
                collision under the policy "error".
        """
        x = as_points(embeddings, device=self.device)
        largest = max(self.codebook_sizes)
        if largest > len(x):
            raise ValueError(
                f"codebook_sizes {list(self.codebook_sizes)}: {largest} codes for a catalogue of {len(x)} items; "
                f"choose at most {len(x)} codes per level"
            )
        if all((rows == x[0]).all() for rows in x.split(ITEMS_AT_ONCE)):
            raise ValueError(
                f"all {len(x)} embeddings are equal: there is nothing to quantize. Check the source of the embeddings"
            )
        if self.collision_policy in ("nearest_free", "error"):
            require_enough_ids(self.codebook_sizes, len(x))
        self.embedding_dim = x.shape[1]
        initial = self._fit_codebooks(x).cpu()
        self.codebooks = [codebook.cpu() for codebook in self.codebooks]
        nearest = initial if self.codes_are_nearest else self._nearest_codes(self._latents(x)).cpu()
        self.fitted_error = float(self._errors(x, nearest).mean())
        initial = initial.numpy()
        self.id_sizes = self.codebook_sizes
        if self.collision_policy == "suffix":
            needed = int(rank_among_equals(initial).max()) + 1
            if self.suffix_size is not None and self.suffix_size < needed:
                raise ValueError(
                    f"suffix_size {self.suffix_size}, but {needed} items have the same codes; raise it to at least "
                    f"{needed}, or choose larger codebooks"
                )
            self.id_sizes = (*self.codebook_sizes, self.suffix_size or 2 * needed)
        final = self._resolve(x, initial, np.zeros((0, len(self.id_sizes)), dtype=np.int64))
        before = collision_summary(initial)
        report = {
            "quantizer_type": self.quantizer_type,
            **self._settings(),
            **self._fit_report(len(x)),
            **quantization_report(x, final, self),
            "collision_rate_before_policy": before[0],
            "max_items_per_id_before_policy": before[1],
            "moved_items": int((final[:, : initial.shape[1]] != initial).any(1).sum()),
        }
        return SemanticIds(final, self.codebooks, self.id_sizes, report, self)

    def encode(self, embeddings) -> np.ndarray:
        """Nearest codes of embeddings (N, d) at the quantized levels, int64 (N, L); collisions are left as they are.

        Raises:
            ValueError: not fitted yet, NaN in a row, or another width than the fitted embeddings.
        """
        return self._nearest_codes(self._latents(self._checked(embeddings))).cpu().numpy()

    def decode(self, codes) -> torch.Tensor:
        """Embeddings float32 (N, d) that codes (N, L) stand for.

        The first levels alone may be given, for a coarser embedding; a suffix level stands for nothing.
        """
        self._require_codebooks()
        codes = torch.from_numpy(np.asarray(codes, dtype=np.int64))
        levels = range(min(codes.shape[1], len(self.codebooks)))
        return self._embeddings(sum(self.codebooks[level][codes[:, level]] for level in levels))

    def place(self, embeddings, existing_codes) -> np.ndarray:
        """Codes of new items beside existing ones by the frozen codebooks and the collision policy.

        Args:
            embeddings: (N, d) of the new items.
            existing_codes: int (M, L) of all levels; they stay as they are.

        Returns:
            int64 (N, L), of all levels. Under "nearest_free" a new item whose nearest ID is taken goes to the nearest
            free code at the last level, or to the nearest prefix with room; under "suffix" it gets the next number of
            its codes.

        Raises:
            ValueError: what `encode` raises; a collision under "error"; no ID left, or no suffix left, with the row.
        """
        x = self._checked(embeddings)
        existing_codes = np.asarray(existing_codes, dtype=np.int64)
        if existing_codes.ndim != 2 or existing_codes.shape[1] != len(self.id_sizes):
            shape = list(existing_codes.shape)
            raise ValueError(f"existing_codes have shape {shape}, expected [items, {len(self.id_sizes)}]")
        return self._resolve(x, self._nearest_codes(self._latents(x)).cpu().numpy(), existing_codes)

    def quantization_error(self, embeddings) -> torch.Tensor:
        """Squared distance of each embedding to what its nearest codes stand for, float32 (N,), on the CPU.

        For new items, far above `fitted_error` it says that the codebooks do not know them.
        """
        x = self._checked(embeddings)
        return self._errors(x, self._nearest_codes(self._latents(x)).cpu())

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes `quantizer.json` and `codebooks.safetensors`; each appears whole or not at all.

        The JSON carries a fingerprint of the weights and comes last: a mixture of two quantizers is refused on load.
        """
        self._require_codebooks()
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self._weights().items()}
        described = {
            "quantizer_type": self.quantizer_type,
            "settings": self._settings(),
            "embedding_dim": self.embedding_dim,
            "id_sizes": list(self.id_sizes),
            "fitted_error": self.fitted_error,
            "fingerprint": _fingerprint(weights),
        }
        with staged_files(save_directory, last=QUANTIZER_FILE) as staging:
            save_file(weights, staging / CODEBOOKS_FILE, {"format": "pt"})
            (staging / QUANTIZER_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "Quantizer":
        """The quantizer that [`save_pretrained`] wrote; [`load_quantizer`] finds the class by itself.

        Raises:
            FileNotFoundError: a file is missing. ValueError: a truncated or foreign file, named.
        """
        described = read_quantizer_file(directory)
        path = Path(directory) / CODEBOOKS_FILE
        try:
            weights = load_file(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is missing; save the quantizer again") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as safetensors ({error}); save or download it again") from error
        if _fingerprint(weights) != described["fingerprint"]:
            raise ValueError(
                f"{path} does not belong to {QUANTIZER_FILE} beside it: its content has another fingerprint. Files "
                "of two quantizers are mixed; save or download the quantizer again"
            )
        try:
            quantizer = cls._restored(described, weights)
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{Path(directory) / QUANTIZER_FILE} does not describe a {cls.__name__} ({error}); it was written by "
                "something else, save the quantizer again"
            ) from error
        return quantizer

    # Parts

    @classmethod
    def _restored(cls, described: dict[str, Any], weights: dict[str, torch.Tensor]) -> "Quantizer":
        """The fitted quantizer that quantizer.json and the weights beside it describe."""
        quantizer = cls(**described["settings"])
        quantizer.embedding_dim = described["embedding_dim"]
        quantizer.id_sizes = tuple(described["id_sizes"])
        quantizer.fitted_error = described["fitted_error"]
        quantizer._load_weights(weights)
        return quantizer

    def _settings(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.setting_names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def _checked(self, embeddings) -> torch.Tensor:
        self._require_codebooks()
        x = as_points(embeddings)
        if x.shape[1] != self.embedding_dim:
            fitted = self.embedding_dim
            raise ValueError(f"embeddings have {x.shape[1]} dimensions, the quantizer was fitted on {fitted}")
        return x

    def _require_codebooks(self) -> None:
        if not self.codebooks:
            raise ValueError(f"this {type(self).__name__} has no codebooks yet; call fit(embeddings) first")

    def _errors(self, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Squared distance of each embedding (N, d) to what its codes (N, levels) stand for, (N,), on the CPU."""
        parts = zip(x.split(ITEMS_AT_ONCE), codes.split(ITEMS_AT_ONCE), strict=True)
        return torch.cat([(rows.cpu() - self.decode(own)).square().sum(1) for rows, own in parts])

    def _nearest_codes(self, latents: torch.Tensor) -> torch.Tensor:
        codebooks, codes = [codebook.to(latents.device) for codebook in self.codebooks], []
        for level, codebook in enumerate(codebooks):
            codes.append(nearest_centroid(Residuals(latents, codebooks[:level], codes), codebook))
        return torch.stack(codes, dim=1)

    def _resolve(self, x: torch.Tensor, codes: np.ndarray, existing: np.ndarray) -> np.ndarray:
        """Applies the collision policy to codes (N, quantized levels) beside existing ones (M, all levels)."""
        if self.collision_policy == "error":
            raise_on_collision(np.concatenate([existing, codes]), len(existing))
        elif self.collision_policy == "nearest_free":
            return move_to_free_ids(self._latents(x), codes, self.codebooks, existing)
        elif self.collision_policy == "suffix":
            # Existing items with the same codes hold the first numbers, in whatever order they stand.
            suffix = rank_among_equals(np.concatenate([existing[:, :-1], codes]))[len(existing) :]
            if suffix.max(initial=0) >= self.id_sizes[-1]:
                row = int(np.flatnonzero(suffix >= self.id_sizes[-1])[0])
                raise ValueError(
                    f"row {row}: all {self.id_sizes[-1]} suffixes of its codes {tuple(codes[row].tolist())} are "
                    "taken; fit again with a larger suffix_size or larger codebooks"
                )
            return np.concatenate([codes, suffix[:, None]], axis=1)
        return codes


def read_quantizer_file(directory: str | os.PathLike) -> dict[str, Any]:
    """What quantizer.json says. Raises FileNotFoundError or ValueError with the file's name."""
    path = Path(directory) / QUANTIZER_FILE
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: {directory} holds no quantizer") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); save or download it again") from error
    needed = {"quantizer_type", "settings", "embedding_dim", "id_sizes", "fitted_error", "fingerprint"}
    missing = needed.difference(described if isinstance(described, dict) else ())
    if missing:
        raise ValueError(f"{path} has no {', '.join(sorted(missing))}: it is the file of something else")
    return described


def _fingerprint(weights: dict[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        digest.update(f"{name} {tuple(weights[name].shape)} ".encode())
        digest.update(weights[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def quantization_report(embeddings, codes: np.ndarray, quantizer: Quantizer) -> dict:
    """JSON-able quality report of codes (N, L) for embeddings (N, d): what "tokenizer" of metrics.json
    (`reporting.metrics_schema`) says of them. Quantized levels alone have a reconstruction_error."""
    x = as_points(embeddings).cpu()
    codes = np.asarray(codes)
    parts = [slice(start, start + ITEMS_AT_ONCE) for start in range(0, len(x), ITEMS_AT_ONCE)]
    mean = x.mean(0)
    variance = float(sum((x[part] - mean).square().sum(dtype=torch.float64) for part in parts))
    levels = []
    for level, size in enumerate(quantizer.id_sizes):
        counts = np.bincount(codes[:, level], minlength=size)
        shares = counts[counts > 0] / len(codes)
        entropy = float(-(shares * np.log2(shares)).sum()) + 0.0
        summary = {
            "codes": int(size),
            "used": int((counts > 0).sum()),
            "use": float((counts > 0).mean()),
            "entropy_bits": entropy,
            "perplexity": 2.0**entropy,
            "min_size": int(counts.min()),
            "max_size": int(counts.max()),
            "balance": len(codes) / size / int(counts.max()),
        }
        if level < len(quantizer.codebooks):
            errors = (x[part] - quantizer.decode(codes[part, : level + 1]) for part in parts)
            error = float(sum(error.square().sum(dtype=torch.float64) for error in errors))
            summary["reconstruction_error"] = error / variance
        levels.append(summary)
    collision_rate, max_items_per_id = collision_summary(codes)
    return {
        "num_items": len(codes),
        "codebook_sizes": [int(size) for size in quantizer.id_sizes],
        "levels": levels,
        "reconstruction_error": levels[len(quantizer.codebooks) - 1]["reconstruction_error"],
        "neighbours_kept": neighbours_kept(x, codes[:, 0]),
        "collision_rate": collision_rate,
        "max_items_per_id": max_items_per_id,
    }


def neighbours_kept(
    embeddings: torch.Tensor, first_codes: np.ndarray, num_neighbours: int = 10, max_items: int = 1000, seed: int = 0
) -> float:
    """Share of an item's nearest neighbours (Euclidean) that have its first code, over at most `max_items` items.

    The items are drawn by seed, their neighbours looked for in the whole catalogue. 0 for a catalogue of one item.
    """
    num_items = len(embeddings)
    num_neighbours = min(num_neighbours, num_items - 1)
    if num_neighbours == 0:
        return 0.0
    mean = embeddings.mean(0)
    drawn = torch.randperm(num_items, generator=torch.Generator().manual_seed(seed))[:max_items]
    codes = torch.from_numpy(np.asarray(first_codes))
    chunks = drawn.split(max(1, NUMBERS_AT_ONCE // min(num_items, ITEMS_AT_ONCE)))
    queries = [embeddings[rows] - mean for rows in chunks]
    nearest = [(torch.empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.long)) for rows in chunks]
    for start in range(0, num_items, ITEMS_AT_ONCE):
        centred = embeddings[start : start + ITEMS_AT_ONCE] - mean
        norms = centred.square().sum(1)
        for number, (rows, query) in enumerate(zip(chunks, queries, strict=True)):
            distances = torch.addmm(norms, query, centred.T, alpha=-2)
            here = ((rows >= start) & (rows < start + len(centred))).nonzero()[:, 0]
            distances[here, rows[here] - start] = torch.inf
            found = distances.topk(min(num_neighbours, len(centred)), dim=1, largest=False)
            # Together with the nearest ones of the blocks before.
            values = torch.cat([nearest[number][0], found.values], dim=1)
            items = torch.cat([nearest[number][1], found.indices + start], dim=1)
            best = values.topk(min(num_neighbours, values.shape[1]), dim=1, largest=False)
            nearest[number] = best.values, items.gather(1, best.indices)
    kept = sum(
        int((codes[items] == codes[rows][:, None]).sum()) for rows, (_, items) in zip(chunks, nearest, strict=True)
    )
    return kept / (len(drawn) * num_neighbours)
