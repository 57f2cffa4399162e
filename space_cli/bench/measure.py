"""A run: every method answers every prompt, interleaved, after a warm-up."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial

from space_cli.bench.energy import joules
from space_cli.bench.methods import Method
from space_cli.bench.record import Sample
from space_cli.core.sampling import Sampling
from space_cli.core.stopping import TextStream, cut_at_stop, text_behind
from space_cli.core.stream import Generation, Parts, is_repetitive
from space_cli.tasks.plan import Planned, View

_WARM_UP_TOKENS = 16


def measure(
    planned: Sequence[Planned],
    methods: Sequence[Method],
    view: View,
    *,
    seeds: int = 1,
    done: Collection[tuple[str, str, int]] = (),
) -> Iterator[list[Sample]]:
    """Yield the samples prompt by prompt: all turns by all methods, so that a drift of the machine affects all alike.

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
            # methods rotate: each prompt starts with the next one
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
