"""Auto-correct decoding: every model call verifies the last candidates and drafts the next ones.

The autoregressive (AR) baseline is the same loop with the block of one slot, `AR_BLOCK`: it shares the model object,
the cache, the sampler and the stop rules with SPACE, and differs in the block alone.

Source: SPACE paper (arXiv 2402.11809), section 3.3 and algorithm 1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.cache import KVCache
from space_cli.core.drafting import ChainDrafter, Drafter, Verified
from space_cli.core.engine import Compiled, EagerEngine, Numerics, context_length, engine_for
from space_cli.core.sampling import Sampler, StepLogits
from space_cli.core.stopping import StopRule, StopState
from space_cli.core.stream import Parts, Step
from space_cli.errors import ContextFull


def check_context(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise `UsageProblem` unless prompt and new tokens fit into the model's context."""
    limit = context_length(model.config)
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise ContextFull(
            f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones exceed the model's context of {limit} tokens",
            hint="shorten the prompt or lower --max-new-tokens",
        )


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    *,
    stop: StopRule,
    sampler: Sampler,
    mask_token_ids: Sequence[int] = (),
    drafts: Drafter | None = None,
    compiled: Compiled | None = None,
    numerics: Numerics | None = None,
    cache: KVCache | None = None,
    logprobs: int | None = None,
) -> Iterator[Step]:
    """Generate after `prompt_ids` and yield one `Step` per model call; the caller stops by not asking for more.

    Args:
        model: a causal LM that takes a 4-D attention mask and position ids.
        prompt_ids: at least one token id.
        stop: when it ends.
        sampler: how tokens are chosen, drafts included.
        mask_token_ids: one shared id, or one per mask of a group.
        drafts: proposes a block and candidates for each step; None is plain AR decoding. Whatever it proposes, the
            output stays the same.
        compiled: the model, compiled; None runs it as it is.
        numerics: how calls are shaped; None is the model's default.
        cache: of earlier generations with this model; only what is new of the prompt is computed, and what is committed
            when the generation ends, or is left, stays in it.
        logprobs: so many likeliest tokens are told of each place; None tells no log-probabilities.

    Raises:
        UsageProblem: prompt and new tokens do not fit the model's context.
        ValueError: the prompt is empty.
    """
    started = time.perf_counter()
    if not prompt_ids:
        raise ValueError("the prompt is empty: there is no head to start from")
    check_context(model, len(prompt_ids), stop.max_new_tokens)
    tokens = list(prompt_ids)
    drafts = ChainDrafter(AR_BLOCK) if drafts is None else drafts
    max_length = len(prompt_ids) + stop.max_new_tokens
    engine = engine_for(
        model, compiled, max_length=max_length, max_slots=drafts.max_slots, numerics=numerics, cache=cache
    )
    # AR and SPACE prefill the same rows, so that their caches agree bit for bit; the head comes with the first step
    computed = engine.prefill(tokens[:-1])
    decoding = _Decoding(engine, sampler, drafts, mask_token_ids, stop.begin(prompt_ids), tokens, logprobs)
    try:
        while True:
            step = decoding.step(started, computed)
            yield step
            if step.finish_reason is not None:
                return
            started, computed = time.perf_counter(), 0
    finally:
        engine.rollback()


@dataclass(slots=True)
class _Decoding:
    """What goes on from step to step; `tokens` are all so far, the last of which is the head."""

    engine: EagerEngine
    sampler: Sampler
    drafts: Drafter
    mask_token_ids: Sequence[int]
    state: StopState
    tokens: list[int]
    logprobs: int | None
    step_logits: StepLogits | None = None
    group: range = range(0)

    def step(self, started: float, prefilled: int) -> Step:
        """Draft, run the block and commit what is accepted; the step's time counts from `started`."""
        began = time.perf_counter()
        proposal = self.drafts.draft(self.tokens, self.step_logits, self.group)
        block, candidates = proposal.block, proposal.candidates
        mask_ids = block.mask_token_ids(self.mask_token_ids) if block.anchors else []
        drafted = time.perf_counter()
        logits = self.engine.run(block, [self.tokens[-1], *candidates, *mask_ids])
        ran = time.perf_counter()
        self.step_logits = self.sampler.step_logits(logits, self.engine.top_k)
        path, emitted = _verify(self.step_logits, block, candidates, self.tokens)
        chose = time.perf_counter()
        self.engine.commit(path)
        committed = time.perf_counter()
        count, reason = self.state.push_all(emitted)
        self.tokens += emitted[:count]
        self.group = block.group(path[-1])
        if reason is None:
            self.drafts.observe(Verified(proposal, path, emitted, committed - began))
        logprobs = (
            () if self.logprobs is None else self.step_logits.logprobs(path[:count], emitted[:count], self.logprobs)
        )
        return Step(
            tokens=tuple(emitted[:count]),
            accepted=min(len(path) - 1, count),
            candidates=tuple(candidates),
            rejected=tuple(candidates[child - 1] for child in block.children[path[-1]]),
            slots=block.num_slots,
            seconds=time.perf_counter() - started,
            finish_reason=reason,
            prefilled=prefilled,
            parts=Parts(ran - drafted, chose - ran, committed - chose, drafted - began),
            depth=max(block.offsets[: block.num_tokens]),
            logprobs=tuple(logprobs),
        )


def _verify(
    step_logits: StepLogits, block: Block, candidates: Sequence[int], tokens: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Follow the path of candidates that equal the sampled tokens, from the head on.

    Returns:
        The slots passed (head first) and the tokens chosen at them, the last of which is the correction.
    """
    path, emitted, history = [0], [], list(tokens)
    while True:
        token = step_logits.token(path[-1], history)
        emitted.append(token)
        history.append(token)
        following = next((slot for slot in block.children[path[-1]] if candidates[slot - 1] == token), None)
        if following is None:
            return path, emitted
        path.append(following)
