"""Stage `tokenize`: item embeddings, their adaptation to behaviour, quantization and the tokenizer (section 3.1)."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from ..data import Feed
from ..embedding_adaptation import EmbeddingAdaptation
from ..item_embeddings import (
    behaviour_embeddings,
    feature_embeddings,
    fuse_embeddings,
    in_earlier_space,
    term_embeddings,
    text_embeddings,
)
from ..semantic_ids import make_several_quantizers
from ..semantic_ids.semantic_id_report import CODE_SAMPLES_FILE, ITEM_MAP_FILE, write_semantic_id_report
from ..session_rows import catalogue_index_lists
from ..tokenization_onerec import OneRecTokenizer
from .data_stage import USER_HISTORIES, PreparedData, prepared_data, run_data
from .previous_run import PreviousRun
from .recipe_arguments import RecipeArguments, TokenizeArguments
from .stage_runner import OutsideInput, Stage, read_json, run_stage

ITEM_EMBEDDINGS = "item_embeddings.safetensors"
SEMANTIC_ID_REPORT = "semantic_ids"


def run_tokenize(args: RecipeArguments) -> Path:
    """Fits the tokenizer on what is known before the evaluated period, or gives a previous run's the items that came
    since; returns the stage's folder."""
    run_data(args)
    options, previous = args.group(TokenizeArguments), PreviousRun.of(args)
    if previous is not None:
        names = {entry.name for entry in fields(options)} - {"previous_run", "seed"}
        previous.require_same("tokenize", options, sorted(names))

    def work(folder: Path) -> dict | None:
        state = PartialState()
        prepared = prepared_data(args, "tokenize")
        feed = prepared.feed
        fitting = {"seed": options.seed, "device": state.device, "show_progress": state.is_main_process}
        if state.is_main_process:
            embeddings, content = embed_items(feed, prepared, options)
            if previous is not None:
                former = load_file(previous.stage("tokenize") / ITEM_EMBEDDINGS)
                embeddings = in_earlier_space(former["embeddings"].numpy(), embeddings)
                content = in_earlier_space(former["content"].numpy(), content)
            elif options.embedding_adaptation is not None:
                adaptation = EmbeddingAdaptation(**fitting, **options.embedding_adaptation)
                adaptation.fit(embeddings, fitted_histories(feed, prepared)).save_pretrained(folder)
                embeddings = adaptation.transform(embeddings)
            saved = {"embeddings": torch.as_tensor(embeddings), "content": torch.as_tensor(content)}
            save_file(saved, folder / ITEM_EMBEDDINGS)
        state.wait_for_everyone()
        # All processes fit on the same numbers, as the K-means is spread over them.
        embeddings = load_file(folder / ITEM_EMBEDDINGS)["embeddings"].numpy()
        if previous is None:
            quantizer = make_several_quantizers(
                options.num_semantic_ids,
                options.quantizer_type,
                options.codebook_sizes or codebook_sizes_for(len(embeddings)),
                options.semantic_id_sources,
                **{**fitting, "collision_policy": options.collision_policy, **options.quantizer},
            )
            tokenizer = OneRecTokenizer.fit(feed.items["item_id"], embeddings, quantizer)
        else:
            tokenizer = OneRecTokenizer.from_pretrained(previous.stage("tokenize"))
            known = tokenizer.num_items
            tokenizer.add_items(feed.items["item_id"].iloc[known:], embeddings[known:])
        if not state.is_main_process:
            return None
        tokenizer.save_pretrained(folder)

        def name(index: int) -> str:
            return feed.item_name(index) or f"item {feed.items['item_id'].iloc[index]}"

        sizes = tokenizer.codebook_sizes
        write_semantic_id_report(folder / SEMANTIC_ID_REPORT, embeddings, tokenizer.codes, sizes, name)
        refit = {} if previous is None else {"refit_reasons": tokenizer.refit_reasons()}
        return {"codebook_sizes": list(sizes), "report": tokenizer.report, **refit}

    outside = [OutsideInput(options.text_encoder)] if options.text_encoder else []
    outside += [] if previous is None else previous.input("tokenize")
    return run_stage(Stage("tokenize", args.output_dir, options, ["data"], outside), work)


def codebook_sizes_for(num_items: int) -> list[int]:
    """Three levels, the first two of which could already tell the items of a catalogue apart.

    >>> codebook_sizes_for(2_000), codebook_sizes_for(12_101), codebook_sizes_for(1_000_000)
    ([64, 64, 64], [128, 128, 128], [1024, 1024, 1024])
    """
    return [2 ** math.ceil(math.log2(num_items) / 2)] * 3


def load_item_embeddings(output_dir: Path) -> torch.Tensor:
    """What a run's semantic IDs were made of, `(N, D)` by catalogue index."""
    return load_file(output_dir / "tokenize" / ITEM_EMBEDDINGS)["embeddings"]


def load_item_content(output_dir: Path) -> torch.Tensor:
    """What is known of a run's items beside their behaviour, `(N, D)` by catalogue index; D is 0 where it is nothing.

    Raises:
        ValueError: the run's embeddings were written without it.
    """
    path = output_dir / "tokenize" / ITEM_EMBEDDINGS
    saved = load_file(path)
    if "content" not in saved:
        raise ValueError(f"{path} has no content of the items: remove {path.parent} to make it anew.")
    return saved["content"]


def semantic_id_pictures(folder: Path) -> dict[str, Any]:
    """What the run's report shows of the stage's pictures: `item_map`, a PNG, and `code_samples`, a table."""
    report = folder / SEMANTIC_ID_REPORT
    return {"item_map": (report / ITEM_MAP_FILE).read_bytes(), "code_samples": read_json(report / CODE_SAMPLES_FILE)}


def fitted_histories(feed: Feed, prepared: PreparedData) -> list[np.ndarray]:
    """Catalogue indices of every user's positive behaviours before the evaluated period, oldest first."""
    histories = catalogue_index_lists(
        prepared.read(USER_HISTORIES).with_format("arrow")[:]["history_item_ids"],
        pd.Index(feed.items["item_id"]).get_indexer,
    )
    return [np.asarray(history) for history in histories.to_numpy(zero_copy_only=False)]


def embed_items(feed: Feed, prepared: PreparedData, options: TokenizeArguments) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of the whole catalogue from every source that the data has and the options weigh, fused: of all of
    them, and of all but the behaviour (N, 0 columns where there is nothing else).

    Raises:
        ValueError: if there is no source at all.
    """
    sources, behaviour = [], None
    if options.content_weight and feed.embedding_column:
        given = np.stack(feed.items[feed.embedding_column].to_numpy()).astype(np.float32)
        sources.append((given, np.ones(len(given), dtype=bool), options.content_weight))
    if options.text_encoder and feed.text_column is None:
        raise ValueError(f"text_encoder is given, but the items of {feed.name} have no text column.")
    if options.text_weight and feed.text_column is not None:
        texts, encoder = feed.items[feed.text_column].tolist(), options.text_encoder
        embeddings, present = text_embeddings(texts, encoder) if encoder else term_embeddings(texts)
        if present.any():  # titles that share no word say nothing
            sources.append((embeddings, present, options.text_weight))
    if options.behaviour_weight:
        histories = fitted_histories(feed, prepared)
        embedded = behaviour_embeddings(histories, len(feed.items), dim=options.behaviour_dim)
        behaviour = (*embedded, options.behaviour_weight)
        sources.append(behaviour)
    columns = (feed.categorical_columns, feed.multi_categorical_columns, feed.numeric_columns)
    if options.feature_weight and any(columns):
        sources.append((*feature_embeddings(feed.items, *columns, dim=options.feature_dim), options.feature_weight))
    if not sources:
        raise ValueError(
            f"The items of {feed.name} have no embedding: give one of content_weight (with an embedding column), "
            "text_weight (with a text column), behaviour_weight or feature_weight (with feature columns)."
        )
    fused = fuse_embeddings(sources, normalisation=options.embedding_normalisation)
    content = [source for source in sources if source is not behaviour]
    if not content:
        return fused, np.zeros((len(fused), 0), dtype=np.float32)
    return fused, fuse_embeddings(content, normalisation=options.embedding_normalisation)
