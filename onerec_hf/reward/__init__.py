"""Reward model: session rewards from users' behaviour (paper section 3.3.1)."""

from .configuration_onerec_reward import OneRecRewardConfig
from .exposure_encoding import REWARD_FEATURES, ExposureEncoder, ItemTotals
from .modeling_onerec_reward import OneRecRewardModel, OneRecRewardOutput
from .reward_metrics import group_auc, objective_metrics, reliability_plot
from .reward_objectives import objective_labels, session_label
from .reward_training import (
    OneRecRewardTrainer,
    RewardCollator,
    RewardPredictions,
    calibrate,
    create_reward_model,
    fit_calibration,
    label_means,
    predict_rewards,
    train_reward_model,
    user_fold,
    user_half,
    without_calibration_users,
)
from .session_scoring import RewardGuide, SessionScorer, SessionScores
