"""The report's first sentences, from made-up metrics."""

import pytest

from onerec_hf.reporting.verdict import difference_interval, verdict_sentences

SPLIT = {"evaluation_start": "2024-01-13T19:06:48+00:00", "data_end": "2024-01-14T23:41:05+00:00"}
DATASET = {"num_evaluated_users": 1405, "num_judged_users": 200, "split": SPLIT}


def recall(value, spread=0.01):
    return {"recall@10": value, "recall@10_interval": [value - spread, value + spread]}


def served(method, rewards, retriever="beam", number=None, candidates=None):
    judges = {
        judge: {"reward": reward, "interval": [reward - 0.03, reward + 0.03]}
        for judge, reward in zip(("reward_model", "independent_judge"), rewards, strict=True)
    }
    entry = {"method": method, "retriever": retriever, "candidates": candidates, "round": number, "judges": judges}
    return entry | {"guided": False, "ranker": "session" if method == "cascade" else None}


def sentences(ours, other=0.08, **parts):
    baselines = {"popularity": recall(0.02), "ease": recall(other)}
    return verdict_sentences({"dataset": DATASET, "onerec": recall(ours), "baselines": baselines, **parts})


def test_an_interval_of_a_difference_of_equal_spreads_is_wider_by_the_root_of_two():
    assert difference_interval(0.1, [0.07, 0.14], 0.2, [0.17, 0.24]) == pytest.approx([-0.15, -0.05])
    assert difference_interval(1.0, [0.7, 1.4], 1.0, [1.0, 1.0]) == pytest.approx([-0.3, 0.4])


@pytest.mark.parametrize(
    "ours, said",
    [
        (0.1, "is better than the best baseline, EASE: Recall@10 0.1000 against 0.0800, a difference of +0.02 (95% "),
        (
            0.085,
            "is level with the best baseline, EASE: Recall@10 0.0850 against 0.0800, a difference of +0.005 (95% ",
        ),
        (0.06, "is worse than the best baseline, EASE: Recall@10 0.0600 against 0.0800, a difference of -0.02 (95% "),
    ],
)
def test_the_next_item_against_the_best_baseline(ours, said):
    next_item, measured = sentences(ours)  # without a reward model there is no more to say
    assert next_item.startswith(f"Next item: OneRec {said}")
    assert next_item.endswith("includes 0)." if "level" in said else "excludes 0).")
    assert measured == (
        "Measured on 1,405 users (200 of them for sessions), whose behaviour from 2024-01-13 to 2024-01-14 was not "
        "trained on."
    )


def test_what_was_not_measured_is_not_judged():
    alone = verdict_sentences({"onerec": recall(0.1)})
    assert "no baseline was fitted" in alone[0] and "better" not in alone[0]
    bare = verdict_sentences({"onerec": {"recall@10": 0.1}, "baselines": {"ease": {"recall@10": 0.05}}})
    assert "OneRec is higher than" in bare[0] and "nothing is certain" in bare[0]
    assert verdict_sentences({"dataset": DATASET}) == []


def test_alignment_is_what_the_last_kept_round_has_changed():
    def change(gain):
        return {"relative": gain, "interval": [gain - 0.01, gain + 0.01]}

    judges = {"reward_model": {"reward_mean": change(0.2)}, "truth": {"reward_mean": change(-0.05)}}
    rounds = [
        {"round": 0, "kept": True},
        {"round": 1, "kept": True, "change": {"judges": judges, "recall@10": change(0.0)}},
        {"round": 2, "kept": False, "change": {"judges": {}, "recall@10": change(0.9)}},
    ]
    found = sentences(0.1, alignment=rounds)
    assert found[0].startswith("Next item: OneRec after alignment is better")
    assert found[1] == (
        "Alignment: by the simulated truth the generated sessions are worse than before: mean reward -5.0% [-6.0%, "
        "-4.0%]; the next item is level with before: Recall@10 +0.0% [-1.0%, +1.0%] (paired by user)."
    )
    assert len(sentences(0.1, alignment=[rounds[0], rounds[1] | {"kept": False}])) == 2


def test_served_sessions_are_chosen_by_the_reward_model_and_compared_by_the_independent_judge():
    entries = [
        served("onerec", (9.0, 9.0), number=0),  # before alignment
        served("onerec", (1.3, 1.0), number=1, candidates=None),
        served("onerec", (1.2, 5.0), number=1),
        served("cascade", (1.4, 1.2), "ease", candidates=128),
        served("cascade", (1.3, 2.0), "sasrec", candidates=32),
        served("cascade", (9.9, 9.9), "onerec", 1, candidates=32),  # of OneRec's own candidates
    ]
    found = sentences(0.1, served=entries)[1]
    assert found.startswith(
        "Served session, by the independent judge: OneRec 1, likeliest session, is worse than the best cascade, "
        "EASE's 128, session by reward: mean reward 1.0000 against 1.2000, a difference of -0.2 (95% interval "
        "-0.242 to -0.158, which excludes 0)."
    )
    assert found.endswith("Both were chosen by the reward model.")
    assert len(sentences(0.1, served=entries[:3])) == 2
