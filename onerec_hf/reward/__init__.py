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
from .session_scoring import SessionScores, item_code_ids, score_sessions

__all__ = [
    "OneRecRewardConfig",
    "OneRecRewardModel",
    "OneRecRewardOutput",
    "OneRecRewardTrainer",
    "RewardCollator",
    "SessionScores",
    "item_code_ids",
    "label_means",
    "objective_metrics",
    "reward_metrics",
    "score_sessions",
    "user_half",
]
