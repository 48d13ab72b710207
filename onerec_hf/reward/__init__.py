"""Reward model: session rewards from users' behaviour (paper section 3.3.1)."""

from .configuration_onerec_reward import OneRecRewardConfig
from .exposure_encoding import REWARD_FEATURES, ExposureEncoder, ItemTotals
from .modeling_onerec_reward import OneRecRewardModel, OneRecRewardOutput
from .reward_metrics import group_auc, objective_metrics, reliability_plot
from .reward_objectives import session_label
from .reward_training import (
    OneRecRewardTrainer,
    RewardCollator,
    RewardPredictions,
    create_reward_model,
    fit_calibration,
    label_means,
    predict_rewards,
    train_reward_model,
    user_fold,
    user_half,
)
from .session_scoring import SessionScorer, SessionScores

__all__ = [
    "REWARD_FEATURES",
    "ExposureEncoder",
    "ItemTotals",
    "OneRecRewardConfig",
    "OneRecRewardModel",
    "OneRecRewardOutput",
    "OneRecRewardTrainer",
    "RewardCollator",
    "RewardPredictions",
    "SessionScorer",
    "SessionScores",
    "create_reward_model",
    "fit_calibration",
    "group_auc",
    "label_means",
    "objective_metrics",
    "predict_rewards",
    "reliability_plot",
    "session_label",
    "train_reward_model",
    "user_fold",
    "user_half",
]
