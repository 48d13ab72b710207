"""A tiny generator, its catalogue, rows and pairs, for the tests of alignment."""

import numpy as np
import torch
from datasets import Dataset

from onerec_hf.alignment import OneRecDPOConfig, OneRecDPOTrainer
from onerec_hf.configuration_onerec import OneRecConfig
from onerec_hf.modeling_onerec import OneRecForConditionalGeneration
from onerec_hf.tokenization_onerec import OneRecTokenizer

CODEBOOK_SIZES = [4, 4, 4]
NUM_ITEMS = 30


def tiny_tokenizer() -> OneRecTokenizer:
    items = np.random.default_rng(0).permutation(64)[:NUM_ITEMS]
    codes = np.stack([items // 16, items // 4 % 4, items % 4], axis=1)
    return OneRecTokenizer.from_semantic_ids(np.arange(100, 100 + NUM_ITEMS), codes, codebook_sizes=CODEBOOK_SIZES)


def tiny_generator(seed: int = 0, **overrides) -> OneRecForConditionalGeneration:
    """Two-item sessions, with dropout, whose output weights are large enough for codes to differ in probability."""
    torch.manual_seed(seed)
    settings = {"codebook_sizes": CODEBOOK_SIZES, "history_items": 6, "session_items": 2, "dropout": 0.1}
    model = OneRecForConditionalGeneration(OneRecConfig.from_preset("debug", **(settings | overrides)))
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    return model


def training_rows(count: int = 40) -> Dataset:
    rng = np.random.default_rng(1)
    histories = [rng.choice(NUM_ITEMS, rng.integers(0, 9), replace=False).tolist() for _ in range(count)]
    return Dataset.from_dict(
        {
            "user_id": [f"u{row}" for row in range(count)],
            "history": histories,
            "session": [rng.choice(NUM_ITEMS, 2, replace=False).tolist() for _ in range(count)],
            "length": [len(history) for history in histories],
        }
    )


def preference_pairs(count: int = 8) -> Dataset:
    """Pairs of which every second one has two rejected sessions."""
    rng = np.random.default_rng(2)
    rows = []
    for row in range(count):
        chosen, *rejected = rng.choice(NUM_ITEMS, 6, replace=False).reshape(3, 2).tolist()
        history = rng.choice(NUM_ITEMS, 1 + row % 5, replace=False).tolist()
        rows.append({"user_id": row, "history": history, "chosen": chosen, "rejected": rejected[: 1 + row % 2]})
    return Dataset.from_list(rows)


def dpo_arguments(output_dir, **overrides) -> OneRecDPOConfig:
    settings = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "lambda_dpo": 0.5,
        "ntp_per_pair": 2,
        "max_steps": 6,
    }
    return OneRecDPOConfig(**(settings | overrides))


def make_trainer(tokenizer, output_dir, model=None, pairs=None, trainer_options=None, **overrides) -> OneRecDPOTrainer:
    return OneRecDPOTrainer(
        model or tiny_generator(),
        dpo_arguments(output_dir, **overrides),
        train_dataset=pairs or preference_pairs(),
        processing_class=tokenizer,
        **({"ntp_dataset": training_rows()} | (trainer_options or {})),
    )
