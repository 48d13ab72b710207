"""Iterative preference alignment: pairs by beam search and reward, DPO mixed with NTP (paper section 3.3.2)."""

from .dpo_trainer import OneRecDPOConfig, OneRecDPOTrainer, PreferenceCollator
from .session_sampler import sample_preferences

__all__ = ["OneRecDPOConfig", "OneRecDPOTrainer", "PreferenceCollator", "sample_preferences"]
