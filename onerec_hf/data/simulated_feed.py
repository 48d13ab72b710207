"""A simulated short-video feed that keeps its truth.

A seeded world of items, users and a logging policy. It writes a log in the schema of real data, and, unlike real data,
it answers what any user would do with any session, so that a policy can be judged by truth and not only by a model.

Items i = 1..N. There are T topics with unit centres c_t in R^d, an item's topic t_i is drawn from weights that fall as
1 / (t + 4), and

    z_i = unit(c_{t_i} + 0.6 e_i),  e_i ~ N(0, I / d)          what the item is about
    q_i ~ N(0, 1)                                              hidden quality
    d_i = exp(N(log 20 + m_{t_i}, 0.5)) clipped to [5, 90] s   duration, m_t ~ N(0, 0.3)
    x_i = W [z_i, 0.3 q_i] + 0.25 noise in R^32                content embedding: all a recommender sees of z_i and q_i

Users u = 1..U. Each has favourite topics: two at the start of the log (weights 1 and .7); at the end one of the two
has been replaced by a new one for half of the users. With s in [0, 1] the time since the start of the log in units of
its length,

    v_u(s) = unit((1 - s) a_u + s b_u),   a_u, b_u = sums of the favourites' centres by weight, plus noise

    affinity  A_ui(s) = 3.6 (v_u(s) . z_i) + 0.5 q_i - 0.3 log(d_i / 20 s)

Feedback of user u on item i at place j of a session: f is the number of earlier items *of this session* on the same
topic (a user tires of repetition within a session and recovers until the next), and

    P(view)          = sigmoid(A_ui(s) - 1.8 - 0.8 f)
    P(like | view)   = sigmoid(0.7 A_ui(s) - 3.5 - 0.4 f)          no like without a view
    P(follow | view) = sigmoid(0.9 A_ui(s) - 5.9 - 0.4 f)          no follow without a view
    watch_time / d_i ~ Beta(6 r, 6 (1 - r)), with r = sigmoid(0.4 A_ui(s) + 0.1 - 0.3 f) given a view,
                                              r = sigmoid(0.4 A_ui(s) - 2.2 - 0.3 f) given none

so that watch_time <= d_i, and given the session all expectations are exact and in closed form:

    swt = sum_i d_i (P(view) r_view + (1 - P(view)) r_no view) / sum_i d_i
    vtr, wtr, ltr = means over i of P(view), P(follow), P(like).

Logging policy. A user makes 8 to 16 requests in 14 days, more in the evening, each answered by 5 to 10 videos that
were not shown to this user before, drawn one after another without replacement from the mixture

    pi_u(i) = 0.60 softmax_i(10 (w_u(s) . z_i) + 0.6 q_i) + 0.20 popularity_i + 0.20 / N

with w_u(s) = unit(v_u(s) + 0.35 noise_u) the policy's imperfect estimate of the taste, and popularity_i proportional
to exp(0.9 q_i + 0.5 noise). It knows nothing of fatigue, and a fifth of what it shows is blind: there is room to do
better.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file

from ..staged_files import staged_directory
from .feed import Feed
from .schema import DataError

DAY = 86400.0
# Monday 1 January 2024, 00:00 UTC.
LOG_START = 1704067200.0
# Ids that no one can mistake for row numbers.
FIRST_ITEM_ID = 100_001
FIRST_USER_ID = 1_001
# Requests start on a grid of half hours, so that no two of a user's overlap: 10 videos of 90 s and the jitter fit in.
REQUEST_GRID = 1800.0
REQUEST_JITTER = 600.0
# Users whose N scores are held at once by the logging policy.
USERS_AT_ONCE = 2048


@dataclass(frozen=True)
class SimulatedFeedParameters:
    """The constants of the model in the module's docstring."""

    users: int = 2000
    items: int = 2000
    seed: int = 0
    topics: int = 24
    latent_size: int = 16
    embedding_size: int = 32
    days: float = 14.0
    min_requests: int = 8
    max_requests: int = 16
    min_request_items: int = 5
    max_request_items: int = 10
    item_noise: float = 0.6
    embedding_noise: float = 0.25
    embedding_quality: float = 0.3
    median_duration: float = 20.0
    min_duration: float = 5.0
    max_duration: float = 90.0
    duration_spread: float = 0.5
    topic_duration_spread: float = 0.3
    drifting_users: float = 0.5
    second_topic_weight: float = 0.7
    taste_noise: float = 0.25
    affinity_scale: float = 3.6
    quality_scale: float = 0.5
    duration_scale: float = 0.3
    view_bias: float = -1.8
    view_fatigue: float = 0.8
    like_scale: float = 0.7
    like_bias: float = -3.5
    follow_scale: float = 0.9
    follow_bias: float = -5.9
    interaction_fatigue: float = 0.4
    watch_scale: float = 0.4
    viewed_watch_bias: float = 0.1
    skipped_watch_bias: float = -2.2
    watch_fatigue: float = 0.3
    watch_concentration: float = 6.0
    policy_taste_share: float = 0.6
    policy_popularity_share: float = 0.2
    policy_sharpness: float = 10.0
    policy_quality: float = 0.6
    policy_noise: float = 0.35
    popularity_quality: float = 0.9
    popularity_noise: float = 0.5


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def topic_fatigue(topics: np.ndarray) -> np.ndarray:
    """For each place of sessions (..., m) of topics: how many earlier places hold the same topic."""
    same = topics[..., :, None] == topics[..., None, :]
    return np.tril(same, k=-1).sum(axis=-1)


class SimulatedFeed:
    """A world and its log.

    Args:
        parameters: see SimulatedFeedParameters.
        truth: item_topics (N,), item_latents (N, d), item_quality (N,), item_durations (N,) [s],
            item_embeddings (N, 32), start_tastes and end_tastes (U, d), which are a_u and b_u, policy_noise (U, d).
        log: columns of the interactions, each (R,): user and item (row numbers), timestamp, session_id, feedback.
    """

    def __init__(self, parameters: SimulatedFeedParameters, truth: dict[str, np.ndarray], log: dict[str, np.ndarray]):
        self.parameters, self.truth, self.log = parameters, truth, log
        self.user_ids = FIRST_USER_ID + np.arange(parameters.users)
        self.item_ids = FIRST_ITEM_ID + np.arange(parameters.items)

    @classmethod
    def generate(cls, users: int = 2000, items: int = 2000, seed: int = 0, **parameters) -> SimulatedFeed:
        """Draws a world and its log; the same arguments give the same world.

        Args:
            users, items: sizes. There must be more items than one user is shown.
            parameters: other fields of SimulatedFeedParameters.

        Raises:
            DataError: fewer items than the requests of one user could need.
        """
        p = SimulatedFeedParameters(users=users, items=items, seed=seed, **parameters)
        shown = p.max_requests * p.max_request_items
        if p.items < shown:
            raise DataError(
                f"simulated feed: {p.items} items are too few: one user may be shown {shown} different ones. Raise "
                "items (simulated_items), or lower max_requests or max_request_items."
            )
        rng = np.random.default_rng(seed)
        world = cls(p, _draw_truth(p, rng), {})
        world.log = world._draw_log(rng)
        return world

    def _draw_log(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        p = self.parameters
        requests = rng.integers(p.min_requests, p.max_requests + 1, size=p.users)
        sizes = rng.integers(p.min_request_items, p.max_request_items + 1, size=(p.users, p.max_requests))
        starts = self._request_starts(requests, rng)
        appeal = p.popularity_quality * self.truth["item_quality"] + p.popularity_noise * rng.standard_normal(p.items)
        popularity = np.exp(appeal)
        popularity = (popularity / popularity.sum()).astype(np.float32)
        parts = []
        for first in range(0, p.users, USERS_AT_ONCE):
            block = np.arange(first, min(first + USERS_AT_ONCE, p.users))
            unseen = np.ones((len(block), p.items), dtype=bool)
            for turn in range(p.max_requests):
                active = block[requests[block] > turn]
                if len(active):
                    shown = self._expose(active, starts[active, turn], popularity, unseen[active - first], rng)
                    kept = np.arange(p.max_request_items) < sizes[active, turn, None]
                    unseen[np.broadcast_to(active[:, None], shown.shape)[kept] - first, shown[kept]] = False
                    parts.append(self._draw_feedback(active, shown, kept, starts[active, turn], rng))
        log = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.lexsort((log["timestamp"], log["user"]))
        log = {name: values[order] for name, values in log.items()}
        opens = (np.diff(log["user"], prepend=-1) != 0) | (np.diff(log["session_id"], prepend=-1) != 0)
        log["session_id"] = np.cumsum(opens)
        return log

    def _request_starts(self, requests: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Times (U, max_requests) in seconds since the start of the log, ascending; inf beyond a user's requests."""
        p = self.parameters
        slots = int(p.days * DAY / REQUEST_GRID)
        hour = (np.arange(slots) * REQUEST_GRID / 3600) % 24
        weight = 0.15 + np.exp(-0.5 * ((hour - 20.5) / 2.5) ** 2) + 0.5 * np.exp(-0.5 * ((hour - 12.5) / 1.5) ** 2)
        keys = rng.standard_exponential((len(requests), slots)) / weight
        drawn = np.argpartition(keys, p.max_requests - 1, axis=1)[:, : p.max_requests].astype(np.float64)
        # The drawn slots have no order yet: those beyond the user's number of requests are dropped before sorting.
        drawn[np.arange(p.max_requests) >= requests[:, None]] = np.inf
        drawn.sort(axis=1)
        return drawn * REQUEST_GRID + rng.uniform(0, REQUEST_JITTER, size=drawn.shape)

    def _expose(self, users, starts, popularity, unseen, rng: np.random.Generator) -> np.ndarray:
        """Items (B, max_request_items) that the logging policy shows next, in order."""
        p, truth = self.parameters, self.truth
        taste = self.tastes(users, starts / (p.days * DAY))
        taste = _unit(taste + p.policy_noise * truth["policy_noise"][users]).astype(np.float32)
        scores = p.policy_sharpness * taste @ truth["item_latents"].T.astype(np.float32)
        scores += p.policy_quality * truth["item_quality"].astype(np.float32)
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        scores *= p.policy_taste_share / scores.sum(axis=1, keepdims=True)
        scores += p.policy_popularity_share * popularity
        scores += (1 - p.policy_taste_share - p.policy_popularity_share) / p.items
        scores *= unseen
        # Exponential races: the order of E_i / pi_i is a draw without replacement from pi.
        # An item already shown has pi = 0 and comes last, at inf (or NaN, should its E be 0).
        with np.errstate(divide="ignore", invalid="ignore"):
            keys = rng.standard_exponential(scores.shape, dtype=np.float32) / scores
        size = p.max_request_items
        shown = np.argpartition(keys, size - 1, axis=1)[:, :size]
        return np.take_along_axis(shown, np.argsort(np.take_along_axis(keys, shown, axis=1), axis=1), axis=1)

    def _draw_feedback(self, users, shown, kept, starts, rng: np.random.Generator) -> dict[str, np.ndarray]:
        p = self.parameters
        chance = self._feedback_given(self.tastes(users, starts / (p.days * DAY)), shown)
        view = rng.random(shown.shape) < chance["view"]
        like = view & (rng.random(shown.shape) < chance["like_given_view"])
        follow = view & (rng.random(shown.shape) < chance["follow_given_view"])
        ratio = np.where(view, chance["watch_given_view"], chance["watch_given_skip"])
        ratio = rng.beta(p.watch_concentration * ratio, p.watch_concentration * (1 - ratio))
        duration = self.truth["item_durations"][shown]
        watch = ratio * duration
        elapsed = np.cumsum(np.where(kept, watch, 0), axis=1) - np.where(kept, watch, 0)
        rows = np.broadcast_to(users[:, None], shown.shape)
        columns = {
            "user": rows,
            "item": shown,
            "timestamp": LOG_START + starts[:, None] + elapsed + np.arange(shown.shape[1]),
            "session_id": np.broadcast_to(starts[:, None] // REQUEST_GRID, shown.shape),
        }
        feedback = {"watch_time": watch, "duration": duration, "view": view, "like": like, "follow": follow}
        columns |= {name: values.astype(np.float32) for name, values in feedback.items()}
        return {name: values[kept] for name, values in columns.items()}

    # The truth

    def tastes(self, users: np.ndarray, progress: np.ndarray | float) -> np.ndarray:
        """v_u(s) (B, d) of user row numbers (B,) at s in [0, 1] (scalar or (B,))."""
        progress = np.broadcast_to(progress, len(users))[:, None]
        truth = self.truth
        return _unit((1 - progress) * truth["start_tastes"][users] + progress * truth["end_tastes"][users])

    def affinities(self, users: np.ndarray, items: np.ndarray, progress: np.ndarray | float = 1.0) -> np.ndarray:
        """A_ui(s) of user row numbers (B,) and item row numbers (B, ...)."""
        return self._affinities(self.tastes(users, progress), items)

    def _affinities(self, tastes: np.ndarray, items: np.ndarray) -> np.ndarray:
        p, truth = self.parameters, self.truth
        # All scores first: at most B x N, where gathering latents would take B x ... x d.
        match = tastes @ truth["item_latents"].T
        match = np.take_along_axis(match, items.reshape(len(items), -1), axis=1).reshape(items.shape)
        length = np.log(truth["item_durations"] / p.median_duration)
        return p.affinity_scale * match + (p.quality_scale * truth["item_quality"] - p.duration_scale * length)[items]

    def _feedback_given(self, tastes: np.ndarray, items: np.ndarray) -> dict[str, np.ndarray]:
        """Probabilities and expected watched shares, each of the shape of `items` (B, ..., m), places last."""
        p = self.parameters
        affinity = self._affinities(tastes, items)
        fatigue = topic_fatigue(self.truth["item_topics"][items])
        watch = p.watch_scale * affinity - p.watch_fatigue * fatigue
        tired = p.interaction_fatigue * fatigue
        return {
            "view": _sigmoid(affinity + p.view_bias - p.view_fatigue * fatigue),
            "like_given_view": _sigmoid(p.like_scale * affinity + p.like_bias - tired),
            "follow_given_view": _sigmoid(p.follow_scale * affinity + p.follow_bias - tired),
            "watch_given_view": _sigmoid(watch + p.viewed_watch_bias),
            "watch_given_skip": _sigmoid(watch + p.skipped_watch_bias),
        }

    def expected_feedback(self, user_ids, session_item_ids) -> dict[str, np.ndarray]:
        """Exact expectations of swt, vtr, wtr and ltr if these sessions were shown at the end of the log (s = 1), see
        [`SessionSimulator`].

        Raises:
            DataError: an unknown user or item.
        """
        users = self._rows(np.asarray(user_ids), FIRST_USER_ID, self.parameters.users, "user")
        sessions = np.asarray(session_item_ids)
        if sessions.ndim not in (2, 3) or len(sessions) != len(users):
            raise DataError(
                f"simulated feed: sessions have shape {sessions.shape} for {len(users)} users; give (B, C, m) "
                "or (B, m)."
            )
        absent = sessions == -1
        items = self._rows(np.where(absent, FIRST_ITEM_ID, sessions), FIRST_ITEM_ID, self.parameters.items, "item")
        given = self._feedback_given(self.tastes(users, 1.0), items)
        view = given["view"]
        ratio = view * given["watch_given_view"] + (1 - view) * given["watch_given_skip"]
        duration = self.truth["item_durations"][items]
        expected = {
            "swt": (duration * ratio).sum(axis=-1) / duration.sum(axis=-1),
            "vtr": view.mean(axis=-1),
            "wtr": (view * given["follow_given_view"]).mean(axis=-1),
            "ltr": (view * given["like_given_view"]).mean(axis=-1),
        }
        broken = absent.any(axis=-1)
        return {label: np.where(broken, np.nan, values) for label, values in expected.items()}

    @staticmethod
    def _rows(ids: np.ndarray, first_id: int, count: int, kind: str) -> np.ndarray:
        rows = ids - first_id
        foreign = (rows < 0) | (rows >= count)
        if foreign.any():
            raise DataError(
                f"simulated feed: there is no {kind} {ids[foreign].flat[0]}; the ids are {first_id} to "
                f"{first_id + count - 1}. Give the feed's own ids, not row numbers."
            )
        return rows

    # Feed and files

    def feed(self) -> Feed:
        """The log in the schema of real data."""
        interactions = {"user_id": self.user_ids[self.log["user"]], "item_id": self.item_ids[self.log["item"]]}
        interactions |= {name: self.log[name] for name in self.log if name not in ("user", "item")}
        items = pd.DataFrame({"item_id": self.item_ids, "video_duration": self.truth["item_durations"]})
        items["content_embedding"] = list(self.truth["item_embeddings"])
        return Feed.from_frames(
            "simulated",
            [(pd.DataFrame(interactions), "simulated log")],
            (items, "simulated items"),
            ["view", "like", "follow"],
            numeric_columns=["video_duration"],
            embedding_column="content_embedding",
            world=self,
        )

    def save(self, directory: str | Path) -> None:
        """Writes world.safetensors and world.json into `directory`, which appears whole or not at all."""
        with staged_directory(directory) as folder:
            tensors = {f"truth.{name}": np.ascontiguousarray(values) for name, values in self.truth.items()}
            tensors |= {f"log.{name}": np.ascontiguousarray(values) for name, values in self.log.items()}
            save_file(tensors, folder / "world.safetensors")
            text = json.dumps(dataclasses.asdict(self.parameters), indent=2) + "\n"
            (folder / "world.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> SimulatedFeed:
        """Reads what `save` wrote."""
        text = (Path(directory) / "world.json").read_text(encoding="utf-8")
        parameters = SimulatedFeedParameters(**json.loads(text))
        tensors = load_file(Path(directory) / "world.safetensors")
        parts = {"truth": {}, "log": {}}
        for name, values in tensors.items():
            part, column = name.split(".", 1)
            parts[part][column] = values
        return cls(parameters, parts["truth"], parts["log"])


def _draw_truth(p: SimulatedFeedParameters, rng: np.random.Generator) -> dict[str, np.ndarray]:
    centres = _unit(rng.standard_normal((p.topics, p.latent_size)))
    weights = 1.0 / (np.arange(p.topics) + 4)
    weights /= weights.sum()
    topics = rng.choice(p.topics, size=p.items, p=weights)
    noise = rng.standard_normal((p.items, p.latent_size)) / np.sqrt(p.latent_size)
    latents = _unit(centres[topics] + p.item_noise * noise)
    quality = rng.standard_normal(p.items)
    length = rng.normal(0, p.topic_duration_spread, p.topics)[topics] + rng.normal(0, p.duration_spread, p.items)
    durations = np.clip(p.median_duration * np.exp(length), p.min_duration, p.max_duration)
    seen = np.column_stack([latents, p.embedding_quality * quality])
    mixing = rng.standard_normal((seen.shape[1], p.embedding_size)) / np.sqrt(seen.shape[1])
    noise = p.embedding_noise * rng.standard_normal((p.items, p.embedding_size))
    embeddings = seen @ mixing + noise / np.sqrt(p.embedding_size)

    # Three different favourite topics a user, drawn by weight: two of the start, and the one that may come later.
    favourites = np.argsort(rng.standard_exponential((p.users, p.topics)) / weights, axis=1)[:, :3]
    first, second, third = (centres[favourites[:, k]] for k in range(3))
    noise = p.taste_noise * rng.standard_normal((p.users, p.latent_size)) / np.sqrt(p.latent_size)
    drifts = rng.random(p.users) < p.drifting_users
    replaced_first = drifts & (rng.random(p.users) < 0.5)
    replaced_second = drifts & ~replaced_first
    start = first + p.second_topic_weight * second + noise
    first, second = np.where(replaced_first[:, None], third, first), np.where(replaced_second[:, None], third, second)
    end = first + p.second_topic_weight * second + noise
    return {
        "item_topics": topics,
        "item_latents": latents,
        "item_quality": quality,
        "item_durations": durations,
        "item_embeddings": embeddings.astype(np.float32),
        "start_tastes": start,
        "end_tastes": end,
        "policy_noise": rng.standard_normal((p.users, p.latent_size)) / np.sqrt(p.latent_size),
    }
