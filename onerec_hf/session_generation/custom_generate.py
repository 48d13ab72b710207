"""The way from `model.generate` to the search over real items."""

import warnings

import torch
from transformers import generation
from transformers.generation import GenerateBeamEncoderDecoderOutput, GenerationConfig

from ..item_trie import ItemTrie
from .generation import generate_sessions
from .searches import SEARCHES, SearchOptions

# What `generate` makes of settings of its config, with their names. The search sees to these by itself: a session has
# its full length and holds no <eos>.
OF_LENGTH = {
    generation.MinLengthLogitsProcessor: "min_length",
    generation.MinNewTokensLengthLogitsProcessor: "min_new_tokens",
    generation.MaxLengthCriteria: "max_length",
    generation.EosTokenCriteria: "eos_token_id",
}
OF_DRAWS = {
    generation.TemperatureLogitsWarper: "temperature",
    generation.TopKLogitsWarper: "top_k",
    generation.TopPLogitsWarper: "top_p",
}


def generate_with_trie(
    model,
    input_ids: torch.LongTensor,
    logits_processor,
    stopping_criteria,
    generation_config: GenerationConfig,
    trie: ItemTrie,
    excluded: torch.LongTensor | None = None,
    allowed: torch.BoolTensor | None = None,
    normalization: str = "level",
    search: str | None = None,
    generator: torch.Generator | None = None,
    item_share: float | torch.Tensor | None = None,
    stochastic_beams: bool = False,
    **model_kwargs,
) -> GenerateBeamEncoderDecoderOutput | torch.LongTensor:
    """`generate`'s way to the engine: `model.generate(**inputs, custom_generate=generate_with_trie, trie=trie)`.

    Beams, groups of beams and their penalty, returned sequences, length, temperature, filters and the form of the
    result follow the generation config, as in plain `generate`; the other arguments are those of
    [`generate_sessions`]. `generate` itself repeats the encoder's output for every beam before it calls this:
    [`generate_sessions`] and [`Recommender`] spare that memory.

    Args:
        search: By default the one that the generation config asks for: `"diverse_beam"` with groups of beams,
            `"sample"` with `do_sample`, otherwise `"beam"`.
        stochastic_beams: The old way to ask for `search="stochastic_beam"`.

    Raises:
        ValueError: For several semantic IDs per item; for a logits processor, a stopping criterion or a decoding of
            the generation config that this search would not follow, for the beginning of a session, and for a length
            that is not a whole number of items.
    """
    if stochastic_beams:
        warnings.warn("stochastic_beams=True is now search='stochastic_beam'", FutureWarning, stacklevel=2)
        search = "stochastic_beam"
    if model.config.num_semantic_ids > 1:
        raise ValueError("generate writes in one semantic ID, the model has several: call generate_sessions.")
    if input_ids.shape[1] > 1:
        raise ValueError("The search begins at an empty session: decoder_input_ids are not continued.")
    if search is None:
        grouped = generation_config.num_beam_groups > 1
        search = "diverse_beam" if grouped else "sample" if generation_config.do_sample else "beam"
    num_items, rest = divmod(generation_config.max_length, model.config.tokens_per_item)
    if rest:
        raise ValueError(
            f"max_length ({generation_config.max_length}) is not a whole number of items: with <bos> an item has "
            f"{model.config.tokens_per_item} tokens, so max_new_tokens must be a multiple of that less one."
        )
    num_return = generation_config.num_return_sequences
    num_beams = num_return if search == "sample" else generation_config.num_beams
    options = SearchOptions.read_from(generation_config, search, num_beams, generator)
    _refuse_what_is_not_followed([*logits_processor, *stopping_criteria], generation_config, search, normalization)
    copies = max(generation_config.num_beams, num_return)
    encoder_outputs, attention_mask = model_kwargs["encoder_outputs"], model_kwargs.get("attention_mask")
    found = generate_sessions(
        model,
        trie,
        attention_mask=None if attention_mask is None else attention_mask[::copies],
        num_items=num_items,
        num_return=num_return,
        excluded=excluded,
        allowed=allowed,
        normalization=normalization,
        item_share=item_share,
        encoder_outputs=type(encoder_outputs)(
            **{name: value[::copies] for name, value in encoder_outputs.items() if torch.is_tensor(value)}
        ),
        **vars(options),
    )
    bos = found.token_ids.new_full((*found.items.shape, 1), model.config.bos_token_id)
    sequences = torch.cat([bos, found.token_ids], -1).flatten(2).flatten(0, 1)
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateBeamEncoderDecoderOutput(sequences=sequences, sequences_scores=found.scores.flatten())


def _refuse_what_is_not_followed(
    processors_and_criteria: list, config: GenerationConfig, search: str, normalization: str
):
    """Raises for what `generate` would do and the search does not. A caller's own processor takes the place of the
    config's of the same kind, and then differs from the config."""
    mode = config.get_generation_mode().value
    grouped = "group_beam_search" if search == "diverse_beam" else None
    if mode not in ("greedy_search", "sample", "beam_search", "beam_sample", grouped):
        raise ValueError(f"The generation config asks for {mode}, which search={search!r} does not do.")
    followed = OF_LENGTH | {kind: name for kind, name in OF_DRAWS.items() if name in SEARCHES[search].reads}
    for entry in processors_and_criteria:
        if type(entry) is generation.LogitNormalization and normalization == "constrained":
            continue
        name = followed.get(type(entry))
        if name is not None:
            value, expected = getattr(entry, name), getattr(config, name)
            if name == "top_k":
                expected = max(expected, entry.min_tokens_to_keep)
            if (value.tolist() if isinstance(value, torch.Tensor) else value) in (expected, [expected]):
                continue
        raise ValueError(
            f"search={search!r} does not follow {type(entry).__name__}: leave out this logits processor or stopping "
            "criterion, or the setting of the generation config that it comes from. Items are left out by `excluded` "
            "and `allowed`, and normalization='constrained' stands for renormalize_logits."
        )
