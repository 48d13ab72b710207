"""Balanced K-means: clusters whose sizes differ by at most one (OneRec section 3.1, Algorithm 1).

An iteration assigns the points to the centroids under that constraint and moves every centroid to the mean of its
points. The optimal assignment is a transport problem, and its dual has one price per cluster: at the right prices
every point may take the cluster of least distance plus price. Prices come from Sinkhorn iterations of the
entropic problem [1] and stay warm from one iteration to the next; a rounding by regret makes the sizes exact; and
points move along disjoint cycles of clusters wherever all of them together gain. Nothing of N x K numbers is ever held
whole: distances are computed in blocks of rows, again in each pass.

[1] M. Cuturi. Sinkhorn Distances: Lightspeed Computation of Optimal Transport. NIPS 2013.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from scipy.optimize import linear_sum_assignment
from tqdm.auto import tqdm

ASSIGNMENTS = ("greedy", "transport", "nearest")
# Distances are computed in blocks of this many numbers (2 MB in float32, which stays in a CPU's cache).
BLOCK_NUMBERS = 2**19
# Rows whose sums are added up at once; the sums of such parts are added in order, whoever computed them.
PART_ROWS = 2**16

# K-means++ draws its seeds from at most this many random points per cluster ...
SEEDING_POINTS = 32
# ... and prices are found on at most this many; all points are assigned by them.
PRICING_POINTS = 32
# Of an assignment that no iteration follows, as many as this where their kernel can be kept.
LAST_PRICING_POINTS = 128
# The Sinkhorn kernel of the pricing points is kept while it has at most this many numbers (2 GB, those of 4,096
# clusters); a larger one is computed again in every pass.
KEPT_NUMBERS = 2**29
# Temperature of the Sinkhorn iterations, as a share of the points' mean squared distance to the own centroid.
TEMPERATURE = 0.2
# The first iteration has no warm prices: it starts at these multiples of the temperature.
COOLING = (4.0, 2.0)
SINKHORN_PASSES = 6
# Prices are good enough when the mean deviation of the clusters' loads falls below this share of a load.
LOAD_TOLERANCE = 0.02
# One pass changes a load at most by this factor, so that the prices of clusters that nothing is near to stay finite.
LARGEST_STEP = 10.0
# Exchange moves one point per cluster: it is left out where a cluster has more points than this, and where the
# assignment problem between all clusters that it solves would take seconds.
EXCHANGE_POINTS = 100
EXCHANGE_CLUSTERS = 2048
# While an iteration lowers the inertia by more than this share, the centroids are far from their places: fewer passes
# and no exchange will do.
COARSE_IMPROVEMENT = 0.01
COARSE_PASSES = 5
# Of the last assignment.
LAST_EXCHANGES = 8


def as_points(x, name: str = "embeddings", device: torch.device | str | None = None) -> torch.Tensor:
    """Float32 tensor (N, d) of `x`; ValueError names the first row that holds NaN or infinity.

    A float32 array stays where it is: one that is mapped from a file is read as it is needed, and never held whole.
    """
    with warnings.catch_warnings():
        # Nothing here writes into the points, so that a file may be mapped for reading alone.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        x = torch.as_tensor(x).to(device=device, dtype=torch.float32)
    if x.ndim != 2 or x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"{name} must be a non-empty matrix [items, dimensions], got shape {list(x.shape)}")
    for number, rows in enumerate(x.split(PART_ROWS)):
        finite = torch.isfinite(rows).all(1)
        if not finite.all():
            row = number * PART_ROWS + int((~finite).nonzero()[0])
            raise ValueError(f"{name} row {row} holds NaN or infinity; repair or drop this item's embedding")
    return x


class Residuals:
    """Points (N, d) less the centroids of the codes that they have, computed for the rows that are asked for, in every
    pass again: beside the points nothing of their size is held.

    Args:
        x: (N, d), which is never written to.
        codebooks, codes: one (K_l, d) and one LongTensor (N,) for each level that is done.
        center: (d,), taken off last.
    """

    def __init__(
        self,
        x: torch.Tensor,
        codebooks: Sequence[torch.Tensor] = (),
        codes: Sequence[torch.Tensor] = (),
        center: torch.Tensor | None = None,
    ):
        self.x, self.codebooks, self.codes, self.center = x, codebooks, codes, center

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        points = self.x[rows]
        for codebook, codes in zip(self.codebooks, self.codes, strict=True):
            points = points - codebook[codes[rows]]
        return points if self.center is None else points - self.center

    def less(self, center: torch.Tensor) -> "Residuals":
        return Residuals(self.x, self.codebooks, self.codes, center)


def nearest_centroid(x: torch.Tensor | Residuals, centroids: torch.Tensor) -> torch.Tensor:
    """Index of the nearest centroid of each row: LongTensor (N,)."""
    labels = torch.empty(len(x), dtype=torch.long, device=centroids.device)
    scores = _Scores(x, centroids)
    for rows in scores.blocks():
        labels[rows] = scores[rows].argmin(1)
    return labels


class _Scores:
    """Squared distances of points to centroids, less the point's own |x|^2, plus a price per cluster.

    `scores[rows]` is a matrix (rows, K) that is valid until the next one is asked for. Where only `some` (M,) of the
    points are meant, its rows and blocks are those of them.
    """

    def __init__(
        self,
        x: torch.Tensor | Residuals,
        centroids: torch.Tensor,
        prices: torch.Tensor | None = None,
        some: torch.Tensor | None = None,
    ):
        self.x, self.some = x, some
        self.num_points = len(x) if some is None else len(some)
        self.offsets = centroids.square().sum(1)
        if prices is not None:
            self.offsets = self.offsets + prices
        self.directions = centroids.T.contiguous()
        self.block_rows = max(1, BLOCK_NUMBERS // len(centroids))
        self.buffer = centroids.new_empty(min(self.block_rows, self.num_points), len(centroids))

    def blocks(self) -> Iterator[slice]:
        for start in range(0, self.num_points, self.block_rows):
            yield slice(start, min(start + self.block_rows, self.num_points))

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        points = self.x[rows if self.some is None else self.some[rows]]
        out = self.buffer[: len(points)] if len(points) <= len(self.buffer) else None
        return torch.addmm(self.offsets, points, self.directions, alpha=-2, out=out)


def _plus_plus_seeds(x: torch.Tensor, num_clusters: int, generator: torch.Generator) -> torch.Tensor:
    """K-means++: each seed is drawn with probability proportional to its squared distance from the seeds before."""
    x = x[torch.randperm(len(x), generator=generator)[: SEEDING_POINTS * num_clusters].to(x.device)]
    drawn = torch.rand(num_clusters, generator=generator).to(x.device)
    norms = x.square().sum(1)
    seeds = [(drawn[0] * len(x)).long().clamp_(max=len(x) - 1)]
    distances = torch.full_like(norms, math.inf)
    for fraction in drawn[1:]:
        seed = seeds[-1]
        distances = torch.minimum(distances, torch.addmv(norms + norms[seed], x, x[seed], alpha=-2)).clamp_(min=0)
        cumulative = distances.cumsum(0)
        # Where all distances are zero, there are fewer distinct points than clusters: any point will do.
        seeds.append(torch.searchsorted(cumulative, fraction * cumulative[-1], right=True).clamp_(max=len(x) - 1))
    return x[torch.stack(seeds)]


class BalancedKMeans:
    """K-means under the constraint that cluster sizes differ by at most one.

    N points in K clusters: N mod K clusters hold ceil(N / K) points, the others floor(N / K).

    Args:
        num_clusters: K.
        assignment: how points are spread over the clusters in each iteration.
            "transport": all clusters at once, near the optimum: prices by Sinkhorn iterations, rounding by regret,
            exchange along cycles.
            "greedy": Algorithm 1 as printed: cluster after cluster takes the points nearest to it among those left.
            The last clusters get what nobody wanted.
            "nearest": plain K-means without the constraint, for comparison; empty clusters restart at the points
            farthest from their centroids.
        max_iterations: upper bound; fitting stops when the inertia no longer falls by `tolerance` of itself.
        seed: of the k-means++ seeding. The same seed, data and device give the same clusters (on a GPU under
            `torch.use_deterministic_algorithms(True)`).
        distributed: the blocks of rows are shared out over the processes of the initialised torch.distributed group.
            Every process must call `fit` with the same points; all of them get the result that one process would.

    Attributes after `fit`: centroids (K, d), labels LongTensor (N,) (the balanced assignment), inertia (sum of squared
    distances to the own centroid), num_iterations.
    """

    def __init__(
        self,
        num_clusters: int,
        assignment: str = "transport",
        max_iterations: int = 50,
        tolerance: float = 3e-3,
        seed: int = 0,
        show_progress: bool = False,
        distributed: bool = False,
    ):
        if assignment not in ASSIGNMENTS:
            raise ValueError(f"assignment must be one of {', '.join(ASSIGNMENTS)}, got {assignment!r}")
        if num_clusters < 1 or max_iterations < 1:
            raise ValueError(
                f"num_clusters and max_iterations must be positive, got {num_clusters} and {max_iterations}"
            )
        self.num_clusters, self.assignment, self.max_iterations = num_clusters, assignment, max_iterations
        self.tolerance, self.seed = tolerance, seed
        self.show_progress, self.distributed = show_progress, distributed

    def fit(self, x) -> "BalancedKMeans":
        """Fits the centroids on points (N, d).

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
        total = float(x.square().sum(1).sum(dtype=torch.float64))
        inertia = None
        if self.assignment == "transport":
            sample = x
            if num_points > PRICING_POINTS * num_clusters:
                chosen = torch.randperm(num_points, generator=generator)[: PRICING_POINTS * num_clusters]
                sample = x[chosen.to(x.device)]
            prices = x.new_zeros(num_clusters)
        few_points = num_points <= EXCHANGE_POINTS * num_clusters
        exchanges = self.assignment == "transport" and few_points and 1 < num_clusters <= EXCHANGE_CLUSTERS
        best_inertia, best, coarse = math.inf, None, True
        progress = tqdm(range(1, self.max_iterations + 1), desc="k-means", disable=not self.show_progress, leave=False)
        for iteration in progress:
            self.num_iterations = iteration
            if self.assignment == "greedy":
                labels = self._assign_greedy(x, centroids)
            elif self.assignment == "nearest":
                labels = self._assign_nearest(x, centroids)
            else:
                passes = COARSE_PASSES if coarse else SINKHORN_PASSES
                prices = self._prices(sample, centroids, prices, inertia and inertia / num_points, passes)
                labels = self._round_by_regret(x, centroids, prices)
                if exchanges and not coarse:
                    self._exchange(x, centroids, labels)
            sums, sizes = self._cluster_sums(x, labels)
            means = sums / sizes[:, None]
            centroids = means.float()
            # Sum of |x - mean|^2; a pass over the points is saved.
            inertia = max(0.0, total - float((means.square().sum(1) * sizes).sum()))
            progress.set_postfix(inertia=f"{inertia:.4g}")
            improved = inertia < best_inertia * (1 - self.tolerance) or coarse
            coarse = coarse and inertia < best_inertia * (1 - COARSE_IMPROVEMENT)
            if best is None or inertia < best_inertia:
                best_inertia, best = inertia, (centroids, labels)
            if not improved:
                break
        centroids, self.labels = best
        if exchanges:
            for _ in range(LAST_EXCHANGES):
                if not self._exchange(x, centroids, self.labels):
                    break
            sums, sizes = self._cluster_sums(x, self.labels)
            centroids = (sums / sizes[:, None]).float()
        self.inertia = sum(
            float((part - centroids[labels]).square().sum(dtype=torch.float64))
            for part, labels in zip(x.split(PART_ROWS), self.labels.split(PART_ROWS), strict=True)
        )
        self.center = center
        self.centroids = centroids + center
        return self

    def predict(self, x) -> torch.Tensor:
        """Nearest centroid of each row, LongTensor (N,); not balanced."""
        return nearest_centroid(as_points(x, device=self.centroids.device), self.centroids)

    def assign(self, x: torch.Tensor | Residuals) -> torch.Tensor:
        """Clusters of points (N, d) around the fitted centroids, under the constraint: LongTensor (N,).

        For points of which the fitted ones were a sample. N mod K clusters hold ceil(N / K) of them, the others
        floor(N / K), whatever the points are. They are read in blocks and beside N numbers nothing is held. Prices are
        found on a sample of them, drawn by seed; there is no exchange along cycles.

        Raises:
            ValueError: the assignment "nearest", which has no constraint; [`predict`] is for it.
        """
        if self.assignment == "nearest":
            raise ValueError('the assignment "nearest" is not balanced; call predict(x)')
        # Distances are precise near the origin alone, as in `fit`.
        points = (x if isinstance(x, Residuals) else Residuals(x)).less(self.center)
        centroids = self.centroids - self.center
        if self.assignment == "greedy":
            return self._assign_greedy(points, centroids)
        generator = torch.Generator().manual_seed(self.seed)
        per_cluster = min(LAST_PRICING_POINTS, max(PRICING_POINTS, KEPT_NUMBERS // self.num_clusters**2))
        chosen = torch.randperm(len(points), generator=generator)[: per_cluster * self.num_clusters]
        sample = points[chosen.to(centroids.device)]
        prices = self._prices(sample, centroids, torch.zeros_like(centroids[:, 0]), None, SINKHORN_PASSES)
        return self._round_by_regret(points, centroids, prices)

    def _over_ranks(self, pieces: Iterable, work: Callable, *results: torch.Tensor) -> None:
        """Does `work(index, piece)` for every piece; each fills its own part of the zero tensors `results`.
        With several processes, each does every n-th piece. The sum over processes then completes the results, exactly,
        as all but one of the summands are zero.
        """
        world, rank = (dist.get_world_size(), dist.get_rank()) if self.distributed else (1, 0)
        for index, piece in enumerate(pieces):
            if index % world == rank:
                work(index, piece)
        if world > 1:
            for result in results:
                # NCCL knows no tensors of the CPU.
                sent = result.cuda() if dist.get_backend() == "nccl" else result
                dist.all_reduce(sent)
                result.copy_(sent)

    def _cluster_sums(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums (K, d), float64, and sizes (K,) of the clusters."""
        parts = x.new_zeros(-(-len(x) // PART_ROWS), self.num_clusters, x.shape[1], dtype=torch.float64)

        def work(index: int, part: tuple[torch.Tensor, torch.Tensor]) -> None:
            rows, own = part
            parts[index].index_add_(0, own, rows.double())

        self._over_ranks(zip(x.split(PART_ROWS), labels.split(PART_ROWS), strict=True), work, parts)
        return parts.sum(0) if len(parts) > 1 else parts[0], torch.bincount(labels, minlength=self.num_clusters)

    def _capacities(self, num_points: int) -> list[int]:
        size, rest = divmod(num_points, self.num_clusters)
        return [size + (cluster < rest) for cluster in range(self.num_clusters)]

    def _assign_greedy(self, x: torch.Tensor | Residuals, centroids: torch.Tensor) -> torch.Tensor:
        labels = torch.empty(len(x), dtype=torch.long, device=centroids.device)
        left = torch.arange(len(x), device=centroids.device)
        for cluster, capacity in enumerate(self._capacities(len(x))):
            distances = [(x[rows] - centroids[cluster]).square().sum(1) for rows in left.split(PART_ROWS)]
            order = torch.cat(distances).argsort(stable=True)
            labels[left[order[:capacity]]] = cluster
            left = left[order[capacity:].sort().values]
        return labels

    def _assign_nearest(self, x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
        labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
        distances = x.new_zeros(len(x))
        scores = _Scores(x, centroids)

        def work(_: int, rows: slice) -> None:
            distances[rows], labels[rows] = scores[rows].min(1)

        self._over_ranks(scores.blocks(), work, labels, distances)
        sizes = torch.bincount(labels, minlength=self.num_clusters)
        empty = (sizes == 0).nonzero()[:, 0]
        if len(empty):
            # A point may leave unless it is the first of its cluster, so that no cluster is emptied in turn.
            order = labels.argsort(stable=True)
            first = order[(sizes.cumsum(0) - sizes)[sizes > 0]]
            distances += x.square().sum(1)
            distances[first] = -math.inf
            labels[distances.topk(len(empty)).indices] = empty
        return labels

    def _prices(
        self, x: torch.Tensor, centroids: torch.Tensor, prices: torch.Tensor, scale: float | None, passes: int
    ) -> torch.Tensor:
        """Prices (K,) at which the points spread evenly; `scale`: mean squared distance to the own centroid.
        The prices given are the start; without a scale it is taken from the nearest centroids, and the start is cold.
        """
        if scale is not None:
            return self._sinkhorn(x, centroids, prices, TEMPERATURE * scale, passes)
        scores = _Scores(x, centroids)
        nearest = x.new_zeros(len(x))

        def work(_: int, rows: slice) -> None:
            nearest[rows] = scores[rows].amin(1)

        self._over_ranks(scores.blocks(), work, nearest)
        scale = max(0.0, float((nearest + x.square().sum(1)).mean()))
        for multiple in (*COOLING, 1.0):
            prices = self._sinkhorn(x, centroids, prices, multiple * TEMPERATURE * scale, SINKHORN_PASSES)
        return prices

    def _sinkhorn(
        self, x: torch.Tensor, centroids: torch.Tensor, prices: torch.Tensor, temperature: float, passes: int
    ) -> torch.Tensor:
        if temperature == 0:  # every point is a centroid
            return prices
        scores = _Scores(x, centroids, prices)
        blocks = list(scores.blocks())
        kept: dict[int, torch.Tensor] = {}

        def kernel(index: int) -> torch.Tensor:
            if index in kept:
                return kept[index]
            values = scores[blocks[index]]
            values = values.sub_(values.amin(1, keepdim=True)).mul_(-1 / temperature).clamp_(min=-60).exp_()
            if len(x) * self.num_clusters <= KEPT_NUMBERS:
                kept[index] = values = values.clone()
            return values

        scaling = torch.ones_like(prices)
        for _ in range(passes):
            loads = x.new_zeros(len(blocks), self.num_clusters)

            def work(index: int, _: slice, scaling=scaling, loads=loads) -> None:
                values = kernel(index)
                torch.mv(values.T, torch.mv(values, scaling).clamp_(min=1e-30).reciprocal_(), out=loads[index])

            self._over_ranks(blocks, work, loads)
            ratio = loads.sum(0).mul_(scaling).mul_(self.num_clusters / len(x))
            scaling = scaling / ratio.clamp(1 / LARGEST_STEP, LARGEST_STEP)
            if float((ratio - 1).abs().mean()) < LOAD_TOLERANCE:
                break
        prices = prices - temperature * scaling.log()
        return prices - prices.mean()

    def _round_by_regret(
        self, x: torch.Tensor | Residuals, centroids: torch.Tensor, prices: torch.Tensor
    ) -> torch.Tensor:
        """Every point asks for its cheapest open cluster; a full one keeps those that would lose most elsewhere."""
        capacity = torch.tensor(self._capacities(len(x)), device=centroids.device)
        # The clusters in highest demand, those with the highest price, hold the extra points.
        capacity = capacity[prices.argsort(stable=True, descending=True).argsort()]
        labels = torch.full((len(x),), -1, dtype=torch.long, device=centroids.device)
        left = torch.arange(len(x), device=centroids.device)
        while len(left):
            choice = torch.zeros(len(left), dtype=torch.long, device=centroids.device)
            regret = centroids.new_zeros(len(left))
            some = None if len(left) == len(x) else left
            scores = _Scores(x, centroids, torch.where(capacity > 0, prices, math.inf), some)

            def work(_: int, rows: slice, choice=choice, regret=regret, scores=scores) -> None:
                cheapest = scores[rows].topk(min(2, self.num_clusters), dim=1, largest=False)
                choice[rows] = cheapest.indices[:, 0]
                regret[rows] = cheapest.values[:, -1] - cheapest.values[:, 0]

            self._over_ranks(scores.blocks(), work, choice, regret)
            order = regret.argsort(descending=True, stable=True)
            order = order[choice[order].argsort(stable=True)]
            asked = torch.bincount(choice, minlength=self.num_clusters)
            rank = torch.arange(len(left), device=centroids.device) - (asked.cumsum(0) - asked)[choice[order]]
            taken = rank < capacity[choice[order]]
            labels[left[order[taken]]] = choice[order[taken]]
            capacity = capacity - asked.minimum(capacity)
            left = left[order[~taken]]
        return labels

    def _exchange(self, x: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor) -> bool:
        """Moves at most one point out of every cluster and into it, where all moves together gain most; in place.
        Returns whether any point moved.

        The best set of disjoint cycles of clusters is an assignment problem between clusters, in which the gain of
        a pair is that of the point best moved from the one to the other.
        """
        sizes = torch.bincount(labels, minlength=self.num_clusters)
        places = torch.arange(int(sizes.max()), device=x.device)
        # Members of each cluster [K, largest size]; where there are fewer, the first stands in again.
        places = torch.where(places < sizes[:, None], places, 0) + (sizes.cumsum(0) - sizes)[:, None]
        members = labels.argsort(stable=True)[places]
        gains = x.new_zeros(self.num_clusters, self.num_clusters)
        movers = torch.zeros_like(gains, dtype=torch.long)
        scores = _Scores(x, centroids)
        step = max(1, scores.block_rows // members.shape[1])
        clusters = torch.arange(self.num_clusters, device=x.device).split(step)

        def work(_: int, chunk: torch.Tensor) -> None:
            values = scores[members[chunk].flatten()].view(len(chunk), -1, self.num_clusters)
            own = values.gather(2, chunk[:, None, None].expand(-1, values.shape[1], 1))
            least = values.sub_(own).min(1)
            gains[chunk] = -least.values
            movers[chunk] = members[chunk].gather(1, least.indices)

        self._over_ranks(clusters, work, gains, movers)
        gains.fill_diagonal_(0)
        sources, targets = map(torch.from_numpy, linear_sum_assignment(gains.cpu().numpy(), maximize=True))
        moved = sources != targets
        sources, targets = sources[moved].to(x.device), targets[moved].to(x.device)
        labels[movers[sources, targets]] = targets
        return len(sources) > 0
