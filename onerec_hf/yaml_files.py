"""Reading the YAML files that users write."""

from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: str | Path) -> Any:
    """What a YAML file in UTF-8 holds, whatever the locale.

    Raises:
        ValueError: the file is in another encoding, no YAML or has tags of Python's; names it and the remedy.
        OSError: there is no such file, or it cannot be read.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not written in utf-8: {error}. Save it in this encoding.") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}. Correct it.") from None
