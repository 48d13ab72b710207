"""Balanced K-means: clusters whose sizes differ by at most one (OneRec section 3.1, Algorithm 1)."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from tqdm.auto import tqdm

ASSIGNMENTS = ("greedy", "transport")
# Of the Sinkhorn iterations, in units of the mean squared distance to the nearest centroid.
TEMPERATURES = (0.1, 0.03, 0.01)
SINKHORN_PASSES = 3
EXCHANGE_PASSES = 20
# Distances are computed in blocks of this many numbers (4 MB in float32, which stays in a CPU's cache) ...
BLOCK_NUMBERS = 2**20
# ... and kept for the passes of one iteration while all of them are at most this many (512 MB).
KEPT_NUMBERS = 2**27


def as_points(x, name: str = "embeddings", device: torch.device | str | None = None) -> torch.Tensor:
    """Float32 tensor [N, d] of `x`; ValueError names the first row that holds NaN or infinity."""
    x = torch.as_tensor(x).to(device=device, dtype=torch.float32)
    if x.ndim != 2 or x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"{name} must be a non-empty matrix [items, dimensions], got shape {list(x.shape)}")
    finite = torch.isfinite(x).all(1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"{name} row {row} holds NaN or infinity; repair or drop this item's embedding")
    return x


Block = tuple[slice, torch.Tensor]


def _distance_blocks(x: torch.Tensor, centroids: torch.Tensor) -> Iterator[Block]:
    """Yields (rows, squared distances [rows, K])."""
    step = max(1, BLOCK_NUMBERS // len(centroids))
    centroid_norms = centroids.square().sum(1)
    for start in range(0, len(x), step):
        block = x[start : start + step]
        distances = block.square().sum(1, keepdim=True) + centroid_norms - 2 * block @ centroids.T
        yield slice(start, start + step), distances.clamp_(min=0)


def nearest_centroid(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Index of the nearest centroid of each row: LongTensor [N]."""
    labels = torch.empty(len(x), dtype=torch.long, device=x.device)
    for rows, distances in _distance_blocks(x, centroids):
        labels[rows] = distances.argmin(1)
    return labels


def _plus_plus_seeds(x: torch.Tensor, num_clusters: int, generator: torch.Generator) -> torch.Tensor:
    """K-means++: each seed is drawn with probability proportional to its squared distance from the seeds before."""
    seeds = [int(torch.randint(len(x), (1,), generator=generator))]
    distances = (x - x[seeds[0]]).square().sum(1).double()
    for _ in range(num_clusters - 1):
        cumulative = distances.cumsum(0)
        drawn = torch.rand(1, generator=generator, dtype=torch.float64).to(x.device)
        if cumulative[-1] > 0:
            seed = int(torch.searchsorted(cumulative, drawn * cumulative[-1], right=True).clamp(max=len(x) - 1))
        else:  # fewer distinct points than clusters
            seed = int(drawn * len(x))
        seeds.append(seed)
        distances = torch.minimum(distances, (x - x[seed]).square().sum(1).double())
    return x[seeds].clone()


class BalancedKMeans:
    """K-means under the constraint that cluster sizes differ by at most one.

    N points in K clusters: N mod K clusters hold ceil(N / K) points, the others floor(N / K).

    Args:
        num_clusters: K.
        assignment: how points are spread over the clusters in each iteration.
            "greedy": Algorithm 1 as printed: cluster after cluster takes the points nearest to it among those left.
            The last clusters get what nobody wanted.
            "transport": all clusters at once. A price per cluster is found by Sinkhorn iterations of the optimal
            transport between points and clusters, then points choose in order of regret and pairs of points that gain
            by it are exchanged. Slower and of lower inertia.
        max_iterations: upper bound; fitting stops when the inertia no longer falls by `tolerance` of itself.
        seed: of the k-means++ seeding. The same seed, data and device give the same clusters.

    Attributes after `fit`: centroids [K, d], labels LongTensor [N] (the balanced assignment), inertia (sum of squared
    distances to the own centroid), num_iterations.
    """

    def __init__(
        self,
        num_clusters: int,
        assignment: str = "transport",
        max_iterations: int = 50,
        tolerance: float = 1e-4,
        seed: int = 0,
        show_progress: bool = False,
    ):
        if assignment not in ASSIGNMENTS:
            raise ValueError(f"assignment must be one of {', '.join(ASSIGNMENTS)}, got {assignment!r}")
        if num_clusters < 1 or max_iterations < 1:
            raise ValueError(
                f"num_clusters and max_iterations must be positive, got {num_clusters} and {max_iterations}"
            )
        self.num_clusters = num_clusters
        self.assignment = assignment
        self.max_iterations = max_iterations
        self.tolerance = tolerance
        self.seed = seed
        self.show_progress = show_progress

    def fit(self, x) -> "BalancedKMeans":
        """Fits the centroids on points [N, d].

        Raises:
            ValueError: fewer points than clusters; a row with NaN or infinity.
        """
        x = as_points(x)
        num_points, num_clusters = len(x), self.num_clusters
        if num_clusters > num_points:
            raise ValueError(
                f"{num_clusters} clusters but only {num_points} points; choose a codebook size of at most {num_points}"
            )
        generator = torch.Generator().manual_seed(self.seed)
        # Distances keep their precision only near the origin: |x|^2 + |c|^2 - 2xc cancels for data far away from it.
        center = x.mean(0)
        x = x - center
        centroids = _plus_plus_seeds(x, num_clusters, generator)
        prices = torch.zeros(num_clusters, device=x.device)
        best_inertia, best = float("inf"), None
        progress = tqdm(
            range(self.max_iterations), desc="balanced k-means", disable=not self.show_progress, leave=False
        )
        for iteration in progress:
            if self.assignment == "greedy":
                labels = self._assign_greedy(x, centroids)
            else:
                # Prices are warm after the first iteration, so only the last temperature is needed.
                temperatures = TEMPERATURES if iteration == 0 else TEMPERATURES[-1:]
                labels = self._assign_transport(x, centroids, prices, temperatures)
            sums = torch.zeros(num_clusters, x.shape[1], dtype=torch.float64, device=x.device)
            sums.index_add_(0, labels, x.double())
            sizes = torch.bincount(labels, minlength=num_clusters)
            centroids = (sums / sizes[:, None]).float()
            inertia = float((x - centroids[labels]).square().sum(dtype=torch.float64))
            progress.set_postfix(inertia=f"{inertia:.4g}")
            improved = inertia < best_inertia * (1 - self.tolerance)
            if inertia < best_inertia:
                best_inertia, best = inertia, (centroids, labels)
            if not improved:
                break
        self.centroids, self.labels = best[0] + center, best[1]
        self.inertia, self.num_iterations = best_inertia, iteration + 1
        return self

    def predict(self, x) -> torch.Tensor:
        """Nearest centroid of each row, LongTensor [N]; not balanced."""
        return nearest_centroid(as_points(x, device=self.centroids.device), self.centroids)

    def _capacities(self, num_points: int) -> list[int]:
        size, rest = divmod(num_points, self.num_clusters)
        return [size + (cluster < rest) for cluster in range(self.num_clusters)]

    def _assign_greedy(self, x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
        labels = torch.empty(len(x), dtype=torch.long, device=x.device)
        left = torch.arange(len(x), device=x.device)
        for cluster, capacity in enumerate(self._capacities(len(x))):
            distances = (x[left] - centroids[cluster]).square().sum(1)
            order = distances.argsort(stable=True)
            labels[left[order[:capacity]]] = cluster
            left = left[order[capacity:].sort().values]
        return labels

    def _assign_transport(
        self, x: torch.Tensor, centroids: torch.Tensor, prices: torch.Tensor, temperatures: Sequence[float]
    ) -> torch.Tensor:
        """Balanced labels [N]; `prices` [K] are updated in place and warm-start the next iteration."""
        num_points, num_clusters = len(x), self.num_clusters
        kept = list(_distance_blocks(x, centroids)) if num_points * num_clusters <= KEPT_NUMBERS else None

        def blocks() -> Iterable[Block]:
            return _distance_blocks(x, centroids) if kept is None else kept

        scale = float(torch.cat([distances.min(1).values for _, distances in blocks()]).mean())
        if scale > 0:
            target = num_points / num_clusters
            for temperature in temperatures:
                for _ in range(SINKHORN_PASSES):
                    load = torch.zeros(num_clusters, device=x.device)
                    for _, distances in blocks():
                        load += torch.sub(prices, distances).div_(temperature * scale).softmax(1).sum(0)
                    # Where nothing is near, the load underflows and the step would be infinite.
                    prices += temperature * scale * (target / load.clamp(min=1e-6 * target)).log()
            prices -= prices.mean()
        labels = self._round_by_regret(x, blocks, prices)
        threshold = 1e-6 * float(x.square().sum(1).mean())
        for _ in range(EXCHANGE_PASSES):
            if not self._exchange(x, centroids, blocks(), labels, threshold):
                break
        return labels

    def _round_by_regret(
        self, x: torch.Tensor, blocks: Callable[[], Iterable[Block]], prices: torch.Tensor
    ) -> torch.Tensor:
        """Every point asks for its cheapest open cluster; a full one keeps those that would lose most elsewhere."""
        capacity = torch.tensor(self._capacities(len(x)), device=x.device)
        # The clusters in highest demand, those with the lowest price, hold the extra points.
        capacity = capacity[prices.argsort(stable=True).argsort()]
        labels = torch.full((len(x),), -1, dtype=torch.long, device=x.device)
        choice = torch.empty(len(x), dtype=torch.long, device=x.device)
        regret = torch.zeros(len(x), device=x.device)
        while (labels < 0).any():
            closed = torch.where(capacity > 0, prices, -float("inf"))
            for rows, distances in blocks():
                open_rows = (labels[rows] < 0).nonzero()[:, 0]
                if len(open_rows):
                    cheapest = (distances[open_rows] - closed).topk(min(2, self.num_clusters), dim=1, largest=False)
                    choice[rows.start + open_rows] = cheapest.indices[:, 0]
                    if self.num_clusters > 1:
                        regret[rows.start + open_rows] = cheapest.values[:, 1] - cheapest.values[:, 0]
            left = (labels < 0).nonzero()[:, 0]
            by_regret = left[regret[left].argsort(descending=True, stable=True)]
            order = by_regret[choice[by_regret].argsort(stable=True)]
            counts = torch.bincount(choice[left], minlength=self.num_clusters)
            rank = torch.arange(len(left), device=x.device) - (counts.cumsum(0) - counts)[choice[order]]
            taken = order[rank < capacity[choice[order]]]
            labels[taken] = choice[taken]
            capacity = capacity - counts.minimum(capacity)
        return labels

    def _exchange(
        self, x: torch.Tensor, centroids: torch.Tensor, blocks: Iterable[Block], labels: torch.Tensor, threshold: float
    ) -> bool:
        """Exchanges points between pairs of clusters, one pair per cluster, where both together gain; in place."""
        gains = torch.full((self.num_clusters, self.num_clusters), -float("inf"), device=x.device)
        for rows, distances in blocks:
            own = distances.gather(1, labels[rows, None])
            gains.scatter_reduce_(0, labels[rows, None].expand_as(distances), own - distances, "amax")
        total = torch.triu(gains + gains.T, diagonal=1)
        first, second = (total > threshold).nonzero(as_tuple=True)
        order = total[first, second].argsort(descending=True, stable=True)
        members = torch.split(
            labels.argsort(stable=True), torch.bincount(labels, minlength=self.num_clusters).tolist()
        )
        busy: set[int] = set()
        for a, b in zip(first[order].tolist(), second[order].tolist(), strict=True):
            if a in busy or b in busy:
                continue
            busy.update((a, b))
            difference = centroids[b] - centroids[a]
            # |x - a|^2 - |x - b|^2 is linear in x, so the best point of each side is found by one product.
            i = members[a][(x[members[a]] @ difference).argmax()]
            j = members[b][(x[members[b]] @ difference).argmin()]
            labels[i], labels[j] = b, a
        return bool(busy)
