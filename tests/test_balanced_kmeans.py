import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from onerec_hf.semantic_ids import BalancedKMeans, balanced_kmeans
from onerec_hf.semantic_ids.balanced_kmeans import nearest_centroid

BALANCED = ["greedy", "transport"]


def clustered(num_points=600, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(40, dim, generator=generator)
    labels = torch.multinomial(torch.rand(40, generator=generator) ** 3, num_points, True, generator=generator)
    return centers[labels] + torch.randn(num_points, dim, generator=generator)


def optimal_cost(x, kmeans):
    """Cost of the exact assignment to the centroids under the clusters' sizes."""
    cost = torch.cdist(x, kmeans.centroids).square()
    seats = cost.repeat_interleave(torch.bincount(kmeans.labels, minlength=kmeans.num_clusters), 1).numpy()
    return float(seats[linear_sum_assignment(seats)].sum())


@settings(max_examples=40, deadline=None)
@given(
    assignment=st.sampled_from(BALANCED),
    num_clusters=st.integers(1, 12),
    more=st.integers(0, 60),
    distinct=st.integers(1, 72),
    seed=st.integers(0, 5),
)
def test_sizes_differ_by_at_most_one(assignment, num_clusters, more, distinct, seed):
    num_points = num_clusters + more
    x = clustered(num_points, 3, seed)[torch.arange(num_points) % distinct]
    kmeans = BalancedKMeans(num_clusters, assignment, seed=seed).fit(x)
    sizes = torch.bincount(kmeans.labels, minlength=num_clusters)
    assert len(sizes) == num_clusters and sizes.sum() == num_points and sizes.max() - sizes.min() <= 1
    assert torch.isfinite(kmeans.centroids).all()
    means = torch.stack([x[kmeans.labels == cluster].mean(0) for cluster in range(num_clusters)])
    assert torch.allclose(kmeans.centroids, means, atol=1e-5)
    assert kmeans.inertia == pytest.approx(float((x - means[kmeans.labels]).square().sum()), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("num_points,num_clusters", [(600, 30), (1000, 24), (300, 7)])
def test_transport_is_close_to_the_exact_assignment(num_points, num_clusters):
    x = clustered(num_points)
    kmeans = BalancedKMeans(num_clusters).fit(x)
    exact = optimal_cost(x, kmeans)
    assert exact <= kmeans.inertia * (1 + 1e-4) and kmeans.inertia < 1.02 * exact
    assert kmeans.inertia < BalancedKMeans(num_clusters, "greedy").fit(x).inertia


def test_exchange_moves_along_the_best_cycles():
    x = clustered(120)
    centroids = x[:8]
    labels = torch.randperm(120, generator=torch.Generator().manual_seed(0)) % 8
    cost = torch.cdist(x, centroids).square()
    before, sizes = labels.clone(), torch.bincount(labels)
    BalancedKMeans(8)._exchange(x, centroids, labels)
    assert torch.equal(torch.bincount(labels), sizes)
    # By hand: the best point of each pair of clusters, and the best permutation of the clusters.
    own = cost.gather(1, before[:, None])
    gains = torch.stack([(own - cost)[before == cluster].amax(0) for cluster in range(8)]).fill_diagonal_(0).numpy()
    most = gains[linear_sum_assignment(gains, maximize=True)].sum()
    gained = (own - cost.gather(1, labels[:, None])).sum()
    assert (before != labels).sum() <= 8 and gained == pytest.approx(most, rel=1e-4) and most > 0


def test_greedy_is_algorithm_1():
    points = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0], [11.0]])
    labels = BalancedKMeans(2, "greedy")._assign_greedy(points, torch.tensor([[10.0], [11.0]]))
    assert labels.tolist() == [1, 1, 1, 0, 0, 0]


def test_nearest_is_plain_k_means():
    x = clustered()
    kmeans = BalancedKMeans(20, "nearest", tolerance=0, max_iterations=200).fit(x)
    assert torch.equal(kmeans.labels, torch.cdist(x, kmeans.centroids).argmin(1))
    assert kmeans.inertia < BalancedKMeans(20).fit(x).inertia


def test_empty_clusters_restart_far_away():
    x = torch.tensor([[0.0], [0.1], [0.2], [5.0], [9.0]])
    labels = BalancedKMeans(3, "nearest")._assign_nearest(x, torch.tensor([[0.1], [100.0], [200.0]]))
    assert labels[:3].tolist() == [0, 0, 0] and sorted(labels[3:].tolist()) == [1, 2]


def test_same_seed_same_clusters_and_blocks_do_not_matter(monkeypatch):
    x = clustered()
    first = BalancedKMeans(20, seed=3).fit(x)
    again = BalancedKMeans(20, seed=3).fit(x)
    assert torch.equal(first.centroids, again.centroids) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.labels, BalancedKMeans(20, seed=4).fit(x).labels)
    monkeypatch.setattr(balanced_kmeans, "BLOCK_NUMBERS", 700)
    monkeypatch.setattr(balanced_kmeans, "PART_ROWS", 64)
    monkeypatch.setattr(balanced_kmeans, "KEPT_NUMBERS", 0)
    assert BalancedKMeans(20, seed=3).fit(x).inertia == pytest.approx(first.inertia, rel=0.02)
    # Prices from a sample of the points.
    monkeypatch.setattr(balanced_kmeans, "PRICING_POINTS", 15)
    assert BalancedKMeans(20, seed=3).fit(x).inertia == pytest.approx(first.inertia, rel=0.04)


PROCESS = """
import sys, torch
import torch.distributed as dist
from onerec_hf.semantic_ids import BalancedKMeans, balanced_kmeans
torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
balanced_kmeans.BLOCK_NUMBERS, balanced_kmeans.PART_ROWS, balanced_kmeans.PRICING_POINTS = 1000, 128, 25
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
x = torch.randn(900, 8, generator=torch.Generator().manual_seed(0))
for assignment in ("transport", "nearest"):
    kmeans = BalancedKMeans(20, assignment, distributed=True, tolerance=0).fit(x)
    torch.save((kmeans.centroids, kmeans.labels, kmeans.inertia), f"{folder}/{assignment}_{rank}.pt")
"""


def test_two_processes_give_the_result_of_one(tmp_path, monkeypatch):
    started = [subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), str(tmp_path)]) for rank in range(2)]
    for name, size in (("BLOCK_NUMBERS", 1000), ("PART_ROWS", 128), ("PRICING_POINTS", 25)):
        monkeypatch.setattr(balanced_kmeans, name, size)
    x = torch.randn(900, 8, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = {name: BalancedKMeans(20, name, tolerance=0).fit(x) for name in ("transport", "nearest")}
    torch.set_num_threads(threads)
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    for rank, name in itertools.product(range(2), one):
        centroids, labels, inertia = torch.load(tmp_path / f"{name}_{rank}.pt")
        assert torch.equal(centroids, one[name].centroids) and torch.equal(labels, one[name].labels)
        assert inertia == one[name].inertia


def test_data_far_from_the_origin():
    x = clustered()
    near, far = BalancedKMeans(20).fit(x), BalancedKMeans(20).fit(x + 1000)
    assert far.inertia == pytest.approx(near.inertia, rel=0.02)


def test_equal_points():
    kmeans = BalancedKMeans(3).fit(torch.ones(7, 2))
    assert kmeans.inertia == 0 and sorted(torch.bincount(kmeans.labels).tolist()) == [2, 2, 3]


def test_nearest_centroid_over_blocks(monkeypatch):
    x, centroids = clustered(50), clustered(7, seed=1)
    monkeypatch.setattr(balanced_kmeans, "BLOCK_NUMBERS", 20)
    assert torch.equal(nearest_centroid(x, centroids), torch.cdist(x, centroids).argmin(1))


def test_bad_input():
    with pytest.raises(ValueError, match="6 clusters but only 5 points"):
        BalancedKMeans(6).fit(torch.randn(5, 2))
    with pytest.raises(ValueError, match="assignment must be one of"):
        BalancedKMeans(2, "best")
    x = torch.randn(5, 2)
    x[3, 1] = float("nan")
    with pytest.raises(ValueError, match="row 3 holds NaN"):
        BalancedKMeans(2).fit(x)
