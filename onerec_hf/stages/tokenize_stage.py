"""Stage `tokenize`: item embeddings, their adaptation to behaviour, quantization and the tokenizer (section 3.1)."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from ..embedding_adaptation import EmbeddingAdaptation
from ..item_embeddings import embed_items, in_earlier_space
from ..semantic_ids import codebook_sizes_for, make_several_quantizers
from ..semantic_ids.semantic_id_report import CODE_SAMPLES_FILE, ITEM_MAP_FILE, write_semantic_id_report
from ..tokenization_onerec import OneRecTokenizer
from .data_stage import prepared_data, run_data
from .previous_run import PreviousRun
from .recipe_arguments import RecipeArguments, TokenizeArguments
from .stage_runner import OutsideInput, Stage, read_json, run_stage

ITEM_EMBEDDINGS = "item_embeddings.safetensors"
EMBEDDING_OPTIONS = (
    *("content_weight", "text_weight", "text_encoder", "behaviour_weight", "behaviour_dim"),
    *("feature_weight", "feature_dim", "embedding_normalisation"),
)
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
            given = {name: getattr(options, name) for name in EMBEDDING_OPTIONS}
            embeddings, content = embed_items(prepared.fitted_feed, **given)
            if previous is not None:
                former = load_file(previous.stage("tokenize") / ITEM_EMBEDDINGS)
                embeddings = in_earlier_space(former["embeddings"].numpy(), embeddings)
                content = in_earlier_space(former["content"].numpy(), content)
            elif options.embedding_adaptation is not None:
                adaptation = EmbeddingAdaptation(**fitting, **options.embedding_adaptation)
                adaptation.fit(embeddings, prepared.fitted_feed.positive_histories()).save_pretrained(folder)
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
