"""The session that a user is served: cascades, guided search, the oracle, replay, and what is reported of each."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from alignment_cases import NUM_ITEMS, tiny_generator
from test_policy_evaluator import make_evaluator, make_scorer

from onerec_hf import Recommender, generate_sessions
from onerec_hf.evaluation import (
    Replay,
    ServedMethod,
    ServedSessions,
    add_oracle_shares,
    cascade_sessions,
    oracle_sessions,
)
from onerec_hf.reporting.served_report import frontier, served_figure, served_section, served_table, served_text
from onerec_hf.session_likelihood import session_log_probs


class World:
    """Users want every item as much as they are told; an item after a smaller one is worth nothing."""

    def __init__(self, values):
        self.values = values

    def expected_feedback(self, user_ids, session_item_ids):
        items = np.asarray(session_item_ids) - 100
        falling = np.diff(items, axis=-1, prepend=NUM_ITEMS) < 0
        return {"swt": (self.values[items] * falling).mean(-1)}


def test_a_greedy_session_takes_at_every_place_what_makes_it_best():
    scorer, evaluator = make_scorer("swt", "vtr"), make_evaluator()
    rows, candidates = evaluator.judged_rows, torch.stack([torch.randperm(NUM_ITEMS)[:7] for _ in range(10)])
    candidates[3, 4:] = -1
    built = cascade_sessions(scorer, rows, candidates, 2, "session", batch_size=3)
    alone = cascade_sessions(scorer, rows, candidates, 2, "item")
    for row, items, greedy, ranked in zip(rows, candidates.tolist(), built.tolist(), alone.tolist(), strict=True):
        items = [item for item in items if item >= 0]
        single = scorer.score([row], torch.tensor([[[item, -1] for item in items]])).reward[0]
        best = [items[place] for place in single.argsort(descending=True)]
        pairs = [[best[0], item] for item in items if item != best[0]]
        rewards = scorer.score([row], torch.tensor([pairs])).reward[0]
        assert ranked == best[:2]
        assert greedy == pairs[int(rewards.argmax())]


def test_a_session_ends_with_its_candidates():
    scorer, rows = make_scorer("swt"), make_evaluator().judged_rows[:2]
    candidates = torch.tensor([[4, -1, -1], [-1, -1, -1]])
    for ranker in ("item", "session"):
        assert cascade_sessions(scorer, rows, candidates, 2, ranker).tolist() == [[4, -1], [-1, -1]]
    with pytest.raises(ValueError, match="one of item, session, got 'list'"):
        cascade_sessions(scorer, rows, candidates, 2, "list")


def test_the_oracle_is_greedy_by_the_truth():
    values = np.linspace(0.1, 0.9, NUM_ITEMS)
    candidates = torch.arange(NUM_ITEMS).repeat(3, 1)
    candidates[1, NUM_ITEMS - 1] = -1
    users, ids = np.array(["a", "b", "c"]), np.arange(100, 100 + NUM_ITEMS)
    found = oracle_sessions(World(values), make_scorer("swt"), ids, users, candidates, 2)
    assert found.tolist() == [[29, 28], [28, 27], [29, 28]]


@pytest.mark.parametrize("item_head", [False, True])
@pytest.mark.parametrize("weight", [0.0, 1.0, 15.0])
def test_with_enough_beams_guided_search_finds_the_best_sum_of_likelihood_and_reward(weight, item_head):
    head = {"encoder_attention": "causal", "history_positions": "item", "item_head": "encoder", "num_items": NUM_ITEMS}
    model = tiny_generator(**(head | {"item_share": 0.4} if item_head else {})).eval()
    evaluator, scorer = make_evaluator(), make_scorer("swt", "vtr")
    rows = evaluator.judged_rows[:4]
    inputs, guide = evaluator.inputs(model, rows), scorer.guide(rows)
    everything = torch.tensor(list(itertools.permutations(range(NUM_ITEMS), 2))).expand(len(rows), -1, -1)
    rewards = scorer.score(rows, everything).reward
    firsts = everything[:, : (NUM_ITEMS - 1) ** 2 : NUM_ITEMS - 1, :1]  # of the permutations, every first item once
    of_first = rewards.view(len(rows), NUM_ITEMS, NUM_ITEMS - 1)[:, : firsts.shape[1]]
    followers = everything.view(len(rows), NUM_ITEMS, NUM_ITEMS - 1, 2)[:, : firsts.shape[1], :, 1]
    torch.testing.assert_close(guide(firsts, followers), of_first)
    with torch.no_grad():
        log_probs = session_log_probs(model, evaluator.trie, everything, **inputs, normalization="level")
    search = {"search": "guided_beam", "guide": guide, "guidance_weight": weight}
    found = generate_sessions(model, evaluator.trie, **inputs, **search, num_beams=30, num_item_beams=30, num_return=5)
    best = (log_probs + weight * 2 * rewards).topk(5)
    torch.testing.assert_close(found.scores, log_probs.gather(1, best.indices), atol=1e-4, rtol=1e-4)
    assert found.items.tolist() == everything.take_along_dim(best.indices[..., None], dim=1).tolist()


def test_guidance_needs_a_guide_and_few_beams_give_real_sessions():
    evaluator, scorer, model = make_evaluator(), make_scorer("swt"), tiny_generator().eval()
    rows = evaluator.judged_rows
    inputs = evaluator.inputs(model, rows)
    with pytest.raises(ValueError, match="needs a guide"):
        generate_sessions(model, evaluator.trie, **inputs, search="guided_beam")
    sessions = evaluator.best_sessions(model, scorer=scorer, num_beams=2, num_item_beams=3, guidance_weight=5.0)
    for session, row in zip(sessions.tolist(), rows, strict=True):
        assert len(set(session)) == 2 and min(session) >= 0 and not set(session) & set(row["history"])
    histories = [[100 + item for item in row["history"]] for row in rows]
    recommended = Recommender(model, evaluator.tokenizer, scorer)(
        histories, top_k=3, num_beams=6, search="guided_beam", num_item_beams=3, guidance_weight=5.0
    )
    assert [row["session"] for row in recommended] == (sessions + 100).tolist()
    plain = Recommender(model, evaluator.tokenizer)(histories, top_k=3, num_beams=6)
    assert [row["items"] for row in recommended] == [row["items"] for row in plain]
    likeliest = evaluator.best_sessions(model, num_beams=6)
    assert [row["session"] for row in plain] == (likeliest + 100).tolist()
    with pytest.raises(ValueError, match="give the Recommender a scorer"):
        Recommender(model, evaluator.tokenizer)(histories, search="guided_beam")


def test_replay_counts_what_the_log_showed_to_the_same_user():
    shown = pd.DataFrame(
        {
            "user_id": ["a", "a", "a", "b", "stranger"],
            "item_id": [103, 104, 103, 105, 106],
            "view": [1.0, 0.0, 0.0, np.nan, 1.0],
        }
    )
    replay = Replay(np.array(["a", "b", "c"]), shown, make_scorer({"name": "vtr", "source": "view", "kind": "binary"}))
    found = replay.of(torch.tensor([[3, 4], [5, 6], [3, -1]]))
    assert found["items"] == 3 and found["share"] == 3 / 5
    # The first showing counts; of b's item nothing is known, and c was shown nothing.
    assert found["feedback"]["vtr"] == {"mean": 0.5, "interval": [0.5, 0.5]}
    assert replay.of(torch.tensor([[7, 8], [-1, -1], [3, 4]])) == {"items": 0, "share": 0.0, "feedback": {}}


@pytest.fixture
def served():
    world = SimpleNamespace(expected_feedback=lambda users, items: {"swt": (np.asarray(items) - 100).mean(-1) / 30})
    evaluator = make_evaluator(scorers={"reward_model": make_scorer("swt")}, world=world)
    following = [np.array([5, row]) for row in range(10, 20)]
    sessions = ServedSessions(evaluator, following)
    rows = torch.arange(10)[:, None]
    guided = ServedMethod("onerec", "beam", 32, guided=True, round=0, guidance_weight=8.0)
    return [
        sessions.entry(ServedMethod("popularity", "popularity"), torch.tensor([[5, 6]]).expand(10, -1), 0.5),
        sessions.entry(ServedMethod("cascade", "popularity", 32, "session"), torch.cat([rows + 10, rows], 1), 1.5),
        sessions.entry(guided, torch.cat([rows, rows + 1], 1), 2.0),
        sessions.entry(ServedMethod("oracle"), torch.tensor([[28, 29]]).expand(10, -1), None),
    ]


def test_an_entry_says_what_was_served_and_how_far_it_is_from_the_truth(served):
    assert [entry["recall"] for entry in served] == [0.5, 0.55, 0.1, 0.0]
    assert served[0]["coverage"] == 2 / NUM_ITEMS and served[3]["milliseconds"] is None
    assert served[1]["judges"]["truth"]["reward"] == pytest.approx(9.5 / 30)
    assert served[1]["replay"] is None and served[2]["round"] == 0 and served[1]["round"] is None
    add_oracle_shares(served)
    assert [round(entry["oracle_share"], 4) for entry in served] == [0, round(4 / 23, 4), round(-0.5 / 23, 4), 1]


def test_nothing_served_is_an_entry_without_figures():
    evaluator = make_evaluator(scorers={"reward_model": make_scorer("swt")})
    following = [np.array([1])] * 10
    entry = ServedSessions(evaluator, following).entry(ServedMethod("ease", "ease"), torch.full((10, 2), -1), 1.0)
    assert entry["judges"] == {} and entry["recall"] == entry["coverage"] == 0
    assert entry["diversity"] is entry["popular_item_share"] is None
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    entries = [entry, {"method": "oracle", "judges": {}}]
    add_oracle_shares(entries)
    assert not any("oracle_share" in each for each in entries)


def test_the_report_shows_every_method_and_joins_the_best(served):
    text = served_section(served)
    names = (
        "Popularity, first items",
        "Popularity&#x27;s 32, session by reward",
        "OneRec 0, guided, 32 beams, weight 8",
    )
    assert all(name in text for name in names) and "data:image/svg" in text and "of the way" not in text
    assert served_section([]) == ""
    add_oracle_shares(served)
    assert "of the way" in served_text(served) and "of the way" in served_table(served).header
    assert len(served_figure(served).axes) == 1
    points = np.array([[0.1, 2.0], [0.2, 1.0], [0.2, 0.5], [0.05, 1.0], [0.1, 2.0]])
    assert frontier(points) == [1, 0]
