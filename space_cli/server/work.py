"""One thread runs the models: requests in order of arrival, a few at a time, one step of each in turn.

A step is one model call for one request: requests are not batched.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Generic, TypeVar

from space_cli.server.errors import api_error, overloaded

if TYPE_CHECKING:
    from space_cli.api import Model
    from space_cli.server.shelf import Shelf

E = TypeVar("E")
_GATHERED_SECONDS = 0.05


class Job(Generic[E]):
    """A request's work, as seen by the coroutine that waits for it.

    Args:
        model: by its name.
        body: what is to be done with the model, an event at a time; each takes a step of a model at most.
        streams: whether events are wanted as they come, or all at the end.
    """

    def __init__(self, model: str, body: Callable[[Model], Iterator[E]], *, streams: bool) -> None:
        self.model = model
        self.is_cancelled = False
        self.running: Iterator[E] | None = None
        self._body, self._streams = body, streams
        self._loop = asyncio.get_running_loop()
        self._wake, self._ended = asyncio.Event(), asyncio.Event()
        self._events: deque[E | BaseException | None] = deque()
        self._is_notified = False

    def begin(self, model: Model) -> None:
        """Start; called by the worker."""
        self.running = self._body(model)

    def put(self, event: E | BaseException | None) -> None:
        """Hand out an event, an error, or None for the end; called by the worker."""
        self._events.append(event)
        is_last = event is None or isinstance(event, BaseException)
        # waking the coroutine takes a processor from the model for a moment
        if not is_last and (self._is_notified or not self._streams):
            return
        self._is_notified = True
        # the loop may be gone where the process ends in the middle of an answer
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._end if is_last else self._wake.set)

    def _end(self) -> None:
        self._ended.set()
        self._wake.set()

    def cancel(self) -> None:
        """Cancel the job; the step under way is its last."""
        self.is_cancelled = True
        self._end()

    async def events(self) -> AsyncIterator[list[E]]:
        """Yield events in batches as they arrive; ends early if the job is cancelled.

        Raises:
            ApiError: what the job failed with.
        """
        while not self.is_cancelled:
            await self._wake.wait()
            # events of faster steps are sent together, since each send takes time from the model
            with suppress(TimeoutError):
                async with asyncio.timeout(_GATHERED_SECONDS):
                    await self._ended.wait()
            self._wake.clear()
            self._is_notified = False
            come: list[E] = []
            while self._events and not self.is_cancelled:
                event = self._events.popleft()
                if event is None or isinstance(event, BaseException):
                    if come:
                        yield come
                    if event is not None:
                        raise api_error(event)
                    return
                come.append(event)
            if come:
                yield come


class Worker:
    """The thread and its queue.

    Args:
        shelf: of models.
        parallel: requests under way at once.
        waiting: requests that may wait beside those under way; one more is refused.
    """

    def __init__(self, shelf: Shelf, *, parallel: int, waiting: int) -> None:
        self._shelf, self._parallel, self._most_waiting = shelf, parallel, waiting
        self._waiting: deque[Job[object]] = deque()
        self._active: deque[Job[object]] = deque()
        self._is_draining = self._is_stopped = False
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="space-worker", daemon=True)

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Number of running requests."""
        return len(self._active)

    @property
    def is_draining(self) -> bool:
        """Whether new jobs are refused."""
        return self._is_draining

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: Job[E]) -> None:
        """Put a job in the queue.

        Raises:
            ApiError: the queue is full, or the server is about to end.
        """
        with self._condition:
            if self._is_draining:
                raise overloaded(503, "the server is shutting down", "shutting_down")
            for left in [waiting for waiting in self._waiting if waiting.is_cancelled]:
                with suppress(ValueError, IndexError):  # the worker came to it meanwhile
                    self._waiting.remove(left)
            # a job that an idle worker is about to begin does not count as waiting
            if len(self._waiting) + len(self._active) >= self._most_waiting + self._parallel:
                raise overloaded(429, f"{len(self._waiting)} requests are waiting already", "queue_full")
            self._waiting.append(job)  # type: ignore[arg-type]
            self._condition.notify()

    def drain(self) -> None:
        """Refuse new and waiting jobs; running ones go on. Safe in a signal handler."""
        self._is_draining = True
        with suppress(IndexError):
            while True:
                self._waiting.popleft().put(overloaded(503, "the server is shutting down", "shutting_down"))

    def stop(self) -> None:
        """End the thread after the current step."""
        self.drain()
        with self._condition:
            self._is_stopped = True
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not (self._waiting or self._active or self._is_stopped):
                    self._condition.wait()
                if self._is_stopped:
                    break
            self._admit()
            for _ in range(len(self._active)):
                job = self._active[0]
                is_going_on = self._advance(job)
                self._active.popleft()
                if is_going_on:
                    self._active.append(job)
        for job in self._active:
            self._end(job)

    def _admit(self) -> None:
        """Start jobs in order; a job whose model has no room yet holds up those after it."""
        while self._waiting and len(self._active) < self._parallel:
            in_use = {job.model for job in self._active}
            try:
                job = self._waiting[0]
                if not job.is_cancelled and not self._shelf.has_room(job.model, in_use):
                    return
                job = self._waiting.popleft()
            except IndexError:  # drained meanwhile
                return
            if job.is_cancelled:
                continue
            self._active.append(job)
            try:
                job.begin(self._shelf.get(job.model, in_use))
            except Exception as error:  # noqa: BLE001  # whatever it is, the request gets the error and the others go on
                self._active.pop()
                job.put(error)

    def _advance(self, job: Job[object]) -> bool:
        """Produce one event of a job; return whether there may be more."""
        assert job.running is not None
        if job.is_cancelled:
            self._end(job)
            return False
        try:
            job.put(next(job.running))
        except StopIteration:
            job.put(None)
            return False
        except Exception as error:  # noqa: BLE001  # whatever it is, the request gets the error and the others go on
            job.put(error)
            return False
        return True

    def _end(self, job: Job[object]) -> None:
        close = getattr(job.running, "close", None)
        if close is not None:
            close()
        job.put(None)
