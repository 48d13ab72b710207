"""The task `generative-recommendation` for `transformers.pipeline`: histories of item ids in, recommendations out."""

from transformers import Pipeline

from .session_generation import Recommender


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
        single = isinstance(histories, dict) or (
            len(histories) > 0 and not isinstance(histories[0], (list, tuple, dict))
        )
        # A dict keeps the base class from taking the users one by one.
        results = super().__call__({"histories": [histories] if single else list(histories)}, **kwargs)
        return results[0] if single else results

    def _sanitize_parameters(self, **kwargs):
        return {}, kwargs, {}

    def preprocess(self, inputs):
        return inputs

    def _forward(self, inputs, **forward_params):
        return self.recommender(inputs["histories"], **forward_params)

    def postprocess(self, model_outputs):
        return model_outputs
