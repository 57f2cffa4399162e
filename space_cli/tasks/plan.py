"""The plan of a run: the prompts to answer, and the token ids of each turn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any, Protocol

from space_cli.chat.conversation import Chat
from space_cli.chat.templates import Turn
from space_cli.core.engine import Numerics
from space_cli.core.sampling import Sampling
from space_cli.core.stopping import StopRule
from space_cli.core.stream import Step
from space_cli.errors import UsageProblem
from space_cli.models import support
from space_cli.models.loading import LoadedModel
from space_cli.tasks.prompts import Prompt, Suite
from space_cli.tasks.task import Task


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of all answers.

    Attributes:
        candidates: k of method space, in the paper's chain; None draws each block by measured cost.
        numerics: how our calls are shaped; None is the model's default.
    """

    max_new_tokens: int
    sampling: Sampling
    candidates: int | None = None
    numerics: Numerics | None = None

    def recorded(self, loaded: LoadedModel) -> dict[str, Any]:
        """Return model and settings, as the records of bench and verify begin."""
        model = {"model": loaded.name, "source": loaded.source, "masks_per_group": loaded.masks_per_group}
        return model | asdict(self)


class View(Protocol):
    """Observes a run; called between steps, outside the timed parts."""

    def started(self, suite: str, task_id: str, method: str) -> None:
        """An answer begins."""

    def stepped(self, method: str, step: Step) -> None:
        """A model call has ended."""

    def finished(self, method: str) -> None:
        """An answer is complete."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One turn of a prompt, ready to be answered.

    Attributes:
        said: the answers to the turns before, as token ids.
    """

    suite: Suite
    prompt: Prompt
    task: Task
    said: tuple[Sequence[int], ...] = ()

    @property
    def turn(self) -> int:
        """Which of the prompt's turns, from 0."""
        return len(self.said)

    @property
    def name(self) -> str:
        """Task id, and the turn of a conversation."""
        return f"{self.prompt.task_id}, turn {self.turn + 1}" if len(self.prompt.turns) > 1 else self.prompt.task_id

    def under_seed(self, seed: int) -> Planned:
        """Return a copy with another sampling seed."""
        return replace(self, task=replace(self.task, sampling=replace(self.task.sampling, seed=seed)))

    def following(self, token_ids: Sequence[int]) -> Planned | None:
        """Return the next turn after an answer to this one, or None."""
        said = (*self.said, token_ids)
        if len(said) == len(self.prompt.turns):
            return None
        prompt_ids = _prompt_ids(self.task.loaded, self.suite, self.prompt, said)
        return replace(self, said=said, task=replace(self.task, prompt_ids=prompt_ids))


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be answered.

    Attributes:
        prompts: the first turn of each, in order.
        left_out: by suite, in words, how many prompts do not fit the model's context.
    """

    prompts: list[Planned]
    left_out: dict[str, str]

    @property
    def turns(self) -> int:
        """Turns of all prompts."""
        return sum(len(each.prompt.turns) for each in self.prompts)


def suites_for(loaded: LoadedModel, suites: Sequence[Suite]) -> list[Suite]:
    """Return the suites as this model is asked: chat models get chat prompts."""
    return [suite.for_chat_model() if loaded.is_chat_model else suite for suite in suites]


def most_tokens(suites: Sequence[Suite], settings: Settings, *, limit: int | None) -> int:
    """Return an upper bound of the tokens that one method generates."""
    turns = sum(len(prompt.turns) for suite in suites for prompt in suite.prompts[:limit])
    return turns * settings.max_new_tokens


def plan(
    loaded: LoadedModel,
    suites: Sequence[Suite],
    settings: Settings,
    *,
    limit: int | None = None,
    draft: LoadedModel | None = None,
) -> Plan:
    """Return the plan of a run.

    Args:
        loaded: the model.
        suites: with the prompts.
        settings: of all answers.
        limit: so many prompts of each suite, the first that fit; of one with categories, the first of each in turn.
        draft: the smaller model of methods that draft with one.

    Raises:
        UsageProblem: a prompt that is empty, or a suite of which no prompt fits the context.
    """
    planned: list[Planned] = []
    left_out = {}
    for suite in suites:
        before, too_long = len(planned), 0
        for prompt in suite.prompts if limit is None else _in_turn(suite.prompts):
            if len(planned) - before == limit:
                break
            each = _planned(loaded, suite, prompt, settings, draft)
            if loaded.context_length is None or _context_needed(each) <= loaded.context_length:
                planned.append(each)
            else:
                too_long += 1
        if too_long:
            room = f"{settings.max_new_tokens} new tokens, into the context of {loaded.name}, {loaded.context_length}"
            left_out[suite.name] = f"{too_long} of {len(planned) - before + too_long} prompts do not fit, with {room}"
            if len(planned) == before:
                hint = "shorten the prompts or lower --max-new-tokens"
                raise UsageProblem(f"{suite.name}: {left_out[suite.name]}", hint=hint)
    return Plan(planned, left_out)


def _in_turn(prompts: Sequence[Prompt]) -> Iterator[Prompt]:
    """Yield the first prompt of each category, then the second, and so on."""
    by_category: dict[str | None, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    return (prompt for row in zip_longest(*by_category.values()) for prompt in row if prompt is not None)


def _planned(
    loaded: LoadedModel, suite: Suite, prompt: Prompt, settings: Settings, draft: LoadedModel | None
) -> Planned:
    prompt_ids = _prompt_ids(loaded, suite, prompt, ())
    if not prompt_ids:
        raise UsageProblem(f"{suite.name} {prompt.task_id}: the prompt has no tokens")
    stop = StopRule(settings.max_new_tokens, loaded.eos_token_ids, suite.stop_strings, loaded.decode)
    task = Task(loaded, prompt_ids, stop, settings.sampling, settings.candidates, settings.numerics, draft)
    return Planned(suite, prompt, task)


def _prompt_ids(loaded: LoadedModel, suite: Suite, prompt: Prompt, said: Sequence[Sequence[int]]) -> list[int]:
    """Return the token ids of the prompt for the turn after those answered."""
    if not suite.chat:
        text, template = prompt.turns[0], loaded.prompt_template
        return loaded.encode(template.replace("{}", text) if template else text)
    chat = Chat(loaded, template=loaded.prompt_template)
    for text, answer in zip(prompt.turns, said, strict=False):
        chat.turns.append(Turn("user", text))
        chat.answered(chat.request(), answer)
    chat.turns.append(Turn("user", prompt.turns[len(said)]))
    return chat.request().token_ids


def _context_needed(planned: Planned) -> int:
    """Return the length of the whole conversation with answers of maximal length."""
    last, most = planned, planned.task.stop.max_new_tokens
    while (following := last.following([last.task.prompt_ids[-1]] * most)) is not None:
        last = following
    return len(last.task.prompt_ids) + most


def prompts_digest(planned: Plan) -> str:
    """Return a hash of all prompts and of the rules that end an answer."""
    inputs = [
        (each.suite.name, each.suite.stop_strings, each.prompt.task_id, each.prompt.turns) for each in planned.prompts
    ]
    return hashlib.sha256(repr(inputs).encode()).hexdigest()[:32]


def check_candidates(loaded: LoadedModel, candidates: int | None) -> None:
    """Refuse a k that the model was not trained for.

    Raises:
        UsageProblem: k is below 1 or above the masks of a group the model was trained with, or it has no masks.
    """
    if candidates is None:
        return
    support.check_candidates(
        candidates, loaded.name, loaded.masks_per_group, option="--candidates", hint="leave it out"
    )
    if not 1 <= candidates <= loaded.masks_per_group:
        raise UsageProblem(
            f"--candidates {candidates}: {loaded.name} was trained for 1 to {loaded.masks_per_group}",
            hint=f"choose 1 to {loaded.masks_per_group}",
        )
