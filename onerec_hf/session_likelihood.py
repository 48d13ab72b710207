"""Where [`session_log_probs`] and [`sampled_divergence`] used to be; they are part of session_generation."""

from .session_generation import sampled_divergence, session_log_probs

__all__ = ["sampled_divergence", "session_log_probs"]
