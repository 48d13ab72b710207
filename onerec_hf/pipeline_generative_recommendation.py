"""The task `generative-recommendation` for `transformers.pipeline`: histories of item ids in, recommendations out."""

from collections.abc import Iterable, Mapping

import pandas as pd
from transformers import Pipeline

from .session_generation import Recommender
from .session_generation.recommender import history_rows


class GenerativeRecommendationPipeline(Pipeline):
    """`pipeline("generative-recommendation", model=DIR)(histories, top_k=10)`.

    `histories` is one history (a list of item ids, oldest first, or a row as [`Recommender`] takes it) or a list of
    them. For each the result is `{"session": [...], "items": [...], "scores": [...]}` in the catalogue's own item ids,
    as [`Recommender`] gives it, whose other arguments (`num_beams`, `exclude_consumed`, ...) are accepted too.
    """

    _load_processor = False
    _load_tokenizer = True
    _load_image_processor = False
    _load_feature_extractor = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.recommender = Recommender(self.model, self.tokenizer)

    def __call__(self, histories, **kwargs):
        """Recommends; a single history gives a single result."""
        if isinstance(histories, Iterable) and not isinstance(histories, (Mapping, str, bytes, pd.DataFrame)):
            histories = list(histories)
        single = isinstance(histories, Mapping) or (isinstance(histories, list) and _begin_with_item_id(histories))
        rows = history_rows([histories] if single else histories)
        # A dict keeps the base class from taking the users one by one.
        results = super().__call__({"histories": rows}, **kwargs)
        return results[0] if single else results

    def _sanitize_parameters(self, **kwargs):
        return {}, kwargs, {}

    def preprocess(self, inputs):
        return inputs

    def _forward(self, inputs, **forward_params):
        return self.recommender(inputs["histories"], **forward_params)

    def postprocess(self, model_outputs):
        return model_outputs


def _begin_with_item_id(values: list) -> bool:
    """Whether the first is a string, a number, or an array of no dimension."""
    if not values or values[0] is None:
        return False
    first = values[0]
    return isinstance(first, (str, bytes)) or not isinstance(first, Iterable) or getattr(first, "ndim", 1) == 0
