"""Counterfactual estimates against a log whose truth is known, and by hand."""

import numpy as np
import pytest

from onerec_hf.evaluation import LoggedFeedback, PolicyOnLog, exposure_shares

ITEMS, USERS, PER_USER = 6, 4000, 4


@pytest.fixture(scope="module")
def world():
    """A log of two kinds of users with a logging policy of its own, two target policies, and what they are worth."""
    random = np.random.default_rng(0)
    kind = random.integers(2, size=USERS)
    chance = random.uniform(0.05, 0.9, size=(2, ITEMS))  # of a view, by kind and item
    logging = random.dirichlet(np.full(ITEMS, 3.0))
    policies = random.dirichlet(np.full(ITEMS, 2.0), size=(2, 2))  # seed and target, by kind
    shown = random.choice(ITEMS, p=logging, size=(USERS, PER_USER))
    views = (random.random(shown.shape) < chance[kind][np.arange(USERS)[:, None], shown]).astype(float)
    nothing = random.random(shown.shape) < 0.3
    shown = np.where(nothing, -1, shown)
    truth = [(policy * chance).sum(1)[kind].mean() for policy in policies]
    return kind, chance, logging, policies, shown, np.where(nothing, np.nan, views), truth


def feedback(world, predicted_chance, propensity, clip=50.0):
    kind, _, _, _, shown, views, _ = world
    place = (np.arange(USERS)[:, None], shown)
    return LoggedFeedback(
        np.where(shown >= 0, propensity[shown], np.nan), {"vtr": views}, {"vtr": predicted_chance[kind][place]}, clip
    )


def on_log(world, policy, predicted_chance):
    kind, _, _, policies, shown, _, _ = world
    probabilities = policies[policy][kind]
    log_probs = np.log(probabilities[np.arange(USERS)[:, None], shown])
    expected = (probabilities * predicted_chance[kind]).sum(1)
    return PolicyOnLog(np.where(shown >= 0, log_probs, np.nan), {"vtr": expected})


def test_true_propensities_give_the_true_value_and_difference(world):
    _, chance, logging, _, shown, _, (seed_value, value) = world
    wrong = np.full_like(chance, 0.5)
    log = feedback(world, wrong, logging)
    result = log.estimates(on_log(world, 1, wrong), on_log(world, 0, wrong))
    values = result["heads"]["vtr"]
    for name in ("snips", "doubly_robust"):
        low, high = values[f"{name}_interval"]
        assert low < value < high and high - low < 0.08
        assert values[name] == pytest.approx(value, abs=0.03)
        low, high = values[f"{name}_difference_interval"]
        assert low < value - seed_value < high
    assert result["mean_weight"] == pytest.approx(1, abs=0.03) and result["conclusive"]
    off = feedback(world, wrong, logging / 3).estimates(on_log(world, 1, wrong))
    assert off["mean_weight"] > 2 and off["effective_sample_size"] > 100 and not off["conclusive"]
    assert result["exposures"] == (shown >= 0).sum() and result["clipped_share"] == 0


def test_a_true_model_makes_up_for_wrong_propensities_and_narrows_the_interval(world):
    _, chance, logging, _, _, _, (_, value) = world
    wrong = np.full(ITEMS, 1 / ITEMS)
    values = feedback(world, chance, wrong).estimates(on_log(world, 1, chance))["heads"]["vtr"]
    assert values["doubly_robust"] == pytest.approx(value, abs=0.015)
    assert abs(values["snips"] - value) > 3 * abs(values["doubly_robust"] - value)
    width = {}
    for name, model in (("true", chance), ("none", np.zeros_like(chance))):
        low, high = feedback(world, model, logging).estimates(on_log(world, 1, model))["heads"]["vtr"][
            "doubly_robust_interval"
        ]
        width[name] = high - low
    assert width["true"] < width["none"]


def test_by_hand_with_clipped_weights():
    log = LoggedFeedback(
        np.array([[0.5, 0.1], [0.25, np.nan]]),
        {"vtr": np.array([[1.0, 0.0], [0.5, np.nan]])},
        {"vtr": np.array([[0.5, 0.5], [0.5, 0.0]])},
        clip=2.0,
    )
    policy = PolicyOnLog(np.log([[0.5, 0.4], [0.25, np.nan]]), {"vtr": np.array([0.6, 0.3])})
    np.testing.assert_allclose(log.weights(policy), [[1, 2], [1, np.nan]])
    result = log.estimates(policy)
    values = result["heads"]["vtr"]
    assert values["snips"] == pytest.approx(1.5 / 4)
    assert values["doubly_robust"] == pytest.approx((2 * 0.6 + 0.3) / 3 + (0.5 - 1.0) / 4)
    assert values["logged"] == pytest.approx(0.5)
    assert result["effective_sample_size"] == pytest.approx(16 / 6) and not result["conclusive"]
    assert result["clipped_share"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="nothing to estimate from"):
        log.estimates(PolicyOnLog(np.full((2, 2), -np.inf), policy.expected))


def test_exposure_shares_are_smoothed():
    np.testing.assert_allclose(exposure_shares(np.array([1, 1, 2]), 4), np.array([1, 3, 2, 1]) / 7)
