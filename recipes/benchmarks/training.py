"""Training speed on this machine: beside other encoder-decoders, against its own matrix products, and by batching.

    python recipes/benchmarks/training.py --json training.json

`--profile` prints where a step's time goes instead. Every figure is a median; what is compared takes turns, so that a
busy moment of the machine strikes all alike. `--threads` is for CPUs; a GPU is used where there is one.
"""

import json
import os
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import (
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from onerec_hf import OneRecConfig, OneRecForConditionalGeneration, OneRecTokenizer
from onerec_hf.pretraining import CPU_EXPERTS, SessionCollator
from onerec_hf.session_rows import index_sessions
from onerec_hf.shared_histories import share_histories

CODEBOOKS = [256, 256, 256]
HIDDEN, HEADS, LAYERS, DENSE, EXPERTS, ACTIVE = 256, 8, 4, 1024, 8, 2
HISTORY, SESSION, BATCH = 64, 5, 32
SHARED = {"hidden_size": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "num_attention_heads": HEADS}
DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def onerec(**overrides) -> OneRecForConditionalGeneration:
    sizes = {"intermediate_size": DENSE, "num_experts": EXPERTS, "num_experts_per_tok": ACTIVE}
    lengths = {"history_items": HISTORY, "session_items": SESSION, "codebook_sizes": CODEBOOKS}
    expert = {"moe_intermediate_size": DENSE // ACTIVE}  # a token passes through as much as in the dense models
    model = OneRecForConditionalGeneration(OneRecConfig(**SHARED | sizes | lengths | expert | overrides))
    if DEVICE.type == "cpu":
        model.set_experts_implementation(CPU_EXPERTS)
    return model


def peers(dropout: float) -> dict[str, torch.nn.Module]:
    """transformers' SwitchTransformers of the same parameters, total and active, and T5 of the same active ones."""
    vocab_size = OneRecConfig(codebook_sizes=CODEBOOKS).vocab_size
    common = {"vocab_size": vocab_size, "d_model": HIDDEN, "d_kv": HIDDEN // HEADS, "num_heads": HEADS}
    common |= {"num_layers": LAYERS, "num_decoder_layers": LAYERS, "decoder_start_token_id": 2}
    common |= {"dropout_rate": dropout, "use_cache": False, "tie_word_embeddings": False}
    # One of half as many experts that are twice as large; two matrices each 1.5 times as wide for our gated three.
    sparse = {"num_experts": EXPERTS // ACTIVE, "d_ff": DENSE * 3 // 2, "expert_capacity": 64}
    sparse |= {"num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": LAYERS}
    switch = SwitchTransformersConfig(**common | sparse)
    switch.encoder_sparse_step = 0  # without sparse layers asked for, the configuration leaves one of them
    return {
        "SwitchTransformers": SwitchTransformersForConditionalGeneration(switch),
        "T5, dense": T5ForConditionalGeneration(T5Config(**common, d_ff=DENSE, feed_forward_proj="gated-silu")),
    }


def batch_lengths(config: OneRecConfig) -> tuple[int, int]:
    """Tokens of a whole history and of a whole session."""
    return config.history_items * config.tokens_per_item - 1, config.session_items * config.tokens_per_item - 1


def random_batch(config: OneRecConfig, batch_size: int) -> dict[str, torch.Tensor]:
    """Whole histories and sessions of random codes as tokens, without padding."""
    generator = torch.Generator().manual_seed(0)
    histories, labels = (
        torch.randint(config.level_offsets[0], config.vocab_size, (batch_size, length), generator=generator)
        for length in batch_lengths(config)
    )
    batch = {"input_ids": histories, "attention_mask": torch.ones_like(histories), "labels": labels}
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def step_of(model: torch.nn.Module) -> Callable[[dict[str, torch.Tensor]], None]:
    """A whole optimizer step of the model on a batch."""
    model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(batch: dict[str, torch.Tensor]) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(work: Callable[[], None]) -> float:
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    started = time.perf_counter()
    work()
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def step_flops(config: OneRecConfig, batch_size: int) -> float:
    """Floating point operations of the matrix products of one training step on a `random_batch`."""
    history, session = batch_lengths(config)
    if config.history_positions == "item":
        history = config.history_items
    width = config.hidden_size
    projections, ffn = 4 * width**2, 3 * width * config.intermediate_size
    experts = 3 * width * config.moe_intermediate_size * config.num_experts_per_tok + config.num_experts * width
    encoder_layer = history * (projections + ffn + 2 * history * width)
    cross = session * (projections // 2 + 2 * history * width) + history * projections // 2
    decoder_layer = session * (projections + experts + 2 * session * width) + cross
    layers = config.encoder_layers * encoder_layer + config.decoder_layers * decoder_layer
    forward = 2 * batch_size * (layers + session * width * config.vocab_size)
    return 3 * forward  # the backward pass has twice the products of the forward one


def matrix_products(dtype: torch.dtype = torch.float32) -> tuple[Callable[[], None], float]:
    """A large product of matrices and its floating point operations."""
    size = 2048 if DEVICE.type == "cpu" else 8192
    first, second = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    return lambda: torch.mm(first, second), 2.0 * size**3


def measure_models(repeats: int, dropout: float) -> dict[str, dict[str, float]]:
    """Step time [s], tokens/s, parameters of every model, and the rates [FLOP/s] of ours and of the machine."""
    torch.manual_seed(0)
    models = {"OneRec": onerec(dropout=dropout), **peers(dropout)}
    batch = random_batch(models["OneRec"].config, BATCH)
    tokens = batch["input_ids"].numel() + batch["labels"].numel()
    product, product_flops = matrix_products()
    work = {name: partial(step_of(model), batch) for name, model in models.items()}
    work["matrix product"] = product
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 2):
        for name, run in work.items():
            taken = seconds(run)
            if turn >= 2:  # the first two warm up
                times[name].append(taken)
    medians = {name: statistics.median(values) for name, values in times.items()}
    results = {
        name: {
            "step_seconds": medians[name],
            "tokens_per_second": tokens / medians[name],
            "parameters": model.num_parameters(),
        }
        for name, model in models.items()
    }
    machine = product_flops / medians["matrix product"]
    flops = step_flops(models["OneRec"].config, BATCH)
    results["OneRec"] |= {
        "flops_per_second": flops / medians["OneRec"],
        "machine_flops_per_second": machine,
        "share_of_machine": flops / medians["OneRec"] / machine,
        "speed_to_switch": medians["SwitchTransformers"] / medians["OneRec"],
        "speed_to_t5": medians["T5, dense"] / medians["OneRec"],
    }
    return results


def simulated_sessions(users: int = 1500) -> tuple[Dataset, OneRecTokenizer]:
    """Sessions of SESSION consecutive behaviours that begin at every second one, by users of unequal activity."""
    generator = np.random.default_rng(0)
    codes = np.stack(np.unravel_index(generator.choice(256**3, 5000, replace=False), CODEBOOKS), axis=1)
    codebooks = [torch.zeros(size, 1) for size in CODEBOOKS]
    tokenizer = OneRecTokenizer.from_semantic_ids(list(range(len(codes))), codes, codebooks)
    rows = []
    for user, length in enumerate(generator.lognormal(2.7, 0.6, users).clip(4, HISTORY).astype(int)):
        run = generator.integers(0, len(codes), length).tolist()
        for start in range(3, length, 2):
            session = run[start : start + SESSION]
            rows.append({"user_id": user, "history_item_ids": run[:start], "session_item_ids": session})
    return index_sessions(Dataset.from_list(rows), tokenizer), tokenizer


def batches_of(rows: Dataset, size: int, grouped: bool, seed: int) -> list[list[int]]:
    """An epoch's batches as row numbers, by the trainer's own length grouping or at random."""
    generator = torch.Generator().manual_seed(seed)
    if grouped:
        order = get_length_grouped_indices(rows["length"][:], size, generator=generator)
    else:
        order = torch.randperm(len(rows), generator=generator).tolist()
    return [order[start : start + size] for start in range(0, len(order) - size + 1, size)]


def measure_batching(steps: int, targets: int = 128, targets_per_row: int = 16) -> dict[str, dict[str, float]]:
    """Share of padding in encoder and decoder inputs, and targets/s, by how batches are made and histories encoded."""
    sessions, tokenizer = simulated_sessions()
    shared = share_histories(sessions, HISTORY, targets_per_row)
    ways = {
        "random batches": ({}, sessions, targets, False),
        "similar lengths": ({}, sessions, targets, True),
        "one causal pass": ({"encoder_attention": "causal"}, shared, targets // targets_per_row, True),
    }
    results = {}
    for positions in ("token", "item"):
        runs = {}
        for name, (overrides, rows, size, grouped) in ways.items():
            torch.manual_seed(0)
            model = onerec(history_positions=positions, **overrides)
            collate = SessionCollator(tokenizer, model)
            epoch = batches_of(rows, size, grouped, seed=0)
            picked = np.random.default_rng(0).permutation(len(epoch))[: steps + 1]
            batches = [collate([rows[row] for row in epoch[index]]) for index in picked]
            all_batches = [collate([rows[row] for row in batch]) for batch in epoch]
            padding = [
                1
                - sum(int(kept(batch).sum()) for batch in all_batches)
                / sum(kept(batch).numel() for batch in all_batches)
                for kept in (lambda batch: batch["attention_mask"] > 0, decoder_tokens)
            ]
            runs[name] = (step_of(model), batches, padding)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for index in range(steps + 1):
            for name, (step, batches, _) in runs.items():
                batch = {key: tensor.to(DEVICE) for key, tensor in batches[index].items()}
                taken = seconds(partial(step, batch))
                if index:
                    times[name].append(taken / len(batch["labels"]))
        for name, (_, _, padding) in runs.items():
            results[f"{positions}: {name}"] = {
                "history_padding": padding[0],
                "session_padding": padding[1],
                # Batches differ in length, so that the mean counts and not the median.
                "targets_per_second": 1 / statistics.mean(times[name]),
            }
    return results


def decoder_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which of the decoder's inputs are tokens: all before a row's last code."""
    return (batch["labels"] != -100).flip(1).cumsum(1).flip(1) > 0


def print_profile(positions: str) -> None:
    """Where the time of a training step goes, operator by operator."""
    model = onerec(history_positions=positions)
    step, batch = step_of(model), random_batch(model.config, BATCH)
    for _ in range(2):
        step(batch)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE.type == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(3):
            step(batch)
    print(
        profiler.key_averages().table(sort_by=f"self_{DEVICE.type}_time_total", row_limit=25, max_name_column_width=45)
    )


def main():
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=7, help="Measured steps of every model.")
    parser.add_argument("--dropout", type=float, default=0.1, help="Of all models that are compared.")
    parser.add_argument("--steps", type=int, default=12, help="Measured batches of every way of batching.")
    parser.add_argument("--parts", nargs="+", choices=["models", "batching"], default=["models", "batching"])
    parser.add_argument("--json", type=Path, help="File to write the figures to.")
    parser.add_argument("--profile", choices=["token", "item"], help="Print a profile of a step instead.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.profile:
        return print_profile(args.profile)
    results = {"threads": torch.get_num_threads(), "device": DEVICE.type}
    if "models" in args.parts:
        results["models"] = measure_models(args.repeats, args.dropout)
        print(f"{BATCH} histories of {HISTORY} items as tokens, sessions of {SESSION}, {args.threads} threads\n")
        print("| model | parameters | step | tokens/s |\n|---|---|---|---|")
        for name, figures in results["models"].items():
            print(
                f"| {name} | {figures['parameters'] / 1e6:.1f}M | {figures['step_seconds'] * 1000:.0f} ms | "
                f"{figures['tokens_per_second']:.0f} |"
            )
        ours = results["models"]["OneRec"]
        print("\n| bar | asked | reached |\n|---|---|---|")
        print(f"| tokens/s to SwitchTransformers | 1.5 | {ours['speed_to_switch']:.2f} |")
        print(f"| tokens/s to dense T5 | 0.9 | {ours['speed_to_t5']:.2f} |")
        print(
            f"| share of the matrix product's rate, {ours['machine_flops_per_second'] / 1e9:.0f} GFLOP/s | 0.45 | "
            f"{ours['share_of_machine']:.2f} |"
        )
    if "batching" in args.parts:
        results["batching"] = measure_batching(args.steps)
        print("\n| positions: batches | padding of histories | of sessions | targets/s |\n|---|---|---|---|")
        for name, figures in results["batching"].items():
            print(
                f"| {name} | {figures['history_padding']:.1%} | {figures['session_padding']:.1%} | "
                f"{figures['targets_per_second']:.0f} |"
            )
    if args.json:
        temporary = args.json.with_name(args.json.name + ".partial")
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        temporary.replace(args.json)


if __name__ == "__main__":
    main()
