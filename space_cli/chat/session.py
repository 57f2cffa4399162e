"""What goes on in a chat, apart from how it looks: the model, the conversation, the settings and the kept cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from pydantic import ValidationError

from space_cli.api.grammar import grammar_for
from space_cli.api.model import Model
from space_cli.api.settings import Mode, SamplingSettings
from space_cli.chat.conversation import Chat
from space_cli.chat.templates import Prefix, Turn
from space_cli.core.cache import KVCache
from space_cli.core.stopping import StopRule, text_behind
from space_cli.core.stream import Generation, Step
from space_cli.errors import ContextFull, UsageProblem, first_invalid
from space_cli.models.loading import LoadedModel
from space_cli.models.support import check_candidates
from space_cli.records import JsonRecord

# AR steps timed behind an answer, to compare with: more of them where they are quick
_MIN_AR_STEPS, _MAX_AR_STEPS, _AR_SECONDS, _LARGEST_GAIN = 4, 12, 0.05, 1.25


class ChatSettings(SamplingSettings):
    """What `/set` changes."""

    context: Literal["stop", "shift"] = "stop"
    live: Literal["text", "steps"] = "text"
    color: Literal["on", "off"] = "on"

    def change(self, name: str, value: str) -> None:
        """Set one by its name.

        Raises:
            UsageProblem: no such setting, or no such value of it.
        """
        if name not in type(self).model_fields:
            raise UsageProblem(f"no setting {name!r}", hint=f"there are {', '.join(type(self).model_fields)}")
        try:
            setattr(self, name, None if (name, value) == ("candidates", "auto") else value)
        except ValidationError as error:
            raise UsageProblem(f"{name} {value}: {first_invalid(error).reason}") from error


class Session:
    """A model in conversation.

    Args:
        loaded: the model.
        settings: how it answers.
        template: a template with one {} in place of the tokenizer's own, or None.
        turns: what was said before.
        schema: that every answer follows, or None.

    Attributes:
        last: the newest request with its answer's steps, or None.
        done: every answer of the session.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        settings: ChatSettings,
        *,
        template: str | None,
        turns: Sequence[Turn] = (),
        schema: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings = settings
        self.template = template
        self.schema = schema
        self.done: list[Generation] = []
        self.take(loaded, turns)

    def take(self, loaded: LoadedModel, turns: Sequence[Turn]) -> None:
        """Continue from these turns with a model."""
        check_candidates(self.settings.candidates, loaded.name, loaded.masks_per_group, hint="leave it at auto")
        self.model = Model(loaded, template=self.template)
        self.cache = KVCache()
        self.chat = Chat(loaded, template=self.template or loaded.prompt_template, turns=turns)
        self.last: tuple[Prefix, Generation] | None = None

    @property
    def loaded(self) -> LoadedModel:
        """The model, with the measured costs of its steps."""
        return self.model.loaded

    def change(self, name: str, value: str) -> None:
        """Change a setting.

        Raises:
            UsageProblem: no such setting or value, or not with this model.
        """
        if name == "candidates" and value != "auto":
            check_candidates(value, self.loaded.name, self.loaded.masks_per_group, hint="leave it at auto")
        self.settings.change(name, value)

    @property
    def tokens(self) -> int:
        """Tokens of the conversation so far."""
        return 0 if self.last is None else len(self.last[0].token_ids) + len(self.last[1].tokens)

    def request(self) -> Prefix:
        """Return the prompt of the next answer, cut to the context as the settings say.

        Raises:
            UsageProblem: it does not fit, or the chat template refuses the conversation.
        """
        asked = self.chat.request()
        while not self.model.fits(len(asked.token_ids), self.settings.max_new_tokens):
            if self.settings.context == "stop" or not self.chat.drop_oldest():
                raise ContextFull(
                    f"the conversation of {len(asked.token_ids)} tokens leaves no room in the context of"
                    f" {self.loaded.context_length}",
                    hint="/reset, /undo, or `/set context shift` to drop the oldest turns",
                )
            asked = self.chat.request()
        return asked

    def steps(self, asked: Prefix, *, mode: Mode | None = None, cache: KVCache | None = None) -> Iterator[Step]:
        """Answer a request, in the mode set unless another is given; what the cache holds is not computed again."""
        length = self.model.answer_length(len(asked.token_ids), self.settings.max_new_tokens)
        stop = StopRule(length, self.loaded.eos_token_ids)
        return self._decode(asked.token_ids, stop, mode or self.settings.mode, self.cache if cache is None else cache)

    def _decode(self, token_ids: list[int], stop: StopRule, mode: Mode, cache: KVCache) -> Iterator[Step]:
        grammar = None if self.schema is None else grammar_for(self.loaded, self.schema, len(token_ids))
        drafts = self.model.drafts(mode, self.settings.candidates, grammar=grammar)
        return self.model.steps(token_ids, stop, self.settings, cache=cache, drafts=drafts, grammar=grammar)

    def conclude(self, asked: Prefix, generation: Generation) -> None:
        """Add an answer to the conversation; an empty answer removes its request."""
        if not generation.tokens:
            self.chat.undo()
            return
        self.chat.answered(asked, generation.tokens)
        self.last = (asked, generation)
        self.done.append(generation)
        self.loaded.remember(generation.tokens)

    def speedup(self) -> float | None:
        """Return the speedup of the last answer over AR, from a few AR steps timed now.

        None where it was AR itself, where the context is full, where an answer was too short to tell, or where other
        work on the machine makes the two incomparable.
        """
        if self.last is None or self.settings.mode == "ar":
            return None
        asked, generation = self.last
        token_ids, limit = asked.token_ids + generation.tokens, self.loaded.context_length
        if len(generation.steps) < 2 or (limit is not None and len(token_ids) + _MAX_AR_STEPS > limit):
            return None
        timed, own = self._ar_seconds(token_ids), [step.seconds for step in generation.steps[1:]]
        if not _are_comparable(timed, own):
            return None
        beside = generation.seconds - statistics.median(own) * len(generation.steps)
        speedup = (beside + statistics.median(timed) * len(generation.tokens)) / generation.seconds
        # a step costs an AR step at least
        return speedup if speedup <= _LARGEST_GAIN * len(generation.tokens) / len(generation.steps) else None

    def _ar_seconds(self, token_ids: list[int]) -> list[float]:
        """Return the seconds of a few AR steps without the first, which includes the prefill."""
        timed: list[float] = []
        began = time.perf_counter()
        for step in self._decode(token_ids, StopRule(_MAX_AR_STEPS), "ar", self.cache):
            timed.append(step.seconds)
            if len(timed) >= _MIN_AR_STEPS and time.perf_counter() - began > _AR_SECONDS:
                break
        return timed[1:]


def _are_comparable(ar: list[float], own: list[float]) -> bool:
    """Return whether two series of steps were timed under the same load: neither scatters."""
    low, _, high = statistics.quantiles(ar, n=4, method="inclusive")
    own_low, _, own_high = statistics.quantiles(own, n=4, method="inclusive") if len(own) > 1 else own * 3
    return high <= 2 * low and own_high <= 4 * own_low and min(own) <= 8 * min(ar)


class AnswerRecord(JsonRecord):
    """One answer, for other programs.

    Attributes:
        accepted_per_step: tokens that came out of each model call.
        seconds: wall time, prefill included.
    """

    text: str
    token_ids: list[int]
    accepted_per_step: list[int]
    prompt_tokens: int
    tokens: int
    steps: int
    seconds: float
    tokens_per_second: float


def record_of(session: Session, asked: Prefix, generation: Generation) -> AnswerRecord:
    """Return the record of an answer, finished or not."""
    token_ids, seconds = generation.tokens, generation.seconds
    return AnswerRecord(
        complete=generation.finish_reason is not None,
        text=text_behind(partial(session.loaded.decode, skip_special_tokens=True), asked.token_ids, token_ids),
        token_ids=token_ids,
        accepted_per_step=[len(step.tokens) for step in generation.steps],
        prompt_tokens=len(asked.token_ids),
        tokens=len(token_ids),
        steps=len(generation.steps),
        seconds=seconds,
        tokens_per_second=len(token_ids) / seconds,
    )
