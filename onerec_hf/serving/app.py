"""The server's paths, and its life from start to stop."""

import asyncio
import logging
import re
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .batching import Batcher, Unavailable
from .metrics import Metrics
from .model_files import ModelFiles
from .requests import PARAMETERS, Limits, RecommendRequest, RequestError, read_request
from .worker_pool import LoadError, WorkerPool

logger = logging.getLogger(__name__)
RETRY_AFTER = {"Retry-After": "1"}  # [s]
# Who is still sending a body reads no refusal: of one that is too large so many times the limit is read, and dropped.
DRAINED = 16


@dataclass(frozen=True)
class ServerOptions:
    """How a model is served.

    Args:
        model, reward_model: folders or Hub ids.
        hub_arguments: `revision`, `token` and such of each.
        workers: processes with a model of their own.
        threads: of each worker's torch; None: torch's own number.
        wait_seconds: that a free worker waits for more requests, see [`Batcher`].
    """

    model: str
    reward_model: str | None = None
    hub_arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    workers: int = 1
    threads: int | None = None
    wait_seconds: float = 0.02
    limits: Limits = field(default_factory=Limits)

    def open_files(self) -> list[ModelFiles]:
        """Of the generator, and the reward model where there is one, as they are now."""
        named = {"model": self.model, "reward_model": self.reward_model}
        given = {name: source for name, source in named.items() if source is not None}
        return [ModelFiles(source, self.hub_arguments.get(name, {})) for name, source in given.items()]


class Server:
    """A model's server; made in the event loop that it serves in."""

    def __init__(self, options: ServerOptions):
        self.options, limits = options, options.limits
        self.pool = WorkerPool(options.open_files, options.workers, options.threads, self._restarted)
        self.metrics = Metrics(lambda: len(self.batcher.queue), lambda: self.pool.process_ids)
        self.batcher = Batcher(self.pool, self.metrics, limits, limits.histories, options.wait_seconds)
        self.last_reload: dict[str, Any] | None = None
        self._reload_wanted = asyncio.Event()
        self._tasks: list[asyncio.Task] = []
        self.app = Starlette(
            routes=[
                Route("/recommend", self._recommend, methods=["POST"]),
                Route("/health", self._health),
                Route("/health/live", self._live),
                Route("/info", self._info),
                Route("/metrics", self._metrics),
            ]
        )

    async def start(self) -> None:
        """Loads the model.

        Raises:
            LoadError: it cannot be served.
        """
        await self.pool.load()
        self._tasks = [asyncio.create_task(self.batcher.serve(place)) for place in range(self.options.workers)]
        self._tasks.append(asyncio.create_task(self._reload_when_wanted()))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.pool.close()

    def reload(self) -> None:
        """Has the model loaded again; one that cannot be leaves the one before in service."""
        self._reload_wanted.set()

    async def _reload_when_wanted(self) -> None:
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted.clear()
            before = None
            try:
                before = await self.pool.load()
            except LoadError as error:
                self.last_reload = {"outcome": "failed", "reason": str(error)}
                logger.error("The model is not exchanged, the one before is still served: %s", error)
            else:
                self.last_reload = {"outcome": "done"}
                logger.warning("The model is exchanged for version %s.", self.pool.about["version"])
            self.metrics.reloads.labels(self.last_reload["outcome"]).inc()
            if before is not None:  # its batches end first, which is nothing that a reload waits for
                await before.close()

    def _restarted(self) -> None:
        self.metrics.restarts.inc()

    async def _recommend(self, http: Request) -> Response:
        start = time.monotonic()
        response = await self._answered(http)
        self.metrics.requests.labels(str(response.status_code)).inc()
        self.metrics.request_seconds.observe(time.monotonic() - start)
        return response

    async def _answered(self, http: Request) -> Response:
        limits = self.options.limits
        try:
            async with asyncio.timeout(limits.seconds):
                body = await _body(http, limits.body_bytes)
            if body is None:
                message = f"is larger than {limits.body_bytes} bytes: send fewer or shorter histories at once."
                return _refusal(413, "body", message)
            request = read_request(body, limits)
            answer = await self.batcher.answer(request)
        except RequestError as error:
            return _refusal(422, error.field, str(error))
        except Unavailable as error:
            return _refusal(503, None, str(error), RETRY_AFTER)
        except (TimeoutError, ClientDisconnect):
            return _refusal(408, "body", f"did not come within {limits.seconds:g} s: send it at once.")
        if "error" in answer:
            field = _field(answer["error"], request) if answer["status"] == 422 else None
            return _refusal(answer["status"], field, answer["error"])
        return JSONResponse(answer["results"])

    async def _health(self, http: Request) -> Response:
        ready = self.pool.ready
        return JSONResponse({"live": True, "ready": ready}, 200 if ready else 503, None if ready else RETRY_AFTER)

    async def _live(self, http: Request) -> Response:
        return JSONResponse({"live": True})

    async def _info(self, http: Request) -> Response:
        options = self.options
        return JSONResponse(
            {
                "onerec_hf": version("onerec_hf"),
                "model": options.model,
                **self.pool.about,
                "workers": self.pool.process_ids,
                "last_reload": self.last_reload,
                "parameters": list(PARAMETERS),
                "limits": asdict(options.limits),
            }
        )

    async def _metrics(self, http: Request) -> Response:
        # Memory is asked of the system, which takes a moment.
        return Response(await asyncio.to_thread(self.metrics.text), media_type="text/plain; version=0.0.4")


async def _body(http: Request, most: int) -> bytes | None:
    """The request's body, None if it is larger than this."""
    body, size = bytearray(), 0
    async for part in http.stream():
        size += len(part)
        if size <= most:
            body += part
        elif size > DRAINED * most:
            break
    return bytes(body) if size <= most else None


def _field(message: str, request: RecommendRequest) -> str:
    """The field of which a message of the recommender speaks: a parameter that was given, or else the inputs."""
    named = [name for name in request.options if re.search(rf"\b{name}\b", message)]
    return f"parameters.{named[0]}" if named else "inputs"


def _refusal(status: int, field: str | None, message: str, headers: dict[str, str] | None = None) -> Response:
    """A refused request's answer; field and message make a sentence."""
    return JSONResponse({"error": {"field": field, "message": message}}, status, headers)


def serve(options: ServerOptions, host: str, port: int, announce: Callable[[str], Any] = print) -> None:
    """Serves until SIGTERM or SIGINT, at which requests that have come are answered and no others taken. SIGHUP
    reloads the model.

    Args:
        port: 0: a free one.
        announce: is told the address, once requests are answered.

    Raises:
        LoadError: the model cannot be served.
        OSError: the address is taken.
    """
    with bound_socket(host, port) as listener:
        asyncio.run(_serve(options, listener, announce))


def bound_socket(host: str, port: int) -> socket.socket:
    """Raises OSError if the address is taken."""
    # asyncio knows by the protocol alone that it may send without delay; an answer's body would come 40 ms late.
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, proto=socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


async def _serve(options: ServerOptions, listener: socket.socket, announce: Callable[[str], Any]) -> None:
    server, handlers = Server(options), {}
    try:
        await server.start()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, server.reload)
        host, port = listener.getsockname()[:2]
        config = uvicorn.Config(
            server.app,
            log_level="warning",
            lifespan="off",
            timeout_keep_alive=60,
            timeout_graceful_shutdown=int(options.limits.seconds) + 5,
        )
        http = uvicorn.Server(config)
        # uvicorn raises the signal that stopped it once more when it has stopped, for whom it concerned before.
        handlers = {number: signal.signal(number, http.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        listener.listen()
        announce(f"Serving {options.model} at http://{f'[{host}]' if ':' in host else host}:{port}")
        await http.serve(sockets=[listener])
    finally:
        await server.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
