"""What a generator is asked when it is evaluated: of rows of histories, by one exclusion rule."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..history_features import encode_history_rows
from ..item_trie import ItemTrie
from ..modeling_onerec import OneRecForConditionalGeneration
from ..session_generation import SessionBeams, excluded_items, generate_sessions
from ..tokenization_onerec import OneRecTokenizer


def draw_sessions(
    model: OneRecForConditionalGeneration, trie: ItemTrie, count: int, generator: torch.Generator, **inputs
) -> SessionBeams:
    """Sessions drawn from the policy, normalised over the items that a user may be given."""
    options = {"search": "sample", "normalization": "constrained", "generator": generator}
    return generate_sessions(model, trie, **inputs, num_beams=count, **options)


def generation_inputs(
    model: OneRecForConditionalGeneration,
    tokenizer: OneRecTokenizer,
    rows: Sequence[Mapping[str, Any]],
    exclude_consumed: bool = True,
) -> dict[str, torch.Tensor | None]:
    """What [`generate_sessions`] and [`session_log_probs`] read of rows, on the model's device.

    Args:
        rows: each has `history`, catalogue indices, and what [`encode_history_rows`] reads beside it.
        exclude_consumed: whether the items of the history are left out.
    """
    excluded = None
    if exclude_consumed:
        excluded = excluded_items([np.asarray(row["history"], dtype=np.int64) for row in rows], model.device)
    return {**encode_history_rows(rows, tokenizer, model.config).to(model.device), "excluded": excluded}
