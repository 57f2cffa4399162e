"""Acceptance after training: tokens per step on held-out prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from pydantic import BaseModel
from transformers import PreTrainedModel

from space_cli.core.block import Block
from space_cli.core.decoder import decode
from space_cli.core.drafting import ChainDrafter
from space_cli.core.sampling import Sampler
from space_cli.core.stopping import StopRule
from space_cli.core.stream import Generation, is_repetitive
from space_cli.models.adapter import bigram_of


class Acceptance(BaseModel):
    """Greedy answers to held-out prompts.

    Attributes:
        candidates: k of the block; 0 for a base without masks.
        answer_loss: mean AR loss of the data's own answers to these prompts; None where it was not measured.
        tokens_per_step: of all answers, tokens over steps.
        tokens_per_step_plain: of those that do not repeat themselves; None where all do.
        repetitive: answers that repeat themselves.
        accepted_by_depth: of the steps of the other answers, the share that accepted so many candidates: 1, 2, ... k.
    """

    candidates: int
    prompts: int
    tokens: int
    steps: int
    tokens_per_step: float
    tokens_per_step_plain: float | None
    repetitive: int
    accepted_by_depth: list[float] = []
    answer_loss: float | None = None


def measure_acceptance(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    mask_token_ids: Sequence[int],
    candidates: int,
    stop: StopRule,
    seconds: float | None = None,
    on_progress: Callable[[int, int], None],
) -> Acceptance | None:
    """Answer prompts greedily with SPACE and measure acceptance; None without prompts.

    Args:
        model: in evaluation mode.
        prompts: token ids.
        mask_token_ids: one shared id, or one per mask.
        candidates: k, and masks of a group; 0 is plain AR.
        stop: when an answer ends.
        seconds: after which no further prompt is begun; None is without end.
        on_progress: gets prompts answered and prompts in all.
    """
    generations: list[Generation] = []
    began = time.monotonic()
    for number, prompt_ids in enumerate(prompts, start=1):
        if generations and seconds is not None and time.monotonic() - began >= seconds:
            break
        drafts = ChainDrafter(Block.chain(candidates, candidates), bigram=bigram_of(model))
        steps = decode(model, prompt_ids, stop=stop, sampler=Sampler(), drafts=drafts, mask_token_ids=mask_token_ids)
        generations.append(Generation(list(steps)))
        on_progress(number, len(prompts))
    if not generations:
        return None
    on_progress(len(prompts), len(prompts))
    plain = [generation for generation in generations if not is_repetitive(generation.tokens)]
    return Acceptance(
        candidates=candidates,
        prompts=len(generations),
        tokens=sum(len(generation.tokens) for generation in generations),
        steps=sum(len(generation.steps) for generation in generations),
        tokens_per_step=_tokens_per_step(generations),
        tokens_per_step_plain=_tokens_per_step(plain) if plain else None,
        repetitive=len(generations) - len(plain),
        accepted_by_depth=_accepted_by_depth(plain, candidates),
    )


def _tokens_per_step(generations: Sequence[Generation]) -> float:
    return sum(len(generation.tokens) for generation in generations) / sum(len(each.steps) for each in generations)


def _accepted_by_depth(generations: Sequence[Generation], candidates: int) -> list[float]:
    # the first step had no guesses to accept
    accepted = [step.accepted for generation in generations for step in generation.steps[1:]]
    depths = range(1, candidates + 1) if accepted else ()
    return [sum(count >= depth for count in accepted) / len(accepted) for depth in depths]
