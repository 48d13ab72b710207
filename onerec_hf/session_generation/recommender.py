"""Recommending with item ids in and out."""

from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from ..data import Feed
from ..data.data_files import memory_frame
from ..evaluation_mode import evaluation_mode
from ..history_features import encode_history_rows
from ..item_index import as_item_ids
from ..item_trie import ItemTrie
from ..renamed_arguments import renamed_arguments
from ..session_rows import users_of_feed
from .generation import generate_sessions
from .likelihood import session_log_probs
from .searches import SearchOptions

_BLOCKED = "blocked_item_ids"
_NOTHING = np.zeros(0, dtype=np.int64)


def excluded_items(histories: list[np.ndarray], device: torch.device) -> torch.LongTensor:
    """Lists of catalogue indices, one by user, as [`ItemConstraint`] reads them: (users, longest), padded with -1."""
    lengths = np.fromiter((len(history) for history in histories), dtype=np.int64, count=len(histories))
    padded = np.full((len(histories), int(lengths.max(initial=0))), -1, dtype=np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate([_NOTHING, *histories])
    return torch.from_numpy(padded).to(device)


def history_rows(histories: Iterable[Iterable | Mapping | None]) -> list[Mapping]:
    """Users' histories, in any container of them, as rows with `history_item_ids`.

    Raises:
        ValueError: for a single row, text, or what is no list.
    """
    if isinstance(histories, (str, bytes, Mapping)):
        raise ValueError(f"histories must be a list with a history for each user, got {type(histories).__name__}.")
    if isinstance(histories, pd.DataFrame):
        histories = histories.to_dict("records")
    try:
        histories = iter(histories)
    except TypeError:
        raise ValueError(f"histories must be a list with a history for each user, got {histories!r:.40}.") from None
    return [row if isinstance(row, Mapping) else {"history_item_ids": row} for row in histories]


def item_list(row: Mapping, user: int, column: str = "history_item_ids") -> list:
    """The item ids of a column of a user's row.

    Raises:
        ValueError: they are missing, no list, or hold a missing one; names the user.
    """
    if column not in row:
        raise ValueError(f"histories[{user}] has no {column}, only {', '.join(map(str, row))}")
    items, where = row[column], f"histories[{user}]"
    if column != "history_item_ids":
        where = f"the {column} of {where}"
    if items is None:
        return []
    if not isinstance(items, (str, bytes)) and hasattr(items, "tolist"):
        items = items.tolist()  # of arrays, tensors and Series
    if isinstance(items, (str, bytes, Mapping, Set)) or not isinstance(items, Iterable):
        raise ValueError(
            f"{where} is {str(items)[:40]!r} ({type(items).__name__}), where a list of item ids is needed, "
            "oldest first: give one list for each user."
        )
    items = list(items)
    for place, item in enumerate(items):
        if item is None or not isinstance(item, (int, str)) and pd.isna(item) is True:
            raise ValueError(f"{where} has no item id at place {place} ({item}): drop it.")
    return items


def _require_count(name: str, value: Any, remedy: str = "") -> None:
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.{remedy}")


class Recommender:
    """Recommends to users from their histories of item ids; keeps the trie on the model's device between calls.

    Items that the tokenizer adds or removes are added or removed here at the next call. Threads may share it.

    >>> from onerec_hf import OneRecConfig, OneRecForConditionalGeneration, OneRecTokenizer
    >>> tokenizer = OneRecTokenizer.from_semantic_ids(
    ...     ["tea", "milk", "rice"], [[0, 1], [1, 0], [1, 1]], codebook_sizes=[2, 2]
    ... )
    >>> config = OneRecConfig.from_preset("debug", codebook_sizes=tokenizer.codebook_sizes, session_items=2)
    >>> recommender = Recommender(OneRecForConditionalGeneration(config), tokenizer)
    >>> found = recommender([["tea"], []], top_k=3)  # a user who drank tea, and a new one
    >>> [sorted(row["items"]) for row in found]
    [['milk', 'rice'], ['milk', 'rice', 'tea']]

    Args:
        model: The trained [`OneRecForConditionalGeneration`].
        tokenizer: The [`OneRecTokenizer`] saved with it.
        scorer: A [`SessionScorer`] whose reward model chooses a user's session among those that the search finds, or
            guides the search; without one it is the likeliest. Its tokenizer has the same catalogue.

    Raises:
        ValueError: If the model was trained on the semantic IDs of another fit, or the scorer's catalogue is another.
    """

    def __init__(self, model, tokenizer, scorer=None):
        tokenizer.require_trained_with(model.config)
        self.model, self.tokenizer, self.scorer = model, tokenizer, scorer
        if scorer is not None and scorer.tokenizer.semantic_id_fingerprint != tokenizer.semantic_id_fingerprint:
            raise ValueError("The reward model's catalogue differs from the generator's: they are of different runs.")
        self._kept: tuple[str, ItemTrie] | None = None  # of which catalogue, and its trie

    @renamed_arguments(exclude_seen="exclude_consumed", unknown="unknown_items")
    def __call__(
        self,
        histories: Iterable[Iterable | Mapping | None],
        top_k: int = 10,
        *,
        exclude_consumed: bool = True,
        unknown_items: str = "error",
        blocked_items: Iterable | None = None,
        allowed_items: Iterable | None = None,
        only: str | None = None,
        session_scores: bool = False,
        batch_size: int = 32,
        show_progress: bool = False,
        **options,
    ) -> list[dict[str, list]]:
        """Recommends.

        Args:
            histories: Item ids per user, oldest first, of the catalogue's own type, as lists, arrays, tensors or a
                column of a table. An empty one or None is of a new user. A model with feedback, times or user
                features needs rows (`dict`) of `history_item_ids` and of the columns that [`encode_history_rows`]
                names. A row's `blocked_item_ids` are items that this user is not given. A reward model reads
                `exposed_item_ids`, `exposed_feedback`, `feedback_totals` and `user_profile` (data/schema.py) of them,
                or else the history.
            top_k: Length of the ranked list.
            exclude_consumed: Whether items of the history are left out.
            unknown_items: `"error"` raises for an item that is not in the catalogue, in a history, in `blocked_items`
                or in `allowed_items`; `"skip"` leaves it out.
            blocked_items: Item ids that nobody is given.
            allowed_items: The only item ids that may be given: an inventory or a region.
            only: `"session"` or `"items"`, where one of the two is enough; each costs a search of its own.
            session_scores: Whether the session's log-probabilities are asked for.
            batch_size: Users encoded together.
            options: `num_beams`, the saved generation config's by default, and at least `top_k`; `normalization`,
                `item_share`, `search` and `temperature` as [`generate_sessions`] has them, where with
                `"stochastic_beam"` the ranked list is a draw without replacement, and `"diverse_beam"` is for
                sessions, and the list by plain beams; `num_beam_groups` and `diversity_penalty` of the latter, for
                which beams are added to make the groups equal; `"guided_beam"`, for sessions too, in which the scorer
                takes part, with `guidance_weight` and `num_item_beams`, the beams that each of its sessions has;
                `seed`, which makes draws repeatable.

        Returns:
            Per user `session`, the item ids of the best (or first drawn) session, or of the one that the scorer chose;
            `items`, the ranked item ids, highest first; and `scores`, their log-probabilities. Lists are shorter than
            asked where fewer items may be recommended. With `session_scores` these too: the log-probability of each of
            the session's items after those before it, among sessions, however they were searched for.

        Raises:
            ValueError: If a history, a user's exposures or an option name an item that the tokenizer does not know, or
                a history is no list of item ids.
            TypeError: For an option that there is not.
        """
        _require_count("top_k", top_k)
        _require_count("batch_size", batch_size)
        if unknown_items not in ("error", "skip"):
            raise ValueError(f"unknown_items must be 'error' or 'skip', got {unknown_items!r}.")
        if only not in (None, "session", "items"):
            raise ValueError(f"only must be 'session' or 'items', got {only!r}.")
        trie = self._trie()
        allowed = self._allowed(trie, blocked_items, allowed_items, unknown_items)
        ranking, sessions = self._searches(trie, top_k, allowed, **options)
        wanted = None if only == "session" else ranking, None if only == "items" else sessions
        rows, results = history_rows(histories), []
        with evaluation_mode(self.model):
            for start in tqdm(range(0, len(rows), batch_size), desc="Recommending", disable=not show_progress):
                batch = self._known_rows(rows[start : start + batch_size], start, unknown_items)
                results.extend(self._recommend(trie, batch, exclude_consumed, *wanted, session_scores))
        return results

    def predict_df(
        self,
        log,
        top_k: int = 10,
        *,
        user_id: str = "user_id",
        item_id: str = "item_id",
        timestamp: str = "timestamp",
        **options,
    ) -> pd.DataFrame:
        """Recommends from a table of behaviours to a table of recommendations.

        >>> import pandas as pd
        >>> from onerec_hf import OneRecConfig, OneRecForConditionalGeneration, OneRecTokenizer
        >>> tokenizer = OneRecTokenizer.from_semantic_ids(
        ...     ["tea", "milk", "rice"], [[0, 1], [1, 0], [1, 1]], codebook_sizes=[2, 2]
        ... )
        >>> config = OneRecConfig.from_preset("debug", codebook_sizes=tokenizer.codebook_sizes, session_items=2)
        >>> recommender = Recommender(OneRecForConditionalGeneration(config), tokenizer)
        >>> log = pd.DataFrame({"who": ["ann", "bob", "ann"], "what": ["tea", "milk", "rice"], "time": [1, 2, 3]})
        >>> table = recommender.predict_df(log, user_id="who", item_id="what", timestamp="time")
        >>> table[["who", "what", "rank"]].values.tolist()[0]
        ['ann', 'milk', 1]

        Args:
            log: A row by positive behaviour, as a data frame of pandas or polars, a `datasets.Dataset` or an Arrow
                table. Without the timestamp column its rows are in the order of time. Or a [`Feed`], of which the
                positive behaviours are read, and all else that the model and the scorer know of a user.
            top_k: Length of the ranked list.
            user_id, item_id, timestamp: Columns of the log; of a feed the first two name those of the result.
            options: Those of a call, but for the histories.

        Returns:
            By user, in the order of the ids, a row for each ranked item and then for what the session has beside them:
            the user and item columns, `rank` from 1 on, `score`, the log-probability, and `session_place` from 1 on;
            rank and score, or the place, are missing where an item is in one of the two alone.

        Raises:
            ValueError: If a column is missing, a row has no user, or for what a call raises it.
        """
        if isinstance(log, Feed):
            histories = users_of_feed(log, self.model.config).to_list()
            users = [row["user_id"] for row in histories]
        else:
            users, histories = self._histories_by_user(memory_frame(log, "log"), user_id, item_id, timestamp)
        rows = []
        for user, found in zip(users, self(histories, top_k, **options), strict=True):
            places = {item: place for place, item in enumerate(found["session"], 1)}
            ranked = enumerate(zip(found["items"], found["scores"], strict=True), 1)
            rows += [(user, item, rank, score, places.pop(item, None)) for rank, (item, score) in ranked]
            rows += [(user, item, None, None, place) for item, place in places.items()]
        table = pd.DataFrame(rows, columns=[user_id, item_id, "rank", "score", "session_place"])
        return table.astype({"rank": "Int64", "score": "float64", "session_place": "Int64"})

    @staticmethod
    def _histories_by_user(frame: pd.DataFrame, user_id: str, item_id: str, timestamp: str) -> tuple[list, list]:
        for name, column in (("user_id", user_id), ("item_id", item_id)):
            if column not in frame:
                columns = ", ".join(map(str, frame.columns))
                raise ValueError(
                    f"The log has no column {column!r}, only {columns}. Pass {name}= with its name there."
                )
        if frame[user_id].isna().any():
            raise ValueError(f"Row {int(frame[user_id].isna().argmax())} of the log has no {user_id}: drop it.")
        if timestamp in frame:
            frame = frame.sort_values(timestamp, kind="stable")
        histories = frame.groupby(user_id)[item_id].agg(list)
        return histories.index.tolist(), histories.tolist()

    def _trie(self) -> ItemTrie:
        """The catalogue's, on the model's device."""
        fingerprint, kept = self.tokenizer.semantic_id_fingerprint, self._kept
        if kept is None or kept[0] != fingerprint:  # at first, or items were added or removed
            kept = fingerprint, ItemTrie.from_tokenizer(self.tokenizer)
        trie = kept[1].to(self.model.device)
        self._kept = fingerprint, trie
        return trie

    def _searches(
        self,
        trie: ItemTrie,
        top_k: int,
        allowed: torch.BoolTensor | None,
        num_beams: int | None = None,
        normalization: str = "level",
        seed: int | None = None,
        item_share: float | None = None,
        **options,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments of [`generate_sessions`] for the ranked list and for the sessions."""
        saved = num_beams is None
        num_beams = self.model.generation_config.num_beams if saved else num_beams
        _require_count("num_beams", num_beams, " Give num_beams, or correct generation_config.json." if saved else "")
        if seed is not None and (type(seed) is bool or not isinstance(seed, (int, np.integer)) or abs(seed) >= 2**63):
            raise ValueError(f"seed must be an integer of 64 bits, got {seed!r}.")
        num_beams = min(max(num_beams, top_k), trie.num_positions)
        generator = None if seed is None else torch.Generator(self.model.device).manual_seed(seed)
        wanted, added = options.get("search", "beam"), 0
        if wanted == "sample":
            raise ValueError("Independent samples make no ranked list: draw without repeats by 'stochastic_beam'.")
        if wanted == "diverse_beam":
            added = -num_beams % max(options.get("num_beam_groups", SearchOptions.num_beam_groups), 1)
        sessions = {"num_beams": num_beams + added, "generator": generator, **options}
        if wanted == "guided_beam":
            if self.scorer is None:
                raise ValueError("'guided_beam' is guided by a reward model: give the Recommender a scorer.")
            sessions |= SearchOptions.divided(num_beams, options.get("num_item_beams", SearchOptions.num_item_beams))
        ranking = {"num_beams": num_beams, "generator": generator, **options}
        if wanted in ("diverse_beam", "guided_beam"):
            ranking["search"] = "beam"
        shared = {"allowed": allowed, "normalization": normalization, "item_share": item_share}
        return (
            {"num_return": min(top_k, num_beams), **shared, **ranking},
            {"num_return": 1 if self.scorer is None or wanted == "guided_beam" else None, **shared, **sessions},
        )

    def _allowed(
        self, trie: ItemTrie, blocked_items: Iterable | None, allowed_items: Iterable | None, unknown_items: str
    ) -> torch.BoolTensor | None:
        if blocked_items is None and allowed_items is None:
            return None
        allowed = np.full(trie.num_items, allowed_items is None)
        for name, items, value in (("allowed_items", allowed_items, True), ("blocked_items", blocked_items, False)):
            if items is None:
                continue
            if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
                raise ValueError(f"{name} must be a list of item ids, got {items!r}.")
            try:
                indices = self.tokenizer.item_index(list(items), unknown_items=unknown_items)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            allowed[indices[indices >= 0]] = value
        return torch.from_numpy(allowed).to(self.model.device)

    def _known_rows(self, rows: list[dict], first: int, unknown_items: str) -> list[dict]:
        """The chunk that begins at user `first` as rows with catalogue indices in `history` and `exposed`."""
        rows = [{**row, "history_item_ids": item_list(row, first + user)} for user, row in enumerate(rows)]
        rows = self._indexed(rows, "history", ("history_feedback", "history_timestamps"), first, unknown_items)
        if any(row.get(_BLOCKED) is not None for row in rows):
            lists = [item_list({_BLOCKED: None} | row, first + user, _BLOCKED) for user, row in enumerate(rows)]
            rows = [{**row, _BLOCKED: items} for row, items in zip(rows, lists, strict=True)]
            rows = self._indexed(rows, "blocked", (), first, unknown_items)
        if self.scorer is None:
            return rows
        feedback = len(self.scorer.model.config.feedback)
        for row in rows:  # exposures stand one after the other: a line for each
            if feedback and row.get("exposed_feedback") is not None:
                row["exposed_feedback"] = np.reshape(row["exposed_feedback"], (-1, feedback))
        return self._indexed(rows, "exposed", ("exposed_feedback",), first, unknown_items)

    def _indexed(
        self, rows: list[dict], name: str, aligned: tuple[str, ...], first: int, unknown_items: str
    ) -> list[dict]:
        """The rows with the known items of `{name}_item_ids`, where there are any, as catalogue indices in `name`, all
        looked up at once, and with what the columns `aligned` hold of these items."""
        lists = [row.get(f"{name}_item_ids") for row in rows]
        items = [item for items in lists if items is not None for item in items]
        ends = np.cumsum([0 if items is None else len(items) for items in lists])
        try:
            indices = self.tokenizer.item_index(items, unknown_items="skip")
        except ValueError as error:
            for user, own in enumerate(lists, start=first):
                as_item_ids([] if own is None else own, f"the {name}_item_ids of histories[{user}]")
            raise ValueError(f"histories: {error}") from None
        missing = np.flatnonzero(indices < 0)
        if len(missing) and unknown_items == "error":
            user = first + int(np.searchsorted(ends, missing[0], side="right"))
            where = f"histories[{user}]" if name == "history" else f"{name}_item_ids of histories[{user}]"
            raise ValueError(
                f"{where} holds item id {items[missing[0]]!r}, which is not in the catalogue of "
                f"{self.tokenizer.num_items} items; drop it or pass unknown_items='skip'"
            )
        indexed = []
        for row, given, found in zip(rows, lists, np.split(indices, ends[:-1]), strict=True):
            known = np.flatnonzero(found >= 0)
            kept = {
                column: [row[column][position] for position in known]
                for column in aligned
                if row.get(column) is not None and len(known) < len(found) == len(row[column])
            }
            indexed.append({**row, **kept, name: None if given is None else found[known]})
        return indexed

    def _recommend(
        self,
        trie: ItemTrie,
        rows: list[dict],
        exclude_consumed: bool,
        ranking: dict | None,
        sessions: dict | None,
        session_scores: bool,
    ) -> list[dict]:
        """Results of users encoded together; `ranking` and `sessions` are the arguments of the two searches, None for
        what is not wanted."""
        model = self.model
        encoded = encode_history_rows(rows, self.tokenizer, model.config).to(model.device)
        excluded = [
            np.concatenate([row["history"][: None if exclude_consumed else 0], row.get("blocked", _NOTHING)])
            for row in rows
        ]
        users = {
            "attention_mask": encoded["attention_mask"],
            "encoder_outputs": model.get_encoder()(**encoded),
            "excluded": excluded_items(excluded, model.device) if any(map(len, excluded)) else None,
        }
        ranked = {} if ranking is None else self._ranked(trie, users, ranking)
        chosen = {} if sessions is None else self._sessions(trie, rows, users, sessions, session_scores)
        columns = chosen | ranked
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _ranked(self, trie: ItemTrie, users: dict, ranking: dict) -> dict[str, list]:
        """By user the ranked `items` and their `scores`."""
        ranked = generate_sessions(self.model, trie, num_items=1, **users, **ranking)
        if ranked.scores[ranked.items[..., 0] >= 0].isnan().any():
            raise ValueError(
                "The model's scores are NaN: its weights are damaged, or its training diverged. "
                "Download or train it again."
            )
        # Draws come in their own order; the list is by score.
        scores, order = ranked.scores.sort(dim=1, descending=True, stable=True)
        items, scores = ranked.items[..., 0].gather(1, order).cpu().numpy(), scores.cpu().numpy()
        return {
            "items": [self._item_ids(row) for row in items],
            "scores": [row_scores[row >= 0].tolist() for row, row_scores in zip(items, scores, strict=True)],
        }

    def _sessions(
        self, trie: ItemTrie, rows: list[dict], users: dict, sessions: dict, session_scores: bool
    ) -> dict[str, list]:
        """By user the `session`, and if they are wanted its `session_scores`."""
        guided = sessions.get("search") == "guided_beam"
        guide = {"guide": self.scorer.guide(rows)} if guided else {}
        found = generate_sessions(self.model, trie, **users, **sessions, **guide).items.cpu()
        chosen = found[:, 0]
        if self.scorer is not None and not guided:
            rewards = self.scorer.score(rows, found).reward
            chosen = found[torch.arange(len(found)), rewards.nan_to_num(-torch.inf).argmax(dim=1)]
        columns = {"session": [self._item_ids(session) for session in chosen.numpy()]}
        if session_scores:
            of_model = {name: sessions[name] for name in ("allowed", "normalization", "item_share")}
            scores = session_log_probs(self.model, trie, chosen[:, None], **users, **of_model, by_item=True)[:, 0]
            pairs = zip(scores.cpu(), chosen, strict=True)
            columns["session_scores"] = [row[session >= 0].tolist() for row, session in pairs]
        return columns

    def _item_ids(self, indices: np.ndarray) -> list:
        """Item ids of the catalogue indices that are there."""
        return self.tokenizer.item_ids[indices[indices >= 0]].tolist()


def recommend(model, tokenizer, histories: list[list], **options) -> list[dict[str, list]]:
    """Recommends once: `Recommender(model, tokenizer)(histories, **options)`.

    Keep a [`Recommender`], whose options these are, to build the trie once for many calls.
    """
    return Recommender(model, tokenizer)(histories, **options)
