"""The server: its answers beside the recommender's, its limits, and that no request is lost with a model or worker."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from alignment_cases import CODEBOOK_SIZES, tiny_generator, tiny_tokenizer

from onerec_hf import Recommender
from onerec_hf.reward import OneRecRewardConfig, OneRecRewardModel, SessionScorer

for engine in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(engine, reason=f"the server needs {engine}: pip install -c constraints.txt -e '.[serve]'")

from onerec_hf.serving import Limits, LoadError, ServerOptions, serve  # noqa: E402
from onerec_hf.serving.app import bound_socket  # noqa: E402
from onerec_hf.serving.batching import Batcher, Unavailable  # noqa: E402
from onerec_hf.serving.metrics import Metrics  # noqa: E402
from onerec_hf.serving.requests import RecommendRequest, RequestError, read_request  # noqa: E402

HISTORIES = [[100, 101, 102], [], [103], [104, 105, 106, 107, 108, 109, 110]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(saved(tmp_path_factory.mktemp("served") / "model"))


def saved(folder: Path, seed: int = 0) -> Path:
    tiny_generator(seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def recommender(seed: int = 0, scorer: SessionScorer | None = None) -> Recommender:
    return Recommender(tiny_generator(seed).eval(), tiny_tokenizer(), scorer)


def send(address: str, data, path: str = "/recommend") -> tuple[int, dict | list, dict]:
    """Status, JSON and headers of an answer; data that is None is got, bytes are sent as they are."""
    body = data if data is None or isinstance(data, bytes) else json.dumps(data).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, body), timeout=60) as answer:
            return answer.status, json.load(answer), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), dict(error.headers)


def while_served(options: ServerOptions, ask):
    """What `ask(address)` gives while this process serves; SIGTERM ends it, as a terminal or a container would."""

    def asked(address: str):
        try:
            return ask(address)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(1) as thread:
        asking = []
        serve(options, "127.0.0.1", 0, lambda text: asking.append(thread.submit(asked, text.split()[-1])))
    return asking[0].result()


def same(found: list[dict], expected: list[dict]) -> None:
    """Equal items; a batch's padding moves the last digits of scores."""
    assert [(row["session"], row["items"]) for row in found] == [(row["session"], row["items"]) for row in expected]
    for row, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(row["scores"], other["scores"], atol=1e-4)
        np.testing.assert_allclose(row["session_scores"], other["session_scores"], atol=1e-4)


def test_concurrent_requests_get_what_the_recommender_gives_each(model, tmp_path):
    torch.manual_seed(0)
    config = OneRecRewardConfig(codebook_sizes=CODEBOOK_SIZES, hidden_size=16, tower_hidden_size=16, session_items=2)
    scorer = SessionScorer(OneRecRewardModel(config).eval(), tiny_tokenizer())
    for part in (scorer.model, scorer.tokenizer):
        part.save_pretrained(tmp_path / "reward_model")
    requests = [
        {},
        {"top_k": 3},
        {"blocked_items": [111, 112, 113, 114, 115]},
        {"blocked_items": [116, 117, 118, 119, 100], "num_beams": 20},
        {"num_beams": 20, "exclude_consumed": False},
        {"allowed_items": [101, 103, 105, 107, 109, 111]},
        {"search": "stochastic_beam", "temperature": 2.0, "seed": 3},
        {"search": "diverse_beam", "num_beams": 8},
        {"search": "guided_beam", "guidance_weight": 40.0, "num_item_beams": 8},
    ]
    asked = [(histories, given) for given in requests for histories in (HISTORIES[:1], HISTORIES[1:])] * 2
    alone = recommender(scorer=scorer)
    expected = [alone(histories, session_scores=True, **given) for histories, given in asked]
    options = ServerOptions(model, str(tmp_path / "reward_model"), threads=1, wait_seconds=0.05)

    def ask(address: str):
        with ThreadPoolExecutor(len(asked)) as clients:
            bodies = [{"inputs": histories, "parameters": given} for histories, given in asked]
            return list(clients.map(lambda body: send(address, body), bodies)), counted(address)

    answers, counts = while_served(options, ask)
    for (status, found, _), one in zip(answers, expected, strict=True):
        assert status == 200
        same(found, one)
    assert counts['onerec_requests_total{status="200"}'] == len(asked) == counts["onerec_request_seconds_count"]
    assert counts["onerec_batch_histories_sum"] == 4 * 2 * len(requests)
    assert counts["onerec_batch_histories_count"] < len(asked)  # some were searched for together


def counted(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        lines = [line.rpartition(" ") for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_what_cannot_be_served_is_refused_with_field_and_remedy(model):
    limits = Limits(body_bytes=2000, histories=4, list_items=20, beams=16)
    refused = [
        (b"x" * 2001, 413, "body", "larger than 2000 bytes: send fewer"),
        (b'{"inputs": [[NaN]]}', 422, "body", "is no JSON"),
        ({"inputs": [[]] * 5}, 422, "inputs", "has 5 histories: send at most 4"),
        ({"inputs": [[100] * 21]}, 422, "inputs[0].history_item_ids", "send the latest 20"),
        ({"inputs": [[100, True]]}, 422, "inputs[0].history_item_ids[1]", "is true or false: item ids"),
        ({"inputs": [[7]]}, 422, "inputs", "item id 7, which is not in the catalogue of 30 items; drop it"),
        ({"inputs": [["tea"]]}, 422, "inputs", "are integers, got strings (first: 'tea')"),
        ({"inputs": [[]], "parameters": {"num_beams": 17}}, 422, "parameters.num_beams", "at most 16 are served"),
        ({"inputs": [[]], "parameters": {"top_k": 0}}, 422, "parameters.top_k", "at least 1, got 0"),
        ({"inputs": [[]], "parameters": {"top_n": 5}}, 422, "parameters.top_n", "or use top_k"),
        ({"inputs": [[]], "parameters": {"temperature": -1}}, 422, "parameters.temperature", "must be positive"),
        ({"inputs": [[]], "parameters": {"seed": "1"}}, 422, "parameters.seed", "is text: give an integer"),
        ({"inputs": [[]], "parameters": {"blocked_items": [7]}}, 422, "inputs", "blocked_item_ids of histories[0]"),
    ]

    text = (Path(__file__).parents[1] / "recipes" / "README.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(import json, time.*?)```", text, re.DOTALL).group(1), scope := {})

    def ask(address: str):
        answers = [send(address, data) for data, *_ in refused]
        # What others do wrong at the same time changes nothing.
        with ThreadPoolExecutor(8) as clients:
            bodies = [{"inputs": [[100]]}, {"inputs": [[7]]}] * 4
            together = list(clients.map(lambda body: send(address, body), bodies))
        by_client = scope["recommend"](HISTORIES, address, top_k=3)
        with pytest.raises(ValueError, match="at most 16 are served"):
            scope["recommend"](HISTORIES, address, num_beams=17)
        return answers, together, by_client, send(address, None, "/info")[1], send(address, None, "/health")

    answers, together, by_client, info, health = while_served(ServerOptions(model, threads=1, limits=limits), ask)
    for (data, status, field, message), (found, answer, _) in zip(refused, answers, strict=True):
        assert (found, answer["error"]["field"]) == (status, field), (data, answer)
        assert message in answer["error"]["message"], (data, answer)
    assert [status for status, *_ in together] == [200, 422] * 4
    same(by_client, recommender()(HISTORIES, top_k=3, session_scores=True))
    (expected,) = recommender()([[100]])
    assert all(found[0]["items"] == expected["items"] for status, found, _ in together if status == 200)
    assert (info["catalogue_size"], info["session_items"], info["limits"]["beams"]) == (30, 2, 16)
    assert health[:2] == (200, {"live": True, "ready": True})


def test_reloads_and_dead_workers_lose_no_request_and_the_stop_answers_all(tmp_path):
    folder = saved(tmp_path / "model")
    first, second = (recommender(seed)([[100]])[0]["items"] for seed in (0, 1))
    assert first != second
    stop, seen = threading.Event(), []

    def load(address: str) -> None:
        while not stop.is_set():
            seen.append(send(address, {"inputs": [[100]]}))

    def until(holds, what: str) -> None:
        deadline = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < deadline, f"waited for {what}"
            time.sleep(0.02)

    def ask(address: str):
        def info() -> dict:
            return send(address, None, "/info")[1]

        def next_answers() -> list:
            count = len(seen)
            until(lambda: len(seen) > count + 4, "answers")
            return seen[count + 4 :]

        (worker,) = info()["workers"]
        os.kill(worker, signal.SIGKILL)
        until(lambda: info()["workers"] != [worker], "another worker")
        assert next_answers()[0][1][0]["items"] == first
        version = info()["version"]

        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
        os.kill(os.getpid(), signal.SIGHUP)
        until(lambda: info()["last_reload"] is not None, "the refused model")
        assert (
            info()["last_reload"]["outcome"] == "failed"
            and f"{folder} cannot be loaded" in info()["last_reload"]["reason"]
        )
        # A worker that is started again has the model that is served, and not what became of the folder.
        os.kill(info()["workers"][0], signal.SIGKILL)
        assert (info()["version"], next_answers()[0][1][0]["items"]) == (version, first)

        shutil.rmtree(folder)
        saved(folder, seed=1)
        os.kill(os.getpid(), signal.SIGHUP)
        until(lambda: info()["version"] != version, "the new model")
        assert next_answers()[0][1][0]["items"] == second
        counts = counted(address)
        return [counts[f'onerec_reloads_total{{outcome="{outcome}"}}'] for outcome in ("done", "failed")], counts

    with ThreadPoolExecutor(3) as clients:

        def asked(address: str):
            for _ in range(3):
                clients.submit(load, address)
            try:
                return ask(address)
            finally:
                stop.set()

        # On a busy machine another worker may take longer to start than requests wait by default.
        limits = Limits(seconds=300)
        (done, failed), counts = while_served(ServerOptions(str(folder), threads=1, limits=limits), asked)
    assert (done, failed, counts["onerec_worker_restarts_total"]) == (1, 1, 2)
    assert {status for status, *_ in seen} == {200}
    assert [row["items"] for _, (row,), _ in seen if row["items"] not in (first, second)] == []


def test_a_slow_body_a_hanging_worker_and_a_full_queue_are_answered_in_time(model):
    limits = Limits(seconds=1.0, waiting=2)

    def ask(address: str):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as slow:
            slow.sendall(b"POST /recommend HTTP/1.1\r\nHost: here\r\nContent-Length: 20\r\n\r\n{")
            assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")
        (worker,) = send(address, None, "/info")[1]["workers"]
        os.kill(worker, signal.SIGSTOP)
        with ThreadPoolExecutor(8) as clients:
            start = time.monotonic()
            answers = list(clients.map(lambda _: send(address, {"inputs": [[]]}), range(8)))
            took = time.monotonic() - start
        deadline = time.monotonic() + 60
        while send(address, {"inputs": [[]]})[0] != 200:
            assert time.monotonic() < deadline
        return answers, took, [worker] == send(address, None, "/info")[1]["workers"]

    answers, took, kept = while_served(ServerOptions(model, threads=1, limits=limits), ask)
    assert [status for status, *_ in answers] == [503] * 8 and took < 5 and not kept
    messages = [answer["error"]["message"] for _, answer, _ in answers]
    assert all(headers["retry-after"] == "1" for *_, headers in answers)
    assert any("requests wait already" in text for text in messages) and any("within 1 s" in text for text in messages)


def test_the_stop_answers_what_has_come_and_takes_no_more(model):
    held = ServerOptions(model, threads=1)

    def ask(address: str):
        clients = ThreadPoolExecutor(4)
        answers = [clients.submit(send, address, {"inputs": [history]}) for history in HISTORIES]
        time.sleep(0.2)  # one is searched for, and the others wait
        return address, answers

    address, answers = while_served(held, ask)
    expected = recommender()(HISTORIES, session_scores=True)
    for answer, one in zip(answers, expected, strict=True):
        status, found, _ = answer.result()
        assert status == 200
        same(found, [one])
    with pytest.raises(urllib.error.URLError, match="refused"):
        send(address, {"inputs": [[]]})


def test_what_cannot_be_loaded_is_not_served(model, tmp_path):
    with pytest.raises(LoadError, match="has no config.json: give a folder such as"):
        serve(ServerOptions(str(tmp_path)), "127.0.0.1", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        serve(ServerOptions(model), "127.0.0.1", taken.getsockname()[1])


def test_only_what_one_search_can_answer_goes_together():
    batches = []

    class FakeWorker:
        async def answer(self, requests, seconds):
            batches.append([request.rows[0]["number"] for request in requests])
            return [{"results": request.rows} for request in requests]

    async def worker(place):
        return FakeWorker()

    def request(number, options, histories=1):
        return RecommendRequest([{"number": number}] * histories, options)

    async def run():
        batcher = Batcher(
            SimpleNamespace(worker=worker), Metrics(lambda: 0, list), Limits(waiting=9), max_batch=4, wait_seconds=0.05
        )
        given = [{}, {"top_k": 3}, {}, {"seed": 1}, {"top_k": 3}, {"seed": 1}, {}]
        asked = [
            asyncio.create_task(batcher.answer(request(number, one, histories=1 + (number == 2))))
            for number, one in enumerate(given)
        ]
        await asyncio.sleep(0)
        serving = asyncio.create_task(batcher.serve(0))
        found = await asyncio.gather(*asked)
        serving.cancel()
        waiting = [asyncio.create_task(batcher.answer(request(number, {}))) for number in range(9)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="9 requests wait already"):
            await batcher.answer(request(9, {}))
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert not batcher.queue
        return found

    found = asyncio.run(run())
    assert batches == [[0, 2, 6], [1, 4], [3], [5]]
    assert [answer["results"][0]["number"] for answer in found] == [*range(7)]


def test_a_worker_waits_for_as_many_as_before_and_no_longer():
    batches = []

    class FakeWorker:
        async def answer(self, requests, seconds):
            batches.append(len(requests))
            await asyncio.sleep(0)
            return [{}] * len(requests)

    async def worker(place):
        return FakeWorker()

    async def run():
        pool, limits = SimpleNamespace(worker=worker), Limits(seconds=600)
        batcher = Batcher(pool, Metrics(lambda: 0, list), limits, max_batch=4, wait_seconds=300)
        serving = asyncio.create_task(batcher.serve(0))

        async def client():
            for _ in range(3):
                await batcher.answer(RecommendRequest([{}], {}))
                await asyncio.sleep(0.01)  # to ask again takes time

        await client()
        alone = len(batches)
        others = [asyncio.create_task(client()) for _ in range(3)]
        while len(batches) < alone + 3:
            await asyncio.sleep(0.001)
        for task in [*others, serving]:
            task.cancel()
        await asyncio.gather(*others, serving, return_exceptions=True)
        return alone

    alone = asyncio.run(asyncio.wait_for(run(), 60))
    assert batches[:alone] == [1, 1, 1]
    assert batches[alone:][1:] == [3, 3] or batches[alone:][2:] == [3]  # the first of them came to a free worker


def test_answers_are_sent_without_delay():
    async def accepted(listener):
        found = asyncio.get_running_loop().create_future()

        async def answer(reader, writer):
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(answer, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.close()
            return await found

    with bound_socket("127.0.0.1", 0) as listener:
        assert asyncio.run(accepted(listener))


def test_bodies_are_read_or_refused_by_name():
    limits = replace(Limits(), histories=2)
    body = {"inputs": [{"history_item_ids": [1], "blocked_item_ids": [2]}, None], "parameters": {"blocked_items": [3]}}
    assert read_request(json.dumps(body).encode(), limits) == RecommendRequest(
        [{"history_item_ids": [1], "blocked_item_ids": [2, 3]}, {"history_item_ids": [], "blocked_item_ids": [3]}], {}
    )
    for text, field in (
        (b"[" * 100_000, "body"),
        (b"\xff", "body"),
        (b"[]", "body"),
        (b"{}", "inputs"),
        (b'{"inputs": [[1]], "top_k": 3}', "top_k"),
        (b'{"inputs": [1]}', "inputs[0]"),
        (b'{"inputs": [{"history_item_ids": "12"}]}', "inputs[0].history_item_ids"),
        (b'{"inputs": [[1]], "parameters": []}', "parameters"),
        (b'{"inputs": [[1]], "parameters": {"guide": 1}}', "parameters.guide"),
        (b'{"inputs": [[1]], "parameters": {"top_k": true}}', "parameters.top_k"),
        (b'{"inputs": [[1]], "parameters": {"num_beam_groups": 1000000000}}', "parameters.num_beam_groups"),
    ):
        with pytest.raises(RequestError) as refused:
            read_request(text, limits)
        assert refused.value.field == field
