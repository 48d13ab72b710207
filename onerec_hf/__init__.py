"""OneRec (arXiv 2502.18965) on Hugging Face: semantic IDs, session generation, reward model, preference alignment."""

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_onerec import OneRecConfig
from .item_trie import ItemTrie, ItemTrieLogitsProcessor
from .modeling_onerec import OneRecForConditionalGeneration, OneRecModel
from .pipeline_generative_recommendation import GenerativeRecommendationPipeline
from .reward import OneRecRewardConfig, OneRecRewardModel
from .session_generation import (
    Recommender,
    SessionBeams,
    generate_sessions,
    generate_with_trie,
    recommend,
    stream_sessions,
)
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
    "GenerativeRecommendationPipeline",
    "ItemTrie",
    "ItemTrieLogitsProcessor",
    "OneRecConfig",
    "OneRecForConditionalGeneration",
    "OneRecModel",
    "OneRecRewardConfig",
    "OneRecRewardModel",
    "OneRecTokenizer",
    "Recommender",
    "SessionBeams",
    "__version__",
    "generate_sessions",
    "generate_with_trie",
    "recommend",
    "stream_sessions",
]
