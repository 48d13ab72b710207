"""Semantic IDs and tokenizer of a large catalogue: seconds by step and peak memory, from a file of embeddings.

    python recipes/benchmarks/large_catalogue.py --num_items 10000000 --output_dir runs/large_catalogue
    python recipes/benchmarks/large_catalogue.py --num_items 1000000 --interactions 50000000
    python recipes/benchmarks/large_catalogue.py --debug

Three processes follow one another: one writes the embeddings (`clustered` of `semantic_ids.py`: half as many Gaussian
clusters as codes of a level, in 64 dimensions) to a .npy file, one maps the file, quantizes it and saves the
tokenizer, one loads and uses the tokenizer. Peak memory is `ru_maxrss` of the process up to the end of the step; pages
of the mapped file that the system keeps in memory count as the process's own. A file of embeddings that is there
already is used. With --interactions one more process makes the items' embeddings of co-occurrence, 64 dimensions, of
as many interactions: histories of 50 items, each about one of a thousand topics, popular items more often than others.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from onerec_hf import ItemTrie, OneRecTokenizer
from onerec_hf.item_embeddings import behaviour_embeddings
from onerec_hf.semantic_ids import balanced_kmeans, codebook_sizes_for, make_quantizer, quantizer, residual_quantizer
from onerec_hf.semantic_ids.semantic_id_report import write_semantic_id_report

DIMENSIONS = 64
ROWS_AT_ONCE = 2**18
DEBUG_ITEMS, DEBUG_INTERACTIONS = 20_000, 200_000
TOPICS, HISTORY = 1_000, 50
LOOKED_UP, HISTORIES, HISTORY_ITEMS, NEW_ITEMS = 1_000_000, 10_000, 64, 1_000


class Steps(list):
    """Rows {"step", "seconds", "peak_gib"}, in the order in which the steps ended."""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.note(name, time.perf_counter() - start)

    def note(self, name: str, seconds: float) -> None:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
        self.append({"step": name, "seconds": seconds, "peak_gib": peak})
        print(f"{name:60s} {seconds:10.1f} s {peak:8.2f} GiB", flush=True)

    def watch(self, owner, name: str, step: str) -> None:
        """Notes every call of a function of a module or class."""
        function: Callable = getattr(owner, name)

        def watched(*args, **kwargs):
            with self.step(step):
                return function(*args, **kwargs)

        setattr(owner, name, watched)


def write_embeddings(path: Path, num_items: int, num_clusters: int) -> Steps:
    steps, random = Steps(), np.random.default_rng(0)
    unfinished = path.with_suffix(".part")
    with steps.step("write the embeddings"):
        centers = random.standard_normal((num_clusters, DIMENSIONS), dtype=np.float32)
        out = np.lib.format.open_memmap(unfinished, "w+", np.float32, (num_items, DIMENSIONS))
        for start in range(0, num_items, ROWS_AT_ONCE):
            rows = out[start : start + ROWS_AT_ONCE]
            rows[:] = random.standard_normal(rows.shape, dtype=np.float32)
            rows += centers[random.integers(num_clusters, size=len(rows))]
        out.flush()
        unfinished.replace(path)
    return steps


def embed_behaviour(num_items: int, interactions: int) -> Steps:
    steps, random = Steps(), np.random.default_rng(3)
    with steps.step(f"draw {interactions:,} interactions"):
        users = interactions // HISTORY
        topics = random.integers(TOPICS, size=users)
        histories = []
        for start in range(0, users, ROWS_AT_ONCE):
            own = topics[start : start + ROWS_AT_ONCE, None]
            ranks = (num_items // TOPICS * random.random((len(own), HISTORY)) ** 2).astype(np.int64)
            histories.extend(ranks * TOPICS + own)
    with steps.step("co-occurrence embeddings"):
        embeddings, present = behaviour_embeddings(histories, num_items)
    assert embeddings.shape == (num_items, min(64, num_items)) and present.mean() > 0.5
    return steps


def item_ids(num_items: int, kind: str) -> np.ndarray:
    """Distinct ids in no order, without a Python object for each of them."""
    numbers = np.random.default_rng(1).permutation(num_items) * 7 + 10**9
    if kind == "integer":
        return numbers
    ids = np.empty(num_items, dtype=np.dtypes.StringDType())
    for start in range(0, num_items, ROWS_AT_ONCE):
        ids[start : start + ROWS_AT_ONCE] = [f"item-{number}" for number in numbers[start : start + ROWS_AT_ONCE]]
    return ids


def make_tokenizer(path: Path, folder: Path, kind: str, options: dict) -> Steps:
    steps = Steps()
    steps.watch(balanced_kmeans.BalancedKMeans, "fit", "K-means of a level, on a sample")
    steps.watch(balanced_kmeans.BalancedKMeans, "assign", "balanced codes of a level")
    steps.watch(residual_quantizer, "nearest_centroid", "nearest codes of a level")
    steps.watch(quantizer.Quantizer, "_resolve", "collisions")
    steps.watch(quantizer, "quantization_report", "quality report")
    embeddings = np.load(path, mmap_mode="r")
    sizes = codebook_sizes_for(len(embeddings))
    with steps.step("fit, all of the above"):
        result = make_quantizer("balanced_rkmeans", sizes, **options).fit(embeddings)
    with steps.step("tokenizer of the codes"):
        ids = item_ids(len(embeddings), kind)
        tokenizer = OneRecTokenizer.from_semantic_ids(
            ids, result.codes, report=result.report, quantizer=result.quantizer
        )
    with steps.step("pictures"):
        write_semantic_id_report(
            folder / "semantic_ids", embeddings, tokenizer.codes, sizes, lambda row: str(ids[row])
        )
    with steps.step("save"):
        tokenizer.save_pretrained(folder)
    return steps


def use_tokenizer(folder: Path) -> Steps:
    steps, random = Steps(), np.random.default_rng(2)
    with steps.step("load"):
        tokenizer = OneRecTokenizer.from_pretrained(folder)
    drawn = random.integers(tokenizer.num_items, size=LOOKED_UP)
    ids = tokenizer.item_ids[drawn]
    with steps.step(f"catalogue indices of {LOOKED_UP:,} ids"):
        found = tokenizer.item_index(ids)
    assert np.array_equal(found, drawn)
    histories = list(ids[: HISTORIES * HISTORY_ITEMS].reshape(HISTORIES, HISTORY_ITEMS))
    with steps.step(f"encode {HISTORIES:,} histories of {HISTORY_ITEMS} items"):
        encoded = tokenizer.encode_histories(histories)
    with steps.step("decode them"):
        decoded = tokenizer.decode_sessions(encoded["input_ids"])
    assert decoded == [history.tolist() for history in histories]
    with steps.step("catalogue fingerprint"):
        tokenizer.catalogue_fingerprint()
    with steps.step("trie"):
        ItemTrie.from_tokenizer(tokenizer)
    embeddings = tokenizer.quantizer.decode(tokenizer.codes[:NEW_ITEMS]) + 0.01
    new = [f"new-{row}" for row in range(NEW_ITEMS)] if isinstance(decoded[0][0], str) else range(NEW_ITEMS)
    with warnings.catch_warnings(), steps.step(f"add {NEW_ITEMS:,} items"):
        warnings.simplefilter("ignore")  # all of them want an ID that is taken
        tokenizer.add_items(new, embeddings)
    return steps


def measure(args: argparse.Namespace) -> list[dict]:
    folder = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    path, saved = folder / f"embeddings_{args.num_items}.npy", folder / f"tokenizer_{args.num_items}"
    options = {"code_assignment": args.code_assignment, "collision_policy": args.collision_policy}
    work = [(make_tokenizer, path, saved, args.ids, options), (use_tokenizer, saved)]
    if not path.exists():
        work.insert(0, (write_embeddings, path, args.num_items, codebook_sizes_for(args.num_items)[0] // 2))
    if args.interactions:
        work.append((embed_behaviour, args.num_items, args.interactions))
    steps = []
    for function, *given in work:
        # A process of its own for each, whose peak memory is of this work alone.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            steps += process.submit(function, *given).result()
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_items", type=int, default=10_000_000)
    parser.add_argument("--interactions", type=int, default=0, help="of the co-occurrence; 0 leaves it out")
    parser.add_argument(
        "--debug", action="store_true", help=f"{DEBUG_ITEMS:,} items, {DEBUG_INTERACTIONS:,} interactions: a minute"
    )
    parser.add_argument("--code_assignment", choices=residual_quantizer.CODE_ASSIGNMENTS, default="nearest")
    parser.add_argument("--collision_policy", default="nearest_free")
    parser.add_argument("--ids", choices=("integer", "string"), default="integer")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/large_catalogue"))
    parser.add_argument("--json", help="file for the same figures")
    args = parser.parse_args()
    if args.debug:
        args.num_items, args.interactions = DEBUG_ITEMS, DEBUG_INTERACTIONS
    steps = measure(args)
    if args.json:
        unfinished = Path(args.json + ".tmp")
        content = {"threads": torch.get_num_threads(), "num_items": args.num_items, "steps": steps}
        unfinished.write_text(json.dumps(content, indent=2), encoding="utf-8")
        unfinished.replace(args.json)


if __name__ == "__main__":
    main()
