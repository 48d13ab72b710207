"""Reward model: session rewards from users' behaviour (paper section 3.3.1)."""

from .configuration_onerec_reward import OneRecRewardConfig
from .modeling_onerec_reward import OneRecRewardModel, OneRecRewardOutput
from .reward_training import (
    OneRecRewardTrainer,
    RewardCollator,
    label_means,
    objective_metrics,
    reward_metrics,
    user_half,
)
from .session_scoring import REWARD_FEATURES, SessionScorer, SessionScores, item_code_ids

__all__ = [
    "OneRecRewardConfig",
    "OneRecRewardModel",
    "OneRecRewardOutput",
    "OneRecRewardTrainer",
    "REWARD_FEATURES",
    "RewardCollator",
    "SessionScorer",
    "SessionScores",
    "item_code_ids",
    "label_means",
    "objective_metrics",
    "reward_metrics",
    "user_half",
]
