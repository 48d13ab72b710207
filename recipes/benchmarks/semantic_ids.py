"""Semantic IDs against their peers: balanced K-means, its scale, the tokenizer's scale and the table of quantizers.

    pip install k-means-constrained faiss-cpu
    python recipes/benchmarks/semantic_ids.py --json semantic_ids.json
    python recipes/benchmarks/semantic_ids.py --parts constrained_4096 faiss

Parts:
    constrained_4096, constrained_16384: inertia and time against k-means-constrained (exact assignment by min-cost
        flow), one initialisation each, all clusters of one size; 4,096 x 64 with K = 128, 16,384 x 64 with K = 256.
    faiss: inertia and time against faiss `Kmeans` (no balance), 100,000 x 64, K = 256, all points, as many
        iterations.
    growth: time per item and iteration at 10,000, 100,000 and 1,000,000 x 64, K = 256.
    million: 1,000,000 x 64, K = 1,024, in a process of its own; time and peak memory.
    tokenizer: load, memory and encoding at 1,000,000 items.
    quantizers: the table of quantizers; needs --data_dir, a folder with kuairand_pure/ and/or amazon_beauty/ (hours,
        resumed under --output_dir).

Data, all seeded: "uniform" in the unit cube; "clustered", K / 2 Gaussian clusters of equal weight around Gaussian
centres, both of variance 1; "heavy-tailed", the same with weights 1 / rank; "heavy-tailed noise", the latter with
Student's t (4 degrees of freedom) radii, whose outliers no balanced cluster can serve.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from onerec_hf.semantic_ids.balanced_kmeans import BalancedKMeans, nearest_centroid

DIMENSIONS = 64
DISTRIBUTIONS = ("uniform", "clustered", "heavy-tailed", "heavy-tailed noise")
# What is asked for is asked of these; the fourth shows what outliers cost.
BARRED = DISTRIBUTIONS[:3]
DATA_SETS = {"kuairand": "kuairand_pure", "amazon_beauty": "amazon_beauty"}
GIB = 2**30


class Figure(NamedTuple):
    part: str
    name: str
    value: float
    bar: str = ""
    met: bool | None = None


def at_most(part: str, name: str, value: float, bar: float | None) -> Figure:
    return Figure(part, name, value) if bar is None else Figure(part, name, value, f"<= {bar:g}", value <= bar)


def at_least(part: str, name: str, value: float, bar: float | None) -> Figure:
    return Figure(part, name, value) if bar is None else Figure(part, name, value, f">= {bar:g}", value >= bar)


def points(distribution: str, num_points: int, num_clusters: int, seed: int = 0) -> np.ndarray:
    """Float32 [num_points, 64]."""
    random = np.random.default_rng(seed)
    if distribution == "uniform":
        return random.random((num_points, DIMENSIONS), dtype=np.float32)
    centers = random.normal(size=(num_clusters // 2, DIMENSIONS)).astype(np.float32)
    weights = np.ones(len(centers)) if distribution == "clustered" else 1 / np.arange(1, len(centers) + 1)
    labels = random.choice(len(centers), num_points, p=weights / weights.sum())
    noise = random.standard_normal((num_points, DIMENSIONS), dtype=np.float32)
    if distribution == "heavy-tailed noise":
        noise /= np.sqrt(random.chisquare(4, size=(num_points, 1)) / 4).astype(np.float32)
    return centers[labels] + noise


def inertia(x: np.ndarray, centroids: np.ndarray, labels: torch.Tensor | None = None) -> float:
    """Sum of squared distances to the own centroid, the nearest one by default, in float64."""
    x, centroids = torch.from_numpy(x), torch.as_tensor(centroids, dtype=torch.float32)
    labels = nearest_centroid(x, centroids) if labels is None else labels
    parts = zip(x.split(2**16), labels.split(2**16), strict=True)
    return float(sum((part.double() - centroids[own].double()).square().sum() for part, own in parts))


def timed_fit(x: np.ndarray, num_clusters: int, repeats: int = 1, **options) -> tuple[BalancedKMeans, float]:
    """The fit, checked for balance, and the median of its seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        kmeans = BalancedKMeans(num_clusters, **options).fit(x)
        seconds.append(time.perf_counter() - start)
    sizes = torch.bincount(kmeans.labels, minlength=num_clusters)
    if sizes.max() - sizes.min() > 1:
        raise AssertionError(f"clusters of {int(sizes.min())} to {int(sizes.max())} points")
    return kmeans, statistics.median(seconds)


def constrained(part: str, num_points: int, num_clusters: int, faster: float, only: list[str]) -> Iterator[Figure]:
    from k_means_constrained import KMeansConstrained

    size = num_points // num_clusters
    for distribution in only:
        x = points(distribution, num_points, num_clusters)
        start = time.perf_counter()
        peer = KMeansConstrained(num_clusters, size_min=size, size_max=size, n_init=1, random_state=0).fit(x)
        peer_seconds = time.perf_counter() - start
        peer_inertia = inertia(x, peer.cluster_centers_, torch.from_numpy(peer.labels_.astype(np.int64)))
        kmeans, seconds = timed_fit(x, num_clusters, repeats=5)
        greedy, greedy_seconds = timed_fit(x, num_clusters, assignment="greedy")
        barred = distribution in BARRED
        ratio = inertia(x, kmeans.centroids, kmeans.labels) / peer_inertia
        yield at_most(part, f"{distribution}: inertia / k-means-constrained's", ratio, 1.01 if barred else None)
        yield at_least(part, f"{distribution}: times faster", peer_seconds / seconds, faster if barred else None)
        yield Figure(part, f"{distribution}: seconds", seconds)
        yield Figure(part, f"{distribution}: seconds of k-means-constrained", peer_seconds)
        ratio = inertia(x, greedy.centroids, greedy.labels) / peer_inertia
        yield Figure(part, f"{distribution}: inertia of Algorithm 1's greedy / k-means-constrained's", ratio)
        yield Figure(part, f"{distribution}: seconds of Algorithm 1's greedy", greedy_seconds)


def unconstrained(part: str, only: list[str]) -> Iterator[Figure]:
    import faiss

    num_points, num_clusters = 100_000, 256
    for distribution in only:
        x = points(distribution, num_points, num_clusters)
        kmeans, seconds = timed_fit(x, num_clusters, repeats=3, max_iterations=25, tolerance=0)
        peer_seconds = []
        for _ in range(3):
            peer = faiss.Kmeans(
                DIMENSIONS, num_clusters, niter=kmeans.num_iterations, max_points_per_centroid=num_points
            )
            start = time.perf_counter()
            peer.train(x)
            peer_seconds.append(time.perf_counter() - start)
        peer_time = statistics.median(peer_seconds)
        ratio = inertia(x, kmeans.centroids, kmeans.labels) / inertia(x, peer.centroids)
        bar = {"uniform": 1.02, "heavy-tailed": 1.10}.get(distribution)
        yield at_most(part, f"{distribution}: inertia / faiss's", ratio, bar)
        yield at_most(part, f"{distribution}: time / faiss's", seconds / peer_time, 5 if bar else None)
        yield Figure(part, f"{distribution}: seconds ({kmeans.num_iterations} iterations)", seconds)
        yield Figure(part, f"{distribution}: seconds of faiss", peer_time)


def growth(part: str) -> Iterator[Figure]:
    num_clusters, costs = 256, {}
    for num_points in (10_000, 100_000, 1_000_000):
        x = points("heavy-tailed", num_points, num_clusters)
        kmeans, seconds = timed_fit(
            x, num_clusters, repeats=3 if num_points < 1_000_000 else 1, max_iterations=8, tolerance=0
        )
        costs[num_points] = seconds / num_points / kmeans.num_iterations * 1e6
        yield Figure(part, f"{num_points:,} x 64: microseconds per item and iteration", costs[num_points])
    ratio = costs[1_000_000] / costs[10_000]
    yield at_most(part, "cost per item, 1,000,000 / 10,000", ratio, 1.3)


def million(part: str) -> Iterator[Figure]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        seconds, iterations, memory = process.submit(_million).result()
    yield at_most(part, f"1,000,000 x 64, K = 1,024: minutes ({iterations} iterations)", seconds / 60, 15)
    yield at_most(part, "1,000,000 x 64, K = 1,024: peak memory of the process, GiB", memory, 6)


def _million() -> tuple[float, int, float]:
    num_clusters = 1024
    kmeans, seconds = timed_fit(points("heavy-tailed", 1_000_000, num_clusters), num_clusters)
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, kmeans.num_iterations, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def tokenizer(part: str) -> Iterator[Figure]:
    import tokenizer_scale

    for name, value, bar in tokenizer_scale.measure():
        yield at_most(part, name, value, bar)


def quantizers(part: str, data_dir: str | None, output_dir: str) -> Iterator[Figure]:
    import quantizer_comparison

    if data_dir is None:
        raise SystemExit("--parts quantizers needs --data_dir, a folder with kuairand_pure/ and/or amazon_beauty/")
    found = {name: str(Path(data_dir) / folder) for name, folder in DATA_SETS.items()}
    found = {name: folder for name, folder in found.items() if os.path.isdir(folder)}
    if not found:
        raise SystemExit(f"--data_dir {data_dir} holds neither of {', '.join(DATA_SETS.values())}")
    cells = quantizer_comparison.quantizer_comparison(found, output_dir)
    print(quantizer_comparison.print_table(cells))
    for cell in cells:
        name = f"{cell['data_set']}, {cell['quantizer']}"
        levels = [level for level in cell["report"]["levels"] if "reconstruction_error" in level]
        yield Figure(part, f"{name}: use", float(np.mean([level["use"] for level in levels])))
        yield Figure(part, f"{name}: entropy, bits", float(np.mean([level["entropy_bits"] for level in levels])))
        yield Figure(part, f"{name}: reconstruction error", cell["report"]["reconstruction_error"])
        yield Figure(part, f"{name}: collisions", cell["report"]["collision_rate_before_policy"])
        yield Figure(part, f"{name}: Recall@10", cell["metrics"]["recall@10"])


PARTS = ("constrained_4096", "constrained_16384", "faiss", "growth", "million", "tokenizer", "quantizers")


def measure(args: argparse.Namespace) -> Iterator[Figure]:
    # Threads and libraries are started before the clock runs.
    BalancedKMeans(16).fit(points("clustered", 2048, 16))
    for part in args.parts:
        if part == "constrained_4096":
            yield from constrained(part, 4096, 128, 30, args.distributions)
        elif part == "constrained_16384":
            yield from constrained(part, 16_384, 256, 100, args.distributions)
        elif part == "faiss":
            yield from unconstrained(part, args.distributions)
        elif part == "growth":
            yield from growth(part)
        elif part == "million":
            yield from million(part)
        elif part == "tokenizer":
            yield from tokenizer(part)
        else:
            yield from quantizers(part, args.data_dir, args.output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:-1], help="all but quantizers by default")
    parser.add_argument("--distributions", nargs="+", choices=DISTRIBUTIONS, default=DISTRIBUTIONS)
    parser.add_argument("--data_dir", help="of the part quantizers")
    parser.add_argument("--output_dir", default="output/quantizer_comparison", help="of the part quantizers")
    parser.add_argument("--json", help="file for the same figures")
    args = parser.parse_args()
    figures = []
    print(f"{'part':18} {'figure':70} {'measured':>12} {'asked':>8}")
    for figure in measure(args):
        figures.append(figure)
        verdict = {True: "met", False: "MISSED", None: ""}[figure.met]
        print(f"{figure.part:18} {figure.name:70} {figure.value:12.4g} {figure.bar:>8} {verdict}", flush=True)
    if args.json:
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        unfinished = Path(args.json + ".tmp")
        content = {**machine, "figures": [figure._asdict() for figure in figures]}
        unfinished.write_text(json.dumps(content, indent=2), encoding="utf-8")
        unfinished.replace(args.json)


if __name__ == "__main__":
    main()
