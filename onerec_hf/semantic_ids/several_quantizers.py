"""Several semantic IDs for every item: a quantizer for each, on what it sees of the embeddings.

The more two IDs group the items in different ways, the more their mean knows. A rotation of the embeddings changes
nothing for K-means. Another seed changes which clusters it ends in; a random half of the dimensions changes the
distances too, at the price of a coarser ID.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from onerec_hf.semantic_ids.balanced_kmeans import as_points
from onerec_hf.semantic_ids.quantizer import Quantizer, SemanticIds
from onerec_hf.semantic_ids.quantizer_types import QUANTIZERS

SEMANTIC_ID_SOURCES = ("projections", "seeds")


class SeveralQuantizers(Quantizer):
    """C quantizers as one, whose codes are those of all its members, one member's levels after the other's.

    Args:
        members: C unfitted quantizers of as many levels each. The first one's ID is the one that it would give alone.
        sources: how what the others see differs beside their seeds: "projections", on random directions, orthogonal
            and half as many as there are; "seeds", not at all.
        seed: of the projections.

    Raises:
        ValueError: fewer than two members, other numbers of levels, unknown sources, or the collision policy "suffix",
            whose level has no codebook.
    """

    quantizer_type = "several"

    def __init__(self, members: Sequence[Quantizer], sources: str = "projections", seed: int = 0):
        first = members[0]
        if len(members) < 2 or any(len(member.codebook_sizes) != len(first.codebook_sizes) for member in members):
            raise ValueError("several semantic IDs need at least two quantizers, all with as many levels")
        if sources not in SEMANTIC_ID_SOURCES:
            raise ValueError(f"sources must be one of {', '.join(SEMANTIC_ID_SOURCES)}, got {sources!r}")
        if any(member.collision_policy == "suffix" for member in members):
            raise ValueError("the collision policy 'suffix' is for one semantic ID; choose another one for several")
        self.members, self.sources = list(members), sources
        sizes = [size for member in members for size in member.codebook_sizes]
        super().__init__(sizes, first.collision_policy, None, seed, first.device)
        self.projections: list[torch.Tensor] = []  # (d, d // 2), of all members but the first

    @property
    def num_semantic_ids(self) -> int:
        return len(self.members)

    def fit(self, embeddings) -> SemanticIds:
        x = as_points(embeddings, device=self.device)
        self.embedding_dim = x.shape[1]
        if self.sources == "projections":
            random = torch.Generator().manual_seed(self.seed)
            shape = (self.embedding_dim, max(self.embedding_dim // 2, 1))
            self.projections = [
                torch.linalg.qr(torch.randn(shape, generator=random)).Q.contiguous() for _ in self.members[1:]
            ]
        found = [member.fit(self._seen(x, number)) for number, member in enumerate(self.members)]
        self._take_over_members()
        codes = np.concatenate([result.codes for result in found], axis=1)
        report = self._report([result.report for result in found], codes)
        return SemanticIds(codes, self.codebooks, self.id_sizes, report, self)

    def encode(self, embeddings) -> np.ndarray:
        x = self._checked(embeddings)
        codes = [member.encode(self._seen(x, number)) for number, member in enumerate(self.members)]
        return np.concatenate(codes, axis=1)

    def decode(self, codes) -> torch.Tensor:
        """Embeddings that the first ID's codes stand for, of codes that begin with them."""
        return self.members[0].decode(np.asarray(codes)[:, : len(self.members[0].codebook_sizes)])

    def place(self, embeddings, existing_codes) -> np.ndarray:
        x = self._checked(embeddings)
        existing = np.split(np.asarray(existing_codes), len(self.members), axis=1)
        placed = [member.place(self._seen(x, number), existing[number]) for number, member in enumerate(self.members)]
        return np.concatenate(placed, axis=1)

    def quantization_error(self, embeddings) -> torch.Tensor:
        """The mean of the members' errors on what each sees, (N,)."""
        x = self._checked(embeddings)
        errors = [member.quantization_error(self._seen(x, number)) for number, member in enumerate(self.members)]
        return torch.stack(errors).mean(0)

    # Parts

    def _seen(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """What a member sees of embeddings (N, d)."""
        return x @ self.projections[number - 1].to(x.device) if number and self.projections else x

    def _take_over_members(self) -> None:
        self.codebooks = [codebook for member in self.members for codebook in member.codebooks]
        self.id_sizes = tuple(size for member in self.members for size in member.id_sizes)
        self.fitted_error = float(np.mean([member.fitted_error for member in self.members]))

    def _report(self, reports: list[dict], codes: np.ndarray) -> dict:
        """The first ID's report with all IDs' sizes and levels, and how much the IDs have in common."""
        first_codes = codes[:, :: len(self.members[0].codebook_sizes)].T
        shared = [shared_pairs(first_codes[0], other) for other in first_codes[1:]]
        return {
            **reports[0],
            "num_semantic_ids": len(self.members),
            "sources": self.sources,
            "codebook_sizes": list(self.id_sizes),
            "levels": [level for report in reports for level in report["levels"]],
            "shared_pairs": float(np.mean(shared)),
        }

    def _settings(self) -> dict[str, Any]:
        members = [
            {
                "quantizer_type": member.quantizer_type,
                "settings": member._settings(),
                "embedding_dim": member.embedding_dim,
                "id_sizes": list(member.id_sizes),
                "fitted_error": member.fitted_error,
            }
            for member in self.members
        ]
        return {"members": members, "sources": self.sources, "seed": self.seed}

    def _weights(self) -> dict[str, torch.Tensor]:
        """The codebooks of all levels by number, as of one quantizer, and what else there is by member."""
        weights = super()._weights()
        for number, member in enumerate(self.members):
            others = {name: tensor for name, tensor in member._weights().items() if not name.startswith("level_")}
            weights |= {f"member_{number}.{name}": tensor for name, tensor in others.items()}
        return weights | {f"projection_{number}": tensor for number, tensor in enumerate(self.projections, start=1)}

    @classmethod
    def _restored(cls, described: dict[str, Any], weights: dict[str, torch.Tensor]) -> "SeveralQuantizers":
        settings, members, level = described["settings"], [], 0
        for number, member in enumerate(settings["members"]):
            prefix = f"member_{number}."
            own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
            sizes = member["settings"]["codebook_sizes"]
            own |= {f"level_{place}": weights[f"level_{level + place}"] for place in range(len(sizes))}
            level += len(sizes)
            members.append(QUANTIZERS[member["quantizer_type"]]._restored(member, own))
        quantizer = cls(members, settings["sources"], settings["seed"])
        quantizer.embedding_dim = described["embedding_dim"]
        if quantizer.sources == "projections":
            quantizer.projections = [weights[f"projection_{number}"] for number in range(1, len(members))]
        quantizer._take_over_members()
        return quantizer


def shared_pairs(codes: np.ndarray, others: np.ndarray) -> float:
    """Pairs of items that have one code by both of two codings, int (N,) each, as a share of those that have by
    either; 1 where there is no pair.

    It is the Jaccard index of the two sets of pairs: 1 for the same groups, whatever they are called.
    """
    both = np.unique(np.stack([codes, others], axis=1), axis=0, return_counts=True)[1]
    counts = [both, np.bincount(codes), np.bincount(others)]
    common, one, other = (float((count * (count - 1) // 2).sum()) for count in counts)
    either = one + other - common
    return common / either if either else 1.0
