"""The data, judges and log of a run for the evaluation of its policies."""

from dataclasses import fields
from functools import cached_property
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset

from ..data import positive_mask
from ..evaluation import (
    EvaluationOptions,
    LoggedExposures,
    PolicyEvaluator,
    Replay,
    ServedSessions,
    popular_items,
)
from ..item_trie import ItemTrie
from ..modeling_onerec import OneRecForConditionalGeneration
from ..pretraining import index_sessions
from ..reward import SessionScorer
from ..tokenization_onerec import OneRecTokenizer
from .data_stage import EVALUATION_CASES, USER_HISTORIES, PreparedData, prepared_data
from .recipe_arguments import RecipeArguments
from .reward_stage import INDEPENDENT_JUDGE, REWARD_MODEL
from .stage_runner import MODEL, stage_dir
from .tokenize_stage import load_item_embeddings

PROPENSITY_DAYS = 7  # of exposures; on KuaiRand shares of a week foretell the next day's best


class EvaluatedRun:
    """What a run's policies are evaluated with, each part read when it is first needed, once for all policies.

    Args:
        args: the run's.
        needed_by: the stage or recipe that evaluates, for errors.
        judged: whether the run has reward models.
    """

    def __init__(self, args: RecipeArguments, needed_by: str, judged: bool):
        self.args, self.needed_by, self.judged = args, needed_by, judged
        self.device = PartialState().device

    @cached_property
    def prepared(self) -> PreparedData:
        return prepared_data(self.args, self.needed_by)

    @cached_property
    def tokenizer(self) -> OneRecTokenizer:
        return OneRecTokenizer.from_pretrained(stage_dir(self.args.output_dir, "tokenize", self.needed_by))

    @cached_property
    def fitted_histories(self) -> Dataset:
        """All users' histories in the fitted period, by catalogue index."""
        return index_sessions(self.prepared.read(USER_HISTORIES), self.tokenizer)

    @cached_property
    def scorers(self) -> dict[str, SessionScorer]:
        """The reward models by name: the one that trains, then the independent one."""
        if not self.judged:
            return {}
        folder, names = stage_dir(self.args.output_dir, "reward", self.needed_by), (REWARD_MODEL, INDEPENDENT_JUDGE)
        return {name: SessionScorer.from_pretrained(folder / name, self.device) for name in names}

    @cached_property
    def evaluator(self) -> PolicyEvaluator:
        cases, count = self.prepared.read(EVALUATION_CASES), self.args.evaluation_users
        if count is not None and count < len(cases):
            # The same users whatever the run's seed, so that runs of several seeds compare by user.
            cases = cases.shuffle(seed=self.args.data_seed).select(range(count))
        consumed = np.concatenate([np.zeros(0, np.int64), *map(np.asarray, self.fitted_histories["history"][:])])
        return PolicyEvaluator(
            self.tokenizer,
            ItemTrie.from_tokenizer(self.tokenizer).to(self.device),
            cases,
            load_item_embeddings(self.args.output_dir),
            popular_items(consumed, len(self.tokenizer.item_ids)),
            self.scorers,
            self.prepared.feed.world,
            EvaluationOptions(**{field.name: getattr(self.args, field.name) for field in fields(EvaluationOptions)}),
        )

    @cached_property
    def log(self) -> LoggedExposures | None:
        """The log's exposures in the evaluated period; None where a split leaves none that an outcome has not chosen,
        where there is no judge to model the feedback, or where none are asked for."""
        args = self.args
        if not self.judged or not args.counterfactual_users or args.split_method != "time":
            return None
        history = self.prepared.split.history
        users = index_sessions(self.prepared.histories_before_evaluation(), self.tokenizer)
        enough = np.asarray(users["length"][:]) >= args.min_history_items
        before = history[history["timestamp"] >= history["timestamp"].max() - PROPENSITY_DAYS * 86400]
        return LoggedExposures(
            users.select(np.flatnonzero(enough)),
            self.prepared.split.evaluation,
            self.tokenizer.item_index(before["item_id"]),
            self.scorers[INDEPENDENT_JUDGE],
            clip=args.counterfactual_clip,
            max_users=args.counterfactual_users,
            seed=args.seed,
        )

    @cached_property
    def served(self) -> ServedSessions:
        """What judges the session that each judged user is served, and replays it where the evaluated period shows
        more than what an outcome has chosen."""
        shown, session_items = self.prepared.split.evaluation, self.args.session_items
        users = self.evaluator.judged_user_ids
        positive = shown[positive_mask(shown, self.prepared.feed.positive_feedback)]
        positive = positive[positive["user_id"].isin(users)].drop_duplicates(["user_id", "item_id"])
        groups = positive.groupby("user_id").head(session_items).groupby("user_id")["item_id"]
        following = [self.tokenizer.item_index(groups.get_group(user)) for user in users]
        replay = None
        if self.args.split_method == "time" and self.prepared.feed.positive_feedback:
            replay = Replay(users, shown, self.scorers[INDEPENDENT_JUDGE])
        return ServedSessions(self.evaluator, following, replay)

    @cached_property
    def seed_model(self) -> OneRecForConditionalGeneration:
        return self.load(self.args.output_dir / "pretrain" / MODEL)

    def load(self, source: Path) -> OneRecForConditionalGeneration:
        return OneRecForConditionalGeneration.from_pretrained(source).to(self.device).eval()
