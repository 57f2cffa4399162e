"""The ASGI application: its endpoints and their handlers. To add one, add it to `Server.endpoints`."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from space_cli import __version__
from space_cli.api import GenerationSettings, Model, Stream, Tool
from space_cli.core.engine import embedding_rows
from space_cli.server import docs
from space_cli.server.bodies import ChatRequest, CompletionRequest
from space_cli.server.docs import Endpoint
from space_cli.server.errors import ApiError, api_error
from space_cli.server.exchange import Exchange, read_body
from space_cli.server.guard import Access, Guard
from space_cli.server.metrics import Metrics
from space_cli.server.shapes import Begun, Came, ChatShape, CompletionShape, Done, Event
from space_cli.server.shelf import Shelf
from space_cli.server.work import Job, Worker

log = logging.getLogger("space.serve")
# no token of any tokenizer known to us has more characters, long runs of spaces apart
_CHARACTERS_PER_TOKEN = 64
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits on requests.

    Attributes:
        body_bytes: of a request.
        new_tokens: of an answer that says nothing of it.
        parallel: requests under way at once.
        waiting: requests in the queue.
    """

    body_bytes: int = 4 * 2**20
    new_tokens: int = 1024
    parallel: int = 4
    waiting: int = 64


class Server:
    """The state that all routes share.

    Args:
        shelf: of models.
        limits: of requests.
        log_prompts: whether prompts are written to the log.
    """

    def __init__(self, shelf: Shelf, limits: Limits, *, log_prompts: bool = False) -> None:
        self.shelf, self.limits, self._log_prompts = shelf, limits, log_prompts
        self.worker = Worker(shelf, parallel=limits.parallel, waiting=limits.waiting)
        self.metrics = Metrics(self.worker, shelf)

    @property
    def endpoints(self) -> list[Endpoint]:
        """All endpoints; they are served and documented alike."""
        conversation = "Answer a conversation; with `stream`, as server-sent events."
        return [
            Endpoint("POST", "/v1/chat/completions", self._chat, conversation, ChatRequest),
            Endpoint(
                "POST",
                "/v1/completions",
                self._completions,
                "Continue a prompt, without a chat template.",
                CompletionRequest,
            ),
            Endpoint("GET", "/v1/models", self._models, "The models that can be requested."),
            Endpoint("GET", "/v1/models/{name:path}", self._model, "One of them."),
            Endpoint("GET", "/health", self._health, "Whether the server takes requests; needs no key."),
            Endpoint("GET", "/metrics", self._metrics, "Metrics in Prometheus' text format."),
            Endpoint("GET", "/docs", self._docs, "This description as a page."),
            Endpoint("GET", "/openapi.json", self._openapi, "This description in OpenAPI's format."),
        ]

    def app(self, access: Access) -> Guard:
        """Return the application."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.worker.start()
            yield
            self.worker.stop()

        routes = [
            Route(endpoint.path, partial(self._with_errors, endpoint.handler), methods=[endpoint.method])
            for endpoint in self.endpoints
        ]
        handlers: dict[Any, Callable[[Request, Exception], Response]] = {HTTPException: _not_here}
        return Guard(Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan), access)

    async def _with_errors(self, handler: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
        """Answer a request; errors take OpenAI's form."""
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:  # noqa: BLE001  # the single place where errors become responses
            answered, path = api_error(error), request.url.path
            self.metrics.requests.labels(request.scope["route"].path, str(answered.status)).inc()
            log.info("%s %d %s", path, answered.status, answered.code)
            return answered.response()

    async def _chat(self, request: Request) -> Response:
        body = ChatRequest.model_validate_json(await read_body(request, self.limits.body_bytes))
        name = self.shelf.name_of(body.model)
        messages, tools = [message.message() for message in body.messages], body.allowed_tools
        settings = GenerationSettings.of(**body.options(self.limits.new_tokens))
        self._log_prompt(messages)

        def run(model: Model) -> Iterator[Event]:
            _check_length(model, len(str(messages)) + len(str(tools)))
            return _answers(model, [model.prompt_ids(messages, tools=tools)], settings, body.n or 1, tools)

        shape = ChatShape(name, logprobs=bool(body.logprobs))
        return await self._exchange(request, body, Job(name, run, streams=bool(body.stream)), shape)

    async def _completions(self, request: Request) -> Response:
        body = CompletionRequest.model_validate_json(await read_body(request, self.limits.body_bytes))
        name = self.shelf.name_of(body.model)
        prompts, count = body.prompts, body.n or 1
        settings = GenerationSettings.of(**body.options(self.limits.new_tokens))
        if body.echo and not all(isinstance(prompt, str) for prompt in prompts):
            raise ApiError(400, "echo needs prompts that are text", param="echo", code="unsupported_parameter")
        self._log_prompt(prompts)

        def run(model: Model) -> Iterator[Event]:
            return _answers(model, [_raw_ids(model, prompt) for prompt in prompts], settings, count)

        echoes = [str(prompt) if body.echo else "" for prompt in prompts for _ in range(count)]
        shape = CompletionShape(name, logprobs=body.logprobs is not None, echoes=echoes)
        return await self._exchange(request, body, Job(name, run, streams=bool(body.stream)), shape)

    async def _exchange(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        job: Job[Event],
        shape: ChatShape | CompletionShape,
    ) -> Response:
        has_usage = body.stream_options is not None and body.stream_options.include_usage
        exchange = Exchange(request, job, shape, self.metrics, has_usage)
        return await exchange.respond(self.worker, stream=bool(body.stream))

    def _log_prompt(self, prompt: object) -> None:
        if self._log_prompts:
            log.info("prompt: %r", prompt)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_entry(name) for name in self.shelf.names]})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(_entry(self.shelf.name_of(request.path_params["name"])))

    async def _health(self, request: Request) -> Response:
        if self.worker.is_draining:
            return JSONResponse({"status": "shutting down"}, 503)
        return JSONResponse({"status": "ok", "version": __version__})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _docs(self, request: Request) -> Response:
        return HTMLResponse(docs.page(self.endpoints), headers={"Content-Security-Policy": _POLICY})

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(docs.openapi(self.endpoints))


def _answers(
    model: Model,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    count: int,
    tools: Sequence[Tool] = (),
) -> Iterator[Event]:
    """Yield the events of `count` answers to each prompt; each further answer uses the next seed."""
    for prompt in prompts:
        # refuse what does not fit before sending anything
        model.answer_length(len(prompt), settings.max_new_tokens)
    yield Begun()
    for index in range(len(prompts) * count):
        number, again = divmod(index, count)
        seeded = settings.model_copy(update={"seed": (settings.seed + again) % 2**63})
        with Stream(model, prompts[number], seeded, tools) as stream:
            for piece in stream:
                yield Came(index, piece)
            yield Done(index, stream.answer, number)


def _raw_ids(model: Model, prompt: str | list[int]) -> list[int]:
    """Return the tokens of a prompt without a chat template; special tokens in it count as such."""
    if isinstance(prompt, str):
        _check_length(model, len(prompt))
        prompt = model.loaded.encode(prompt)
    rows = embedding_rows(model.loaded.model)
    if not prompt or not all(0 <= token < rows for token in prompt):
        message = f"a prompt has a token outside of 0 to {rows - 1}" if prompt else "a prompt is empty"
        raise ApiError(400, message, param="prompt", code="invalid_value")
    return prompt


def _check_length(model: Model, characters: int) -> None:
    """Refuse a prompt that is far too long before tokenizing it, which is slow."""
    limit = model.context_length
    if limit is not None and characters > limit * _CHARACTERS_PER_TOKEN:
        message = f"the prompt of {characters} characters is longer than the context of {limit} tokens"
        raise ApiError(400, message, code="context_length_exceeded", param="messages")


def _entry(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "space"}


def _not_here(request: Request, error: Exception) -> Response:
    """Answer a request for an unknown path or method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path} is not here; see /docs"
    return ApiError(error.status_code, message, code="not_found", headers=error.headers).response()
