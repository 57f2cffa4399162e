"""One request and its response: reads the body within bounds, sends the job's events as a whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from space_cli.server.errors import ApiError
from space_cli.server.shapes import Came, Done, Event, Shape, usage_of

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from space_cli.server.metrics import Metrics
    from space_cli.server.work import Job, Worker

log = logging.getLogger("space.serve")
# clients that send or read more slowly than this are dropped
BODY_SECONDS, SEND_SECONDS = 30.0, 60.0
_CLIENT_GONE = 499


async def read_body(request: Request, most_bytes: int) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: it is no JSON by its own account, too large, or too slow.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be application/json", code="unsupported_media_type")
    too_large = ApiError(
        413, f"the body is larger than {most_bytes} bytes", code="body_too_large", headers={"Connection": "close"}
    )
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most_bytes:
                    raise too_large
    except TimeoutError as error:
        headers = {"Connection": "close"}
        raise ApiError(408, "the body came too slowly", code="body_too_slow", headers=headers) from error
    return bytes(body)


@dataclass(slots=True)
class Exchange:
    """A request whose job is in the queue.

    Attributes:
        request: as it came.
        job: its work.
        shape: of the response.
        has_usage: whether a stream ends with its usage.
    """

    request: Request
    job: Job[Event]
    shape: Shape
    metrics: Metrics
    has_usage: bool = False
    done: list[Done] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    first: float | None = None
    _watch: asyncio.Task[None] | None = None

    async def respond(self, worker: Worker, *, stream: bool) -> Response:
        """Put the job in the queue and return its response.

        Raises:
            ApiError: the job was refused, or failed before anything came of it.
        """
        events = self.job.events()
        try:
            worker.submit(self.job)
            self._watch = asyncio.create_task(self._cancel_when_gone())
            if stream:
                # errors before the first event still have a status of their own
                first: list[Event] = await anext(events, [])
                return _EventStream(self, _behind(first, events))
            async for batch in events:
                self.take(batch)
        except ApiError:
            self.stop()
            raise
        except BaseException:  # the connection's task was cancelled
            self.finish(_CLIENT_GONE)
            raise
        if self.job.is_cancelled:
            self.finish(_CLIENT_GONE)
            return Response(status_code=_CLIENT_GONE)
        self.finish(200)
        return JSONResponse(self.shape.whole(self.done))

    async def _cancel_when_gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.job.cancel()

    def take(self, batch: list[Event]) -> None:
        """Record events."""
        self.done += [event for event in batch if isinstance(event, Done)]
        if self.first is None:
            self.first = next((event.at - self.began for event in batch if isinstance(event, Came)), None)

    def stop(self) -> None:
        """Stop the job if it still runs."""
        self.job.cancel()
        if self._watch is not None:
            self._watch.cancel()

    def finish(self, status: int) -> None:
        """Stop the job if it still runs, count it and write its line in the log."""
        self.stop()
        seconds, path = time.monotonic() - self.began, self.request.url.path
        self.metrics.requests.labels(path, str(status)).inc()
        usage = usage_of(self.done)
        self.metrics.count(usage, sum(len(each.answer.steps) for each in self.done))
        if self.done and self.first is not None:
            self.metrics.first.observe(self.first)
            self.metrics.seconds.observe(seconds)
        fields = (path, self.job.model, status, usage["prompt_tokens"], usage["completion_tokens"], seconds)
        log.info("%s %s %d %d+%d tokens %.2f s", *fields)


async def _behind(first: list[Event], events: AsyncIterator[list[Event]]) -> AsyncIterator[list[Event]]:
    """Yield the batch already taken, then the rest."""
    yield first
    async for batch in events:
        yield batch


class _EventStream(Response):
    """Server-sent events of an exchange, batched as they arrive."""

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, events: AsyncIterator[list[Event]]) -> None:
        super().__init__(None, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._exchange, self._events = exchange, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the answer ends or the reader disconnects or stalls."""
        status = _CLIENT_GONE
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in self._data():
                async with asyncio.timeout(SEND_SECONDS):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            if not self._exchange.job.is_cancelled:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                status = 200
        except (TimeoutError, OSError, ClientDisconnect):
            # the connection cannot be used any more; to leave the response unfinished closes it
            self._exchange.job.cancel()
        finally:
            self._exchange.finish(status)

    async def _data(self) -> AsyncIterator[bytes]:
        shape, exchange = self._exchange.shape, self._exchange
        try:
            async for batch in self._events:
                exchange.take(batch)
                if data := b"".join(_event(chunk) for event in batch for chunk in shape.chunks(event)):
                    yield data
        except ApiError as error:
            yield _event(error.body)
            return
        if not exchange.job.is_cancelled:
            yield (_event(shape.usage_chunk(exchange.done)) if exchange.has_usage else b"") + b"data: [DONE]\n\n"


def _event(data: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"
