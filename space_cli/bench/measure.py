"""A run: every method on every prompt, interleaved, warm-up apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from space_cli.bench.methods import Method, Task
from space_cli.bench.report import Sample
from space_cli.bench.suites import Suite
from space_cli.core.choose import Sampling
from space_cli.core.engine import Numerics
from space_cli.core.stopping import StopRule, TextStream, cut_at_stop
from space_cli.core.stream import Generation, Parts, Step, is_repetitive
from space_cli.errors import UsageProblem
from space_cli.models.loading import LoadedModel

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


def measure(
    loaded: LoadedModel,
    suites: Sequence[Suite],
    methods: Sequence[Method],
    settings: Settings,
    view: View,
    *,
    draft: LoadedModel | None = None,
) -> Iterator[Sample]:
    """Yield one sample per prompt and method; all of a prompt before the next prompt, so that drift hits all alike.

    Args:
        loaded: the model.
        suites: with the prompts.
        methods: as `choose_methods` gave them.
        settings: of all answers.
        view: sees the run.
        draft: the smaller model of methods that draft with one.

    Raises:
        UsageProblem: candidates out of range, or a prompt that does not fit the context; before anything has run.
    """
    check_candidates(loaded, settings.candidates, methods)
    planned = plan(loaded, suites, settings, draft=draft)
    for method in methods:
        task = planned[0].task
        few = min(_WARM_UP_TOKENS, settings.max_new_tokens)
        method.run(replace(task, stop=replace(task.stop, max_new_tokens=few)), lambda _: None)
    for turn, each in enumerate(planned):
        # each method takes its turn at being first after the one before it
        order = [*methods[turn % len(methods) :], *methods[: turn % len(methods)]]
        samples = [_answer(method, each, view) for method in order]
        yield from _compared(samples, methods, settings.sampling, view)


@dataclass(frozen=True, slots=True)
class Planned:
    """A prompt of a suite, ready to be answered."""

    suite: str
    task_id: str
    category: str | None
    task: Task


def plan(
    loaded: LoadedModel, suites: Sequence[Suite], settings: Settings, *, draft: LoadedModel | None = None
) -> list[Planned]:
    """Return the tasks of all prompts, in order.

    Raises:
        UsageProblem: a prompt that is empty or does not fit the context; before anything has run.
    """
    planned = [
        Planned(suite.name, prompt.task_id, prompt.category, _task(loaded, suite, prompt.turns[0], settings, draft))
        for suite in suites
        for prompt in suite.prompts
    ]
    for each in planned:
        _check_fits(loaded, f"{each.suite} {each.task_id}", each.task)
    return planned


def check_candidates(loaded: LoadedModel, candidates: int | None, methods: Sequence[Method]) -> None:
    """Refuse a k that the model was not trained for.

    Raises:
        UsageProblem: k is below 1 or above the masks of a group the model was trained with.
    """
    if candidates is None or not any(method.needs_training for method in methods):
        return
    if not 1 <= candidates <= loaded.masks_per_group:
        raise UsageProblem(
            f"--candidates {candidates}: {loaded.name} was trained for 1 to {loaded.masks_per_group}",
            hint=f"choose 1 to {loaded.masks_per_group}",
        )


def _task(loaded: LoadedModel, suite: Suite, text: str, settings: Settings, draft: LoadedModel | None) -> Task:
    stop = StopRule(settings.max_new_tokens, loaded.eos_token_ids, suite.stop_strings, loaded.decode)
    prompt = loaded.prompt_template.replace("{}", text) if loaded.prompt_template else text
    return Task(loaded, loaded.encode(prompt), stop, settings.sampling, settings.candidates, settings.numerics, draft)


def _check_fits(loaded: LoadedModel, name: str, task: Task) -> None:
    length = len(task.prompt_ids)
    if not length:
        raise UsageProblem(f"{name}: the prompt has no tokens")
    if loaded.context_length is not None and length + task.stop.max_new_tokens > loaded.context_length:
        raise UsageProblem(
            f"{name}: {length} prompt tokens and {task.stop.max_new_tokens} new ones exceed the context of"
            f" {loaded.name}, {loaded.context_length} tokens",
            hint="shorten the prompt or lower --max-new-tokens",
        )


def _answer(method: Method, planned: Planned, view: View) -> Sample:
    view.started(planned.suite, planned.task_id, method.name)
    generation = method.run(planned.task, lambda step: view.stepped(method.name, step))
    return _sample(method, planned, generation)


def _sample(method: Method, planned: Planned, generation: Generation) -> Sample:
    task, tokens = planned.task, generation.tokens
    text = task.loaded.decode(tokens, skip_special_tokens=True)
    stream = TextStream(task.loaded.decode)
    return Sample(
        suite=planned.suite,
        task_id=planned.task_id,
        category=planned.category,
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


def _compared(samples: list[Sample], methods: Sequence[Method], sampling: Sampling, view: View) -> Iterator[Sample]:
    """Say of each sample whether it equals AR's; a method with a random stream of its own is not compared."""
    expected = next((sample.token_ids for sample in samples if sample.method == "ar"), None)
    exact = {method.name for method in methods if method.exact_under_seed or not sampling.temperature}
    for sample in samples:
        if expected is not None and sample.method in exact:
            sample.identical = sample.token_ids == expected
        view.finished(sample.method)
        yield sample
