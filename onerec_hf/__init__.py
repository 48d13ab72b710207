"""OneRec (arXiv 2502.18965) on Hugging Face: semantic IDs, session generation, reward model, preference alignment."""

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY

from .alignment import OneRecDPOConfig, OneRecDPOTrainer, PreferenceSampling, sample_preferences
from .configuration_onerec import OneRecConfig
from .data import DataArguments, DataError, Feed, SimulatedFeed, feed_from_log, load_feed, split_feed
from .evaluation import EASE, Fused, ItemKNN, Popularity, SASRec, rank_items, ranking_metrics
from .item_embeddings import embed_items
from .item_memory import remember_items
from .item_trie import ItemTrie, ItemTrieLogitsProcessor
from .modeling_onerec import OneRecForConditionalGeneration, OneRecModel
from .pipeline_generative_recommendation import GenerativeRecommendationPipeline
from .pretraining import OneRecPretrainer
from .reward import OneRecRewardConfig, OneRecRewardModel, OneRecRewardTrainer, SessionScorer, create_reward_model
from .semantic_ids import make_quantizer
from .session_generation import (
    Recommender,
    SessionBeams,
    generate_sessions,
    generate_with_trie,
    recommend,
    stream_sessions,
)
from .session_rows import index_sessions, training_sessions
from .sharded_rows import ShardedRows
from .shared_histories import share_histories
from .tokenization_onerec import OneRecTokenizer

__version__ = "0.1.0"

AutoConfig.register("onerec", OneRecConfig)
AutoConfig.register("onerec_reward", OneRecRewardConfig)
AutoModel.register(OneRecConfig, OneRecModel)
AutoModel.register(OneRecRewardConfig, OneRecRewardModel)
AutoModelForSeq2SeqLM.register(OneRecConfig, OneRecForConditionalGeneration)
AutoTokenizer.register(OneRecConfig, tokenizer_class=OneRecTokenizer)
AutoTokenizer.register(OneRecRewardConfig, tokenizer_class=OneRecTokenizer)
PIPELINE_REGISTRY.register_pipeline(
    "generative-recommendation",
    pipeline_class=GenerativeRecommendationPipeline,
    pt_model=AutoModelForSeq2SeqLM,
    type="text",
)

__all__ = [
    "DataArguments",
    "DataError",
    "EASE",
    "Feed",
    "Fused",
    "GenerativeRecommendationPipeline",
    "ItemKNN",
    "ItemTrie",
    "ItemTrieLogitsProcessor",
    "OneRecConfig",
    "OneRecDPOConfig",
    "OneRecDPOTrainer",
    "OneRecForConditionalGeneration",
    "OneRecModel",
    "OneRecPretrainer",
    "OneRecRewardConfig",
    "OneRecRewardModel",
    "OneRecRewardTrainer",
    "OneRecTokenizer",
    "Popularity",
    "PreferenceSampling",
    "Recommender",
    "SASRec",
    "SessionBeams",
    "SessionScorer",
    "ShardedRows",
    "SimulatedFeed",
    "__version__",
    "create_reward_model",
    "embed_items",
    "feed_from_log",
    "generate_sessions",
    "generate_with_trie",
    "index_sessions",
    "load_feed",
    "make_quantizer",
    "rank_items",
    "ranking_metrics",
    "recommend",
    "remember_items",
    "sample_preferences",
    "share_histories",
    "split_feed",
    "stream_sessions",
    "training_sessions",
]
