"""What a request may ask for: its limits, its fields, and how it becomes rows and options of [`Recommender`]."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

# Arguments of [`Recommender`] that a request may give, with the types of their values in JSON.
NUMBER, LIST = (int, float), (list,)
PARAMETERS: dict[str, tuple[type, ...]] = {
    "top_k": (int,),
    "num_beams": (int,),
    "only": (str,),
    "exclude_consumed": (bool,),
    "unknown_items": (str,),
    "blocked_items": LIST,
    "allowed_items": LIST,
    "search": (str,),
    "temperature": NUMBER,
    "seed": (int,),
    "num_beam_groups": (int,),
    "diversity_penalty": NUMBER,
    "guidance_weight": NUMBER,
    "num_item_beams": (int,),
    "normalization": (str,),
    "item_share": NUMBER,
}
BEAMS = ("top_k", "num_beams", "num_beam_groups", "num_item_beams")  # each takes beams, which cost time and memory
TYPE_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false", list: "a list"}
HISTORY, BLOCKED = "history_item_ids", "blocked_item_ids"
LISTS = (HISTORY, BLOCKED, "exposed_item_ids", "history_feedback", "history_timestamps")


@dataclass(frozen=True)
class Limits:
    """What a request may cost.

    Args:
        body_bytes: of its JSON.
        histories: in it, which are searched for together.
        list_items: of a history, and of any other list of items.
        beams: for each history.
        seconds: from its arrival to its answer.
        waiting: requests that wait at a time.
    """

    body_bytes: int = 2**20
    histories: int = 32
    list_items: int = 1000
    beams: int = 256
    seconds: float = 30.0
    waiting: int = 256


class RequestError(ValueError):
    """What is wrong with a field of a request, with the remedy."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class RecommendRequest:
    """A request that was read.

    Args:
        rows: its histories as rows, each with the items that it blocks.
        options: the other arguments of [`Recommender`].
    """

    rows: list[dict[str, Any]]
    options: dict[str, Any]

    @property
    def group(self) -> str | None:
        """Requests of the same group are answered by one search; None: this one is searched for alone, since what a
        seed draws depends on who is searched for beside it."""
        return None if "seed" in self.options else json.dumps(self.options, sort_keys=True)


def read_request(body: bytes, limits: Limits) -> RecommendRequest:
    """The request of a body such as `{"inputs": [[12, 7]], "parameters": {"top_k": 10}}`.

    Raises:
        RequestError: a field is missing, of a wrong type, unknown or beyond its limit.
    """
    try:
        data = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RequestError("body", f'is no JSON ({error}): send {{"inputs": [[item ids, oldest first]]}}.') from None
    if not isinstance(data, dict):
        raise RequestError("body", f'is {_kind(data)}: send an object, {{"inputs": [[item ids, oldest first]]}}.')
    for name in data.keys() - {"inputs", "parameters"}:
        raise RequestError(name, "is unknown: a request has inputs, and parameters.")
    options = _options(data.get("parameters"), limits)
    rows = _rows(data.get("inputs"), limits)
    blocked = options.pop("blocked_items", [])
    if blocked:
        rows = [{**row, BLOCKED: [*(row.get(BLOCKED) or []), *blocked]} for row in rows]
    return RecommendRequest(rows, options)


def _options(given: Any, limits: Limits) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise RequestError("parameters", f"is {_kind(given)}: give an object of options by name.")
    options = {}
    for name, value in given.items():
        field = f"parameters.{name}"
        if name not in PARAMETERS:
            likely = get_close_matches(name, PARAMETERS, n=1) or [", ".join(PARAMETERS)]
            raise RequestError(field, f"is unknown: leave it out, or use {likely[0]}.")
        if value is None:
            continue
        kinds = PARAMETERS[name]
        if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
            raise RequestError(field, f"is {_kind(value)}: give {TYPE_NAMES[kinds[-1]]}.")
        if name in BEAMS and value > limits.beams:
            raise RequestError(field, f"is {value}: at most {limits.beams} are served.")
        if isinstance(value, list):
            _check_items(field, value, limits)
        options[name] = value
    return options


def _rows(given: Any, limits: Limits) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise RequestError("inputs", "must be a list with a history of item ids for each user, such as [[12, 7]].")
    if len(given) > limits.histories:
        raise RequestError("inputs", f"has {len(given)} histories: send at most {limits.histories} in one request.")
    rows = []
    for place, row in enumerate(given):
        field = f"inputs[{place}]"
        if row is None or isinstance(row, list):
            row = {HISTORY: row or []}
        if not isinstance(row, Mapping):
            raise RequestError(field, f"is {_kind(row)}: give a list of item ids, or an object with {HISTORY}.")
        for name in LISTS:
            values = row.get(name)
            if values is None:
                continue
            if not isinstance(values, list):
                raise RequestError(f"{field}.{name}", f"is {_kind(values)}: give a list.")
            _check_items(f"{field}.{name}", values, limits, items=name.endswith("_item_ids"))
        rows.append(dict(row))
    return rows


def _check_items(field: str, values: list, limits: Limits, items: bool = True) -> None:
    if len(values) > limits.list_items:
        raise RequestError(field, f"has {len(values)} entries: send the latest {limits.list_items} at most.")
    for place, value in enumerate(values if items else ()):
        if type(value) not in (int, str):
            raise RequestError(f"{field}[{place}]", f"is {_kind(value)}: item ids are integers or text.")


def _kind(value: Any) -> str:
    """What a JSON value is, for a message."""
    if value is None:
        return "null"
    return "an object" if isinstance(value, dict) else TYPE_NAMES[type(value)]


def _no_number(name: str):
    raise ValueError(f"{name} is no number of JSON")
