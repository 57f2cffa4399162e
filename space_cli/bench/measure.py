"""A run: every method on every prompt, interleaved, warm-up apart."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Protocol

from space_cli.bench.energy import joules
from space_cli.bench.methods import Method, Task
from space_cli.bench.report import Sample
from space_cli.bench.suites import Prompt, Suite
from space_cli.core.choose import Sampling
from space_cli.core.engine import Numerics
from space_cli.core.stopping import StopRule, TextStream, cut_at_stop, text_behind
from space_cli.core.stream import Generation, Parts, Step, is_repetitive
from space_cli.errors import UsageProblem
from space_cli.models.chat import Chat
from space_cli.models.loading import LoadedModel
from space_cli.models.prompting import Turn

_WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are made.

    Attributes:
        candidates: k of method space, in the paper's chain; None draws each block by measured cost.
        numerics: how our calls are shaped; None is the model's default.
    """

    max_new_tokens: int
    sampling: Sampling
    candidates: int | None = None
    numerics: Numerics | None = None


class View(Protocol):
    """Sees a run as it happens; called between steps, outside what is timed."""

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
        """Return the same with another seed of sampling."""
        return replace(self, task=replace(self.task, sampling=replace(self.task.sampling, seed=seed)))

    def following(self, token_ids: Sequence[int]) -> Planned | None:
        """Return the next turn behind an answer to this one; None where it was the last."""
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
    """Return the suites in the form in which this model is to be asked."""
    return [suite.for_chat_model() if loaded.is_chat_model else suite for suite in suites]


def most_tokens(suites: Sequence[Suite], settings: Settings, *, limit: int | None) -> int:
    """Return how many tokens one method may have to generate, whatever fits the context."""
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
    """Return what is to be answered, before anything has run.

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
    """Return what the model is given for the turn behind those answered."""
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
    """Return the tokens of the whole conversation, were every answer as long as it may be."""
    last, most = planned, planned.task.stop.max_new_tokens
    while (following := last.following([last.task.prompt_ids[-1]] * most)) is not None:
        last = following
    return len(last.task.prompt_ids) + most


def prompts_digest(planned: Plan) -> str:
    """Return a hash of all prompts and of the rules that end an answer."""
    told = [
        (each.suite.name, each.suite.stop_strings, each.prompt.task_id, each.prompt.turns) for each in planned.prompts
    ]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]


def check_candidates(loaded: LoadedModel, candidates: int | None, methods: Sequence[Method]) -> None:
    """Refuse a k that the model was not trained for.

    Raises:
        UsageProblem: k is below 1 or above the masks of a group the model was trained with, or it has no masks.
    """
    if candidates is None or not any(method.takes_candidates for method in methods):
        return
    if not loaded.masks_per_group:
        raise UsageProblem(
            f"--candidates {candidates}: {loaded.name} has no masks, and copies as many tokens as pay",
            hint="leave it out",
        )
    if not 1 <= candidates <= loaded.masks_per_group:
        raise UsageProblem(
            f"--candidates {candidates}: {loaded.name} was trained for 1 to {loaded.masks_per_group}",
            hint=f"choose 1 to {loaded.masks_per_group}",
        )


def measure(
    planned: Sequence[Planned],
    methods: Sequence[Method],
    view: View,
    *,
    seeds: int = 1,
    done: Collection[tuple[str, str, int]] = (),
) -> Iterator[list[Sample]]:
    """Yield the samples of a prompt, of all its turns and all methods, before the next prompt: drift hits all alike.

    Later turns follow AR's answers (those of the first method where AR is not among them), so that all methods get
    the same prompts.

    Args:
        planned: what to answer.
        methods: as `choose_methods` gave them.
        view: sees the run.
        seeds: how many answers to each prompt, under consecutive seeds.
        done: suite, task id and seed of what is answered already.
    """
    task = planned[0].task
    few = replace(task, stop=replace(task.stop, max_new_tokens=min(_WARM_UP_TOKENS, task.stop.max_new_tokens)))
    for method in methods:
        method.run(few, lambda _: None)
    seeded = [(each, seed) for each in planned for seed in range(task.sampling.seed, task.sampling.seed + seeds)]
    for turn, (each, seed) in enumerate(seeded):
        if (each.suite.name, each.prompt.task_id, seed) not in done:
            # each method takes its turn at being first after the one before it
            place = turn % len(methods)
            yield _conversation(each.under_seed(seed), methods, [*methods[place:], *methods[:place]], view)


def _conversation(first: Planned, methods: Sequence[Method], order: Sequence[Method], view: View) -> list[Sample]:
    leading = next((method.name for method in methods if method.name == "ar"), methods[0].name)
    samples: list[Sample] = []
    planned: Planned | None = first
    while planned is not None:
        answers = [_answer(method, planned, view) for method in order]
        samples += _compared(answers, methods, planned.task.sampling)
        for method in methods:
            view.finished(method.name)
        planned = planned.following(next(each.token_ids for each in answers if each.method == leading))
    return samples


def _answer(method: Method, planned: Planned, view: View) -> Sample:
    view.started(planned.suite.name, planned.name, method.name)
    before = joules()
    generation = method.run(planned.task, lambda step: view.stepped(method.name, step))
    after = joules()
    sample = _sample(method, planned, generation)
    sample.joules = after - before if before is not None and after is not None and after >= before else None
    return sample


def _sample(method: Method, planned: Planned, generation: Generation) -> Sample:
    task, tokens = planned.task, generation.tokens
    text = text_behind(partial(task.loaded.decode, skip_special_tokens=True), task.prompt_ids, tokens)
    stream = TextStream(task.loaded.decode, task.prompt_ids)
    return Sample(
        suite=planned.suite.name,
        task_id=planned.prompt.task_id,
        turn=planned.turn,
        category=planned.prompt.category,
        method=method.name,
        seed=task.sampling.seed,
        prompt_tokens=len(task.prompt_ids),
        tokens=len(tokens),
        steps=len(generation.steps),
        seconds=generation.seconds,
        first_step_seconds=generation.steps[0].seconds,
        parts=_summed([step.parts for step in generation.steps if step.parts is not None]),
        token_ids=tokens,
        text=cut_at_stop(text, task.stop.stop_strings),
        tokens_by_step=[len(step.tokens) for step in generation.steps],
        depth_by_step=[step.depth for step in generation.steps if step.parts is not None],
        text_by_step=["".join(map(stream.push, step.tokens)) for step in generation.steps],
        rejected_by_step=[[task.loaded.decode([token]) for token in step.rejected] for step in generation.steps],
        finish_reason=generation.finish_reason,
        repetitive=is_repetitive(tokens),
    )


def _summed(parts: Sequence[Parts]) -> dict[str, float] | None:
    return {name: sum(getattr(part, name) for part in parts) for name in Parts._fields} if parts else None


def _compared(samples: list[Sample], methods: Sequence[Method], sampling: Sampling) -> list[Sample]:
    """Say of each sample whether it equals AR's; a method with a random stream of its own is not compared."""
    expected = next((sample.token_ids for sample in samples if sample.method == "ar"), None)
    exact = {method.name for method in methods if method.exact_under_seed or not sampling.temperature}
    for sample in samples:
        if expected is not None and sample.method in exact:
            sample.identical = sample.token_ids == expected
    return samples
