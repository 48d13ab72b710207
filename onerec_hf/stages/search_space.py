"""What a hyper-parameter search may change: fields of a method's options, each with its range or choices."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainingArguments

from ..configuration_onerec import OneRecConfig
from ..yaml_files import read_yaml
from .recipe_arguments import BASELINES, FUSED, PretrainArguments, RankingBeams, RecipeArguments, TokenizeArguments

ONEREC = "onerec"
METHODS = (*BASELINES, ONEREC)
# Of the data, what cuts the training sessions and leaves the evaluated users and their next items as they are.
SESSION_FIELDS = (
    *(
        "history_items",
        "history_feedback",
        "history_timestamps",
        "user_features",
        "session_items",
        "min_session_items",
    ),
    *("session_source", "session_cut", "session_gap_hours", "session_stride", "quality_predicates", "quality_join"),
)
ONEREC_FIELDS = {
    *SESSION_FIELDS,
    *(entry.name for group in (TokenizeArguments, PretrainArguments, RankingBeams) for entry in fields(group)),
} - {"seed", "exclude_consumed"}
UNKNOWN = object()


@dataclass(frozen=True)
class SearchedField:
    """A field of a method's options, named by its path such as `pretrain.learning_rate`.

    Args:
        low, high: ends of its range, both within; whole numbers where both are.
        log: whether its logarithm is drawn evenly.
        choices: its values in place of a range, anything that YAML has.
    """

    name: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple | None = None

    @classmethod
    def parse(cls, method: str, name: str, given: Any) -> SearchedField:
        """Reads `{low, high, log}` or `{choices}`.

        Raises:
            ValueError: anything else; names method and field.
        """
        place = f"{method}.{name}"
        if not isinstance(given, Mapping) or set(given) not in ({"choices"}, {"low", "high"}, {"low", "high", "log"}):
            raise ValueError(
                f"{place} must be {{low, high}}, {{low, high, log}} or {{choices: [...]}}, got {given!r}."
            )
        if "choices" in given:
            if not isinstance(given["choices"], list) or not given["choices"]:
                raise ValueError(f"{place}.choices must be a list of values, got {given['choices']!r}.")
            return cls(name, choices=tuple(given["choices"]))
        low, high, log = given["low"], given["high"], given.get("log", False)
        for end, value in (("low", low), ("high", high)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{place}.{end} must be a number, got {value!r}; YAML reads 1.0e-3, not 1e-3.")
        if not isinstance(log, bool):
            raise ValueError(f"{place}.log must be true or false, got {log!r}.")
        if low > high:
            raise ValueError(f"{place}.low is {low}, above high: {high}.")
        if log and low <= 0:
            raise ValueError(f"{place}.low is {low}, which has no logarithm: leave log out, or raise it.")
        return cls(name, low, high, log)

    def contains(self, value: Any) -> bool:
        if self.choices is not None:
            return value in self.choices
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and self.low <= value <= self.high and (not self.whole or value == int(value))

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def example(self) -> Any:
        return self.low if self.choices is None else self.choices[0]

    def stored(self, value: Any) -> Any:
        """As a study has it: JSON text of a choice, which may be a list or null."""
        return value if self.choices is None else json.dumps(self.choices[self.choices.index(value)])

    def shown(self, stored: Any) -> Any:
        """As a table has what is stored: text without quotes."""
        value = stored if self.choices is None else json.loads(stored)
        return value if isinstance(value, str) else stored

    def suggest(self, trial: Any) -> Any:
        """The value that an optuna trial gives the field."""
        if self.choices is not None:
            return json.loads(trial.suggest_categorical(self.name, list(map(self.stored, self.choices))))
        return (trial.suggest_int if self.whole else trial.suggest_float)(self.name, self.low, self.high, log=self.log)


def read_space(path: Path, methods: Sequence[str], args: RecipeArguments) -> dict[str, list[SearchedField]]:
    """The searched fields of every method in a YAML file.

    Raises:
        ValueError: a method that has none, or a field that is not the method's or has no range; names them.
    """
    content = read_yaml(path) or {}
    spaces = {}
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"There is no method {method!r} to search; there are {', '.join(METHODS)}.")
        if not isinstance(content, Mapping) or not isinstance(content.get(method), Mapping) or not content[method]:
            raise ValueError(f"{path} has no fields of {method}: give it a mapping such as {{dropout: {{...}}}}.")
        searched = [SearchedField.parse(method, name, given) for name, given in content[method].items()]
        for field in searched:
            check_field(field, method, args)
        spaces[method] = searched
    return spaces


def check_field(field: SearchedField, method: str, args: RecipeArguments) -> None:
    """Raises ValueError for a field that the method does not have, or that a search must not change."""
    top, place = field.name.split(".")[0], f"{method}.{field.name}"
    if method == ONEREC and top not in ONEREC_FIELDS:
        raise ValueError(
            f"{place} is not searched: it is no option of semantic IDs, sessions, training or ranking. "
            "All trials are compared on the same users."
        )
    if method == FUSED and top == "members":
        raise ValueError(
            f"{place} is not searched: members have the best options of their own search, or the recipe's."
        )
    try:
        replace(args, **changed_options(args, method, {field.name: field.example}))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error


def path_of(method: str, name: str) -> list[str]:
    """Where a field stands in a recipe."""
    return name.split(".") if method == ONEREC else ["baselines", method, *name.split(".")]


def changed_options(args: RecipeArguments, method: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a recipe by name, whole, in which a method's fields have these values."""
    changes: dict[str, Any] = {}
    for name, value in values.items():
        top, *nested = path_of(method, name)
        if not nested:
            changes[top] = value
            continue
        place = changes.setdefault(top, copy.deepcopy(getattr(args, top)) or {})
        for key in nested[:-1]:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        place[nested[-1]] = value
    return changes


def present_values(args: RecipeArguments, method: str, searched: Sequence[SearchedField]) -> dict[str, Any]:
    """The recipe's own values of the searched fields, of those that lie in the space and are known."""
    values = {field.name: present_value(args, method, field.name) for field in searched}
    return {field.name: values[field.name] for field in searched if field.contains(values[field.name])}


def present_value(args: RecipeArguments, method: str, name: str) -> Any:
    """A field's value in a recipe, or its default; `UNKNOWN` where neither says."""
    top, *nested = path_of(method, name)
    value = getattr(args, top)
    for key in nested:
        value = value.get(key, UNKNOWN) if isinstance(value, dict) else UNKNOWN
    if value is not UNKNOWN:
        return value
    if method != ONEREC:
        if len(nested) > 2:  # a weight or a temperature of the fused baseline
            return 1.0
        default = inspect.signature(BASELINES[method]).parameters[nested[-1]].default
        return UNKNOWN if default is inspect.Parameter.empty else default
    if top == "pretrain_recent":
        return present_value(args, method, ".".join(["pretrain", *nested]))
    try:
        source = OneRecConfig.from_preset(args.preset, **args.model) if top == "model" else Seq2SeqTrainingArguments
        return getattr(source, nested[-1], UNKNOWN) if top in ("model", "pretrain") and len(nested) == 1 else UNKNOWN
    except (TypeError, ValueError):
        return UNKNOWN
