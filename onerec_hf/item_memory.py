"""Filling the item head's memory with what users consumed together."""

from collections.abc import Sequence

import numpy as np
import torch

from .co_consumption import item_similarities
from .modeling_onerec import OneRecForConditionalGeneration

SHRINKAGE = 3.0


def remember_items(model: OneRecForConditionalGeneration, histories: Sequence[np.ndarray]) -> None:
    """Gives every item of the model's memory the neighbours that it has in these histories, in place of those before.

    Nothing is trained: a service may do it again as its log grows.

    Args:
        model: has `item_memory`.
        histories: catalogue indices of each user, oldest first.

    Raises:
        ValueError: no memory, no interactions at all, or an index outside the catalogue.
    """
    config = model.config
    if not config.item_memory:
        raise ValueError("The model has no memory of items: set item_memory, the neighbours of each, before training.")
    similarities = item_similarities(histories, config.num_items, config.item_memory, SHRINKAGE)
    rows = np.repeat(np.arange(config.num_items), np.diff(similarities.indptr))
    places = rows, np.arange(len(rows)) - similarities.indptr[rows]
    neighbours = np.full((config.num_items, config.item_memory), -1)
    values = np.zeros(neighbours.shape, dtype=np.float32)
    neighbours[places], values[places] = similarities.indices, similarities.data
    model.item_memory.set_neighbours(torch.from_numpy(neighbours), torch.from_numpy(values))
