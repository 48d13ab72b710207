"""Workers as the front sees them: started, watched, started again, and exchanged for those of another model."""

import asyncio
import json
import logging
import multiprocessing
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

from .model_files import ModelFiles
from .requests import RecommendRequest
from .worker import run_worker

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_STARTS = 1.0  # of a worker that cannot be started
SECONDS_TO_END = 5.0  # of a worker without a batch

# Workers are forked from a process that has imported the package and computed nothing: they start in the time of
# loading a model, and neither threads nor a GPU are there to be forked.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([run_worker.__module__])


class LoadError(Exception):
    """Why a model cannot be served."""


class WorkerDied(Exception):
    """A worker's process ended before it answered."""


class Worker:
    """A worker's process, and the thread that reads from it."""

    def __init__(self, process, connection):
        self.process, self._connection = process, connection
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._answer: asyncio.Future = self._loop.create_future()
        self._free = asyncio.Lock()
        threading.Thread(target=self._read, daemon=True).start()

    @classmethod
    async def start(cls, model: str, reward_model: str | None, threads: int | None) -> tuple[Self, dict[str, Any]]:
        """A worker that has loaded the models of these folders, and what it says of them.

        Args:
            threads: of its torch; None: torch's own number.

        Raises:
            LoadError: it cannot load them.
        """
        connection, theirs = _processes.Pipe()
        process = _processes.Process(target=run_worker, args=(theirs, model, reward_model, threads))
        try:
            await asyncio.to_thread(process.start)
        except (OSError, EOFError) as error:  # no memory; or what forks is gone, until the next start
            raise LoadError(f"no process can be started: {type(error).__name__}: {error}") from None
        theirs.close()
        worker = cls(process, connection)
        try:
            message = await worker._answer
        except WorkerDied:
            raise LoadError("the worker's process ended while it loaded the model") from None
        except asyncio.CancelledError:
            process.kill()
            raise
        if "failed" in message:
            raise LoadError(message["failed"])
        return worker, message["model"]

    def _read(self) -> None:
        try:
            while True:
                message = json.loads(self._connection.recv_bytes())
                self._loop.call_soon_threadsafe(self._received, message)
        except (EOFError, OSError):
            self._connection.close()
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._has_ended)

    def _received(self, message: Any) -> None:
        if not self._answer.done():
            self._answer.set_result(message)

    def _has_ended(self) -> None:
        self.ended.set()
        if not self._answer.done():
            self._answer.set_exception(WorkerDied())
            self._answer.exception()  # marks it as seen, where nobody waits for it

    async def answer(self, requests: list[RecommendRequest], seconds: float) -> list[dict[str, Any]]:
        """What [`answers`] gives.

        Raises:
            WorkerDied: the process ended, or took longer and was killed, since nobody waits for it any more.
        """
        async with self._free:
            if self.ended.is_set():
                raise WorkerDied
            self._answer = self._loop.create_future()
            message = json.dumps([asdict(request) for request in requests]).encode()
            try:
                async with asyncio.timeout(seconds):
                    # Of a worker that does not read, a long message waits in its thread.
                    await asyncio.to_thread(self._connection.send_bytes, message)
                    return await self._answer
            except TimeoutError:
                logger.error("A batch took more than %g s: its worker is killed.", seconds)
                self.process.kill()
                raise WorkerDied from None
            except OSError:
                raise WorkerDied from None

    async def close(self) -> None:
        """Lets the process end after its batch."""
        async with self._free:
            try:
                self._connection.send_bytes(b"null")
            except OSError:  # it has ended
                pass
            await asyncio.to_thread(self.process.join, SECONDS_TO_END)
            self.process.kill()
            await asyncio.to_thread(self.process.join)


@dataclass
class ServedModel:
    """A model that is served: its files (and its reward model's), what is known of it, and its workers."""

    files: list[ModelFiles]
    about: dict[str, Any]
    workers: list[Worker]

    async def close(self) -> None:
        await asyncio.gather(*(worker.close() for worker in self.workers))
        for files in self.files:
            files.remove()


class WorkerPool:
    """The workers of one model; each place has one at a time.

    Args:
        open_files: gives the files of the generator and, where there is one, the reward model, as they are now.
        num_workers: places.
        threads: of each worker's torch; None: torch's own number.
        restarted: is called when a worker was started in the place of one that died.
    """

    def __init__(
        self,
        open_files: Callable[[], list[ModelFiles]],
        num_workers: int,
        threads: int | None,
        restarted: Callable[[], Any],
    ):
        self._open_files, self._num_workers = open_files, num_workers
        self._threads, self._restarted = threads, restarted
        self._model: ServedModel | None = None
        self._changed = asyncio.Event()  # set when a worker takes a place, and then another event
        self._keepers: list[asyncio.Task] = []

    async def load(self) -> ServedModel | None:
        """Loads the model as it is now and serves it; returns the one before, for the caller to close.

        Raises:
            LoadError: it cannot be served; the one before still is.
        """
        try:
            files = await asyncio.to_thread(self._open_files)
        except (OSError, ValueError) as error:
            raise LoadError(f"{type(error).__name__}: {error}") from None
        starts = [asyncio.create_task(self._start(files)) for _ in range(self._num_workers)]
        try:
            started = await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            for result in await asyncio.gather(*starts, return_exceptions=True):
                if not isinstance(result, BaseException):
                    await result[0].close()
            for each in files:
                each.remove()
            raise
        before = self._model
        self._model = ServedModel(files, started[0][1], [worker for worker, _ in started])
        self._workers_changed()
        if before is None:
            self._keepers = [asyncio.create_task(self._keep(place)) for place in range(self._num_workers)]
        return before

    async def _start(self, files: list[ModelFiles]) -> tuple[Worker, dict[str, Any]]:
        model, reward_model = [*(str(each.folder) for each in files), None][:2]
        try:
            return await Worker.start(model, reward_model, self._threads)
        except LoadError as error:
            reason = str(error)
            for each in files:  # the copies are nobody's concern
                reason = reason.replace(str(each.folder), each.source)
            raise LoadError(reason) from None

    def _workers_changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _keep(self, place: int) -> None:
        """Starts a worker again where one died, of the same files."""
        while True:
            model = self._model
            await model.workers[place].ended.wait()
            if model is not self._model:  # it has gone with its model
                continue
            logger.warning("A worker died and is started again.")
            try:
                worker, _ = await self._start(model.files)
            except LoadError as error:
                logger.error("No worker can be started: %s", error)
                await asyncio.sleep(SECONDS_BETWEEN_STARTS)
                continue
            if model is not self._model:
                await worker.close()
                continue
            model.workers[place] = worker
            self._restarted()
            self._workers_changed()

    async def worker(self, place: int) -> Worker:
        """The place's living worker, as soon as there is one."""
        while (worker := self._model.workers[place]).ended.is_set():
            await self._changed.wait()
        return worker

    @property
    def ready(self) -> bool:
        """Whether a worker lives."""
        return self._model is not None and any(not worker.ended.is_set() for worker in self._model.workers)

    @property
    def process_ids(self) -> list[int]:
        return [] if self._model is None else [worker.process.pid for worker in self._model.workers]

    @property
    def about(self) -> dict[str, Any]:
        """What is known of the model, with the version of its files."""
        versions = [files.version for files in self._model.files]
        return {"version": versions[0], "reward_model_version": [*versions, None][1], **self._model.about}

    async def close(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        if self._model is not None:
            await self._model.close()
