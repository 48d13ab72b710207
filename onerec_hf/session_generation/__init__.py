"""Session generation: sessions and ranked items under the item constraint, their likelihoods, recommending by id."""

from .beam_cache import BeamCacheLayer, BeamPaths
from .code_scores import NORMALIZATIONS, CodeScores
from .custom_generate import generate_with_trie
from .generation import DecidedItem, SessionBeams, generate_sessions, stream_sessions
from .item_gate import fit_item_gate
from .likelihood import sampled_divergence, session_log_probs
from .recommender import Recommender, excluded_items, recommend
from .searches import SEARCHES, SearchOptions
