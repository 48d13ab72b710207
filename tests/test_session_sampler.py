from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from alignment_cases import CODEBOOK_SIZES, tiny_generator, tiny_tokenizer, training_rows
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.alignment import PreferenceCollator, PreferenceSampling, sample_preferences
from onerec_hf.configuration_onerec import OneRecConfig
from onerec_hf.item_trie import ItemTrie
from onerec_hf.modeling_onerec import OneRecForConditionalGeneration
from onerec_hf.pretraining import SessionCollator
from onerec_hf.reward import OneRecRewardConfig, OneRecRewardModel, SessionScorer
from onerec_hf.session_generation import excluded_items, generate_sessions
from onerec_hf.tokenization_onerec import OneRecTokenizer


class FirstCodeReward(OneRecRewardModel):
    """Stands in for a trained judge: the reward is the token ids' sum, so the oracle needs no model."""

    def forward(self, session_ids, **behaviour):
        reward = session_ids.sum((-1, -2)).float()
        return SimpleNamespace(reward=reward, probabilities=reward[..., None].expand(-1, -1, 4))

    def score_extensions(self, behaviour, session_ids, candidate_ids, **indices):
        return (session_ids.sum((-1, -2))[..., None] + candidate_ids.sum(-1)).float()


@pytest.fixture(scope="module")
def tokenizer() -> OneRecTokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def judge(tokenizer) -> SessionScorer:
    config = OneRecRewardConfig(codebook_sizes=CODEBOOK_SIZES, hidden_size=8, num_attention_heads=1, session_items=2)
    return SessionScorer(FirstCodeReward(config), tokenizer)


@pytest.fixture(scope="module")
def trie() -> ItemTrie:
    return ItemTrie(tiny_tokenizer().codes, CODEBOOK_SIZES)


def draw(model, trie, scorer, rows, seed=0, parts_dir=None, **options) -> Dataset:
    sampling = PreferenceSampling(**({"r_dpo": 1.0, "num_candidates": 6} | options))
    return sample_preferences(model, trie, scorer, rows, sampling, seed=seed, parts_dir=parts_dir, show_progress=False)


def test_best_and_worst_of_the_beams(tokenizer, judge, trie):
    model, rows = tiny_generator().train(), training_rows(20)
    pairs = draw(model, trie, judge, rows)
    assert model.training and pairs["user_id"][:] == rows["user_id"][:]
    assert pairs.features["user_id"] == rows.features["user_id"]
    model.eval()
    for pair in pairs:
        history = np.asarray(pair["history"], dtype=np.int64)
        encoded = tokenizer.encode_histories([history], max_items=6, catalogue_indices=True)
        beams = generate_sessions(
            model, trie, **encoded, num_beams=6, excluded=excluded_items([history], model.device)
        ).items[0]
        rewards = tokenizer.item_token_ids[beams].sum((-1, -2)).tolist()
        assert pair["candidates"] == beams.tolist() and pair["candidate_rewards"] == rewards
        assert pair["chosen"] == beams[int(np.argmax(rewards))].tolist()
        assert pair["rejected"] == [beams[int(np.argmin(rewards))].tolist()]
        assert (pair["chosen_reward"], pair["rejected_reward"]) == (max(rewards), min(rewards))
        assert pair["mean_reward"] == pytest.approx(np.mean(rewards))
        assert not set(pair["history"]) & {*pair["chosen"], *pair["rejected"][0]}
        labels = tokenizer.encode_sessions([pair["chosen"], *pair["rejected"]], catalogue_indices=True)
        with torch.no_grad():
            log_probs = (
                model(**encoded, labels=labels).logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
            )
        expected = log_probs.masked_fill(labels == 2, 0).sum(1).tolist()
        assert [pair["chosen_log_prob"], *pair["rejected_log_probs"]] == pytest.approx(expected, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    rewards=st.lists(st.integers(0, 6), min_size=0, max_size=9),
    winner=st.sampled_from([1.0, 0.8]),
    loser=st.sampled_from([0.0, 0.3]),
    num_rejected=st.integers(1, 3),
    gap=st.sampled_from([0.0, 2.0]),
)
def test_pairs_by_quantile_gap_and_number(rewards, winner, loser, num_rejected, gap):
    options = PreferenceSampling(
        winner_quantile=winner, loser_quantile=loser, num_rejected=num_rejected, min_reward_margin=gap
    )
    sessions = np.arange(2 * len(rewards)).reshape(-1, 2)
    pair = options.pair(sessions, np.array(rewards, dtype=np.float32))
    ordered, last = sorted(rewards), len(rewards) - 1
    if last < 1:
        assert pair is None
        return
    best = ordered[last - round((1 - winner) * last)]
    start = round(loser * last)
    expected = [reward for reward in ordered[start : start + num_rejected] if best > reward and best - reward >= gap]
    if not expected:
        assert pair is None
        return
    reward_of = {tuple(session): reward for session, reward in zip(sessions.tolist(), rewards, strict=True)}
    assert reward_of[tuple(pair["chosen"])] == pair["chosen_reward"] == best
    assert [reward_of[tuple(session)] for session in pair["rejected"]] == expected
    assert pair["rejected_reward"] == expected[0] and len({tuple(s) for s in pair["rejected"]}) == len(expected)


@pytest.mark.parametrize(
    "options",
    [
        {"search": "sample", "top_p": 0.9, "num_candidates": 40},
        {"search": "stochastic_beam", "temperature": 2.0},
        {"search": "diverse_beam", "num_beam_groups": 3},
    ],
    ids=["sample", "stochastic_beam", "diverse_beam"],
)
def test_other_searches_give_distinct_legal_sessions(judge, trie, options):
    model, rows = tiny_generator(), training_rows(6)
    pairs = draw(model, trie, judge, rows, **options)
    assert len(pairs) == 6
    for pair in pairs:
        candidates = [tuple(session) for session in pair["candidates"]]
        assert 2 <= len(candidates) == len(set(candidates)) == len(pair["candidate_rewards"])
        assert all(len(set(session)) == 2 and not set(session) & set(pair["history"]) for session in candidates)
    assert draw(model, trie, judge, rows, **options).to_list() == pairs.to_list()


def test_features_of_histories_reach_the_model(tokenizer, judge, trie):
    config = OneRecConfig(**{**tiny_generator().config.to_dict(), "history_feedback": ["like"], "time_gap_buckets": 3})
    model = OneRecForConditionalGeneration(config)
    rows = training_rows(4)
    times = [[float(place) for place in range(len(history))] for history in rows["history"]]
    features = {"history_feedback": [[[place % 2] for place in history] for history in rows["history"]]}
    features |= {"history_timestamps": times, "timestamp": [100.0] * 4}
    rows = Dataset.from_dict(rows[:] | features)
    pairs = draw(model, trie, judge, rows)
    assert {name: pairs[name][:] for name in features} == features
    collator = PreferenceCollator(tokenizer, model, rows)
    batch = collator(pairs.add_column("ntp_rows", [[row] for row in range(4)]).to_list())
    ordinary = SessionCollator(tokenizer, model)(rows.to_list())
    for name in ("history_feedback", "history_time_gaps"):
        assert torch.equal(batch[name], ordinary[name]) and torch.equal(batch[f"ntp_{name}"], ordinary[name])


def test_share_and_seed(judge, trie):
    model, rows = tiny_generator(), training_rows(40)
    drawn = draw(model, trie, judge, rows, r_dpo=0.25)
    assert len(drawn) == 10
    assert draw(model, trie, judge, rows, r_dpo=0.25).to_list() == drawn.to_list()
    assert draw(model, trie, judge, rows, r_dpo=0.25, seed=1)["user_id"][:] != drawn["user_id"][:]


def test_parts_that_are_there_are_not_drawn_again(judge, trie, tmp_path):
    model, rows = tiny_generator(), training_rows(40)
    whole = draw(model, trie, judge, rows, search="sample")
    assert draw(model, trie, judge, rows, parts_dir=tmp_path, search="sample").to_list() == whole.to_list()
    parts = sorted(tmp_path.iterdir())
    assert [path.name for path in parts] == [f"part_{number:06d}.parquet" for number in range(3)]
    # A kill has left the first part alone, and half of the second; the mark tells whether the first is drawn again.
    marked = pq.read_table(parts[0]).slice(0, 1)
    pq.write_table(marked, parts[0])
    parts[1].rename(parts[1].with_suffix(".partial"))
    parts[2].unlink()
    resumed = draw(model, trie, judge, rows, parts_dir=tmp_path, search="sample")
    assert resumed.to_list() == [whole[0], *whole.select(range(16, 40)).to_list()]


def test_rows_without_a_choice_make_no_pair(judge, trie):
    rows = training_rows(10)
    pairs = draw(tiny_generator(), trie, judge, rows)
    gaps = np.subtract(pairs["chosen_reward"][:], pairs["rejected_reward"][:])
    largest = float(gaps.max())
    kept = draw(tiny_generator(), trie, judge, rows, min_reward_margin=largest)
    assert len(kept) == (gaps >= largest).sum() < 10
    # The trie of two items has two sessions of two, of one reward: their sum knows no order.
    few = OneRecTokenizer.from_semantic_ids([1, 2], np.array([[0, 0, 0], [1, 1, 1]]), codebook_sizes=CODEBOOK_SIZES)
    lonely = Dataset.from_dict({"user_id": [0], "history": [[]]}).cast_column("history", rows.features["history"])
    scorer = SessionScorer(judge.model, few)
    assert len(draw(tiny_generator(), ItemTrie.from_tokenizer(few), scorer, lonely)) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r_dpo": 0.0}, "r_dpo"),
        ({"num_candidates": 1}, "at least 2"),
        ({"search": "greedy"}, "search must be one of beam"),
        ({"loser_quantile": 1.0}, "quantiles"),
        ({"num_rejected": 0}, "num_rejected"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PreferenceSampling(**options)


def test_old_names_of_options_warn():
    with pytest.warns(FutureWarning, match="'exclude_history' is now called 'exclude_consumed'"):
        options = PreferenceSampling(sample_share=0.5, min_reward_gap=0.1, exclude_history=False)
    assert options == PreferenceSampling(r_dpo=0.5, min_reward_margin=0.1, exclude_consumed=False)


def test_the_chosen_session_comes_from_guided_search_and_the_rejected_one_from_the_policy(judge, trie):
    model, rows = tiny_generator(), training_rows()
    settings = {"r_dpo": 0.5, "num_candidates": 4, "loser_quantile": 0.5}
    plain = sample_preferences(model, trie, judge, rows, PreferenceSampling(**settings), seed=1)
    guided = PreferenceSampling(**settings, guided_beams=60, num_item_beams=6, guidance_weight=100.0)
    pairs = sample_preferences(model, trie, judge, rows, guided, seed=1)
    guided_pairs = {pair["user_id"]: pair for pair in pairs}
    gains = []
    for pair in plain:
        of_same = guided_pairs[pair["user_id"]]
        assert of_same["candidates"] == pair["candidates"] and of_same["rejected"] == pair["rejected"]
        gains.append(of_same["chosen_reward"] - pair["chosen_reward"])
    assert min(gains) >= 0 and max(gains) > 0
    with pytest.raises(ValueError, match="search must be one of beam, diverse_beam"):
        PreferenceSampling(search="guided_beam")
