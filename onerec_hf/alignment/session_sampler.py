"""Self-hard preference pairs (paper section 3.3.2, Algorithm 2): for a share of the training rows the snapshot M_t
generates N sessions by beam search, the reward model scores them, and the best and the worst become a pair."""

import numpy as np
from datasets import Dataset, Features, List, Value
from tqdm.auto import tqdm

from ..history_features import HISTORY_FEATURES, encode_history_rows
from ..item_trie import ItemTrie
from ..modeling_onerec import OneRecForConditionalGeneration
from ..reward import REWARD_FEATURES, SessionScorer
from ..session_generation import excluded_items, generate_sessions
from ..tokenization_onerec import OneRecTokenizer

FEATURES = tuple(dict.fromkeys((*HISTORY_FEATURES, *REWARD_FEATURES)))


def sample_preferences(
    model: OneRecForConditionalGeneration,
    trie: ItemTrie,
    tokenizer: OneRecTokenizer,
    scorer: SessionScorer,
    dataset: Dataset,
    sample_share: float = 0.01,
    num_candidates: int = 128,
    num_items: int | None = None,
    min_reward_gap: float = 0.0,
    exclude_history: bool = True,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> Dataset:
    """
    Draw one round's preference pairs. The defaults of `sample_share` (r_DPO) and `num_candidates` (N) are the paper's.

    A row is left out when it has fewer than two sessions, when all of its sessions have one reward (winner and loser
    would be the same), and when the winner's reward exceeds the loser's by less than `min_reward_gap`. Both models'
    training modes are left as they were.

    Args:
        model (`OneRecForConditionalGeneration`): Snapshot M_t that generates.
        trie (`ItemTrie`): Trie of the catalogue, on the model's device.
        tokenizer (`OneRecTokenizer`): Tokenizer of all three.
        scorer (`SessionScorer`): The reward model that scores the sessions.
        dataset (`Dataset`): Training rows with `user_id`, `history` (catalogue indices, oldest first) and the columns
            that [`encode_history_rows`] and the reward model need.
        sample_share (`float`): Share of the rows drawn, in (0, 1]; at least one row is drawn.
        num_candidates (`int`): Beams, and sessions scored for each row.
        num_items (`int`, *optional*): Items of a session; the generator's `session_items` by default.
        min_reward_gap (`float`): Smallest difference of rewards that makes a pair.
        exclude_history (`bool`): Whether items of the row's history are kept out of its sessions.
        seed (`int`): Chooses the rows; give every round another one.
        batch_size (`int`): Rows generated and scored at once.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        `Dataset`: `user_id`, `history`, `chosen` and `rejected` (catalogue indices), `chosen_reward`,
        `rejected_reward`, `mean_reward` and `candidate_rewards`, the rewards of the row's sessions in beam order, and
        the columns of `HISTORY_FEATURES` and `REWARD_FEATURES` that `dataset` has.

    Raises:
        ValueError: if `sample_share` is outside (0, 1] or `num_candidates` below 2.
    """
    if not 0 < sample_share <= 1:
        raise ValueError(f"sample_share must lie in (0, 1], got {sample_share}.")
    if num_candidates < 2:
        raise ValueError(f"num_candidates must be at least 2 to make a pair, got {num_candidates}.")
    count = min(len(dataset), max(1, round(sample_share * len(dataset))))
    rows = np.sort(np.random.default_rng(seed).choice(len(dataset), count, replace=False))
    drawn = dataset.select(rows)
    kept = ["user_id", "history", *(name for name in FEATURES if name in dataset.column_names)]

    was_training = model.training
    model.eval()
    pairs = []
    for start in tqdm(range(0, count, batch_size), desc="drawing sessions", disable=not progress):
        batch = drawn.select(range(start, min(start + batch_size, count))).to_list()
        histories = [np.asarray(row["history"], dtype=np.int64) for row in batch]
        encoded = encode_history_rows(batch, tokenizer, model.config).to(model.device)
        excluded = excluded_items(histories, model.device) if exclude_history else None
        beams = generate_sessions(
            model, trie, **encoded, num_items=num_items, num_beams=num_candidates, excluded=excluded
        )
        items = beams.items.cpu()
        scores = scorer.score(batch, items, batch_size)
        for row, sessions, rewards in zip(batch, items, scores.reward, strict=True):
            real = (sessions >= 0).all(-1) & ~rewards.isnan()
            sessions, rewards = sessions[real], rewards[real]
            if len(rewards) < 2:
                continue
            winner, loser = int(rewards.argmax()), int(rewards.argmin())
            gap = float(rewards[winner] - rewards[loser])
            if gap <= 0 or gap < min_reward_gap:
                continue
            pairs.append(
                {name: row[name] for name in kept}
                | {
                    "chosen": sessions[winner].tolist(),
                    "rejected": sessions[loser].tolist(),
                    "chosen_reward": float(rewards[winner]),
                    "rejected_reward": float(rewards[loser]),
                    "mean_reward": float(rewards.mean()),
                    "candidate_rewards": rewards.tolist(),
                }
            )
    model.train(was_training)
    features = Features(
        {
            **{name: dataset.features[name] for name in kept},
            "history": List(Value("int64")),
            "chosen": List(Value("int64")),
            "rejected": List(Value("int64")),
            "chosen_reward": Value("float32"),
            "rejected_reward": Value("float32"),
            "mean_reward": Value("float32"),
            "candidate_rewards": List(Value("float32")),
        }
    )
    return Dataset.from_dict({name: [pair[name] for pair in pairs] for name in features}, features=features)
