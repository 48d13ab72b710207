"""What `onerec serve` gives to concurrent users, beside the same model's offline batch; or how it stands a long load.

    python recipes/benchmarks/serving.py --model runs/quickstart/align/model --json serving.json
    python recipes/benchmarks/serving.py --model runs/quickstart/align/model --soak_minutes 30

Without `--model` the model is one of the quickstart's size with random weights and catalogue. Each client asks for a
session and a list, and asks again when it has them. The soak has reloads, of broken checkpoints too, kills and
bad requests: every answer is compared with the recommender's own, and memory is printed.
"""

import argparse
import http.client
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, set_seed

from onerec_hf import OneRecConfig, OneRecForConditionalGeneration, OneRecTokenizer, Recommender
from onerec_hf.reporting.tables import Table

SINGLE_USERS = 32  # each searched for alone, offline
SOAK_CLIENTS = 8
SOAK_REQUESTS = 48  # different ones, of which every answer is known
BAD_REQUESTS = [
    (b'{"inputs": [[1, ', 422),
    (b'{"inputs": [["no such item", {}]]}', 422),
    (b'{"inputs": [[]], "parameters": {"num_beams": 100000}}', 422),
    (b'{"inputs": [[]], "parameters": {"no_such": 1}}', 422),
    (b"x" * (2**20 + 1), 413),
]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a generator's folder")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=320, help="for each number of clients, at least")
    parser.add_argument("--num_beams", type=int, default=32)
    parser.add_argument("--max_batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the worker and of the batch")
    parser.add_argument("--soak_minutes", type=float, help="minutes of load in place of the table")
    parser.add_argument("--json", type=Path, help="file to which the figures are written too")
    return parser


def random_model(folder: Path) -> Path:
    """A generator with the quickstart's configuration, of 2,000 items."""
    set_seed(0)
    codes = np.random.default_rng(0).permutation(64**3)[:2000]
    codes = np.stack([codes // 64**2, codes // 64 % 64, codes % 64], axis=1)
    tokenizer = OneRecTokenizer.from_semantic_ids(np.arange(100_000, 102_000), codes, codebook_sizes=[64] * 3)
    config = OneRecConfig.from_preset(
        "small",
        codebook_sizes=tokenizer.codebook_sizes,
        history_items=64,
        session_items=5,
        history_positions="item",
        encoder_attention="causal",
        encoder_positions="distance",
        item_head="encoder",
        item_encoders=["shared", "content"],
        item_share=1.0,
        session_item_share=0.0,
        num_items=2000,
        item_content_size=32,
        initializer_range=0.06,
    )
    model = OneRecForConditionalGeneration(config)
    model.set_item_content(torch.randn(2000, 32))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class ServerProcess:
    """`onerec serve` of a folder, in a process of its own."""

    def __init__(self, model: Path, *options: str):
        command = [sys.executable, "-m", "onerec_hf", "serve", str(model), "--port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the server did not start: see above")
        self.address = urlsplit(line.split()[-1]).netloc

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.address, timeout=120)

    def info(self) -> dict:
        _, text = ask(self.connection(), None, "/info")
        return json.loads(text)

    def resident(self) -> list[int]:
        """Resident memory [MiB] of the front, and of the worker."""
        front = psutil.Process(self.process.pid).memory_info().rss
        workers = 0
        for process_id in self.info()["workers"]:
            try:
                workers += psutil.Process(process_id).memory_info().rss
            except psutil.NoSuchProcess:  # killed a moment ago
                continue
        return [round(size / 2**20) for size in (front, workers)]

    def batches(self) -> tuple[float, float]:
        """Histories in all batches so far, and batches."""
        _, text = ask(self.connection(), None, "/metrics")
        counted = dict(line.rsplit(" ", 1) for line in text.decode().splitlines())
        return tuple(float(counted[f"onerec_batch_histories_{name}"]) for name in ("sum", "count"))

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


def ask(connection: http.client.HTTPConnection, body: bytes | None, path: str = "/recommend") -> tuple[int, bytes]:
    """Status and text of an answer."""
    connection.request("GET" if body is None else "POST", path, body)
    answer = connection.getresponse()
    return answer.status, answer.read()


def latencies(server: ServerProcess, bodies: list[bytes], clients: int, count: int) -> tuple[list[float], float]:
    """Seconds of each request, and of all together, of clients that ask until so many requests were sent."""
    taken, seconds, failures = itertools.count(), [], []

    def client() -> None:
        connection = server.connection()
        while (number := next(taken)) < count:
            start = time.perf_counter()
            status, text = ask(connection, bodies[number % len(bodies)])
            seconds.append(time.perf_counter() - start)
            if status != 200:
                failures.append(text)

    start = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures or len(seconds) != count:
        raise RuntimeError(
            f"{count - len(seconds)} requests without an answer, {len(failures)} refused: {failures[:1]}"
        )
    return seconds, time.perf_counter() - start


def seconds_of(run: Callable) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(args: argparse.Namespace, model: Path, recommender: Recommender, histories: list[list]) -> dict:
    """The table's figures."""
    options = {"num_beams": args.num_beams, "session_scores": True, "batch_size": args.max_batch}
    bodies = [
        json.dumps({"inputs": [history], "parameters": {"num_beams": args.num_beams}}).encode()
        for history in histories
    ]

    def offline() -> float:
        return len(histories) / seconds_of(lambda: recommender(histories, **options))

    recommender(histories[: args.max_batch], **options)
    single = [seconds_of(partial(recommender, [history], **options)) for history in histories[:SINGLE_USERS]]
    batches = [offline()]
    server = ServerProcess(model, "--threads", str(args.threads), "--max_batch", str(args.max_batch))
    rows = []
    try:
        latencies(server, bodies, args.max_batch, 2 * args.max_batch)
        before = server.batches()
        for clients in args.clients:
            count = max(args.requests if clients > 1 else args.requests // 4, 4 * clients)
            seconds, whole = latencies(server, bodies, clients, count)
            p50, p95, p99 = np.percentile(seconds, [50, 95, 99]).tolist()
            rows.append({"clients": clients, "per_second": count / whole, "p50": p50, "p95": p95, "p99": p99})
            after = server.batches()
            rows[-1]["batch"] = (after[0] - before[0]) / (after[1] - before[1])
            before = after
            batches.append(offline())  # in turn, so that a drift of the machine's speed falls on both
    finally:
        code = server.stop()
    return {
        "offline_per_second": statistics.median(batches),
        "offline_runs": batches,
        "single_user_s": statistics.median(single),
        "threads": args.threads,
        "served": rows,
        "exit_status": code,
    }


def print_table(figures: dict) -> None:
    offline, single = figures["offline_per_second"], figures["single_user_s"]
    header = [
        "clients",
        "requests/s",
        "of the batch",
        "together",
        "p50 [ms]",
        "p95 [ms]",
        "p99 [ms]",
        "p99, of one user's",
    ]
    rows = []
    for place, row in enumerate(figures["served"]):
        beside = statistics.mean(figures["offline_runs"][place : place + 2])  # before it and after it
        quantiles = [round(1000 * row[name]) for name in ("p50", "p95", "p99")]
        share, times = f"{row['per_second'] / beside:.2f}", f"{row['p99'] / single:.1f}"
        together = f"{row['batch']:.1f}"
        rows.append([str(row["clients"]), f"{row['per_second']:.1f}", share, together, *quantiles, times])
    print(Table(header, rows).text())
    print(
        f"Offline batch: {offline:.1f} users/s; one user alone: {1000 * single:.0f} ms. {figures['threads']} threads."
    )


class Soak:
    """A long load on a server, whose model's folder is a copy that is broken and mended on the way."""

    def __init__(self, folder: Path, recommender: Recommender, histories: list[list], num_beams: int):
        self.folder, self.counts, self.wrong = folder, Counter(), []
        self.stopped = threading.Event()
        self.requests = []
        ids = recommender.tokenizer.item_ids.tolist()
        for number, history in enumerate(histories[:SOAK_REQUESTS]):
            blocked = {} if number % 2 else {"blocked_items": ids[number : number + 50]}
            given = {"num_beams": num_beams, "top_k": 5 + number % 3, **blocked}
            (expected,) = recommender([history], **given)
            body = json.dumps({"inputs": [history], "parameters": given}).encode()
            self.requests.append((body, {"session": expected["session"], "items": expected["items"]}))

    def client(self, server: ServerProcess, seed: int) -> None:
        chosen, connection = random.Random(seed), server.connection()
        while not self.stopped.is_set():
            bad = chosen.random() < 0.1
            body, expected = chosen.choice(BAD_REQUESTS if bad else self.requests)
            try:
                status, text = ask(connection, body)
            except (OSError, http.client.HTTPException) as error:
                self.counts["lost"] += 1
                self.wrong.append(repr(error))
                connection = server.connection()
                continue
            if bad:
                right = status == expected
            else:
                right = status == 200 and expected.items() <= json.loads(text)[0].items()
            self.counts[f"{status}, {'right' if right else 'wrong'}"] += 1
            if not right:
                self.wrong.append(text[:300].decode(errors="replace"))

    def run(self, server: ServerProcess, minutes: float) -> list[list[int]]:
        """Minutes' resident memory [MiB] of front and worker."""
        threads = [threading.Thread(target=self.client, args=(server, seed)) for seed in range(SOAK_CLIENTS)]
        for thread in threads:
            thread.start()
        weights = self.folder / "model.safetensors"
        whole, memory, start = weights.read_bytes(), [], time.monotonic()
        deeds = itertools.cycle([self.kill, partial_reload(weights, whole[:1000]), partial_reload(weights, whole)])
        while (passed := time.monotonic() - start) < 60 * minutes:
            if passed >= 60 * len(memory):
                memory.append(server.resident())
                print(f"{passed / 60:5.1f} min, RSS {memory[-1]} MiB, {dict(self.counts)}", flush=True)
            next(deeds)(server)
            time.sleep(10)
        self.stopped.set()
        for thread in threads:
            thread.join()
        return [*memory, server.resident()]

    def kill(self, server: ServerProcess) -> None:
        os.kill(server.info()["workers"][0], signal.SIGKILL)
        self.counts["kills"] += 1


def partial_reload(weights: Path, content: bytes) -> Callable[[ServerProcess], None]:
    """Writes the weights and has the server load them."""

    def reload(server: ServerProcess) -> None:
        weights.write_bytes(content)
        server.process.send_signal(signal.SIGHUP)

    return reload


def soak(args: argparse.Namespace, model: Path, recommender: Recommender, histories: list[list]) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(model, Path(scratch) / "model"))
        load = Soak(folder, recommender, histories, args.num_beams)
        server = ServerProcess(folder, "--threads", str(args.threads), "--max_batch", str(args.max_batch))
        try:
            memory = load.run(server, args.soak_minutes)
            _, metrics = ask(server.connection(), None, "/metrics")
        finally:
            code = server.stop()
    counted = [
        line for line in metrics.decode().splitlines() if line.startswith(("onerec_reloads_t", "onerec_worker_r"))
    ]
    print(*counted, *load.wrong[:5], sep="\n")
    print(f"{dict(load.counts)}; RSS of front and worker [MiB]: first {memory[0]}, last {memory[-1]}; exit {code}")
    return {"counts": load.counts, "resident_mib": memory, "exit_status": code, "metrics": counted}


def main() -> None:
    args = make_parser().parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or random_model(Path(scratch) / "model")
        generator = AutoModelForSeq2SeqLM.from_pretrained(model).eval()
        recommender = Recommender(generator, AutoTokenizer.from_pretrained(model))
        items, draws = recommender.tokenizer.item_ids, np.random.default_rng(0)
        length = generator.config.history_items
        histories = [draws.choice(items, length, replace=False).tolist() for _ in range(4 * args.max_batch)]
        if args.soak_minutes is None:
            figures = compare(args, model, recommender, histories)
            print_table(figures)
        else:
            figures = soak(args, model, recommender, histories)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
