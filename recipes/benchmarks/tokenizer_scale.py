"""The tokenizer at a million items: loading, memory, encoding, new items. A part of `semantic_ids.py`."""

import gc
import multiprocessing
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import psutil
import torch

from onerec_hf import OneRecTokenizer
from onerec_hf.semantic_ids import ResidualQuantizer

NUM_ITEMS = 1_000_000
NUM_LEVELS, CODEBOOK_SIZE, DIM = 3, 256, 16
NUM_HISTORIES, HISTORY_ITEMS = 100_000, 64
NEW_ITEMS = 1_000


def measure() -> list[tuple[str, float, float | None]]:
    """(what and its unit, measured, the most it may be) for integer and for string ids."""
    rows = []
    for kind in ("integer", "string"):
        with tempfile.TemporaryDirectory() as directory:
            _tokenizer(kind).save_pretrained(directory)
            # In a process of its own, so that the memory is the tokenizer's alone.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                figures = process.submit(_use, directory).result()
        rows += [(f"{kind} ids: {name}", value, bar) for name, value, bar in figures]
    return rows


def _tokenizer(kind: str) -> OneRecTokenizer:
    """A catalogue of random items in random order, each with an ID of its own."""
    generator = np.random.default_rng(0)
    numbers = generator.choice(10**12, NUM_ITEMS, replace=False)
    quantizer = ResidualQuantizer.from_codebooks(
        torch.from_numpy(generator.normal(size=(NUM_LEVELS, CODEBOOK_SIZE, DIM)).astype(np.float32))
    )
    semantic_ids = generator.choice(CODEBOOK_SIZE**NUM_LEVELS, NUM_ITEMS, replace=False)
    codes = np.stack(np.unravel_index(semantic_ids, (CODEBOOK_SIZE,) * NUM_LEVELS), axis=1)
    item_ids = numbers if kind == "integer" else [f"item-{number:012d}" for number in numbers]
    return OneRecTokenizer.from_semantic_ids(item_ids, codes, quantizer=quantizer)


def _use(directory: str) -> list[tuple[str, float, float | None]]:
    with tempfile.TemporaryDirectory() as small:
        # What a first tokenizer loads and starts once is not a cost of the items.
        OneRecTokenizer.from_semantic_ids(["a"], [[0]], codebook_sizes=[1]).save_pretrained(small)
        OneRecTokenizer.from_pretrained(small).item_index(["a"])
    gc.collect()
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    tokenizer = OneRecTokenizer.from_pretrained(directory)
    load = time.perf_counter() - started
    tokenizer.item_index(tokenizer.item_ids[:1])
    gc.collect()
    memory = (psutil.Process().memory_info().rss - before) / tokenizer.num_items

    drawn = np.random.default_rng(1).integers(tokenizer.num_items, size=(NUM_HISTORIES, HISTORY_ITEMS))
    histories = [tokenizer.item_ids[row].tolist() for row in drawn]
    started = time.perf_counter()
    batch = tokenizer.encode_histories(histories)
    encode = time.perf_counter() - started
    assert batch["input_ids"].shape == (NUM_HISTORIES, HISTORY_ITEMS * (NUM_LEVELS + 1) - 1)
    single = _milliseconds(lambda: tokenizer.encode_histories(histories[:1]))

    embeddings = tokenizer.quantizer.decode(tokenizer.codes[:NEW_ITEMS]) + 0.01
    new_ids = [f"new-{number}" for number in range(NEW_ITEMS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the codes here are random, so that a refit is due from the start
        add = _milliseconds(
            lambda: tokenizer.add_items(
                new_ids if isinstance(histories[0][0], str) else range(-NEW_ITEMS, 0), embeddings
            )
        )
    return [
        (f"load {NUM_ITEMS:,} items [s]", load, 3.0),
        ("memory per item [bytes]", memory, 150.0),
        (f"encode {NUM_HISTORIES:,} histories of {HISTORY_ITEMS} [s]", encode, 10.0),
        ("encode one history [ms]", single, None),
        (f"add {NEW_ITEMS:,} items [ms]", add, None),
    ]


def _milliseconds(work) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


if __name__ == "__main__":
    for name, value, bar in measure():
        print(f"{name:60s} {value:10.2f}" + (f"   at most {bar:g}" if bar else ""))
