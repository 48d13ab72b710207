"""Checkpoints that are damaged, of something else or made to do harm: whatever comes of them names them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch


@contextmanager
def readable_checkpoint(source: Any, subfolder: str | None = None) -> Iterator[None]:
    """Within it a model or tokenizer is loaded from `source`, a folder or a repository of the Hub.

    Raises:
        ValueError: in place of what the libraries raise for content that they did not expect, with the source's name;
            or for a folder whose weights lie outside of it.
    """
    try:
        if source is not None:
            _require_shards_inside(Path(source, subfolder or ""))
        yield
    except Exception as error:
        readable = type(error) is ValueError and str(source) in str(error)
        # Nothing can be loaded there, whatever the files hold; the library says so.
        readable |= torch.get_default_device().type == "meta"
        # These say what is missing: a file, a package, memory.
        if readable or isinstance(error, (OSError, ImportError, torch.OutOfMemoryError)):
            if isinstance(error, OSError) and source is not None and not Path(source).exists():
                error.add_note(f"If {source} is on the Hub, `hf download {source}` gets all that is used offline.")
            raise
        problem = f"{type(error).__name__}: {error}"
        if isinstance(error, UnpicklingError):
            problem = "its weights are a pickle of more than tensors, which could run any code"
        raise ValueError(
            f"{source} cannot be loaded: {problem}. Correct the arguments if there are any, or else save or download "
            "its files again."
        ) from error


def _require_shards_inside(folder: Path) -> None:
    """Raises ValueError if an index of shards names a file that is not in its folder."""
    for path in (*folder.glob("*.safetensors.index.*json"), *folder.glob("*.bin.index.*json")):  # and of variants
        try:
            names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is no index of shards ({problem}); save or download it again.") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
                raise ValueError(f"{path} names {name!r} as a file of weights, where only those beside it are read.")
