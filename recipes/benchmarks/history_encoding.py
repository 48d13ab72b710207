"""How histories are encoded, by quality and speed: every way is trained for the same processor time on one run's data.

    python recipes/fit_tokenizer.py --config recipes/kuairand/preference_alignment.yaml --data_dir KUAIRAND_FOLDER \
        --evaluation_split validation --output_dir runs/kuairand_validation
    python recipes/benchmarks/history_encoding.py --config recipes/kuairand/preference_alignment.yaml \
        --data_dir KUAIRAND_FOLDER --evaluation_split validation --output_dir runs/kuairand_validation --minutes 12

The learning rate falls over the time, not over a number of steps, so that every way ends its schedule in it. Each
way's result is kept in the run's folder `history_encoding` and printed with the others'; `--ways` chooses some.
"""

import math
import sys
import time
from argparse import ArgumentParser

import numpy as np
import torch
from transformers import Seq2SeqTrainingArguments, TrainerCallback, set_seed

from onerec_hf import ItemTrie, OneRecConfig, OneRecForConditionalGeneration, OneRecTokenizer, generate_sessions
from onerec_hf.evaluation import ranking_metrics
from onerec_hf.pretraining import TARGETS_PER_ROW, OneRecPretrainer
from onerec_hf.session_rows import index_sessions
from onerec_hf.shared_histories import share_histories
from onerec_hf.stages.data_stage import EVALUATION_CASES, PRETRAINING_SESSIONS, prepared_data
from onerec_hf.stages.pretrain_stage import TRAINING_DEFAULTS, fitting_batch_size
from onerec_hf.stages.recipe_arguments import parse_recipe_arguments
from onerec_hf.stages.stage_runner import read_json, stage_dir, write_json

WAYS = {
    "token": {"history_positions": "token"},
    "item": {"history_positions": "item"},
    "token, causal": {"history_positions": "token", "encoder_attention": "causal"},
    "item, causal": {"history_positions": "item", "encoder_attention": "causal"},
    "item, lazy decoder": {  # the layers of the preset small, all of them in the decoder
        "history_positions": "item",
        "encoder_attention": "causal",
        "encoder_positions": "absolute",
        "encoder_layers": 0,
        "decoder_layers": 4,
        "context_key_value_sets": 1,
    },
}
WARMUP = 0.05
RANKED = 10


class ProcessorTime(TrainerCallback):
    """Ends training after a processor time, which neither a busy nor a paused machine changes."""

    def __init__(self, seconds: float):
        self.seconds, self.start = seconds, None

    @property
    def used(self) -> float:
        """Share of the time that is used up."""
        if self.start is None:
            return 0.0
        return (time.process_time() - self.start) / torch.get_num_threads() / self.seconds

    def learning_rate(self, step: int) -> float:
        """Warm-up and half a cosine over the time; the number of the step doesn't matter."""
        used = min(self.used, 1.0)
        return max(used, 1e-3) / WARMUP if used < WARMUP else 0.5 * (1 + math.cos(math.pi * used))

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self.start or time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = self.used >= 1


def train(way: str, args, tokenizer: OneRecTokenizer, seconds: float):
    """A model trained in one way for the given processor time [s], and what the training says of itself."""
    set_seed(args.seed)
    sessions = index_sessions(prepared_data(args, "history_encoding").read(PRETRAINING_SESSIONS), tokenizer)
    rows = sessions
    options = {"per_device_train_batch_size": fitting_batch_size(len(sessions)), **args.pretrain}
    if WAYS[way].get("encoder_attention") == "causal":
        rows = share_histories(sessions, args.history_items, TARGETS_PER_ROW)
        options["per_device_train_batch_size"] = max(options["per_device_train_batch_size"] // TARGETS_PER_ROW, 1)
    lengths = {"history_items": args.history_items, "session_items": args.session_items}
    overrides = lengths | args.model | WAYS[way] | {"codebook_sizes": list(tokenizer.codebook_sizes)}
    model = OneRecForConditionalGeneration(OneRecConfig.from_preset(args.preset, **overrides))
    training_args = Seq2SeqTrainingArguments(
        **TRAINING_DEFAULTS
        | {"train_sampling_strategy": "group_by_length", "seed": args.seed}
        | options
        | {"num_train_epochs": 1000, "save_strategy": "no", "disable_tqdm": True}
    )
    clock = ProcessorTime(seconds)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training_args.learning_rate, weight_decay=training_args.weight_decay, fused=True
    )
    trainer = OneRecPretrainer(
        model=model,
        processing_class=tokenizer,
        args=training_args,
        train_dataset=rows,
        callbacks=[clock],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, clock.learning_rate)),
    )
    trainer.train()
    # A row may hold several targets: count them by the share of the rows that was seen.
    seen = trainer.state.global_step * training_args.per_device_train_batch_size / len(rows) * len(sessions)
    used = (time.process_time() - clock.start) / torch.get_num_threads()
    facts = {
        "parameters": model.num_parameters(),
        "minutes": used / 60,
        "steps": trainer.state.global_step,
        "histories_per_second": seen / used,
        "epochs": seen / len(sessions),
        "loss": next((row["loss"] for row in reversed(trainer.state.log_history) if "loss" in row), None),
    }
    return model, facts


@torch.no_grad()
def ranking(model: OneRecForConditionalGeneration, tokenizer: OneRecTokenizer, cases, beams: int) -> dict[str, float]:
    """Each user's next item in the full catalogue, the history's items left out."""
    model.eval()
    trie = ItemTrie.from_tokenizer(tokenizer)
    histories = [np.asarray(history) for history in cases["history"][:]]
    order = np.argsort([len(history) for history in histories], kind="stable")
    ranked = np.full((len(histories), RANKED), -1)
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        encoded = tokenizer.encode_histories(
            [histories[row] for row in rows], max_items=model.config.history_items, catalogue_indices=True
        )
        found = generate_sessions(model, trie, **encoded, num_items=1, num_beams=beams)
        for row, items in zip(rows, found.items[..., 0].numpy(), strict=True):
            new = items[(items >= 0) & ~np.isin(items, histories[row])][:RANKED]
            ranked[row, : len(new)] = new
    targets = tokenizer.item_index(cases["next_item_id"][:])
    return ranking_metrics(ranked, targets, trie.num_items, (RANKED,), interval_resamples=1000)


def main():
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--minutes", type=float, default=12.0, help="Processor time of every way, per thread.")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    own, rest = parser.parse_known_args()
    args = parse_recipe_arguments(rest)
    folder = args.output_dir / "history_encoding"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = OneRecTokenizer.from_pretrained(stage_dir(args.output_dir, "tokenize", "history_encoding"))
    for way in own.ways:
        path = folder / f"{way.replace(', ', '_')}_{own.minutes:g}_minutes.json"
        if path.exists():
            continue
        model, facts = train(way, args, tokenizer, own.minutes * 60)
        cases = index_sessions(prepared_data(args, "history_encoding").read(EVALUATION_CASES), tokenizer)
        started = time.process_time()
        result = ranking(model, tokenizer, cases, args.ranking_beams)
        facts["evaluation_minutes"] = (time.process_time() - started) / torch.get_num_threads() / 60
        write_json(path, {"way": way, "training": facts, "ranking": result})
    print("| histories | R@10 | 95% interval | N@10 | histories/s | epochs | minutes |")
    print("|---|---|---|---|---|---|---|")
    for path in sorted(folder.glob("*.json")):
        result = read_json(path)
        facts, scores = result["training"], result["ranking"]
        print(
            f"| {result['way']} | {scores['recall@10']:.4f} | {scores.get('recall@10_interval')} | "
            f"{scores['ndcg@10']:.4f} | {facts['histories_per_second']:.0f} | {facts['epochs']:.1f} | "
            f"{facts['minutes']:.1f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
