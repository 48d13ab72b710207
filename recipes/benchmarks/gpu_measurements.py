"""What is measured on a GPU within one process, at two sizes. A part of `gpu.py`.

Each check is a generator of rows, dictionaries of what was measured; a row with a `failure` makes the check fail.
"""

import copy
import itertools
import statistics
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from generation import encode, prefix_function, random_catalogue, same_result, ways_to_generate
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from training import DEVICE, batch_lengths, matrix_products, random_batch, seconds, step_flops, step_of
from transformers.utils import is_flash_attn_2_available

from onerec_hf import ItemTrie, OneRecConfig, OneRecForConditionalGeneration, OneRecTokenizer, generate_sessions
from onerec_hf.reward import OneRecRewardConfig, OneRecRewardModel, SessionScorer
from onerec_hf.semantic_ids import BalancedKMeans

BF16 = torch.bfloat16
PRECISIONS = {"autocast": torch.float32, "bfloat16": BF16}  # weights' types; the first are cast where it counts
ATTENTION = {  # implementations, and what a model's class says of them
    "eager": None,
    "sdpa": "_supports_sdpa",
    "flex_attention": "_supports_flex_attn",
    "flash_attention_2": "_supports_flash_attn",
}
EXPERTS = ("eager", "batched_mm", "grouped_mm")
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
# Largest differences: of scores between devices, relative ones of logits between attentions and of experts' outputs.
SCORE_TOLERANCE, LOGITS_TOLERANCE = 1e-3, 1e-3
EXPERTS_TOLERANCE = {torch.float32: 1e-4, BF16: 2e-2}


@dataclass(frozen=True)
class Sizes:
    """What the checks measure; `presets` are the configurations that stand for the two sizes of model."""

    presets: dict[str, str] = field(default_factory=lambda: {"0.1b": "0.1b", "1b": "1b"})
    overrides: dict = field(default_factory=dict)
    num_items: int = 100_000
    history_items: int = 512
    session_items: int = 5
    users: tuple[int, ...] = (1, 8, 64)
    beams: tuple[int, ...] = (128, 256)
    batches: tuple[int, ...] = (16, 64)
    compared_history: int = 64
    compared_users: int = 16
    points: int = 1_000_000
    clusters: int = 1024
    scored_users: int = 256
    repeats: int = 5
    peer_seconds: float = 12.0


TINY = Sizes(
    presets={"0.1b": "debug", "1b": "debug"},
    overrides={"codebook_sizes": [32, 32, 32]},
    num_items=300,
    history_items=16,
    users=(1, 2),
    beams=(4,),
    batches=(2,),
    compared_history=8,
    compared_users=3,
    points=2000,
    clusters=16,
    scored_users=4,
    repeats=2,
)


class NotApplicable(Exception):
    """Why a check cannot be run here."""


def milliseconds(work: Callable[[], object], sizes: Sizes, warm_ups: int = 2, budget: float = 8.0) -> float:
    """Median of `sizes.repeats` runs, of fewer where these would take longer than the budget [s]."""
    for _ in range(warm_ups):
        work()
    times: list[float] = []
    while len(times) < sizes.repeats and (not times or sum(times) + times[-1] <= budget):
        times.append(seconds(work))
    return 1000 * statistics.median(times)


def attempt(row: dict, measure: Callable[[], dict]) -> dict:
    """The row with what is measured and the GPU's peak memory [GiB]; a note where memory or an error is in the way."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        row = row | measure()
    except NotApplicable as reason:
        return row | {"note": str(reason)}
    except torch.OutOfMemoryError:
        return row | {"note": "out of memory"}
    except Exception as error:
        traceback.print_exc()
        lines = str(error).splitlines() or [""]
        return row | {"failure": f"{type(error).__name__}: {lines[0]}"}
    if DEVICE.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def config_of(sizes: Sizes, preset: str, **overrides) -> OneRecConfig:
    lengths = {"history_items": sizes.history_items, "session_items": sizes.session_items}
    return OneRecConfig.from_preset(sizes.presets[preset], **lengths | sizes.overrides | overrides)


def build(sizes: Sizes, preset: str, **overrides) -> OneRecForConditionalGeneration:
    """A model with random weights, made on the device, for evaluation."""
    torch.manual_seed(0)
    with DEVICE:
        model = OneRecForConditionalGeneration(config_of(sizes, preset, **overrides))
    return model.to(DEVICE).eval()


def catalogue_of(sizes: Sizes, config: OneRecConfig) -> tuple[OneRecTokenizer, ItemTrie]:
    codes = random_catalogue(sizes.num_items, config.codebook_sizes[0])
    tokenizer = OneRecTokenizer.from_semantic_ids(
        np.arange(sizes.num_items), codes, codebook_sizes=config.codebook_sizes
    )
    return tokenizer, ItemTrie.from_tokenizer(tokenizer).to(DEVICE)


def histories_of(tokenizer: OneRecTokenizer, users: int, config: OneRecConfig) -> dict[str, torch.Tensor]:
    encoded, _ = encode(tokenizer, users, config.history_items)
    return {name: tensor.to(DEVICE) for name, tensor in encoded.items() if name in ("input_ids", "attention_mask")}


@torch.no_grad()
def same_results(sizes: Sizes) -> Iterator[dict]:
    """Sessions and scores here and on the CPU, by the engine and by `generate`; ranked items in half precision."""
    lengths = {"history_items": sizes.compared_history, "session_items": 2}
    model = build(sizes, "0.1b", initializer_range=0.06, **lengths)  # so wide that scores differ by more than rounding
    tokenizer, trie = catalogue_of(sizes, model.config)
    encoded = histories_of(tokenizer, sizes.compared_users, model.config)
    beams = max(sizes.beams[0] // 2, 10)
    there = {name: tensor.cpu() for name, tensor in encoded.items()}
    ways = ways_to_generate(model, trie, prefix_function(tokenizer), 2, beams)
    on_cpu = ways_to_generate(copy.deepcopy(model).cpu(), copy.deepcopy(trie).cpu(), None, 2, beams)
    found, expected = ways["engine"](encoded), on_cpu["engine"](there)

    def difference(sequences: torch.Tensor, scores: torch.Tensor) -> dict:
        return {"largest_difference": same_result(found, sequences, scores, beams, SCORE_TOLERANCE)}

    sequences = torch.nn.functional.pad(expected.token_ids, (1, 0)).flatten(0, 1).flatten(1)
    yield attempt(
        {"compared": "float32, here and on the CPU"},
        lambda: difference(sequences.to(DEVICE), expected.scores.to(DEVICE)),
    )

    def beside(peer: str) -> dict:
        theirs = ways[peer](encoded)
        return difference(theirs.sequences, theirs.sequences_scores)

    for peer in ("processor", "prefix_fn"):
        yield attempt({"compared": f"float32, engine and generate ({peer})"}, partial(beside, peer))

    def ranked(weights: OneRecForConditionalGeneration, autocast: bool = False) -> torch.Tensor:
        with torch.autocast(DEVICE.type, BF16, enabled=autocast):
            return generate_sessions(weights, trie, **encoded, num_items=1, num_beams=beams).items[:, :10, 0]

    exact = ranked(model)

    def shared(*how) -> dict:
        return {"top_10_in_common": (ranked(*how)[:, :, None] == exact[:, None]).any(-1).float().mean().item()}

    yield attempt({"compared": "bfloat16 by autocast, and float32"}, partial(shared, model, True))
    yield attempt({"compared": "bfloat16 weights, and float32"}, partial(shared, copy.deepcopy(model).to(BF16)))


def step_ms(model: OneRecForConditionalGeneration, sizes: Sizes) -> dict[str, float]:
    """Of an optimizer step on the smallest batch, by the weights' precision; the model itself is not changed."""
    times = {}
    for name, dtype in PRECISIONS.items():
        work, batch = step_of(copy.deepcopy(model).to(dtype)), random_batch(model.config, sizes.batches[0])
        with torch.autocast(DEVICE.type, BF16, enabled=dtype != BF16):
            times[f"{name}_step_ms"] = milliseconds(partial(work, batch), sizes)
    return times


@torch.no_grad()
def decoding_ms(model: OneRecForConditionalGeneration, sizes: Sizes) -> float:
    """Of a step of the search, a code of every beam, without the encoder; in half precision."""
    model = copy.deepcopy(model).to(BF16).eval()
    tokenizer, trie = catalogue_of(sizes, model.config)
    encoded = histories_of(tokenizer, sizes.users[1], model.config)
    hidden = encoded | {"input_ids": None, "encoder_outputs": model.get_encoder()(**encoded)}
    engine = ways_to_generate(model, trie, None, sizes.session_items, sizes.beams[0])["engine"]
    return milliseconds(partial(engine, hidden), sizes) / (sizes.session_items * model.config.num_levels)


@torch.no_grad()
def padded_logits(model: OneRecForConditionalGeneration) -> torch.Tensor:
    """Logits (2, tokens, vocabulary), where the second of the histories is half as long."""
    batch = random_batch(model.config, 2)
    padding = batch["input_ids"].shape[1] // 2 // model.config.tokens_per_item * model.config.tokens_per_item
    batch["attention_mask"][1, :padding] = 0
    batch["input_ids"][1, :padding] = model.config.pad_token_id
    return model(**batch).logits.float()


def attention(sizes: Sizes) -> Iterator[dict]:
    """Implementations of attention: logits beside eager's, a training step, a step of the search."""
    model = build(sizes, "0.1b")
    model.set_attn_implementation("eager")
    expected = padded_logits(model)

    def measure(name: str, supported: str | None) -> dict:
        if supported and not getattr(model, supported, False):
            raise NotApplicable("the model does not support it")
        if name == "flash_attention_2" and not is_flash_attn_2_available():
            raise NotApplicable("flash-attn is not installed")
        if name == "flex_attention" and DEVICE.type == "cpu":
            raise NotApplicable("has no backward pass on a CPU")
        model.set_attn_implementation(name)
        differences = (padded_logits(model) - expected).norm(dim=-1) / expected.norm(dim=-1)
        # A router that is between two experts may choose the other one, which few positions show.
        row = {"difference": differences.quantile(0.9).item()}
        assert row["difference"] <= LOGITS_TOLERANCE, f"logits differ by {row['difference']:.2g}"
        row |= step_ms(model, sizes)
        if name != "flex_attention":  # which is compiled anew for every length
            row["decoding_step_ms"] = decoding_ms(model, sizes)
        return row

    for name, supported in ATTENTION.items():
        yield attempt({"implementation": name}, partial(measure, name, supported))


def experts(sizes: Sizes) -> Iterator[dict]:
    """Implementations of the experts: outputs beside eager's in single precision, a training step, a search step."""
    model = build(sizes, "0.1b")
    block = model.get_decoder().layers[0].moe
    states = torch.randn(sizes.batches[0] * batch_lengths(model.config)[1], model.config.hidden_size, device=DEVICE)

    @torch.no_grad()
    def outputs(name: str, dtype: torch.dtype) -> torch.Tensor:
        model.set_experts_implementation(name)
        _, weights, chosen = block.gate(states)
        return copy.deepcopy(block.experts).to(dtype)(states.to(dtype), chosen, weights.to(dtype)).float()

    expected = outputs("eager", torch.float32)

    def measure(name: str) -> dict:
        row = {}
        for dtype, tolerance in EXPERTS_TOLERANCE.items():
            key = f"{str(dtype).removeprefix('torch.')}_difference"
            row[key] = ((outputs(name, dtype) - expected).norm() / expected.norm()).item()
            assert row[key] <= tolerance, f"{key} is {row[key]:.2g}"
        return row | step_ms(model, sizes) | {"decoding_step_ms": decoding_ms(model, sizes)}

    for name in EXPERTS:
        yield attempt({"implementation": name}, partial(measure, name))


def sdpa_backends(sizes: Sizes) -> Iterator[dict]:
    """PyTorch's kernels of attention on what the model asks of them, with a mask of half of every other history."""
    config = config_of(sizes, "0.1b")
    heads, history = config.num_attention_heads, batch_lengths(config)[0]
    size = config.hidden_size // heads
    for place, rows, queries in (
        ("encoder, forward and backward", sizes.batches[0], history),
        ("beams to history, forward", sizes.users[-1], sizes.beams[0]),
    ):
        training = queries == history
        tensors = [
            torch.randn(rows, heads, length, size, device=DEVICE, dtype=BF16, requires_grad=training)
            for length in (queries, history, history)
        ]
        mask = torch.ones(rows, 1, 1, history, dtype=torch.bool, device=DEVICE)
        mask[::2, ..., : history // 2] = False
        for padding in (None, mask):

            def work(tensors=tensors, padding=padding, training=training) -> None:
                output = scaled_dot_product_attention(*tensors, attn_mask=padding)
                if training:
                    torch.autograd.grad(output, tensors, output)

            for name in BACKENDS:
                row = {"attention": place, "padding": padding is not None, "backend": name}
                with sdpa_kernel(getattr(SDPBackend, name)):
                    row = attempt(row, lambda work=work: {"ms": milliseconds(work, sizes)})
                # A kernel that refuses is no failure, but for the one that takes everything.
                if name != "MATH" and "failure" in row:
                    row["note"] = row.pop("failure").partition(". ")[0]
                yield row


def training(sizes: Sizes, preset: str) -> Iterator[dict]:
    """Optimizer steps: tokens/s, memory, and floating point operations beside those of a large matrix product."""
    dtype = BF16 if DEVICE.type == "cuda" else torch.float32  # a CPU may have no products in half precision
    product, flops = matrix_products(dtype)
    peak = 1000 * flops / milliseconds(product, sizes)
    yield {"weights": f"matrix product in {str(dtype).removeprefix('torch.')}", "tflops": peak / 1e12}

    def measure(dtype: torch.dtype, experts: str, batch_size: int) -> dict:
        model = build(sizes, preset).to(dtype)
        model.set_experts_implementation(experts)
        work = partial(step_of(model), random_batch(model.config, batch_size))
        with torch.autocast(DEVICE.type, BF16, enabled=dtype != BF16):
            step = milliseconds(work, sizes)
        rate = 1000 * step_flops(model.config, batch_size) / step
        return {
            "parameters": model.num_parameters(),
            "step_ms": step,
            "tokens_per_second": 1000 * batch_size * sum(batch_lengths(model.config)) / step,
            "tflops": rate / 1e12,
            "share_of_peak": rate / peak,
        }

    for batch_size, precision, name in itertools.product(sizes.batches, PRECISIONS, ("grouped_mm", "eager")):
        row = {"preset": sizes.presets[preset], "histories": batch_size, "weights": precision, "experts": name}
        yield attempt(row, partial(measure, PRECISIONS[precision], name, batch_size))


@torch.no_grad()
def generation(sizes: Sizes, preset: str) -> Iterator[dict]:
    """Sessions by the engine in half precision, and by stock `generate` of the same weights, beams and items."""
    model = build(sizes, preset).to(BF16)
    tokenizer, trie = catalogue_of(sizes, model.config)
    prefixes = prefix_function(tokenizer)
    measured: dict[tuple[str, int, int], float] = {}  # milliseconds by way, users and beams

    def measure(name: str, users: int, beams: int) -> dict:
        fewer = [key for key in measured if key[0] == name and key[2] == beams]
        if fewer and name != "engine":
            expected = measured[fewer[-1]] * users / fewer[-1][1] / 1000
            if expected > sizes.peer_seconds:
                raise NotApplicable(f"not run, {expected:.0f} s expected")
        way = ways_to_generate(model, trie, prefixes, sizes.session_items, beams)[name]
        encoded = histories_of(tokenizer, users, model.config)
        warm_ups = 2 if name == "engine" else int(not fewer)
        taken = milliseconds(partial(way, encoded), sizes, warm_ups)
        measured[name, users, beams] = taken
        row = {"ms": taken, "ms_per_user": taken / users}
        engine = measured.get(("engine", users, beams))
        return row | ({"times_engine": taken / engine} if engine and name != "engine" else {})

    # The engine first: what is left of the time is the others'.
    for name, users, beams in itertools.product(("engine", "processor", "prefix_fn"), sizes.users, sizes.beams):
        row = {"preset": sizes.presets[preset], "way": name, "users": users, "beams": beams}
        yield attempt(row, partial(measure, name, users, beams))


def kmeans(sizes: Sizes) -> Iterator[dict]:
    """Clustering of points of 64 dimensions, balanced and plain: one run each, after one on a twentieth of them."""
    points = torch.randn(sizes.points, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def measure(assignment: str) -> dict:
        BalancedKMeans(sizes.clusters, assignment).fit(points[: max(sizes.points // 20, sizes.clusters)])
        clustering = BalancedKMeans(sizes.clusters, assignment)
        taken = seconds(lambda: clustering.fit(points))
        counts = clustering.labels.bincount(minlength=sizes.clusters)
        figures = {"inertia": clustering.inertia, "smallest": counts.min().item(), "largest": counts.max().item()}
        if assignment == "transport":
            assert figures["largest"] - figures["smallest"] <= 1, "the clusters are not balanced"
        return {"seconds": taken, "iterations": clustering.num_iterations} | figures

    for name, assignment in (("balanced", "transport"), ("plain", "nearest")):
        row = {"clusters": f"{sizes.clusters:,}, {name}", "points": sizes.points}
        yield attempt(row, partial(measure, assignment))


def reward_scoring(sizes: Sizes) -> Iterator[dict]:
    """Sessions of a user that the reward model scores, encoding included."""
    codebooks = config_of(sizes, "0.1b").codebook_sizes
    tokenizer, _ = catalogue_of(sizes, config_of(sizes, "0.1b"))
    model = OneRecRewardModel(OneRecRewardConfig(codebook_sizes=codebooks, history_items=sizes.history_items))
    scorer = SessionScorer(model.eval(), tokenizer).to(DEVICE)
    draws = np.random.default_rng(0)
    rows = [{"history": row} for row in draws.integers(0, sizes.num_items, (sizes.scored_users, sizes.history_items))]
    shape = (sizes.scored_users, sizes.beams[0], sizes.session_items)
    sessions = torch.from_numpy(draws.integers(0, sizes.num_items, shape))

    def measure(half: bool) -> dict:
        with torch.autocast(DEVICE.type, BF16, enabled=half):
            taken = milliseconds(lambda: scorer.score(rows, sessions), sizes)
        return {"ms": taken, "sessions_per_second": 1000 * sessions[..., 0].numel() / taken}

    for half in (False, True):
        row = {"precision": "bfloat16 by autocast" if half else "float32"}
        row |= {"users": sizes.scored_users, "sessions_each": sizes.beams[0]}
        yield attempt(row, partial(measure, half))
