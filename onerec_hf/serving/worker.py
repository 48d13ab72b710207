"""The process that holds the model: batches of requests in, answers out, as JSON over a pipe."""

import json
import signal
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import logging

from ..modeling_onerec import OneRecForConditionalGeneration
from ..reward import SessionScorer
from ..session_generation import Recommender
from ..tokenization_onerec import OneRecTokenizer
from .requests import RecommendRequest

# What a user's request is wrong by, as [`Recommender`] and what it calls say it.
REFUSALS = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


def load_recommender(model: str, reward_model: str | None) -> Recommender:
    """The recommender of a folder's generator, and of a folder's reward model, on this process' device."""
    device = PartialState().device
    generator = OneRecForConditionalGeneration.from_pretrained(model).to(device).eval()
    scorer = None if reward_model is None else SessionScorer.from_pretrained(reward_model, device)
    return Recommender(generator, OneRecTokenizer.from_pretrained(model), scorer)


def warm_up(recommender: Recommender) -> None:
    """Recommends once, with all that a model may read of a user.

    Raises:
        ValueError: the model's scores are no numbers.
    """
    config, items = recommender.model.config, recommender.tokenizer.item_ids[:2].tolist()
    row = {
        "history_item_ids": items,
        "history_feedback": [[None] * len(config.history_feedback)] * len(items),
        "history_timestamps": [0.0] * len(items),
        "timestamp": 0.0,
        "user_features": dict.fromkeys(config.user_features),
    }
    recommender([row, row], session_scores=True)


def describe(recommender: Recommender) -> dict[str, Any]:
    """What a caller may want to know of the model, JSON-able."""
    model, tokenizer, config = recommender.model, recommender.tokenizer, recommender.model.config
    reads = {
        "history_feedback": list(config.history_feedback),
        "history_timestamps": bool(config.time_gap_buckets),
        "user_features": list(config.user_features),
    }
    return {
        "catalogue_size": tokenizer.num_items,
        "catalogue": tokenizer.semantic_id_fingerprint,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": str(model.device),
        "session_items": config.session_items,
        "history_items": config.history_items,
        "num_beams": model.generation_config.num_beams,
        "reads": {name: value for name, value in reads.items() if value},
        "reward_model": recommender.scorer is not None,
    }


def answers(recommender: Recommender, requests: list[RecommendRequest]) -> list[dict[str, Any]]:
    """`{"results": [...]}` of each request, or `{"status": ..., "error": ...}`. They are of one group.

    A batch that fails is halved, until what is wrong stands alone: one request's fault is no other's.
    """
    rows = [row for request in requests for row in request.rows]
    try:
        found = recommender(rows, **requests[0].options, session_scores=True, batch_size=len(rows))
    except Exception as error:
        if len(requests) > 1:
            half = len(requests) // 2
            return answers(recommender, requests[:half]) + answers(recommender, requests[half:])
        status = 422 if isinstance(error, REFUSALS) else 500
        return [{"status": status, "error": f"{error}" if status == 422 else f"{type(error).__name__}: {error}"}]
    taken = iter(found)
    return [{"results": [next(taken) for _ in request.rows]} for request in requests]


def run_worker(connection: Connection, model: str, reward_model: str | None, threads: int | None) -> None:
    """Loads the models, says `{"model": ...}` or `{"failed": why}`, and answers batches, until None comes in the place
    of one or the pipe is closed."""
    # The front decides when a worker goes: signals to the whole group leave it to finish its batch.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logging.disable_progress_bar()
    tqdm.set_lock(threading.RLock())  # its own, of processes, would outlive a worker that is killed
    if threads is not None:
        torch.set_num_threads(threads)
    torch.seed()  # a forked process would repeat the draws of the others
    try:
        recommender = load_recommender(model, reward_model)
        warm_up(recommender)
    except Exception as error:
        _send(connection, {"failed": f"{type(error).__name__}: {error}"})
        return
    _send(connection, {"model": describe(recommender)})
    while True:
        try:
            batch = json.loads(connection.recv_bytes())
            if batch is None:
                return
            _send(connection, answers(recommender, [RecommendRequest(**request) for request in batch]))
        except (EOFError, OSError):  # the front is gone
            return


def _send(connection: Connection, message: Mapping | list) -> None:
    connection.send_bytes(json.dumps(message, allow_nan=False).encode())
