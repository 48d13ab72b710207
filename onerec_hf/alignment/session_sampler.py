"""Self-hard preference pairs (paper section 3.3.2, Algorithm 2): for a share of the training rows the snapshot M_t
generates N sessions, the reward model scores them, and the best and the worst become a pair.

The rows are cut into parts of a fixed size, which the processes take in turn. A part is one file, written whole, and
its draws have a seed of their own, so that a killed run goes on after what it has, on any number of processes, and
the pairs do not depend on theirs.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets import Dataset, Features, List, Value
from tqdm.auto import tqdm

from ..evaluation_mode import evaluation_mode
from ..history_features import HISTORY_FEATURES, encode_history_rows
from ..item_trie import ItemTrie
from ..modeling_onerec import OneRecForConditionalGeneration
from ..renamed_arguments import renamed_arguments
from ..reward import SessionScorer
from ..session_generation import SEARCHES, SearchOptions, excluded_items, generate_sessions
from ..session_likelihood import session_log_probs
from ..session_rows import index_sessions, rows_of, users_of_feed
from ..staged_files import staged_file
from ..typed_arguments import typed_arguments

ROWS_PER_PART = 16
GUIDED = "guided_beam"
PAIR_FEATURES = {
    "chosen": List(Value("int64")),
    "rejected": List(List(Value("int64"))),
    "chosen_reward": Value("float32"),
    "rejected_reward": Value("float32"),
    "mean_reward": Value("float32"),
    "chosen_log_prob": Value("float32"),
    "rejected_log_probs": List(Value("float32")),
    "candidates": List(List(Value("int64"))),
    "candidate_rewards": List(Value("float32")),
}


@typed_arguments
@dataclass
class PreferenceSampling:
    """How a round's candidates are drawn and made pairs. `r_dpo`, `num_candidates`, the search and the quantiles are
    the paper's by default.

    Args:
        r_dpo: Share of the rows drawn, in (0, 1]; at least one row is drawn.
        num_candidates: N, sessions generated for each row; the same session counts once.
        num_items: Items of a session; the generator's `session_items` by default.
        search: `"beam"`, `"diverse_beam"`, `"sample"` (nucleus sampling by `top_p`) or `"stochastic_beam"`.
        guided_beams: With a number, the chosen session is the best one of a search of so many beams that the reward
            model guides, and the candidates that the policy finds by itself are there to be rejected.
        guidance_weight, num_item_beams: Of the guided search.
        temperature, top_p, num_beam_groups, diversity_penalty: Of the search, as [`generate_sessions`] has them.
        winner_quantile: Rank of the winner among the row's rewards: 1 is the best, 0.5 the median.
        loser_quantile: Rank of the loser; 0 is the worst.
        num_rejected: Sessions rejected in a pair, the loser and those that rank right above it; S-DPO takes all of
            them, a loss of pairs the loser alone.
        min_reward_margin: Smallest difference to the winner's reward with which a session is rejected.
        exclude_consumed: Whether items of the row's history are kept out of its sessions.
    """

    r_dpo: float = 0.01
    num_candidates: int = 128
    num_items: int | None = None
    search: str = "beam"
    temperature: float = 1.0
    top_p: float | None = None
    num_beam_groups: int = 4
    diversity_penalty: float = 0.5
    guided_beams: int | None = None
    guidance_weight: float = SearchOptions.guidance_weight
    num_item_beams: int = SearchOptions.num_item_beams
    winner_quantile: float = 1.0
    loser_quantile: float = 0.0
    num_rejected: int = 1
    min_reward_margin: float = 0.0
    exclude_consumed: bool = True

    def __post_init__(self):
        if not 0 < self.r_dpo <= 1:
            raise ValueError(f"r_dpo must lie in (0, 1], got {self.r_dpo}.")
        if self.num_candidates < 2:
            raise ValueError(f"num_candidates must be at least 2 to make a pair, got {self.num_candidates}.")
        # A guided search is beside it, and candidates are many, not the likeliest alone.
        searches = [name for name in SEARCHES if name not in (GUIDED, "widening_beam")]
        if self.search not in searches:
            raise ValueError(f"search must be one of {', '.join(searches)}, got {self.search!r}.")
        if self.guided_beams is not None and self.guided_beams < 1:
            raise ValueError(f"guided_beams must be at least 1, got {self.guided_beams}.")
        if not 0 <= self.loser_quantile < self.winner_quantile <= 1:
            raise ValueError(
                f"The quantiles must satisfy 0 <= loser_quantile < winner_quantile <= 1, got {self.loser_quantile} "
                f"and {self.winner_quantile}."
            )
        if self.num_rejected < 1:
            raise ValueError(f"num_rejected must be at least 1, got {self.num_rejected}.")

    def search_options(self, generator: torch.Generator) -> dict[str, Any]:
        """The arguments of [`generate_sessions`] for this search."""
        return vars(SearchOptions.read_from(self, self.search, self.num_candidates, generator))

    def guidance(self, scorer: SessionScorer, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The arguments of [`generate_sessions`] for the guided search."""
        return {
            "search": GUIDED,
            "guide": scorer.guide(rows),
            "guidance_weight": self.guidance_weight,
            **SearchOptions.divided(self.guided_beams, self.num_item_beams),
            "num_return": 1,
        }

    def pair(
        self, sessions: np.ndarray, rewards: np.ndarray, guided: tuple[np.ndarray, float] | None = None
    ) -> dict[str, Any] | None:
        """The pair of one row's candidates, or None where no reward is below the winner's by the margin.

        Args:
            sessions: (C, m) distinct sessions of catalogue indices, the likeliest of equal reward first.
            rewards: (C,) their rewards.
            guided: The winner of a guided search (m,), and its reward.
        """
        count = len(rewards)
        if count < (2 if guided is None else 1):
            return None
        winner = np.argsort(-rewards, kind="stable")[round((1 - self.winner_quantile) * (count - 1))]
        chosen, chosen_reward = (sessions[winner], rewards[winner]) if guided is None else guided
        start = round(self.loser_quantile * (count - 1))
        rejected = np.argsort(rewards, kind="stable")[start : start + self.num_rejected]
        margins = chosen_reward - rewards[rejected]
        rejected = rejected[(margins > 0) & (margins >= self.min_reward_margin)]
        if not len(rejected):
            return None
        return {
            "chosen": chosen.tolist(),
            "rejected": sessions[rejected].tolist(),
            "chosen_reward": float(chosen_reward),
            "rejected_reward": float(rewards[rejected[0]]),
            "mean_reward": float(rewards.mean()),
            "candidates": sessions.tolist(),
            "candidate_rewards": rewards.tolist(),
        }


PreferenceSampling.__init__ = renamed_arguments(
    sample_share="r_dpo", min_reward_gap="min_reward_margin", exclude_history="exclude_consumed"
)(PreferenceSampling.__init__)


@renamed_arguments(progress="show_progress")
def sample_preferences(
    model: OneRecForConditionalGeneration,
    trie: ItemTrie,
    scorer: SessionScorer,
    dataset,
    options: PreferenceSampling | None = None,
    seed: int = 0,
    parts_dir: str | Path | None = None,
    show_progress: bool = True,
) -> Dataset:
    """Draws one round's preference pairs.

    A row is left out when fewer than two sessions could be generated for it or no reward is below the winner's by the
    margin. Both models' training modes are left as they were.

    Args:
        model: Snapshot M_t that generates.
        trie: On the model's device.
        scorer: The reward model, with the tokenizer of both.
        dataset: Training rows with `user_id`, `history` (catalogue indices, oldest first) and the columns that
            [`encode_history_rows`] and the scorer read; or a [`Feed`], or a log that [`feed_from_log`] reads by its
            default names, whose users the rows are.
        seed: Chooses the rows and the draws; give every round another one.
        parts_dir: Where the parts are kept, to be found again by a run that is resumed; a run of several processes
            needs one that all of them see. Pairs drawn by other options must not be in it.

    Returns:
        Dataset of `user_id`, `history`, `chosen` and `rejected` (one session and a list of them, the lowest reward
        first, as catalogue indices), `chosen_reward`, `rejected_reward` (of the first rejected), `mean_reward`,
        `candidates` and `candidate_rewards` (the row's distinct sessions in the order of the search), and the columns
        of `HISTORY_FEATURES` that `dataset` has.

    Raises:
        ValueError: if there are several processes and no `parts_dir`.
    """
    options, state = options or PreferenceSampling(), PartialState()
    if state.num_processes > 1 and parts_dir is None:
        raise ValueError("Several processes exchange pairs through files: give parts_dir, which all of them see.")
    dataset = rows_of(dataset, lambda feed: index_sessions(users_of_feed(feed, model.config), scorer.tokenizer))
    count = min(len(dataset), max(1, round(options.r_dpo * len(dataset))))
    rows = np.sort(np.random.default_rng(seed).choice(len(dataset), count, replace=False))
    kept = ["user_id", "history", *(name for name in HISTORY_FEATURES if name in dataset.column_names)]
    features = Features({name: dataset.features[name] for name in kept} | {"history": List(Value("int64"))})
    features.update(PAIR_FEATURES)
    parts = [rows[start : start + ROWS_PER_PART] for start in range(0, count, ROWS_PER_PART)]

    with TemporaryDirectory() as temporary, evaluation_mode(model):
        folder = Path(parts_dir or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"part_{number:06d}.parquet" for number in range(len(parts))]
        for number, part in enumerate(tqdm(parts, desc="drawing sessions", disable=not show_progress)):
            if number % state.num_processes == state.process_index and not paths[number].exists():
                draw_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
                pairs = _pairs_of(model, trie, scorer, dataset.select(part).to_list(), options, draw_seed)
                columns = {name: [pair[name] for pair in pairs] for name in features}
                with staged_file(paths[number]) as partial:
                    pq.write_table(pa.table(columns, schema=features.arrow_schema), partial)
        state.wait_for_everyone()
        return Dataset(pa.concat_tables([pq.read_table(path) for path in paths]))


def _pairs_of(
    model, trie: ItemTrie, scorer: SessionScorer, rows: list[dict[str, Any]], options: PreferenceSampling, seed: int
) -> list[dict[str, Any]]:
    """Rows generated and scored at once, as pairs with the rows' own columns."""
    histories = [np.asarray(row["history"], dtype=np.int64) for row in rows]
    inputs = encode_history_rows(rows, scorer.tokenizer, model.config).to(model.device)
    encoded = {"attention_mask": inputs["attention_mask"], "encoder_outputs": model.get_encoder()(**inputs)}
    excluded = excluded_items(histories, model.device) if options.exclude_consumed else None
    search = options.search_options(torch.Generator(model.device).manual_seed(seed))
    found = generate_sessions(model, trie, **encoded, num_items=options.num_items, excluded=excluded, **search)
    sessions = found.items.cpu()
    rewards = scorer.score(rows, sessions, batch_size=len(rows)).reward.numpy()
    winners = [None] * len(rows)
    if options.guided_beams is not None:
        guided = {"num_items": options.num_items, "excluded": excluded, **options.guidance(scorer, rows)}
        best = generate_sessions(model, trie, **encoded, **guided).items.cpu()
        of_best = scorer.score(rows, best, batch_size=len(rows)).reward[:, 0].tolist()
        whole = (best[:, 0] >= 0).all(-1).tolist()
        winners = [
            winner if found else None for *winner, found in zip(best[:, 0].numpy(), of_best, whole, strict=True)
        ]
    pairs = []
    compared = torch.full((len(rows), 1 + options.num_rejected, sessions.shape[-1]), -1)
    by_row = zip(rows, sessions.numpy(), rewards, winners, compared, strict=True)
    for row, candidates, candidate_rewards, winner, places in by_row:
        first = np.sort(np.unique(candidates, axis=0, return_index=True)[1])
        first = first[(candidates[first] >= 0).all(-1) & ~np.isnan(candidate_rewards[first])]
        pair = options.pair(candidates[first], candidate_rewards[first], winner)
        pairs.append(pair and row | pair)
        if pair is not None:
            places[: 1 + len(pair["rejected"])] = torch.tensor([pair["chosen"], *pair["rejected"]])
    log_probs = session_log_probs(model, trie, compared, **encoded, normalization="vocabulary")
    for pair, (chosen, *rejected) in zip(pairs, log_probs.float().cpu().tolist(), strict=True):
        if pair is not None:
            pair |= {"chosen_log_prob": chosen, "rejected_log_probs": rejected[: len(pair["rejected"])]}
    return [pair for pair in pairs if pair is not None]
