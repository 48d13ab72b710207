"""Iterative preference alignment: pairs by search and reward, DPO mixed with NTP (paper section 3.3.2)."""

from .dpo_trainer import OneRecDPOConfig, OneRecDPOTrainer, PreferenceCollator
from .session_sampler import PreferenceSampling, sample_preferences
