"""Self-hard preference pairs (paper section 3.3.2, Algorithm 2): for a share of the training rows the snapshot M_t
generates N sessions, the reward model scores them, and the best and the worst become a pair.

The rows are cut into parts of a fixed size, which the processes take in turn. A part is one file, written whole, and
its draws have a seed of their own, so that a killed run goes on behind what it has, on any number of processes, and
the pairs do not depend on theirs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets import Dataset, Features, List, Value
from tqdm.auto import tqdm

from ..history_features import HISTORY_FEATURES, encode_history_rows
from ..item_trie import ItemTrie
from ..modeling_onerec import OneRecForConditionalGeneration
from ..reward import SessionScorer
from ..session_generation import SEARCHES, excluded_items, generate_sessions
from ..session_likelihood import session_log_probs
from ..staged_files import staged_file

ROWS_PER_PART = 16
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


@dataclass
class PreferenceSampling:
    """
    How a round's candidates are drawn and made pairs. `sample_share`, `num_candidates`, the search and the quantiles
    are the paper's by default.

    Args:
        sample_share (`float`): r_DPO, share of the rows drawn, in (0, 1]; at least one row is drawn.
        num_candidates (`int`): N, sessions generated for each row; the same session counts once.
        num_items (`int`, *optional*): Items of a session; the generator's `session_items` by default.
        search (`str`): `"beam"`, `"diverse_beam"`, `"sample"` (nucleus sampling by `top_p`) or `"stochastic_beam"`.
        temperature, top_p, num_beam_groups, diversity_penalty: Of the search, as [`generate_sessions`] has them.
        winner_quantile (`float`): Rank of the winner among the row's rewards: 1 is the best, 0.5 the median.
        loser_quantile (`float`): Rank of the loser; 0 is the worst.
        num_rejected (`int`): Sessions rejected in a pair, the loser and those that rank right above it; S-DPO takes
            all of them, a loss of pairs the loser alone.
        min_reward_gap (`float`): Smallest difference to the winner's reward with which a session is rejected.
        exclude_history (`bool`): Whether items of the row's history are kept out of its sessions.
    """

    sample_share: float = 0.01
    num_candidates: int = 128
    num_items: int | None = None
    search: str = "beam"
    temperature: float = 1.0
    top_p: float | None = None
    num_beam_groups: int = 4
    diversity_penalty: float = 0.5
    winner_quantile: float = 1.0
    loser_quantile: float = 0.0
    num_rejected: int = 1
    min_reward_gap: float = 0.0
    exclude_history: bool = True

    def __post_init__(self):
        if not 0 < self.sample_share <= 1:
            raise ValueError(f"sample_share must lie in (0, 1], got {self.sample_share}.")
        if self.num_candidates < 2:
            raise ValueError(f"num_candidates must be at least 2 to make a pair, got {self.num_candidates}.")
        if self.search not in SEARCHES:
            raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {self.search!r}.")
        if not 0 <= self.loser_quantile < self.winner_quantile <= 1:
            raise ValueError(
                f"The quantiles must satisfy 0 <= loser_quantile < winner_quantile <= 1, got {self.loser_quantile} "
                f"and {self.winner_quantile}."
            )
        if self.num_rejected < 1:
            raise ValueError(f"num_rejected must be at least 1, got {self.num_rejected}.")

    def search_options(self, generator: torch.Generator) -> dict[str, Any]:
        """The arguments of [`generate_sessions`] that the search reads."""
        options: dict[str, Any] = {"search": self.search, "num_beams": self.num_candidates}
        if self.search == "diverse_beam":
            options |= {"num_beam_groups": self.num_beam_groups, "diversity_penalty": self.diversity_penalty}
        elif self.search != "beam":
            options |= {"temperature": self.temperature, "generator": generator}
        return options | ({"top_p": self.top_p} if self.search == "sample" else {})

    def pair(self, sessions: np.ndarray, rewards: np.ndarray) -> dict[str, Any] | None:
        """
        The pair of one row's candidates, or None where no reward is below the winner's by the gap.

        Args:
            sessions (`np.ndarray` of shape `(C, m)`): Distinct sessions of catalogue indices, the likeliest of equal
                reward first.
            rewards (`np.ndarray` of shape `(C,)`): Their rewards.
        """
        count = len(rewards)
        if count < 2:
            return None
        winner = np.argsort(-rewards, kind="stable")[round((1 - self.winner_quantile) * (count - 1))]
        start = round(self.loser_quantile * (count - 1))
        rejected = np.argsort(rewards, kind="stable")[start : start + self.num_rejected]
        gaps = rewards[winner] - rewards[rejected]
        rejected = rejected[(gaps > 0) & (gaps >= self.min_reward_gap)]
        if not len(rejected):
            return None
        return {
            "chosen": sessions[winner].tolist(),
            "rejected": sessions[rejected].tolist(),
            "chosen_reward": float(rewards[winner]),
            "rejected_reward": float(rewards[rejected[0]]),
            "mean_reward": float(rewards.mean()),
            "candidates": sessions.tolist(),
            "candidate_rewards": rewards.tolist(),
        }


def sample_preferences(
    model: OneRecForConditionalGeneration,
    trie: ItemTrie,
    scorer: SessionScorer,
    dataset: Dataset,
    options: PreferenceSampling | None = None,
    seed: int = 0,
    parts_dir: str | Path | None = None,
    progress: bool = True,
) -> Dataset:
    """
    Draw one round's preference pairs.

    A row is left out when fewer than two sessions could be generated for it or no reward is below the winner's by the
    gap. Both models' training modes are left as they were.

    Args:
        model (`OneRecForConditionalGeneration`): Snapshot M_t that generates.
        trie (`ItemTrie`): Trie of the catalogue, on the model's device.
        scorer (`SessionScorer`): The reward model, with the tokenizer of both.
        dataset (`Dataset`): Training rows with `user_id`, `history` (catalogue indices, oldest first) and the columns
            that [`encode_history_rows`] and the scorer read.
        options (`PreferenceSampling`, *optional*): How candidates are drawn and made pairs.
        seed (`int`): Chooses the rows and the draws; give every round another one.
        parts_dir (*optional*): Where the parts are kept, to be found again by a run that is resumed; a run of several
            processes needs one that all of them see. Pairs drawn by other options must not be in it.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        `Dataset`: `user_id`, `history`, `chosen` and `rejected` (one session and a list of them, the lowest reward
        first, as catalogue indices), `chosen_reward`, `rejected_reward` (of the first rejected), `mean_reward`,
        `candidates` and `candidate_rewards` (the row's distinct sessions in the order of the search), and the columns
        of `HISTORY_FEATURES` that `dataset` has.

    Raises:
        ValueError: if there are several processes and no `parts_dir`.
    """
    options, state = options or PreferenceSampling(), PartialState()
    if state.num_processes > 1 and parts_dir is None:
        raise ValueError("Several processes exchange pairs through files: give parts_dir, which all of them see.")
    count = min(len(dataset), max(1, round(options.sample_share * len(dataset))))
    rows = np.sort(np.random.default_rng(seed).choice(len(dataset), count, replace=False))
    kept = ["user_id", "history", *(name for name in HISTORY_FEATURES if name in dataset.column_names)]
    features = Features({name: dataset.features[name] for name in kept} | {"history": List(Value("int64"))})
    features.update(PAIR_FEATURES)
    parts = [rows[start : start + ROWS_PER_PART] for start in range(0, count, ROWS_PER_PART)]
    if parts_dir is not None:
        Path(parts_dir).mkdir(parents=True, exist_ok=True)

    was_training = model.training
    model.eval()
    drawn = []
    for number, part in enumerate(tqdm(parts, desc="drawing sessions", disable=not progress)):
        path = None if parts_dir is None else Path(parts_dir) / f"part_{number:06d}.parquet"
        if path is None or number % state.num_processes == state.process_index and not path.exists():
            draw_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            pairs = _pairs_of(model, trie, scorer, dataset.select(part).to_list(), options, draw_seed)
            columns = {name: [pair[name] for pair in pairs] for name in features}
            table = pa.table(columns, schema=features.arrow_schema)
            if path is None:
                drawn.append(table)
            else:
                with staged_file(path) as partial:
                    pq.write_table(table, partial)
    model.train(was_training)
    state.wait_for_everyone()
    if parts_dir is not None:
        drawn = [pq.read_table(Path(parts_dir) / f"part_{number:06d}.parquet") for number in range(len(parts))]
    return Dataset(pa.concat_tables(drawn))


@torch.no_grad()
def _pairs_of(
    model: OneRecForConditionalGeneration,
    trie: ItemTrie,
    scorer: SessionScorer,
    rows: list[dict[str, Any]],
    options: PreferenceSampling,
    seed: int,
) -> list[dict[str, Any]]:
    """Rows generated and scored at once, as pairs with the rows' own columns."""
    histories = [np.asarray(row["history"], dtype=np.int64) for row in rows]
    inputs = encode_history_rows(rows, scorer.tokenizer, model.config).to(model.device)
    encoded = {"attention_mask": inputs["attention_mask"], "encoder_outputs": model.get_encoder()(**inputs)}
    found = generate_sessions(
        model,
        trie,
        **encoded,
        num_items=options.num_items,
        excluded=excluded_items(histories, model.device) if options.exclude_history else None,
        **options.search_options(torch.Generator(model.device).manual_seed(seed)),
    )
    sessions = found.items.cpu()
    rewards = scorer.score(rows, sessions, batch_size=len(rows)).reward.numpy()
    pairs = []
    compared = torch.full((len(rows), 1 + options.num_rejected, sessions.shape[-1]), -1)
    for row, candidates, candidate_rewards, places in zip(rows, sessions.numpy(), rewards, compared, strict=True):
        _, first = np.unique(candidates, axis=0, return_index=True)
        first = np.sort(first)
        first = first[(candidates[first] >= 0).all(-1) & ~np.isnan(candidate_rewards[first])]
        pair = options.pair(candidates[first], candidate_rewards[first])
        pairs.append(pair and row | pair)
        if pair is not None:
            places[: 1 + len(pair["rejected"])] = torch.tensor([pair["chosen"], *pair["rejected"]])
    log_probs = session_log_probs(model, trie, compared, **encoded, normalization="vocabulary").float().cpu()
    for pair, (chosen, *rejected) in zip(pairs, log_probs.tolist(), strict=True):
        if pair is not None:
            pair |= {"chosen_log_prob": chosen, "rejected_log_probs": rejected[: len(pair["rejected"])]}
    return [pair for pair in pairs if pair is not None]
