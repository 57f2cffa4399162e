"""A model that answers: the one entry point for commands, server and Python."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, cast, get_args

from space_cli.api.answers import Answer, AnswerText, Message, Piece
from space_cli.api.caches import MAX_BYTES, CachePool
from space_cli.api.grammar import Grammar, grammar_for
from space_cli.api.settings import GenerationSettings, Mode, Options, SamplingSettings
from space_cli.api.tools import CallReader, Tool, check_tools, response_template
from space_cli.chat.templates import Role, Turn, ids_of, request
from space_cli.core.cache import KVCache
from space_cli.core.costs import ASSUMED_COSTS
from space_cli.core.decoder import decode
from space_cli.core.drafting.ngrams import LONGEST_MATCH
from space_cli.core.sampling import Sampler
from space_cli.core.stopping import StopRule
from space_cli.core.threads import release_threads
from space_cli.errors import ContextFull, UsageProblem
from space_cli.models.engines import measured
from space_cli.models.loading import LoadedModel
from space_cli.models.support import check_candidates

if TYPE_CHECKING:
    from space_cli.core.drafting import Drafter
    from space_cli.core.stream import Step

_T = TypeVar("_T")
Prompt = str | Sequence[Message]
_MIN_ANSWER_TOKENS = 16  # of a word or less, an answer helps nobody


class Model:
    """Answers prompts and conversations; several answers may be in progress, one step at a time.

    Args:
        loaded: with its engine.
        template: a template with one {} in place of the tokenizer's own, or None.
        cache_bytes: of keys and values kept from answer to answer.
    """

    def __init__(self, loaded: LoadedModel, *, template: str | None = None, cache_bytes: int = MAX_BYTES) -> None:
        self.loaded = loaded
        self._template = template or loaded.prompt_template
        self._caches = CachePool(most_bytes=cache_bytes)
        self._lock = threading.RLock()

    @property
    def name(self) -> str:
        """The name it was requested by."""
        return self.loaded.name

    @property
    def context_length(self) -> int | None:
        """Largest number of tokens of prompt and answer together, or None if unlimited."""
        return self.loaded.context_length

    @property
    def cache_bytes(self) -> int:
        """Size of the idle KV caches."""
        return self._caches.nbytes

    def prompt_ids(self, prompt: Prompt, *, raw: bool = False, tools: Sequence[Tool] = ()) -> list[int]:
        """Return the token ids of a prompt or a conversation.

        Args:
            prompt: a text, or the turns of a conversation, the last of which asks.
            raw: no chat template: the model goes on behind the text.
            tools: functions that the model may call, as OpenAI's interface describes them.

        Raises:
            UsageProblem: the chat template refuses the conversation, or it is none.
        """
        turns = [Turn("user", prompt)] if isinstance(prompt, str) else [_turn(message) for message in prompt]
        if not turns:
            raise UsageProblem("the conversation has no turns", hint="give a message of the user at least")
        check_tools(tools)
        template = "{}" if raw else self._template
        return request(turns, self.loaded.tokenizer, template=template, tools=tools).token_ids

    def fits(self, prompt_tokens: int, max_new_tokens: int) -> bool:
        """Return whether the context has room for the prompt and for an answer of some words."""
        limit = self.context_length
        return limit is None or prompt_tokens + min(max_new_tokens, _MIN_ANSWER_TOKENS) <= limit

    def answer_length(self, prompt_tokens: int, max_new_tokens: int) -> int:
        """Return how many tokens an answer can have.

        Raises:
            UsageProblem: the prompt leaves no room.
        """
        limit = self.context_length
        if not self.fits(prompt_tokens, max_new_tokens):
            raise ContextFull(
                f"the prompt of {prompt_tokens} tokens leaves no room in the context of {limit}", hint="shorten it"
            )
        return max_new_tokens if limit is None else min(max_new_tokens, limit - prompt_tokens)

    def drafts(
        self,
        mode: Mode,
        candidates: int | None = None,
        *,
        texts: Iterable[Sequence[int]] = (),
        grammar: Grammar | None = None,
    ) -> Drafter | None:
        """Return the drafter of an answer, None for one token at a time; measures step costs if it needs them.

        Args:
            mode: space or ar.
            candidates: tokens guessed per step, always as many; None is as many as pay.
            texts: token ids to copy from besides the context.
            grammar: that the answer follows.

        Raises:
            UsageProblem: a fixed number of candidates is asked for, and the model has no masks.
        """
        if mode == "ar":
            return None
        check_candidates(candidates, self.name, self.loaded.masks_per_group, hint="leave it out")
        if candidates is None and self.loaded.costs is ASSUMED_COSTS:
            self.loaded = measured(self.loaded)
        asked = None if candidates is None else min(candidates, self.loaded.masks_per_group)
        return self.loaded.drafts(asked, texts=texts, guide=grammar)

    def steps(
        self,
        token_ids: Sequence[int],
        stop: StopRule,
        settings: SamplingSettings,
        *,
        cache: KVCache,
        drafts: Drafter | None,
        logprobs: int | None = None,
        grammar: Grammar | None = None,
    ) -> Iterator[Step]:
        """Generate after these tokens, one step per model call; cached tokens are not computed again."""
        first = [] if grammar is None else [grammar]
        return decode(
            self.loaded.model,
            token_ids,
            stop=stop,
            sampler=Sampler.from_sampling(settings.sampling(), prompt_length=len(token_ids), first=first),
            drafts=drafts,
            mask_token_ids=self.loaded.mask_token_ids,
            compiled=self.loaded.compiled,
            cache=cache,
            logprobs=logprobs,
        )

    def stream(
        self, prompt: Prompt, *, raw: bool = False, tools: Sequence[Tool] = (), **options: Unpack[Options]
    ) -> Stream:
        """Answer; iterate over the result for its pieces, stop iterating or `close` it to end early.

        Args:
            prompt: a text, or the turns of a conversation.
            raw: no chat template: the model goes on behind the text.
            tools: functions that the model may call, as OpenAI's interface describes them.
            options: fields of `GenerationSettings`.

        Raises:
            UsageProblem: an option is out of range, or the prompt does not fit.
        """
        return Stream(self, self.prompt_ids(prompt, raw=raw, tools=tools), GenerationSettings.of(**options), tools)

    def generate(
        self, prompt: Prompt, *, raw: bool = False, tools: Sequence[Tool] = (), **options: Unpack[Options]
    ) -> Answer:
        """Return the whole answer; arguments and errors are those of `stream`."""
        with self.stream(prompt, raw=raw, tools=tools, **options) as stream:
            for _ in stream:
                pass
            return stream.answer

    async def agenerate(
        self, prompt: Prompt, *, raw: bool = False, tools: Sequence[Tool] = (), **options: Unpack[Options]
    ) -> Answer:
        """Return the whole answer, computed in a thread of the model's own; a cancelled task stops within a step."""
        stream = await self._in_thread(lambda: self.stream(prompt, raw=raw, tools=tools, **options))
        async for _ in self._pieces(stream):
            pass
        return stream.answer

    async def astream(
        self, prompt: Prompt, *, raw: bool = False, tools: Sequence[Tool] = (), **options: Unpack[Options]
    ) -> AsyncIterator[Piece]:
        """Yield the pieces of an answer as `stream` does, computed in a thread of the model's own."""
        stream = await self._in_thread(lambda: self.stream(prompt, raw=raw, tools=tools, **options))
        async for piece in self._pieces(stream):
            yield piece

    async def _pieces(self, stream: Stream) -> AsyncIterator[Piece]:
        try:
            while (piece := await self._in_thread(lambda: next(stream, None))) is not None:
                yield piece
        finally:
            # after the step that may still be running
            self._executor.submit(stream.close)

    async def _in_thread(self, function: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    @cached_property
    def _executor(self) -> ThreadPoolExecutor:
        # one thread, since torch keeps a worker pool for each calling thread
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="space")


class Stream:
    """An answer in progress: an iterator over its pieces.

    Args:
        model: that answers.
        token_ids: of the prompt.
        settings: how.
        tools: that are offered to the model.

    Raises:
        UsageProblem: the prompt does not fit, or the model cannot answer so.
    """

    def __init__(
        self, model: Model, token_ids: Sequence[int], settings: GenerationSettings, tools: Sequence[Tool] = ()
    ) -> None:
        self._model, self.prompt_ids, self.settings = model, tuple(token_ids), settings
        loaded = model.loaded
        stop = StopRule(
            model.answer_length(len(token_ids), settings.max_new_tokens),
            loaded.eos_token_ids,
            settings.stop,
            loaded.decode,
        )
        schema = settings.schema_to_follow
        grammar = None if schema is None else grammar_for(loaded, schema, len(token_ids))
        template = response_template(loaded) if tools else None
        reader = None if template is None else CallReader(loaded, template, token_ids, tools)
        self._text = AnswerText(loaded, token_ids, settings.stop, reader)
        self._pieces: list[Piece] = []
        with model._lock:
            texts = [self._expected()] if settings.prediction else []
            drafts = model.drafts(settings.mode, settings.candidates, texts=texts, grammar=grammar)
            self._cache: KVCache | None = model._caches.take(token_ids)
            self._steps = model.steps(
                token_ids,
                stop,
                settings,
                cache=self._cache,
                drafts=drafts,
                logprobs=settings.logprobs,
                grammar=grammar,
            )

    def _expected(self) -> list[int]:
        """Return the predicted answer's tokens after the end of the prompt, so that lookup finds it at once."""
        said = ids_of(self.settings.prediction, self._model.loaded.tokenizer)
        return [*self.prompt_ids[-LONGEST_MATCH:], *said]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        """Run the model once and return the resulting piece."""
        with self._model._lock:
            try:
                step = next(self._steps)
            except StopIteration:
                self.close()
                raise
            except BaseException:
                # a cache interrupted in the middle of a step is not reused
                self._cache = None
                raise
            piece = self._text.piece(step)
            self._pieces.append(piece)
            if step.finish_reason is not None:
                self.close()
        return piece

    @property
    def answer(self) -> Answer:
        """The answer so far."""
        steps = tuple(piece.step for piece in self._pieces)
        computed = steps[0].prefilled + 1 if steps else 0
        return Answer(
            text="".join(piece.text for piece in self._pieces),
            token_ids=tuple(token for step in steps for token in step.tokens),
            prompt_tokens=len(self.prompt_ids),
            cached_tokens=max(0, len(self.prompt_ids) - computed) if steps else 0,
            finish_reason=steps[-1].finish_reason if steps else None,
            steps=steps,
            logprobs=tuple(token for piece in self._pieces for token in piece.logprobs),
            tool_calls=tuple(call for piece in self._pieces for call in piece.tool_calls),
        )

    def close(self) -> None:
        """Stop; the KV cache is kept for the next request with the same prefix."""
        with self._model._lock:
            self._steps.close()  # type: ignore[attr-defined]  # a generator
            if self._cache is not None:
                self._model._caches.give(self._cache)
                self._cache = None
                release_threads()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()


def _turn(message: Mapping[str, Any]) -> Turn:
    role, content = message.get("role"), message.get("content")
    if role not in get_args(Role):
        raise UsageProblem(f"a message has the role {role!r}", hint=f"use {', '.join(get_args(Role))}")
    calls = [_call(call) for call in message.get("tool_calls") or ()]
    if not isinstance(content, str) and not (content is None and calls):
        raise UsageProblem(f"the content of a message of the {role} is no text")
    fields = {name: message[name] for name in ("name", "tool_call_id") if message.get(name)}
    return Turn(cast(Role, role), content or "", fields | ({"tool_calls": calls} if calls else {}))


def _call(call: Any) -> dict[str, Any]:
    """Return a tool call as templates take it: arguments as an object, not as OpenAI's JSON string."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UsageProblem("a call of a tool names no function")
    arguments = function.get("arguments")
    with suppress(ValueError, RecursionError):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {**call, "function": {**function, "arguments": arguments}}
