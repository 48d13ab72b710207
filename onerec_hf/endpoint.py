"""A pushed generator as an inference endpoint: what its repository's `handler.py` imports."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import pipeline

from .staged_files import staged_file

HANDLER = '''"""What an inference endpoint runs: histories of item ids in, recommendations out."""

from onerec_hf.endpoint import EndpointHandler

__all__ = ["EndpointHandler"]
'''
REQUIREMENTS = "onerec_hf\n"
ENDPOINT_FILES = {"handler.py": HANDLER, "requirements.txt": REQUIREMENTS}


def write_endpoint_files(directory: str | Path) -> Path:
    """Writes `handler.py`, and `requirements.txt` with what it needs, to an existing directory, which is returned."""
    for name, content in ENDPOINT_FILES.items():
        with staged_file(Path(directory, name)) as partial:
            partial.write_text(content, encoding="utf-8")
    return Path(directory)


class EndpointHandler:
    """What the platform makes once, of the repository's folder, and calls for each request.

    Args:
        path: folder of a saved generator and its tokenizer.
    """

    def __init__(self, path: str = ""):
        self.recommender = pipeline("generative-recommendation", model=path)

    def __call__(self, data: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Recommends for each history.

        Args:
            data: a request's JSON: `inputs`, one history (item ids, oldest first) or a list of them, and, if wanted,
                `parameters`, arguments of [`Recommender`] such as `top_k`, `num_beams` or `blocked_items`.

        Returns:
            `{"session": [...], "items": [...], "scores": [...]}` of each history, JSON-able.

        Raises:
            ValueError: no inputs, or a parameter that the recommender does not have; what it refuses itself.
        """
        inputs, parameters = data.get("inputs"), data.get("parameters") or {}
        if not isinstance(inputs, list) or not inputs:
            raise ValueError('inputs must be a history of item ids, or a list of them, e.g. {"inputs": [[12, 7]]}.')
        try:
            results = self.recommender(inputs, **parameters)
        except TypeError as error:  # an option that there is not
            raise ValueError(f"parameters {sorted(parameters)}: {error}") from error
        return results if isinstance(results, list) else [results]
