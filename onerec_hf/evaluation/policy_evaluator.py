"""Evaluates a policy on data: its ranking of the next item, its sessions under every judge, its divergence from a seed
model, and its probabilities of what a log shows.

A policy's figures pass through, from the cases to the table: [`PolicyEvaluator.generator`], its `rank`, `generate` and
`results`, [`user_metrics`], [`PolicyEvaluator.judge`], [`mean_and_max`], [`PolicyResults.summary`] (an entry of
metrics.json), and of `reporting` `write_report` or `print_table` and `Table`.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..data import SessionSimulator
from ..evaluation_mode import evaluation_mode
from ..item_trie import ItemTrie
from ..modeling_onerec import OneRecForConditionalGeneration
from ..pretraining import index_sessions
from ..reward import SessionScorer
from ..session_generation import generate_sessions
from ..session_likelihood import sampled_divergence, session_log_probs
from ..tokenization_onerec import OneRecTokenizer
from .counterfactual import PolicyOnLog
from .logged_exposures import LoggedExposures
from .policy_inputs import draw_sessions, generation_inputs
from .policy_results import PolicyResults, popular_item_share
from .ranked_sessions import sessions_of_ranking
from .ranking_metrics import COVERAGE_CUTOFF, duplicate_rate, illegal_rate, intra_session_diversity, user_metrics
from .session_judges import judge_by_model, judge_by_truth, mean_and_max

CUTOFFS = (5, 10, 50)
TRUTH = "truth"
DIRECT_DRAWS = 16  # items drawn for the expectation of the feedback's model under a policy


@dataclass(frozen=True)
class EvaluationOptions:
    """How policies are evaluated, the same for all that are compared.

    Args:
        exclude_consumed: whether items of a user's history are left out, for every method alike.
        ranking_beams: beams of a generator's ranked list.
        judged_users: cases, drawn by seed, whose sessions are judged; None for all.
        judged_sessions: sessions of each of them: found by a generator's beams, or of highest score by a ranking.
        session_items: items of a session of a ranking; a generator's configuration has its own.
        cascade_candidates: how many of a ranking's items cascades read.
        divergence_sessions: sessions drawn of each of them for the divergence from the seed model; 0 for none.
        seed: of what is drawn.
    """

    exclude_consumed: bool = True
    ranking_beams: int = 128
    judged_users: int | None = 500
    judged_sessions: int = 32
    session_items: int = 5
    cascade_candidates: Sequence[int] = ()
    divergence_sessions: int = 8
    seed: int = 0

    @property
    def ranked_items(self) -> int:
        """Ranked items that a ranking's figures, its judged sessions and cascades need."""
        return max(*CUTOFFS, self.judged_sessions + self.session_items - 1, *self.cascade_candidates)


class PolicyEvaluator:
    """Evaluates any number of policies on the same users, under the same judges.

    Args:
        tokenizer, trie: the catalogue, the trie on the models' device.
        cases: a row by user as [`evaluation_cases`] makes them: `user_id`, `history_item_ids` (oldest first),
            `next_item_id`, and what the models and the scorers read beside these.
        item_embeddings: (items, D), for the diversity of sessions.
        popular: (items,) whether an item is popular: [`popular_items`].
        scorers: the judges by name; without any, no session is judged.
        world: what knows the truth of simulated users: judges too, with the first scorer's objectives and scalar.

    Attributes:
        cases, histories, targets: the cases by catalogue index.
        judged: rows of the judged cases; `judged_rows` are these, `judged_user_ids` (judged,) whose they are.
    """

    def __init__(
        self,
        tokenizer: OneRecTokenizer,
        trie: ItemTrie,
        cases: Dataset,
        item_embeddings: torch.Tensor,
        popular: np.ndarray,
        scorers: Mapping[str, SessionScorer] | None = None,
        world: SessionSimulator | None = None,
        options: EvaluationOptions | None = None,
    ):
        self.tokenizer, self.trie, self.options = tokenizer, trie, options or EvaluationOptions()
        self.item_embeddings, self.popular = item_embeddings, popular
        self.scorers, self.world = dict(scorers or {}), world
        self.targets = tokenizer.item_index(cases["next_item_id"][:])
        self.cases = index_sessions(cases, tokenizer)
        self.histories = [np.asarray(history) for history in self.cases["history"][:]]
        drawn = np.random.default_rng(self.options.seed).permutation(len(self.cases))
        self.judged = np.sort(drawn[: self.options.judged_users])
        self.judged_rows = self.cases.select(self.judged).to_list()
        self.judged_user_ids = np.asarray(self.cases["user_id"][:])[self.judged]

    def generator(
        self,
        model: OneRecForConditionalGeneration,
        seed_model: OneRecForConditionalGeneration | None = None,
        name: str = "policy",
    ) -> PolicyResults:
        """A model that generates: its ranking over all cases; sessions, judges and divergence over the judged ones.

        Args:
            seed_model: the policy that the divergence `kl_to_seed` is measured to; the model itself has none.
                Without one there is no such figure.
            name: for the progress bars.
        """
        with evaluation_mode(model):
            started = time.monotonic()
            ranked, _ = self.rank(model, name=name)
            seconds = time.monotonic() - started
            sessions, token_ids = self.generate(model, name)
        results = self.results(ranked, sessions)
        if seed_model is not None:
            results.by_user["kl_to_seed"] = self.divergence(model, seed_model, name)
        results.facts["users_per_second"] = len(ranked) / seconds
        made = token_ids[(sessions >= 0).all(-1)]
        results.facts["illegal_rate"] = illegal_rate(made, self.tokenizer.semantic_id_token_ids)
        return results

    def ranking_method(self, ranked: np.ndarray, scores: np.ndarray) -> PolicyResults:
        """A method that ranks items: its sessions are those of [`sessions_of_ranking`].

        Args:
            ranked: (users, k) catalogue indices for the cases, best first, -1 for nothing; k at least
                `options.ranked_items`.
            scores: (users, k) log-probabilities up to a user's constant.
        """
        best, totals = ranked[self.judged], scores[self.judged]
        found, _ = sessions_of_ranking(best, totals, self.options.judged_sessions, self.options.session_items)
        return self.results(ranked, torch.from_numpy(found))

    def rank(
        self,
        model: OneRecForConditionalGeneration,
        width: int = max(CUTOFFS),
        name: str = "policy",
        cases: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ranked items of some cases, by default of all, (users, width) catalogue indices, and their
        log-probabilities."""
        cases = np.arange(len(self.cases)) if cases is None else cases
        beams = max(self.options.ranking_beams, width)
        ranked, scores = np.full((len(cases), width), -1), np.full((len(cases), width), -np.inf)
        histories = [self.histories[case] for case in cases]
        for rows in _batches(histories, model.config.history_items, 1024, f"ranking, {name}"):
            inputs = self.inputs(model, self.cases.select(cases[rows]).to_list())
            found = generate_sessions(model, self.trie, **inputs, num_items=1, num_beams=beams, num_return=width)
            ranked[rows, : found.items.shape[1]] = found.items[..., 0].cpu().numpy()
            scores[rows, : found.items.shape[1]] = found.scores.cpu().numpy()
        return ranked, scores

    def generate(
        self, model: OneRecForConditionalGeneration, name: str = "policy", **search
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """The judged cases' sessions (users, C, m) and their items' tokens (users, C, m, L), -1 for nothing.

        Args:
            name: for the progress bar.
            search: fields of [`SearchOptions`] other than `num_beams`, which is C.
        """
        sessions = torch.full((len(self.judged), self.options.judged_sessions, model.config.session_items), -1)
        token_ids = torch.full((*sessions.shape, self.tokenizer.num_levels), -1)
        for rows, judged in self._judged_batches(model, f"sessions, {name}", sessions.shape[1]):
            inputs = self.inputs(model, judged)
            found = generate_sessions(model, self.trie, **inputs, num_beams=sessions.shape[1], **search)
            sessions[rows, : found.items.shape[1]] = found.items.cpu()
            token_ids[rows, : found.items.shape[1]] = found.token_ids.cpu()
        return sessions, token_ids

    def best_sessions(
        self,
        model: OneRecForConditionalGeneration,
        name: str = "policy",
        scorer: SessionScorer | None = None,
        **search,
    ) -> torch.LongTensor:
        """The judged cases' best sessions (users, m) of a search: with a scorer one that it guides, otherwise by
        beams; `search` as of [`generate`], with `num_beams`."""
        sessions = torch.full((len(self.judged), model.config.session_items), -1)
        beams = search["num_beams"] * search.get("num_item_beams", 1)
        for rows, judged in self._judged_batches(model, f"sessions, {name}", beams):
            if scorer is not None:
                search |= {"search": "guided_beam", "guide": scorer.guide(judged)}
            found = generate_sessions(model, self.trie, **self.inputs(model, judged), num_return=1, **search)
            sessions[rows] = found.items[:, 0].cpu()
        return sessions

    def divergence(
        self, model: OneRecForConditionalGeneration, seed_model: OneRecForConditionalGeneration, name: str = "policy"
    ) -> np.ndarray:
        """KL of the judged cases' session distribution from the seed model's, (users,) [nats a session], estimated
        from sessions drawn from the model; both policies are normalised over the items that the user may be given.
        0 of the seed model itself, NaN where no session is to be drawn."""
        if seed_model is model:
            return np.zeros(len(self.judged))
        divergence, count = np.full(len(self.judged), np.nan), self.options.divergence_sessions
        noise = torch.Generator(model.device).manual_seed(self.options.seed)
        for rows, judged in self._judged_batches(model, f"divergence, {name}") if count else ():
            with evaluation_mode(model), evaluation_mode(seed_model):
                found = draw_sessions(model, self.trie, count, noise, **self.inputs(model, judged))
                seed = session_log_probs(seed_model, self.trie, found.items, **self.inputs(seed_model, judged))
            divergence[rows] = sampled_divergence(found.scores, seed).cpu().numpy()
        return divergence

    def _judged_batches(
        self, model: OneRecForConditionalGeneration, title: str, beams: int = 32
    ) -> Iterator[tuple[np.ndarray, list[Mapping]]]:
        """Places among the judged cases, and their rows; more at a time where there are few beams."""
        histories = [self.histories[row] for row in self.judged]
        for rows in _batches(histories, model.config.history_items, 512 * max(1, 32 // beams), title):
            yield rows, [self.judged_rows[row] for row in rows]

    def inputs(self, model: OneRecForConditionalGeneration, rows: Sequence[Mapping]) -> dict[str, torch.Tensor | None]:
        """[`generation_inputs`] of rows by catalogue index."""
        return generation_inputs(model, self.tokenizer, rows, self.options.exclude_consumed)

    def results(self, ranked: np.ndarray, sessions: torch.LongTensor) -> PolicyResults:
        """Results of the cases' rankings (users, k) and of the judged ones' sessions (judged, C, m)."""
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
        """What every judge says of the judged cases' sessions (judged, C, m): by judge and objective (judged, C)."""
        judges = {name: judge_by_model(scorer, self.judged_rows, sessions) for name, scorer in self.scorers.items()}
        if self.world is not None and self.scorers:
            scorer, item_ids = next(iter(self.scorers.values())), np.asarray(self.tokenizer.item_ids)
            judges[TRUTH] = judge_by_truth(self.world, scorer, item_ids, self.judged_user_ids, sessions)
        return judges

    def on_log(self, model: OneRecForConditionalGeneration, log: LoggedExposures, name: str = "policy") -> PolicyOnLog:
        """The model's next-item distribution on the log, for [`LoggedFeedback.estimates`] of `log.feedback`."""
        log_probs = np.full(log.items.shape, np.nan)
        drawn = torch.full((len(log.rows), DIRECT_DRAWS, 1), -1)
        noise = torch.Generator(model.device).manual_seed(self.options.seed)
        histories = [row["history"] for row in log.rows]
        with evaluation_mode(model):
            for rows in _batches(histories, model.config.history_items, 1024, f"log, {name}"):
                inputs = self.inputs(model, [log.rows[row] for row in rows])
                shared = {"attention_mask": inputs["attention_mask"], "excluded": inputs.pop("excluded")}
                # The history is encoded once for the items that were shown and those that are drawn.
                shared["encoder_outputs"] = model.get_encoder()(**inputs)
                items = torch.from_numpy(log.items[rows])
                found = session_log_probs(model, self.trie, items[..., None], **shared)
                log_probs[rows] = np.where(items >= 0, found.double().cpu().numpy(), np.nan)
                found = generate_sessions(
                    model, self.trie, **shared, num_items=1, num_beams=DIRECT_DRAWS, search="sample", generator=noise
                )
                drawn[rows] = found.items.cpu()
        expected = judge_by_model(log.scorer, log.rows, drawn)
        means = {objective: mean_and_max({"": values})["_mean"] for objective, values in expected.items()}
        return PolicyOnLog(log_probs, means)


def _batches(
    histories: Sequence[Sequence[int]], longest: int, tokens_per_batch: int, title: str
) -> Iterator[np.ndarray]:
    """Places of histories in batches of about `tokens_per_batch` items, of which a history has `longest` at most;
    similar lengths stand together. With a progress bar."""
    kept = np.array([len(history) for history in histories], dtype=np.int64).clip(1, longest)
    order, start = np.argsort(kept, kind="stable"), 0
    with tqdm(total=len(order), desc=title) as bar:
        while start < len(order):
            size = max(1, tokens_per_batch // int(kept[order[min(start + 64, len(order) - 1)]]))
            rows = order[start : start + size]
            yield rows
            bar.update(len(rows))
            start += size
