"""What the server counts, in Prometheus' text format."""

from collections.abc import Callable

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server.

    Args:
        waiting: gives the number of waiting requests.
        worker_ids: gives the workers' process ids.
    """

    def __init__(self, waiting: Callable[[], int], worker_ids: Callable[[], list[int]]):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("onerec_requests", "Answered requests.", ["status"], registry=registry)
        self.request_seconds = Histogram(
            "onerec_request_seconds", "From a request's arrival to its answer.", buckets=SECONDS, registry=registry
        )
        self.batch_histories = Histogram(
            "onerec_batch_histories", "Histories searched for together.", buckets=COUNTS, registry=registry
        )
        self.batch_seconds = Histogram(
            "onerec_batch_seconds", "A batch's time in its worker.", buckets=SECONDS, registry=registry
        )
        self.reloads = Counter("onerec_reloads", "Reloads of the model.", ["outcome"], registry=registry)
        self.restarts = Counter("onerec_worker_restarts", "Workers started again.", registry=registry)
        length = Gauge("onerec_queue_length", "Requests that wait for a worker.", registry=registry)
        length.set_function(waiting)
        resident = Gauge("onerec_workers_resident_bytes", "Resident memory of all workers.", registry=registry)
        resident.set_function(lambda: sum(map(resident_bytes, worker_ids())))
        ProcessCollector(registry=registry)
        for outcome in ("done", "failed"):
            self.reloads.labels(outcome)

    def text(self) -> bytes:
        return generate_latest(self.registry)


def resident_bytes(process_id: int) -> int:
    """A process' resident memory; 0 if it is gone."""
    try:
        return psutil.Process(process_id).memory_info().rss
    except psutil.NoSuchProcess:
        return 0
