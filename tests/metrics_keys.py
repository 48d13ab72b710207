"""Compares the keys of a metrics.json with its schema."""

import re
from collections.abc import Mapping
from typing import Any

from onerec_hf.reporting.metrics_schema import METRICS


def undescribed(metrics: Any, schema: Any = METRICS, path: str = "") -> list[str]:
    """The keys of a metrics.json that are not in `METRICS` or nested otherwise, by path; none are expected."""
    if isinstance(schema, str):
        return [path] if isinstance(metrics, Mapping) else []
    if isinstance(schema, list):
        parts = [(str(index), entry, schema[0]) for index, entry in enumerate(metrics)]
    elif isinstance(metrics, Mapping):
        parts = [(key, value, _entry(key, schema)) for key, value in metrics.items()]
    else:
        return [path]
    found = []
    for key, value, entry in parts:
        found += [f"{path}.{key}"] if entry is None else undescribed(value, entry, f"{path}.{key}")
    return found


def _entry(key: str, schema: Mapping[str, Any]) -> Any:
    """The schema's entry of a key, or of the figure whose interval it is."""
    for name in (key, key.removesuffix("_interval")):
        if name in schema:
            return schema[name]
        for pattern, entry in schema.items():
            if "<" in pattern and re.fullmatch(re.sub(r"<\w+>", ".+", pattern), name):
                return entry
    return None
