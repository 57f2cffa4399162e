"""One prompt to be answered, and the two ways to answer it: our decoder, and transformers' `generate`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from space_cli.core.decoder import decode
from space_cli.core.drafting import Drafter
from space_cli.core.engine import Numerics
from space_cli.core.sampling import Sampler, Sampling
from space_cli.core.stopping import StopRule
from space_cli.core.stream import Generation, Step
from space_cli.models.loading import LoadedModel
from space_cli.models.reference import reference_model
from space_cli.models.stops import no_defaults_of_its_own

OnStep = Callable[[Step], None]


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt for one method.

    Attributes:
        candidates: k of the paper's chain, None for blocks drawn anew each step.
        draft: a smaller model of the same vocabulary, for methods that draft with one.
    """

    loaded: LoadedModel
    prompt_ids: Sequence[int]
    stop: StopRule
    sampling: Sampling
    candidates: int | None
    numerics: Numerics | None = None
    draft: LoadedModel | None = None

    def sampler(self) -> Sampler:
        """Return what chooses the tokens of the answer."""
        return Sampler.from_sampling(self.sampling, prompt_length=len(self.prompt_ids))


def run_decode(task: Task, drafts: Drafter | None, on_step: OnStep) -> Generation:
    """Answer a task with our decoder; without drafts, one token at a time."""
    generation = Generation()
    for step in decode(
        task.loaded.model,
        task.prompt_ids,
        stop=task.stop,
        sampler=task.sampler(),
        drafts=drafts,
        mask_token_ids=task.loaded.mask_token_ids,
        compiled=task.loaded.compiled,
        numerics=task.numerics,
    ):
        generation.steps.append(step)
        on_step(step)
    return generation


def run_generate(task: Task, on_step: OnStep, **options: Any) -> Generation:
    """Run transformers' `generate` with its default cache and our stop rule."""
    if task.sampling.temperature:
        torch.manual_seed(task.sampling.seed)
    recorder = _Recorder(task, on_step)
    _call_generate(task, task.prompt_ids, stopping_criteria=StoppingCriteriaList([recorder]), **options)
    return recorder.generation


def next_token_probabilities(task: Task, prompt_ids: Sequence[int]) -> torch.Tensor:
    """Return the (V,) float64 probabilities from which transformers' `generate` would draw the next token."""
    few = replace(task, stop=replace(task.stop, max_new_tokens=1))
    output = _call_generate(few, prompt_ids, output_scores=True, return_dict_in_generate=True)
    scores: torch.Tensor = output.scores[0][0]
    return scores.double().softmax(dim=-1)


def _call_generate(
    task: Task,
    prompt_ids: Sequence[int],
    *,
    stopping_criteria: StoppingCriteriaList | None = None,
    assistant_model: PreTrainedModel | None = None,
    **options: Any,
) -> Any:
    sampling, loaded = task.sampling, task.loaded
    if sampling.temperature:
        options |= {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
        options |= {"top_p": sampling.top_p, "min_p": sampling.min_p or None}
    config = GenerationConfig(
        max_new_tokens=task.stop.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=sorted(loaded.eos_token_ids) or None,
        pad_token_id=min(loaded.eos_token_ids, default=0),
        **options,
    )
    model = reference_model(loaded.model)
    input_ids = torch.tensor([list(prompt_ids)], device=model.device)
    with no_defaults_of_its_own(model), no_defaults_of_its_own(assistant_model or model):
        return model.generate(  # type: ignore[operator]  # mixed in by transformers where mypy does not see it
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            # applied between its own repetition penalty and temperature, as our decoder does
            logits_processor=sampling.count_penalties(len(task.prompt_ids)),
            stopping_criteria=stopping_criteria,
            assistant_model=assistant_model,
        )


class _Recorder(StoppingCriteria):
    """Records what `generate` adds between two calls as a `Step`, and applies our stop rule."""

    def __init__(self, task: Task, on_step: OnStep) -> None:
        self.generation = Generation()
        self._state = task.stop.begin(task.prompt_ids)
        self._length = len(task.prompt_ids)
        self._on_step = on_step
        self._started = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tokens = input_ids[0, self._length :].tolist()
        count, reason = self._state.push_all(tokens)
        step = Step(
            tokens=tuple(tokens[:count]),
            accepted=max(0, count - 1),
            candidates=(),
            rejected=(),
            slots=0,
            seconds=time.perf_counter() - self._started,
            finish_reason=reason,
        )
        self._length += len(tokens)
        if self.generation.finish_reason is None:
            self.generation.steps.append(step)
            self._on_step(step)
        self._started = time.perf_counter()
        return torch.tensor([reason is not None], device=input_ids.device)
