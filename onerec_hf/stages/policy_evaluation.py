"""How one policy of a run is evaluated: item-level ranking, its generated sessions under every judge, its divergence
from the seed model, and its probabilities of what the real log shows."""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from ..data import Feed, session_labels
from ..evaluation import (
    COVERAGE_CUTOFF,
    REWARD,
    LoggedFeedback,
    PolicyOnLog,
    PolicyResults,
    duplicate_rate,
    exposure_shares,
    illegal_rate,
    intra_session_diversity,
    judge_by_model,
    judge_by_truth,
    mean_and_max,
    popular_item_share,
    popular_items,
    scalar_of,
    sessions_of_ranking,
    user_metrics,
)
from ..history_features import encode_history_rows
from ..item_trie import ItemTrie
from ..modeling_onerec import OneRecForConditionalGeneration
from ..pretraining import index_sessions
from ..reward import SessionScorer
from ..session_generation import excluded_items, generate_sessions
from ..session_likelihood import sampled_divergence, session_log_probs
from ..staged_files import staged_file
from ..tokenization_onerec import OneRecTokenizer
from .data_stage import EVALUATION_CASES, USER_HISTORIES, prepared_data
from .pretrain import MODEL
from .recipe_arguments import RecipeArguments
from .reward import INDEPENDENT_JUDGE, REWARD_MODEL
from .stage_runner import stage_dir
from .tokenize import load_item_embeddings

CUTOFFS = (5, 10, 50)
TRUTH = "truth"
LOG_EXPOSURES = 8  # of a user, the first ones: the model's view of him is as old as the period's beginning
PROPENSITY_DAYS = 7  # of exposures; on KuaiRand shares of a week foretell the next day's best
DIRECT_DRAWS = 16  # items drawn for the expectation of the feedback's model under a policy


class PolicyEvaluation:
    """The users, judges and log of a run, read once for all of its policies.

    Args:
        args: The run's.
        needed_by: The stage or recipe that evaluates, for errors.
        judged: Whether the run has reward models.
    """

    def __init__(self, args: RecipeArguments, needed_by: str, judged: bool):
        self.args, self.options, self.judged_run = args, args.evaluation, judged
        self.device = PartialState().device
        self.prepared = prepared_data(args, needed_by)
        self.feed: Feed = self.prepared.feed
        self.tokenizer = OneRecTokenizer.from_pretrained(stage_dir(args.output_dir, "tokenize", needed_by))
        self.trie = ItemTrie.from_tokenizer(self.tokenizer).to(self.device)
        cases = self.prepared.read(EVALUATION_CASES)
        if self.options.evaluation_users is not None and self.options.evaluation_users < len(cases):
            cases = cases.shuffle(seed=args.run.seed).select(range(self.options.evaluation_users))
        self.cases: Dataset = index_sessions(cases, self.tokenizer)
        self.targets = self.tokenizer.item_index(cases["next_item_id"][:])
        judged_users = np.random.default_rng(args.run.seed).permutation(len(self.cases))[: self.options.judged_users]
        self.judged = np.sort(judged_users)

    @functools.cached_property
    def histories(self) -> list[np.ndarray]:
        """Catalogue indices of the evaluated users' histories, oldest first."""
        return [np.asarray(history) for history in self.cases["history"][:]]

    @functools.cached_property
    def judged_rows(self) -> list[dict]:
        return self.cases.select(self.judged).to_list()

    @functools.cached_property
    def fitted_histories(self) -> Dataset:
        return index_sessions(self.prepared.read(USER_HISTORIES), self.tokenizer)

    @functools.cached_property
    def item_embeddings(self) -> torch.Tensor:
        return load_item_embeddings(self.args.output_dir)

    @functools.cached_property
    def popular(self) -> np.ndarray:
        consumed = np.concatenate([np.zeros(0, np.int64), *map(np.asarray, self.fitted_histories["history"][:])])
        return popular_items(consumed, self.trie.num_items)

    @functools.cached_property
    def scorers(self) -> dict[str, SessionScorer]:
        """The reward models by name: the one that trains, then the independent one."""
        folder = stage_dir(self.args.output_dir, "reward", "evaluate")
        return {
            name: SessionScorer.from_pretrained(folder / name, self.device)
            for name in (REWARD_MODEL, INDEPENDENT_JUDGE)
        }

    @functools.cached_property
    def seed_model(self) -> OneRecForConditionalGeneration:
        return self.load(self.args.output_dir / "pretrain" / MODEL)

    def load(self, source: Path) -> OneRecForConditionalGeneration:
        return OneRecForConditionalGeneration.from_pretrained(source).to(self.device).eval()

    # ---------------------------------------------------------------------------------------------------- generators

    def generator(self, model: OneRecForConditionalGeneration, name: str, is_seed: bool = False) -> PolicyResults:
        """Ranking over all evaluated users; sessions, judges and divergence over the judged ones.

        Args:
            model: In evaluation mode.
            name: For the progress bars.
            is_seed: Whether it is the seed model, whose divergence from itself is 0.
        """
        ranked, scores = self.rank(model, name)
        count = self.options.judged_sessions
        sessions = torch.full((len(self.judged), count, model.config.session_items), -1)
        codes = torch.full((*sessions.shape, self.tokenizer.num_levels), -1)
        divergence = np.full(len(self.judged), 0.0 if is_seed else np.nan)
        draws = 0 if is_seed else self.options.divergence_sessions
        noise = torch.Generator(self.device).manual_seed(self.args.run.seed)
        offsets = torch.tensor(model.config.level_offsets)
        lengths = [len(row["history"]) for row in self.judged_rows]
        with tqdm(total=len(self.judged), desc=f"sessions, {name}") as bar:
            for rows in self.batches(lengths, 512):
                inputs = self.inputs(model, [self.judged_rows[row] for row in rows])
                found = generate_sessions(model, self.trie, **inputs, num_beams=count)
                sessions[rows, : found.items.shape[1]] = found.items.cpu()
                codes[rows, : found.items.shape[1]] = found.token_ids.cpu() - offsets
                if draws:
                    divergence[rows] = self.divergence(model, inputs, rows, draws, noise)
                bar.update(len(rows))
        results = self.judged_results(ranked, sessions)
        results.by_user["kl_to_seed"] = divergence
        made = (sessions >= 0).all(-1)
        results.facts["illegal_rate"] = illegal_rate(codes[made], self.tokenizer.codes)
        return results

    @property
    def judged_width(self) -> int:
        """Ranked items that a method's figures and its judged sessions need."""
        return max(*CUTOFFS, self.options.judged_sessions + self.args.data.session_items - 1)

    def rank(
        self, model: OneRecForConditionalGeneration, name: str, width: int = max(CUTOFFS)
    ) -> tuple[np.ndarray, np.ndarray]:
        """The evaluated users' ranked items int [B, width] and their log-probabilities."""
        beams = max(self.options.ranking_beams, width)
        ranked, scores = np.full((len(self.cases), width), -1), np.full((len(self.cases), width), -np.inf)
        with tqdm(total=len(self.cases), desc=f"ranking, {name}") as bar:
            for rows in self.batches([len(history) for history in self.histories], 1024):
                found = generate_sessions(
                    model,
                    self.trie,
                    **self.inputs(model, self.cases.select(rows).to_list()),
                    num_items=1,
                    num_beams=beams,
                    num_return=width,
                )
                ranked[rows, : found.items.shape[1]] = found.items[..., 0].cpu().numpy()
                scores[rows, : found.items.shape[1]] = found.scores.cpu().numpy()
                bar.update(len(rows))
        return ranked, scores

    def divergence(
        self,
        model: OneRecForConditionalGeneration,
        inputs: dict[str, torch.Tensor],
        rows: np.ndarray,
        draws: int,
        noise: torch.Generator,
    ) -> np.ndarray:
        """KL of a user's session distribution from the seed model's [nats a session], estimated from sessions drawn
        from the model. Both policies are normalised over the items that the user may be given, which is what is drawn
        from."""
        found = generate_sessions(
            model,
            self.trie,
            **inputs,
            num_beams=draws,
            search="sample",
            normalization="constrained",
            generator=noise,
        )
        seed_inputs = self.inputs(self.seed_model, [self.judged_rows[row] for row in rows])
        seed = session_log_probs(self.seed_model, self.trie, found.items, **seed_inputs)
        return sampled_divergence(found.scores, seed).cpu().numpy()

    def inputs(self, model: OneRecForConditionalGeneration, rows: list[dict]) -> dict[str, torch.Tensor]:
        """What generation needs of rows of the cases or of the fitted histories."""
        batch = encode_history_rows(rows, self.tokenizer, model.config).to(self.device)
        excluded = None
        if self.options.exclude_consumed:
            excluded = excluded_items([np.asarray(row["history"]) for row in rows], self.device)
        return {**batch, "excluded": excluded}

    def batches(self, lengths: list[int], tokens_per_batch: int) -> Iterator[np.ndarray]:
        """Places of rows in batches of about `tokens_per_batch` history tokens, similar lengths together."""
        kept = np.asarray(lengths).clip(1, self.args.data.history_items)
        order, start = np.argsort(kept, kind="stable"), 0
        while start < len(order):
            size = max(1, tokens_per_batch // int(kept[order[min(start + 64, len(order) - 1)]]))
            yield order[start : start + size]
            start += size

    # -------------------------------------------------------------------------------------------------------- judges

    def ranking_method(self, ranked: np.ndarray, scores: np.ndarray) -> PolicyResults:
        """A method that ranks items: its sessions are those of [`sessions_of_ranking`].

        Args:
            ranked, scores: [B, k], of the evaluated users; scores are log-probabilities up to a user's constant.
        """
        sessions, _ = sessions_of_ranking(
            ranked[self.judged], scores[self.judged], self.options.judged_sessions, self.args.data.session_items
        )
        return self.judged_results(ranked, torch.from_numpy(sessions))

    def judged_results(self, ranked: np.ndarray, sessions: torch.LongTensor) -> PolicyResults:
        """Results of rankings [B, k] of the evaluated users and sessions [B', C, m] of the judged ones."""
        by_user = user_metrics(ranked, self.targets, CUTOFFS)
        by_user["popular_item_share"] = popular_item_share(sessions, self.popular)
        facts = {
            "duplicate_rate": duplicate_rate(sessions),
            "intra_session_diversity": intra_session_diversity(sessions, self.item_embeddings),
            "session_coverage": len(torch.unique(sessions[sessions >= 0])) / self.trie.num_items,
        }
        for judge, values in self.judge(sessions).items():
            by_user |= {f"{judge}/{name}": figures for name, figures in mean_and_max(values).items()}
        return PolicyResults(facts, by_user, ranked[:, :COVERAGE_CUTOFF], self.trie.num_items)

    def judge(self, sessions: torch.LongTensor) -> dict[str, dict[str, np.ndarray]]:
        """What every judge of the run says of the judged users' sessions."""
        if not self.judged_run:
            return {}
        judges = {name: judge_by_model(scorer, self.judged_rows, sessions) for name, scorer in self.scorers.items()}
        if self.feed.world is not None:
            users = np.asarray(self.cases["user_id"][:])[self.judged]
            item_ids = np.asarray(self.tokenizer.item_ids)
            scorer = self.scorers[REWARD_MODEL]
            judges[TRUTH] = judge_by_truth(self.feed.world, scorer, item_ids, users, sessions)
        return judges

    # ------------------------------------------------------------------------------------------------------- the log

    @functools.cached_property
    def log(self) -> "LoggedExposures | None":
        """The real log's exposures in the evaluated period; None where a split leaves none that an outcome has not
        chosen, where there is no judge to model the feedback, or where none are asked for."""
        if not self.judged_run or not self.options.counterfactual_users or self.args.data.split_method != "time":
            return None
        return LoggedExposures(self)

    def on_log(self, model: OneRecForConditionalGeneration, name: str) -> PolicyOnLog:
        """The model's next-item distribution on the logged exposures."""
        log, scorer = self.log, self.scorers[INDEPENDENT_JUDGE]
        log_probs = np.full(log.items.shape, np.nan)
        drawn = torch.full((len(log.rows), DIRECT_DRAWS, 1), -1)
        noise = torch.Generator(self.device).manual_seed(self.args.run.seed)
        with tqdm(total=len(log.rows), desc=f"log, {name}") as bar:
            for rows in self.batches([len(row["history"]) for row in log.rows], 1024):
                inputs = self.inputs(model, [log.rows[row] for row in rows])
                shared = {
                    "attention_mask": inputs["attention_mask"],
                    "excluded": inputs.pop("excluded"),
                    "encoder_outputs": model.get_encoder()(**inputs),
                }
                items = torch.from_numpy(log.items[rows])
                found = session_log_probs(model, self.trie, items[..., None], **shared)
                log_probs[rows] = np.where(items >= 0, found.double().cpu().numpy(), np.nan)
                found = generate_sessions(
                    model, self.trie, **shared, num_items=1, num_beams=DIRECT_DRAWS, search="sample", generator=noise
                )
                drawn[rows] = found.items.cpu()
                bar.update(len(rows))
        expected = judge_by_model(scorer, log.rows, drawn)
        return PolicyOnLog(log_probs, {head: mean_and_max({"": v})["_mean"] for head, v in expected.items()})


class LoggedExposures:
    """The first exposures, good or bad, of users in the evaluated period, beside their histories before it.

    Users are drawn from all who were shown anything, not from the evaluation's, whom a later positive behaviour has
    chosen.
    """

    def __init__(self, evaluation: PolicyEvaluation):
        args, tokenizer = evaluation.args, evaluation.tokenizer
        split = evaluation.prepared.split
        users = evaluation.fitted_histories
        enough = np.asarray(users["length"][:]) >= args.data.min_history_items
        known = {user: row for row, user in enumerate(users["user_id"][:]) if enough[row]}
        shown = split.evaluation
        user_row = shown["user_id"].map(known)
        shown, user_row = shown[user_row.notna()], user_row[user_row.notna()].to_numpy(dtype=np.int64)
        chosen = np.unique(user_row)
        limit = evaluation.options.counterfactual_users
        chosen = np.sort(np.random.default_rng(args.run.seed).permutation(chosen)[:limit])
        self.rows = users.select(chosen).to_list()
        place = np.searchsorted(chosen, user_row).clip(max=len(chosen) - 1)
        kept = chosen[place] == user_row
        shown, place = shown[kept], place[kept]
        first = np.r_[True, place[1:] != place[:-1]] if len(place) else np.zeros(0, dtype=bool)
        within = np.arange(len(place)) - np.maximum.accumulate(np.where(first, np.arange(len(place)), 0))
        early = within < LOG_EXPOSURES
        shown, spot = shown[early], (place[early], within[early])

        shape = (len(chosen), LOG_EXPOSURES)
        self.items = np.full(shape, -1)
        self.items[spot] = tokenizer.item_index(shown["item_id"])
        before = split.fit[split.fit["timestamp"] >= split.fit["timestamp"].max() - PROPENSITY_DAYS * 86400]
        shares = exposure_shares(tokenizer.item_index(before["item_id"]), evaluation.trie.num_items)
        self.propensities = np.where(self.items >= 0, shares[self.items], np.nan)
        labels = session_labels(shown.reset_index(drop=True), np.arange(len(shown))[:, None])
        scorer = evaluation.scorers[INDEPENDENT_JUDGE]
        predicted = judge_by_model(scorer, self.rows, torch.from_numpy(self.items)[..., None])
        self.labels = {}
        for head in (name for name in scorer.objectives if name in labels):
            self.labels[head] = np.full(shape, np.nan)
            self.labels[head][spot] = labels[head]
        reward = scalar_of(scorer, self.labels)
        if reward is not None:
            self.labels = {REWARD: reward, **self.labels}
        self.feedback = LoggedFeedback(
            self.propensities, self.labels, predicted, evaluation.options.counterfactual_clip
        )


def save_on_log(policy: PolicyOnLog, path: Path) -> None:
    """Writes one .safetensors file, whole or not at all."""
    with staged_file(path) as partial:
        save_file({"log_probs": policy.log_probs, **policy.expected}, partial)


def load_on_log(path: Path) -> PolicyOnLog:
    expected = load_file(path)
    return PolicyOnLog(expected.pop("log_probs"), expected)
