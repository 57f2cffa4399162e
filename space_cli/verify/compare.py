"""Compares SPACE's answers with those of AR and of transformers' `generate`, token for token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Literal

import torch

from space_cli.core.attention import invariant_attention_of
from space_cli.core.block import Block
from space_cli.core.costs import ASSUMED_COSTS
from space_cli.core.drafting import AcceptanceStats, AdaptiveDrafter, ChainDrafter, Proposal, Verified
from space_cli.core.drafting.chain import Substitute
from space_cli.core.engine import embedding_rows
from space_cli.core.sampling import Sampling, StepLogits
from space_cli.core.stream import Generation, Step, common_prefix_length
from space_cli.models.loading import LoadedModel
from space_cli.tasks.plan import Planned, View
from space_cli.tasks.task import Task, run_decode, run_generate
from space_cli.verify.divergence import DivergenceAnalyzer
from space_cli.verify.record import Answer, Divergence

DraftsName = Literal["adaptive", "model", "mixed"]
_CONTEXT_TOKENS = 24
_DRAFTS_PER_ANSWER = 4


@dataclass(frozen=True, slots=True)
class Comparison:
    """Settings of a comparison.

    Attributes:
        block: of SPACE, but for adaptive drafts, which draw their own.
        drafts: those of everyday use; the model's own in the paper's chain; or a blend of right and wrong tokens that
            gives every acceptance length.
        against: of `record.AGAINST`; sampled, hf is left to `distribution`.
        base: an adapter's base model, loaded without the adapter; given where `against` has it.
        same_shape: AR runs blocks of the same shape too, all of its drafts wrong.
        seeds: how many, from that of the tasks on.
        turns: counts the steps of mixed drafts through the whole run, so that short answers too give every length.
    """

    block: Block
    drafts: DraftsName
    against: tuple[str, ...]
    base: LoadedModel | None = None
    same_shape: bool = False
    seeds: int = 1
    turns: Iterator[int] = field(default_factory=count)

    def methods(self, sampling: Sampling) -> list[str]:
        """Return the methods that answer, in order; when sampling, `distribution` tests hf."""
        hf = ["hf"] if "hf" in self.against and not sampling.temperature else []
        return ["ar", "space", *hf, *(["base"] if self.base is not None else [])]

    @property
    def candidates(self) -> int | None:
        """Candidates of every block; None where blocks differ from step to step."""
        return None if self.drafts == "adaptive" else self.block.num_candidates


def compare(planned: Sequence[Planned], comparison: Comparison, view: View) -> Iterator[Answer]:
    """Yield the findings for each prompt, seed and turn, in order; later turns follow SPACE's answers."""
    analyzer = DivergenceAnalyzer(planned[0].task.loaded.model)
    for first in planned:
        begin = first.task.sampling.seed
        for seed in range(begin, begin + comparison.seeds):
            each: Planned | None = first.under_seed(seed)
            while each is not None:
                answer = _Case(each, comparison, analyzer, view).answer()
                each.task.loaded.remember(answer.token_ids)
                yield answer
                each = each.following(answer.token_ids)


class _Case:
    """One prompt under one seed."""

    def __init__(self, planned: Planned, comparison: Comparison, analyzer: DivergenceAnalyzer, view: View) -> None:
        self._planned, self._task = planned, planned.task
        self._comparison, self._analyzer, self._view = comparison, analyzer, view
        self._sampler = self._task.sampler()
        self._seed = self._task.sampling.seed if self._task.sampling.temperature else None

    def answer(self) -> Answer:
        """Answer by all methods and examine what differs."""
        ar = self._watched("ar", lambda on_step: run_ar(self._task, self._comparison, on_step)).tokens
        predictions: list[Sequence[int]] = []
        space = self._watched(
            "space", lambda on_step: run_space(self._task, self._comparison, ar, on_step, predictions)
        )
        answers = {"ar": ar} if "ar" in self._comparison.against else {}
        if "hf" in self._comparison.against and self._seed is None:
            answers["hf"] = self._watched("hf", self._run_hf).tokens
        if self._comparison.base is not None:
            untouched = replace(self._task, loaded=self._comparison.base)
            answers["base"] = self._watched("base", lambda on_step: run_decode(untouched, None, on_step)).tokens
        divergences = [
            self._parting(name, tokens, space.tokens) for name, tokens in answers.items() if tokens != space.tokens
        ]
        checked, wrong = self._check_drafts(space, predictions)
        return Answer(
            suite=self._planned.suite.name,
            prompt=self._planned.name,
            seed=self._seed,
            tokens=len(space.tokens),
            token_ids=space.tokens,
            identical={name: tokens == space.tokens for name, tokens in answers.items()},
            accepted_by_step=[step.accepted for step in space.steps],
            drafts_checked=checked,
            divergences=divergences + wrong,
        )

    def _watched(self, name: str, run: Callable[[Callable[[Step], None]], Generation]) -> Generation:
        self._view.started(self._planned.suite.name, self._planned.name, name)
        generation = run(lambda step: self._view.stepped(name, step))
        self._view.finished(name)
        return generation

    def _run_hf(self, on_step: Callable[[Step], None]) -> Generation:
        # bit for bit the same only where generate's calls have our inner shapes too
        invariant = self._task.numerics == "invariant"
        with invariant_attention_of(self._task.loaded.model) if invariant else nullcontext():
            return run_generate(self._task, on_step)

    def _parting(self, against: str, expected: list[int], got: list[int]) -> Divergence:
        """Examine the first place where two answers differ."""
        position = common_prefix_length(expected, got)
        history = [*self._task.prompt_ids, *got[:position]]
        one, other = (answer[position] if position < len(answer) else None for answer in (expected, got))
        return self._examined(against, position, history, history, one, other)

    @torch.inference_mode()
    def _check_drafts(self, space: Generation, predictions: Sequence[Sequence[int]]) -> tuple[int, list[Divergence]]:
        """Recompute some mask groups' predictions by a plain causal call without cache or block.

        Wrong drafts change no output, only speed; they are found here or nowhere.
        """
        loaded = self._task.loaded
        checked, wrong = 0, []
        ids = loaded.mask_token_ids
        # with a penalty, adaptive drafts leave the predictions before one out of its history
        skipped = self._comparison.drafts == "adaptive" and self._task.sampling.reads_history
        last = len(space.steps) - 1 if ids and not skipped else 0
        for index in sorted({last * part // _DRAFTS_PER_ANSWER for part in range(_DRAFTS_PER_ANSWER)} if last else ()):
            count = len(predictions[index + 1])
            if not count:
                continue
            masks = [ids[0]] * count if len(ids) == 1 else list(ids[:count])
            # the masks stood behind the last accepted slot and did not see the correction, which is the new head
            done = [token for step in space.steps[: index + 1] for token in step.tokens]
            input_ids = [*self._task.prompt_ids, *done[:-1], *masks]
            call = torch.tensor([input_ids], device=loaded.model.device)
            step_logits = self._sampler.step_logits(
                loaded.model(input_ids=call, use_cache=False).logits[0, -len(masks) :]
            )
            history = [*self._task.prompt_ids, *done]
            checked += 1
            for mask, got in enumerate(predictions[index + 1]):
                expected = step_logits.token(mask, history)
                if expected != got:
                    seen = input_ids[: len(input_ids) - len(masks) + mask + 1]
                    wrong.append(self._examined("drafts", len(done) + mask, seen, history, expected, got))
                    break
                history.append(got)
        return checked, wrong

    def _examined(
        self,
        against: str,
        position: int,
        input_ids: Sequence[int],
        history: Sequence[int],
        expected: int | None,
        got: int | None,
    ) -> Divergence:
        decode = self._task.loaded.decode
        divergence = Divergence(
            suite=self._planned.suite.name,
            prompt=self._planned.name,
            seed=self._seed,
            against=against,
            position=position,
            expected=expected,
            got=got,
            expected_text="" if expected is None else decode([expected]),
            got_text="" if got is None else decode([got]),
            context=decode(list(history[-_CONTEXT_TOKENS:])),
            gap=None,
            noise=None,
            exact_dtype=None,
            verdict="violation",
            reason="one answer ended where the other went on",
        )
        if expected is None or got is None:
            return divergence
        finding = self._analyzer.examine(input_ids, history, self._sampler, expected=expected, got=got)
        divergence.gap, divergence.noise = finding.gap, finding.noise
        divergence.exact_dtype, divergence.verdict = finding.exact_dtype, finding.verdict
        divergence.reason = _reason(divergence, self._task.loaded.dtype)
        return divergence


def run_ar(task: Task, comparison: Comparison, on_step: Callable[[Step], None]) -> Generation:
    """Answer by AR: one row per call, or blocks of SPACE's shape whose drafts are all wrong."""
    if not comparison.same_shape:
        return run_decode(task, None, on_step)
    # no answer holds a mask token, so none of these is accepted; were one right, the output would be the same
    wrong = [next(iter(task.loaded.mask_token_ids), 0)] * comparison.block.num_candidates
    return run_decode(task, ChainDrafter(comparison.block, lambda *_: wrong), on_step)


def run_space(
    task: Task,
    comparison: Comparison,
    expected: Sequence[int],
    on_step: Callable[[Step], None],
    predictions: list[Sequence[int]] | None = None,
) -> Generation:
    """Answer by SPACE.

    Args:
        task: what to answer.
        comparison: gives block and drafts.
        expected: AR's answer, from which mixed drafts are made.
        on_step: sees each step.
        predictions: gets the candidates that the model itself drafted for each step.
    """
    if comparison.drafts == "adaptive":
        return run_decode(task, _Watched(task.loaded, [] if predictions is None else predictions), on_step)
    mixed = mixed_drafter([*task.prompt_ids, *expected], embedding_rows(task.loaded.model), comparison.turns)

    def drafter(tokens: Sequence[int], candidates: Sequence[int]) -> Sequence[int]:
        if predictions is not None:
            predictions.append(candidates[: comparison.block.masks])
        return mixed(tokens, candidates) if comparison.drafts == "mixed" else candidates

    return run_decode(task, ChainDrafter(comparison.block, drafter), on_step)


class _Watched(AdaptiveDrafter):
    """An adaptive drafter that records the masks' predictions of each step.

    Uses assumed step costs and an unlimited budget, so drafting is exercised even where it would not pay.
    """

    def __init__(self, loaded: LoadedModel, predictions: list[Sequence[int]]) -> None:
        stats = AcceptanceStats(ASSUMED_COSTS, loaded.masks_per_group, trials=math.inf)
        super().__init__(stats, loaded.masks_per_group, bigram=loaded.bigram, sources=loaded.sources())
        self._noted = predictions

    def draft(self, tokens: Sequence[int], step_logits: StepLogits | None = None, group: range = range(0)) -> Proposal:
        proposal = super().draft(tokens, step_logits, group)
        # by themselves: what ties them to the token before is no part of the model
        own = step_logits.top_k(group, tokens, 1)[0][:, 0].tolist() if step_logits and proposal.guesses else []
        self._noted.append(own)
        return proposal

    def observe(self, step: Verified) -> None:
        super().observe(replace(step, seconds=ASSUMED_COSTS.by_slots[step.proposal.block.num_slots]))


def samplers(comparison: Comparison) -> dict[str, Callable[[Task], list[int]]]:
    """Return the function that answers a task with token ids, by method."""

    def ar(task: Task) -> list[int]:
        return run_ar(task, comparison, lambda _: None).tokens

    def space(task: Task) -> list[int]:
        # mixed drafts need to know the right tokens
        expected = ar(task) if comparison.drafts == "mixed" else []
        return run_space(task, comparison, expected, lambda _: None).tokens

    return {"ar": ar, "space": space}


def mixed_drafter(expected: Sequence[int], vocabulary: int, turns: Iterator[int]) -> Substitute:
    """Return a drafter whose drafts are right for 0, 1, ..., k, 0, ... tokens, then wrong once, then right again.

    Args:
        expected: prompt and answer, the source of right tokens; behind its end any token will do.
        vocabulary: number of token ids.
        turns: 0, 1, ..., one for each step.
    """

    def draft(tokens: Sequence[int], candidates: Sequence[int]) -> Sequence[int]:
        wrong = next(turns) % (len(candidates) + 1)
        following = [*expected[len(tokens) : len(tokens) + len(candidates)], *candidates]
        return [(following[i] + (i == wrong)) % vocabulary for i in range(len(candidates))]

    return draft


def _reason(divergence: Divergence, dtype: str) -> str:
    noise = f"{dtype} errs by up to {divergence.noise:.2g} in a logit here"
    gap = "one could not be chosen at all" if divergence.gap is None else f"their scores are {divergence.gap:.2g} apart"
    if divergence.verdict == "tie":
        return f"{gap} in {divergence.exact_dtype}, and {noise}: rounding explains either"
    return f"{gap} in {divergence.exact_dtype}, but {noise}: rounding does not explain both"
