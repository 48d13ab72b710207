"""What preference alignment costs: a DPO step against one that encodes every history twice, and drawing the pairs.

    python recipes/benchmarks/alignment.py --json alignment.json
    python recipes/benchmarks/alignment.py --parts sampling --config recipes/kuairand/preference_alignment.yaml \
        --data_dir KUAIRAND_FOLDER --output_dir runs/kuairand

Two parts, `--parts` for one of them: `step` times optimizer steps of `OneRecDPOTrainer` beside a plain training loop
that encodes the history for the chosen and the rejected session alike, in policy and reference, in turn and with the
same weights, pairs and loss; and once more with the reference's log-probabilities known beforehand, as the stage
`align` has them from the sampler. `sampling` times the candidates of 100 users, generated and scored. Models have the
shapes of the KuaiRand recipe and random weights; the options of a recipe, `--output_dir` among them, let `sampling`
take the run's model, users and reward model (of random weights and the recipe's width where none is trained yet).
"""

import copy
import json
import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, disable_progress_bars
from transformers import set_seed

from onerec_hf import ItemTrie, OneRecConfig, OneRecForConditionalGeneration, OneRecTokenizer
from onerec_hf.alignment import OneRecDPOConfig, OneRecDPOTrainer, PreferenceSampling, sample_preferences
from onerec_hf.pretraining import CPU_EXPERTS, index_sessions
from onerec_hf.reward import OneRecRewardConfig, OneRecRewardModel, SessionScorer, create_reward_model
from onerec_hf.session_generation import SEARCHES
from onerec_hf.stages.data_stage import USER_HISTORIES, prepared_data
from onerec_hf.stages.recipe_arguments import parse_recipe_arguments
from onerec_hf.stages.reward_stage import REWARD_MODEL
from onerec_hf.stages.stage_runner import MODEL, stage_dir
from onerec_hf.stages.tokenize_stage import load_item_content

PARTS = ("step", "sampling")
CODEBOOK_SIZES = [128, 128, 128]
NUM_ITEMS = 7583  # of KuaiRand-Pure
HISTORY_ITEMS, SESSION_ITEMS = 50, 5
BETA, LEARNING_RATE, MAX_GRAD_NORM = 0.1, 1e-5, 1.0


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--pairs", type=int, default=16, help="pairs of a step")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--num_candidates", type=int, default=128)
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=("beam", "diverse_beam", "sample"))
    parser.add_argument("--json", type=Path, default=None, help="file to which the figures are written too")
    return parser


def random_tokenizer() -> OneRecTokenizer:
    places = np.random.default_rng(0).choice(128**3, NUM_ITEMS, replace=False)
    codes = np.stack(np.unravel_index(places, CODEBOOK_SIZES), axis=1)
    return OneRecTokenizer.from_semantic_ids(np.arange(NUM_ITEMS), codes, codebook_sizes=CODEBOOK_SIZES)


def random_generator(**overrides) -> OneRecForConditionalGeneration:
    """The KuaiRand recipe's shapes; the overrides are positions and attention of its encoder."""
    set_seed(0)
    lengths = {"history_items": HISTORY_ITEMS, "session_items": SESSION_ITEMS}
    return OneRecForConditionalGeneration(
        OneRecConfig.from_preset("small", codebook_sizes=CODEBOOK_SIZES, **lengths, **overrides)
    )


def random_rows(count: int) -> Dataset:
    """Full histories, with one chosen and one rejected session each."""
    generator = np.random.default_rng(1)
    rows = []
    for user in range(count):
        items = generator.choice(NUM_ITEMS, HISTORY_ITEMS + 2 * SESSION_ITEMS, replace=False)
        history, chosen, rejected = np.split(items, [HISTORY_ITEMS, HISTORY_ITEMS + SESSION_ITEMS])
        rows.append(
            {
                "user_id": user,
                "history": history.tolist(),
                "chosen": chosen.tolist(),
                "rejected": [rejected.tolist()],
            }
        )
    return Dataset.from_list(rows)


# ------------------------------------------------------------------------------------------------------------ the step


def package_step(
    model, reference, pairs: Dataset, tokenizer: OneRecTokenizer, precompute: bool = False
) -> tuple[Callable, Callable]:
    """A batch's loss by the trainer, and a whole optimizer step, both from rows of pairs."""
    with tempfile.TemporaryDirectory() as folder:
        args = OneRecDPOConfig(
            output_dir=folder,
            beta=BETA,
            ntp_per_pair=0,
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=len(pairs),
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            precompute_ref_log_probs=precompute,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = OneRecDPOTrainer(model, args, pairs, tokenizer, ref_model=reference)
    rows = list(trainer.train_dataset)
    model.train()

    def loss() -> torch.Tensor:
        return trainer.compute_loss(model, trainer.data_collator(rows))

    return loss, optimizer_step(model, loss)


def optimizer_step(model, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """A whole step on what `loss` gives."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_step(model, reference, pairs: Dataset, tokenizer: OneRecTokenizer) -> tuple[Callable, Callable]:
    """The same by a plain loop: a pair is two rows, each with its history."""
    rows = list(pairs)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # as in the trainer

    def log_probs(scored, histories, labels) -> torch.Tensor:
        inputs = F.pad(labels[:, :-1], (1, 0), value=scored.config.bos_token_id)
        logits = scored(**histories, decoder_input_ids=inputs, use_cache=False).logits
        per_token = logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
        return per_token.masked_fill(labels == scored.config.bos_token_id, 0.0).sum(1)

    def loss() -> torch.Tensor:
        histories = tokenizer.encode_histories(
            [row["history"] for row in rows] * 2, max_items=HISTORY_ITEMS, catalogue_indices=True
        )
        sessions = [row["chosen"] for row in rows] + [row["rejected"][0] for row in rows]
        labels = tokenizer.encode_sessions(sessions, catalogue_indices=True)
        policy = log_probs(model, histories, labels)
        with torch.no_grad():
            frozen = log_probs(reference, histories, labels)
        chosen, rejected = (policy - frozen).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    return loss, optimizer_step(model, loss)


def seconds(work: Callable[[], object]) -> float:
    """Processor time [s] of all threads, which a busy machine does not change."""
    started = time.process_time()
    work()
    return time.process_time() - started


def compare_steps(args: Namespace) -> list[dict]:
    tokenizer, pairs = random_tokenizer(), random_rows(args.pairs)
    print("| encoder | one position per | loss | plain [ms] | reference live [ms] | | known [ms] | |")
    print("|---|---|---|---|---|---|---|---|")
    results = []
    for attention in ("causal", "bidirectional"):
        for positions in ("item", "token"):
            reference = random_generator(history_positions=positions, encoder_attention=attention).eval()
            reference.set_experts_implementation(CPU_EXPERTS)
            policy = copy.deepcopy(reference)
            with torch.no_grad():  # as in the middle of a round: policy and reference differ
                for parameter in policy.parameters():
                    parameter.mul_(1.5)
            sides = [
                make(copy.deepcopy(policy), copy.deepcopy(reference), pairs, tokenizer)
                for make in (plain_step, package_step, partial(package_step, precompute=True))
            ]
            losses = [loss().item() for loss, _ in sides]
            difference = max(losses) - min(losses)
            assert difference <= 1e-4, f"the losses {losses} differ"
            times = [[seconds(step) for _, step in sides] for _ in range(args.repeats + 2)][2:]  # two warm up
            plain, ours, precomputed = (statistics.median(side) for side in zip(*times, strict=True))
            row = {
                "encoder_attention": attention,
                "history_positions": positions,
                "loss": losses[0],
                "loss_difference": difference,
                "plain_step_s": plain,
                "step_s": ours,
                "ratio": plain / ours,
                "precomputed_step_s": precomputed,
                "precomputed_ratio": plain / precomputed,
            }
            results.append(row)
            print(
                f"| {attention} | {positions} | {losses[0]:.4f} | {plain * 1e3:.1f} | {ours * 1e3:.1f} | "
                f"{row['ratio']:.2f}x | {precomputed * 1e3:.1f} | {row['precomputed_ratio']:.2f}x |",
                flush=True,
            )
    return results


# -------------------------------------------------------------------------------------------------------- the sampling


def random_run(users: int) -> tuple[OneRecForConditionalGeneration, SessionScorer, Dataset]:
    tokenizer = random_tokenizer()
    model = random_generator(history_positions="item", encoder_attention="causal")
    config = OneRecRewardConfig(
        codebook_sizes=CODEBOOK_SIZES, history_items=HISTORY_ITEMS, session_items=SESSION_ITEMS
    )
    return model, SessionScorer(OneRecRewardModel(config), tokenizer), random_rows(users)


def trained_run(args, users: int) -> tuple[OneRecForConditionalGeneration, SessionScorer, Dataset]:
    """Seed model, reward model and the first users of a run."""
    source = stage_dir(args.output_dir, "pretrain", "alignment") / MODEL
    tokenizer = OneRecTokenizer.from_pretrained(source)
    prepared = prepared_data(args, "alignment")
    folder = args.output_dir / "reward" / REWARD_MODEL
    if folder.exists():
        scorer = SessionScorer.from_pretrained(folder)
    else:
        lengths = {"history_items": args.history_items, "session_items": args.session_items}
        config = lengths | args.reward_model
        embeddings = load_item_content(args.output_dir)
        model = create_reward_model(config, prepared.fitted_feed, tokenizer, embeddings)
        scorer = SessionScorer(model, tokenizer)
    rows = index_sessions(prepared.read(USER_HISTORIES), tokenizer).shuffle(seed=0).select(range(users))
    return OneRecForConditionalGeneration.from_pretrained(source), scorer, rows


def measure_sampling(args: Namespace, recipe: list[str]) -> dict:
    if any(option.startswith("--output_dir") for option in recipe):
        model, scorer, rows = trained_run(parse_recipe_arguments(recipe), args.users)
    else:
        model, scorer, rows = random_run(args.users)
    model.eval()
    trie = ItemTrie.from_tokenizer(scorer.tokenizer)
    results = {"users": len(rows), "num_candidates": args.num_candidates}
    lengths = [min(len(history), model.config.history_items) for history in rows["history"][:]]
    print(f"{len(rows)} users with {np.mean(lengths):.1f} items of history, {args.num_candidates} candidates each")
    print("| search | seconds, with scoring | processor seconds | of them scoring | pairs |")
    print("|---|---|---|---|---|")
    found = []
    for search in args.searches:
        options = PreferenceSampling(r_dpo=1.0, num_candidates=args.num_candidates, search=search)

        def draw(rows=rows, options=options) -> Dataset:
            return sample_preferences(model, trie, scorer, rows, options, show_progress=False)

        draw(rows.select(range(2)))  # warms up
        started = time.perf_counter()
        processor_s = seconds(lambda: found.append(draw()))  # noqa: B023
        wall_s = time.perf_counter() - started
        pairs = found.pop()
        drawn = [(row["candidates"] * args.num_candidates)[: args.num_candidates] for row in pairs]
        sessions, scored = torch.tensor(drawn), rows.to_list()[: len(drawn)]
        results[search] = {
            "seconds": wall_s,
            "processor_s": processor_s,
            "scoring_s": seconds(lambda: scorer.score(scored, sessions)),  # noqa: B023
            "pairs": len(pairs),
        }
        figures = results[search]
        print(
            f"| {search} | {figures['seconds']:.1f} | {figures['processor_s']:.1f} | {figures['scoring_s']:.1f} | "
            f"{len(pairs)} |",
            flush=True,
        )
    return results


def main():
    args, recipe = make_parser().parse_known_args()
    disable_progress_bars()
    figures = {"threads": torch.get_num_threads()}
    if "step" in args.parts:
        figures["step"] = compare_steps(args)
    if "sampling" in args.parts:
        figures["sampling"] = measure_sampling(args, recipe)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
