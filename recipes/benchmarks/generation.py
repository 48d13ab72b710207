"""What session generation costs, against plain `generate` with the same weights, beams, items and scores.

    python recipes/benchmarks/generation.py --json generation.json

Four parts, `--parts` for some of them: `one_item` and `session` time the engine, also with widening beams, beside
`generate` with `prefix_allowed_tokens_fn` and beside `generate` with the vectorised `ItemTrieLogitsProcessor`;
`catalogue` times it at 10,000 and 1,000,000 items; `mixture` times ranking with an item head's mixture beside the same
beams without it, with the memory that it adds. Every figure is a median; a peer that takes more than `--peer_seconds`
is run once, after a run for one user that warms it up.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LogitsProcessorList, set_seed

from onerec_hf import (
    ItemTrie,
    ItemTrieLogitsProcessor,
    OneRecConfig,
    OneRecForConditionalGeneration,
    OneRecTokenizer,
    generate_sessions,
)

PARTS = ("one_item", "session", "catalogue", "mixture")
PEERS = ("prefix_fn", "processor")
CODEBOOK_SIZES = [256, 256, 256]
HISTORY_ITEMS = 64
SESSION_ITEMS = 5
# Of the mixture's part: as a policy is evaluated.
RANKED_ITEMS, RANKING_BEAMS, RANKING_HISTORY, RANKING_BATCH = 50, 64, 20, 51
CONTENT_SIZE = 64


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--users", nargs="+", type=int, default=[1, 4, 16], help="batch sizes")
    parser.add_argument("--num_beams", type=int, default=128)
    parser.add_argument("--num_items", type=int, default=10_000, help="catalogue of the comparisons")
    parser.add_argument("--many_items", type=int, default=1_000_000, help="catalogue to compare with it in cost")
    parser.add_argument("--history_positions", choices=["token", "item"], default="token")
    parser.add_argument("--ranked_users", type=int, default=1000, help="users of the mixture's part")
    parser.add_argument("--item_encoders", nargs="+", type=int, default=[0, 1], help="an item head's further encoders")
    parser.add_argument("--item_memory", nargs="+", type=int, default=[0, 64], help="neighbours that it remembers")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peer_seconds", type=float, default=20.0, help="time for the repeats of one peer")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, help="file to which the figures are written too")
    return parser


def build_model(history_positions: str) -> OneRecForConditionalGeneration:
    """About 7.5M parameters; weights wide enough that scores differ by more than rounding."""
    set_seed(0)
    config = OneRecConfig(
        codebook_sizes=CODEBOOK_SIZES,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=96,
        encoder_layers=4,
        decoder_layers=4,
        num_attention_heads=4,
        num_experts=8,
        history_items=HISTORY_ITEMS,
        session_items=SESSION_ITEMS,
        history_positions=history_positions,
        initializer_range=0.06,
    )
    return OneRecForConditionalGeneration(config).eval()


def random_catalogue(num_items: int, codes: int = 256) -> np.ndarray:
    """Distinct code tuples [num_items, 3]."""
    generator = np.random.default_rng(0)
    keys = np.unique(generator.integers(0, codes**3, num_items + num_items // 4))
    keys = generator.permutation(keys)[:num_items]
    return np.stack([keys // codes**2, keys // codes % codes, keys % codes], axis=1)


def encode(tokenizer: OneRecTokenizer, users: int, history_items: int = HISTORY_ITEMS):
    generator = np.random.default_rng(users)
    histories = [generator.integers(0, tokenizer.num_items, history_items) for _ in range(users)]
    return tokenizer.encode_histories(histories, catalogue_indices=True), torch.from_numpy(np.stack(histories))


def prefix_function(tokenizer: OneRecTokenizer) -> Callable[[int, torch.Tensor], list[int]]:
    """What users write today: a dictionary of prefixes; no item twice in a session."""
    children: dict[tuple, dict[int, int]] = {}
    for tokens in tokenizer.item_token_ids.tolist():
        for depth in range(len(tokens)):
            below = children.setdefault(tuple(tokens[:depth]), {})
            below[tokens[depth]] = below.get(tokens[depth], 0) + 1
    allowed = {prefix: list(below) for prefix, below in children.items()}
    width = tokenizer.tokens_per_item

    def allowed_tokens(row: int, input_ids: torch.Tensor) -> list[int]:
        ids = input_ids.tolist()
        done, depth = divmod(len(ids) - 1, width)
        if depth == width - 1:
            return [2]
        prefix = tuple(ids[len(ids) - depth :])
        used = [tuple(ids[start + 1 : start + width]) for start in range(0, done * width, width)]
        used = [item for item in used if item[:depth] == prefix]
        if not used:
            return allowed[prefix]
        counts = dict(children[prefix])
        for item in used:
            counts[item[depth]] -= 1
        return [token for token, count in counts.items() if count > 0]

    return allowed_tokens


def seconds(run: Callable, repeats: int, budget: float = float("inf")) -> float:
    """Median over repeats; fewer of them when they would take longer than the budget."""
    times = []
    while len(times) < repeats and (not times or sum(times) + times[-1] <= budget):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def machine_rate() -> float:
    """FLOP/s of a product of two 2048 x 2048 matrices."""
    left, right = torch.randn(2, 2048, 2048)
    torch.mm(left, right)
    return 2 * 2048**3 / seconds(lambda: torch.mm(left, right), 15)


def count_flops(model: OneRecForConditionalGeneration, run: Callable) -> int:
    """Multiplications and additions of all matrix products; implementations are chosen that the counter can see."""
    experts, attention = model.config._experts_implementation, model.config._attn_implementation
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        run()
    model.set_experts_implementation(experts)
    model.set_attn_implementation(attention)
    return counter.get_total_flops()


def same_result(
    found, sequences: torch.Tensor, scores: torch.Tensor, num_beams: int, tolerance: float = 1e-4
) -> float:
    """Largest difference of scores.

    Raises:
        AssertionError: If it exceeds the tolerance, or the sessions differ by more than the order within such a
            difference.
    """
    users = len(found.scores)
    scores = scores.view(users, num_beams)
    difference = (found.scores - scores).abs().max().item()
    assert difference <= tolerance, f"scores differ by {difference}"
    theirs = sequences.view(users, num_beams, found.items.shape[2], -1)[..., 1:].flatten(2)
    ours = found.token_ids.flatten(2)
    for user in range(users):
        # The last places may be tied with what just missed the beam.
        sure = scores[user] > scores[user, -1] + 2 * tolerance
        missing = {tuple(row) for row in theirs[user][sure].tolist()} - {tuple(row) for row in ours[user].tolist()}
        assert not missing, f"user {user}: {len(missing)} sessions of the other are not among the engine's"
    return difference


def ways_to_generate(
    model: OneRecForConditionalGeneration, trie: ItemTrie, prefixes: Callable, num_items: int, num_beams: int
) -> dict[str, Callable[[dict], object]]:
    """The engine and its peers by name; each takes the encoder's inputs, and `prefixes` is of [`prefix_function`]."""
    # `generate` adds the log-probability of a <bos> that is certain, unless it renormalizes.
    renormalize = num_items > 1
    new_tokens = num_items * model.config.tokens_per_item - 1

    def engine(encoded: dict, search: str = "beam"):
        normalization = "constrained" if renormalize else "vocabulary"
        counts = {"num_items": num_items, "num_beams": num_beams}
        return generate_sessions(model, trie, **encoded, **counts, normalization=normalization, search=search)

    def stock(encoded: dict, **constraint):
        return model.generate(
            **encoded,
            **constraint,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            renormalize_logits=renormalize,
            return_dict_in_generate=True,
            output_scores=True,  # of which sequences_scores come
        )

    def by_prefixes(encoded: dict):
        return stock(encoded, prefix_allowed_tokens_fn=prefixes)

    def by_processor(encoded: dict):
        processor = ItemTrieLogitsProcessor(trie, model.config.level_offsets)
        return stock(encoded, logits_processor=LogitsProcessorList([processor]))

    return {"engine": engine, **dict(zip(PEERS, (by_prefixes, by_processor), strict=True))}


@torch.no_grad()
def compare(args, model, tokenizer, num_items: int, rate: float) -> list[dict]:
    trie = ItemTrie.from_tokenizer(tokenizer)
    ways = ways_to_generate(model, trie, prefix_function(tokenizer), num_items, args.num_beams)
    rows = []
    for users in args.users:
        encoded, _ = encode(tokenizer, users)
        engine = partial(ways["engine"], encoded)
        found = engine()
        row = {"items": num_items, "users": users, "engine_s": seconds(engine, args.repeats)}
        encoder_outputs = model.get_encoder()(**encoded)
        decode = partial(ways["engine"], {**encoded, "input_ids": None, "encoder_outputs": encoder_outputs})
        row["decode_s"] = seconds(decode, args.repeats)
        row["decode_flops"] = count_flops(model, decode)
        row["decode_share_of_machine"] = row["decode_flops"] / row["decode_s"] / rate
        row["share_of_machine"] = count_flops(model, engine) / row["engine_s"] / rate
        row["widening_s"] = seconds(partial(engine, search="widening_beam"), args.repeats)
        for name in PEERS:
            if name not in args.peers:
                continue
            peer = partial(ways[name], encoded)
            ways[name](encode(tokenizer, 1)[0])
            start = time.perf_counter()
            theirs = peer()
            first = time.perf_counter() - start
            row[f"{name}_s"] = first if first > args.peer_seconds / 2 else seconds(peer, 3, args.peer_seconds)
            row[f"{name}_ratio"] = row[f"{name}_s"] / row["engine_s"]
            row[f"{name}_difference"] = same_result(found, theirs.sequences, theirs.sequences_scores, args.num_beams)
        rows.append(row)
        print_row(row)
    return rows


def print_row(row: dict):
    peers = "".join(
        f" {row[f'{name}_s']:>11.2f} {row[f'{name}_ratio']:>6.1f}x {row[f'{name}_difference']:>8.1e}"
        if f"{name}_s" in row
        else " " * 29
        for name in PEERS
    )
    print(
        f"{row['items']:>5} {row['users']:>5} {row['engine_s']:>9.3f} {row['widening_s']:>11.3f}{peers} "
        f"{row['decode_share_of_machine']:>8.0%} {row['share_of_machine']:>8.0%}",
        flush=True,
    )


@torch.no_grad()
def compare_catalogues(args, model) -> list[dict]:
    """The engine at two catalogue sizes in turn, consumed items left out."""
    sides = []
    for num_items in (args.num_items, args.many_items):
        codes = random_catalogue(num_items)
        tokenizer = OneRecTokenizer.from_semantic_ids(np.arange(num_items), codes, codebook_sizes=CODEBOOK_SIZES)
        start = time.perf_counter()
        trie = ItemTrie.from_tokenizer(tokenizer)
        build = time.perf_counter() - start
        size = sum(buffer.numel() * buffer.element_size() for buffer in trie.buffers()) / 1e6
        print(f"trie of {num_items:,} items: built in {build:.2f} s, {size:.1f} MB, fan-outs {trie.fan_outs}")
        sides.append({"tokenizer": tokenizer, "trie": trie, "build_s": build, "megabytes": size})
    rows = []
    print("items users   s at few  s at many   ratio")
    for num_items in (1, SESSION_ITEMS):
        for users in args.users:
            runs = []
            for side in sides:
                encoded, consumed = encode(side["tokenizer"], users)

                def run(trie=side["trie"], encoded=encoded, consumed=consumed, num_items=num_items):
                    generate_sessions(
                        model, trie, **encoded, num_items=num_items, num_beams=args.num_beams, excluded=consumed
                    )

                run()
                runs.append(run)
            # In turn, so that a drift of the machine's speed falls on both.
            times = [[seconds(run, 1) for run in runs] for _ in range(args.repeats)]
            few, many = (statistics.median(side) for side in zip(*times, strict=True))
            rows.append({"items": num_items, "users": users, "few_s": few, "many_s": many, "ratio": many / few})
            print(f"{num_items:>5} {users:>5} {few:>10.3f} {many:>10.3f} {many / few:>7.2f}", flush=True)
    return [{"build_s": sides[1]["build_s"], "megabytes": sides[1]["megabytes"]}, *rows]


def build_ranker(num_items: int, codes: int, item_encoders: int, item_memory: int) -> OneRecForConditionalGeneration:
    """The small preset (d 128) with an item head."""
    set_seed(0)
    config = OneRecConfig.from_preset(
        "small",
        codebook_sizes=[codes] * 3,
        history_positions="item",
        history_items=RANKING_HISTORY,
        session_items=1,
        encoder_attention="causal",
        encoder_positions="distance",
        item_head="encoder",
        num_items=num_items,
        item_content_size=CONTENT_SIZE,
        item_encoders=["shared", *["learned"] * item_encoders],
        item_memory=item_memory,
        initializer_range=0.06,
    )
    model = OneRecForConditionalGeneration(config).eval()
    model.set_item_content(torch.randn(num_items, CONTENT_SIZE))
    if item_memory:
        neighbours = torch.randint(num_items, (num_items, item_memory))
        model.item_memory.set_neighbours(neighbours, torch.rand(neighbours.shape))
    return model


def peak_memory(run: Callable) -> float:
    """GiB that a run takes at most beyond what the process holds before it; of Linux, NaN elsewhere."""

    def kilobytes(entry: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(entry))

    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
        before = kilobytes("VmRSS")
    except OSError:
        return float("nan")
    run()
    return (kilobytes("VmHWM") - before) / 2**20


@torch.no_grad()
def measure_mixture(model: OneRecForConditionalGeneration, trie: ItemTrie, batches: list[dict], repeats: int) -> dict:
    """Ranking by a mixture beside plain beams, batch by batch in turn: times for a user, and memory."""

    def rank(batch: dict, share: float):
        counts = {"num_items": 1, "num_beams": RANKING_BEAMS, "num_return": RANKED_ITEMS}
        generate_sessions(model, trie, **batch, **counts, item_share=share)

    # The mixture's first run makes the items' vectors, which are kept.
    memory = [peak_memory(partial(rank, batches[0], share)) for share in (0.0, 0.5)]
    times = np.array(
        [
            np.sum([[seconds(partial(rank, batch, share), 1) for share in (0.0, 0.5)] for batch in batches], axis=0)
            for _ in range(repeats)
        ]
    )
    plain, mixture = 1000 * np.median(times, axis=0) / sum(len(batch["input_ids"]) for batch in batches)
    return {
        "plain_ms": plain,
        "mixture_ms": mixture,
        "ratio": np.median(times[:, 1] / times[:, 0]),
        "plain_gib": memory[0],
        "mixture_gib": memory[1],
        "kept_gib": model.item_vectors().nbytes / 2**30,
    }


def compare_mixtures(args) -> list[dict]:
    rows = []
    print("    items codes heads memory   plain ms  mixture ms   ratio  plain GiB  mixture GiB  of it kept")
    for num_items, codes in ((args.num_items, 256), (args.many_items, 256), (args.many_items, 1024)):
        catalogue = torch.from_numpy(random_catalogue(num_items, codes))
        trie = ItemTrie(catalogue, [codes] * 3)
        generator = np.random.default_rng(0)
        histories = torch.from_numpy(generator.integers(0, num_items, (args.ranked_users, RANKING_HISTORY)))
        for item_encoders, item_memory in itertools.product(args.item_encoders, args.item_memory):
            model = build_ranker(num_items, codes, item_encoders, item_memory)
            batches = [encode_items(model, catalogue, users) for users in histories.split(RANKING_BATCH)]
            row = {"items": num_items, "codes": codes, "heads": 1 + item_encoders, "item_memory": item_memory}
            row |= measure_mixture(model, trie, batches, args.repeats)
            rows.append(row)
            print(
                "{items:>9,} {codes:>5} {heads:>5} {item_memory:>6} {plain_ms:>10.2f} {mixture_ms:>11.2f} "
                "{ratio:>7.2f} {plain_gib:>10.2f} {mixture_gib:>12.2f} {kept_gib:>11.2f}".format(**row),
                flush=True,
            )
    return rows


def encode_items(model: OneRecForConditionalGeneration, catalogue: torch.LongTensor, histories: torch.LongTensor):
    """Histories [users, items] of catalogue indices as the encoder reads them; their items are left out."""
    tokens = catalogue[histories] + torch.tensor(model.config.level_offsets)
    tokens = torch.nn.functional.pad(tokens, (0, 1), value=model.config.sep_token_id).flatten(1)[:, :-1]
    mask = torch.ones_like(tokens)
    return {"input_ids": tokens, "attention_mask": mask, "history_item_indices": histories, "excluded": histories}


def main():
    args = make_parser().parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = build_model(args.history_positions)
    rate = machine_rate()
    figures = {
        "parameters": model.num_parameters(),
        "threads": torch.get_num_threads(),
        "machine_flops_per_s": rate,
        "num_beams": args.num_beams,
        "history_positions": args.history_positions,
        "num_items": args.num_items,
    }
    print(
        f"{figures['parameters'] / 1e6:.1f}M parameters, {args.num_items:,} items, {args.num_beams} beams, "
        f"histories of {HISTORY_ITEMS} items, one position per {args.history_positions}; "
        f"{torch.get_num_threads()} threads, {rate / 1e9:.0f} GFLOP/s"
    )
    if {"one_item", "session"} & set(args.parts):
        codes = random_catalogue(args.num_items)
        tokenizer = OneRecTokenizer.from_semantic_ids(np.arange(args.num_items), codes, codebook_sizes=CODEBOOK_SIZES)
        print("Shares are of the machine's rate: decoding alone, and with the encoder.")
        peers = "".join(f" {name + ' s':>11} {'ratio':>7} {'|score|':>8}" for name in PEERS)
        print(f"items users  engine s  widening s{peers}   decode    whole")
    for part, num_items in (("one_item", 1), ("session", SESSION_ITEMS)):
        if part in args.parts:
            figures[part] = compare(args, model, tokenizer, num_items, rate)
    if "catalogue" in args.parts:
        figures["catalogue"] = compare_catalogues(args, model)
    if "mixture" in args.parts:
        figures["mixture"] = compare_mixtures(args)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
