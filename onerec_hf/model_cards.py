"""The former path of `onerec_hf.reporting.model_cards`."""

import warnings

from .reporting.model_cards import *  # noqa: F403

warnings.warn("onerec_hf.model_cards has moved to onerec_hf.reporting.model_cards", FutureWarning, stacklevel=2)
