"""Choosing a token: a deterministic function of (logits, history, position, seed).

Sampling adds Gumbel noise that depends on seed and position alone and takes the largest score (the Gumbel-max trick:
the result is distributed as the softmax). Drafts are chosen with the noise of the position they are for, so that
acceptance is plain equality and SPACE under a seed gives, token for token, what AR gives under that seed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, cast

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from space_cli.errors import RunFailed

TOP_K = 16
"""Tokens of each row whose probabilities an engine gives; `kSpaceLikely` of the kernels is the same number."""
_NONE = -1
_INFINITE = 0x7F80
"""The exponent's bits of a bfloat16 that is infinite or no number."""
_NOISE_ROWS_KEPT = 64
_MASK64 = (1 << 64) - 1
# of splitmix64
_STEP, _FACTORS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


class TopK(NamedTuple):
    """The `TOP_K` most probable tokens of each row, in descending order, if the engine computes them too.

    Attributes:
        tokens: (Q, TOP_K) int64, of equal logits the first.
        probs: (Q, TOP_K) float32, of the softmax.
    """

    tokens: torch.Tensor
    probs: torch.Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen, in transformers' words; temperature 0 is greedy and ignores top_k, top_p and min_p.

    Presence and frequency penalties are OpenAI's: off the logit of a token that the answer has already, once, and once
    for each time that it came.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, not {self.temperature}")

    @property
    def reads_history(self) -> bool:
        """Whether the tokens so far change what is chosen."""
        return self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)

    def processors(self, prompt_length: int = 0) -> LogitsProcessorList:
        """Return the processors, transformers' ones in the order `generate` applies them.

        Args:
            prompt_length: tokens in front of the answer, which presence and frequency penalties do not count.
        """
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        processors += self.count_penalties(prompt_length)
        if self.temperature == 0:
            return processors
        if self.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            processors.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            processors.append(MinPLogitsWarper(self.min_p))
        return processors

    def count_penalties(self, prompt_length: int) -> LogitsProcessorList:
        """Return the processor of the presence and frequency penalties, which `generate` lacks; empty without them."""
        if not (self.presence_penalty or self.frequency_penalty):
            return LogitsProcessorList()
        return LogitsProcessorList([_CountPenalty(prompt_length, self.presence_penalty, self.frequency_penalty)])


class _CountPenalty(LogitsProcessor):
    """OpenAI's presence and frequency penalties, which transformers does not have."""

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self._prompt_length, self._presence, self._frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        answers = input_ids[:, self._prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, answers, torch.ones_like(answers, dtype=scores.dtype))
        taken = counts * self._frequency + (counts > 0) * self._presence
        return cast(torch.FloatTensor, scores - taken)


class Sampler:
    """Chooses tokens. It has no state that could change an answer.

    Args:
        processors: transformers logits processors; each row gets its own history.
        seed: of the noise; None is greedy.
        reads_history: whether any processor does: converting a long history to a tensor takes longer than sampling.
    """

    def __init__(
        self,
        processors: LogitsProcessorList | None = None,
        *,
        seed: int | None = None,
        reads_history: bool = True,
    ) -> None:
        self._processors = _Processors(processors or LogitsProcessorList(), reads_history)
        self._noise = None if seed is None else _Noise(seed)

    @classmethod
    def from_sampling(
        cls, sampling: Sampling, *, prompt_length: int = 0, first: Sequence[LogitsProcessor] = ()
    ) -> Sampler:
        """Return the sampler that `sampling` describes.

        Args:
            sampling: how.
            prompt_length: tokens in front of the answer.
            first: processors in front of its own; they get the history.
        """
        seed = sampling.seed if sampling.temperature else None
        processors = LogitsProcessorList([*first, *sampling.processors(prompt_length)])
        return cls(processors, seed=seed, reads_history=bool(first) or sampling.reads_history)

    def step_logits(self, logits: torch.Tensor, top_k: TopK | None = None) -> StepLogits:
        """Return the logits of one model call, to sample from row by row.

        Args:
            logits: (Q, V) of any float type.
            top_k: what is known of them already.
        """
        return StepLogits(logits, top_k, self._processors, self._noise)


@dataclass(frozen=True, slots=True)
class _Processors:
    """Processors, and whether they look at the history."""

    own: LogitsProcessorList
    reads_history: bool

    def applied(self, scores: torch.Tensor, history: Sequence[int]) -> torch.Tensor:
        """Return (rows, V) scores after all processors."""
        if self.own:
            histories = [list(history) if self.reads_history else []] * len(scores)
            ids = cast(torch.LongTensor, torch.tensor(histories, dtype=torch.int64, device=scores.device))
            # one by one: the list looks up their signatures at every call
            for processor in self.own:
                scores = processor(ids, scores)
        return scores


class StepLogits:
    """The logits of one model call. A row is processed only when its token is needed."""

    def __init__(self, logits: torch.Tensor, top_k: TopK | None, processors: _Processors, noise: _Noise | None) -> None:
        self._logits, self._processors, self._noise = logits, processors, noise
        plain = not processors.own and noise is None
        self._top_k = top_k if plain else None
        self._greedy: list[int] | None = None
        if plain:
            self._greedy = largest(logits) if top_k is None else _first(top_k)

    def token(self, row: int, history: Sequence[int]) -> int:
        """Sample the token that follows `history` (prompt included) from the logits of `row`.

        Raises:
            RunFailed: the logits are not finite.
        """
        token = largest(self.scores(row, history)[None])[0] if self._greedy is None else self._greedy[row]
        if token == _NONE:
            raise RunFailed(
                f"the model's logits behind {len(history)} tokens are not finite",
                hint="its weights are damaged, or --dtype is too narrow for them: try float32",
            )
        return token

    def scores(self, row: int, history: Sequence[int]) -> torch.Tensor:
        """Return the (V,) scores of `row` whose largest is chosen: processed logits, and noise if sampled.

        float32, or float64 where the logits are.
        """
        scores = self._logits[row : row + 1]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = self._processors.applied(scores, history)
        if self._noise is not None:
            scores = scores + self._noise.at(len(history), scores.shape[-1], scores.device)
        return scores[0]

    def logprobs(self, rows: Sequence[int], tokens: Sequence[int], count: int) -> list[tuple[tuple[int, float], ...]]:
        """Return each row's token and the `count` most probable ones, with unprocessed log-probabilities.

        Args:
            rows: that the tokens were chosen from.
            tokens: one for each row.
            count: beside the token itself.
        """
        scores = self._logits[list(rows)]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(dim=-1)
        values, best = (each.tolist() for each in scores.topk(min(count, scores.shape[-1]), dim=-1))
        own = scores[torch.arange(len(tokens)), list(tokens)].tolist()
        return [
            ((token, value), *zip(best[row], values[row], strict=True))
            for row, (token, value) in enumerate(zip(tokens, own, strict=True))
        ]

    def top_k(self, rows: range, history: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return for consecutive rows the `count` most probable tokens, and their probabilities in descending order.

        (rows, count) int64 and float32 or float64; fewer columns where the vocabulary is smaller.

        The first row's token follows `history`, the next one's the token after it, and so on. Drafts, not verdicts:
        processors see `history` alone.
        """
        if self._top_k is not None and count <= TOP_K:
            tokens, probs = (each[rows.start : rows.stop, :count] for each in self._top_k)
            return tokens.numpy(), probs.numpy()
        scores = self._logits[rows.start : rows.stop]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = self._processors.applied(scores, history)
        if self._noise is not None:
            places = range(len(history), len(history) + len(rows))
            scores = scores + torch.stack([self._noise.at(at, scores.shape[-1], scores.device) for at in places])
        probs, tokens = scores.softmax(dim=-1).topk(min(count, scores.shape[-1]), dim=-1)
        return tokens.cpu().numpy(), probs.cpu().numpy()


def largest(logits: torch.Tensor) -> list[int]:
    """Return the argmax of each row of (Q, V) logits, -1 where the largest logit is not finite.

    This is the one copy from the device in a step.
    """
    if logits.device.type != "cpu":
        values, tokens = logits.max(dim=-1)
        return cast(list[int], torch.where(values.isfinite(), tokens, _NONE).tolist())
    rows = np.arange(len(logits))
    if logits.dtype != torch.bfloat16:
        numbers = logits.numpy()
        places = numbers.argmax(axis=-1)
        finite = np.isfinite(numbers[rows, places])
    else:
        # numpy has no bfloat16; as integers they have the same order once the magnitude of negative ones is turned over
        bits = logits.view(torch.int16).numpy()
        places = (bits ^ (bits >> 15 & 0x7FFF)).argmax(axis=-1)
        finite = bits[rows, places] & _INFINITE != _INFINITE
    return cast(list[int], np.where(finite, places, _NONE).tolist())


def _first(top_k: TopK) -> list[int]:
    """Return the most probable token of each row, -1 where the probabilities are NaN."""
    tokens, probs = (each[:, 0].numpy() for each in top_k)
    return cast(list[int], np.where(np.isfinite(probs), tokens, _NONE).tolist())


class _Noise:
    """Gumbel noise as a function of (seed, position), drawn on the CPU so that every device gets the same."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        # a position's noise serves its draft first and its verification a step or two later
        self._rows: OrderedDict[int, torch.Tensor] = OrderedDict()

    def at(self, position: int, size: int, device: torch.device) -> torch.Tensor:
        """Return (size,) float32 noise of the token at `position`."""
        row = self._rows.get(position)
        if row is None:
            row = torch.from_numpy(_gumbel(_mixed(self._seed, position), size)).to(device)
            self._rows[position] = row
            if len(self._rows) > _NOISE_ROWS_KEPT:
                self._rows.popitem(last=False)
        return row


def _gumbel(key: int, size: int) -> np.ndarray:
    """Return (size,) float32 Gumbel noise: numbers `key` + 1, 2, ... steps on of a splitmix64 stream.

    Half the time of a torch generator, and the same whatever its version. Uniforms have 52 bits: with the 24 of float32
    the tail of the distribution would be cut.
    """
    bits = _steps(size) + np.uint64(key)
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(_FACTORS[0])
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(_FACTORS[1])
    bits ^= bits >> np.uint64(31)
    # odd, so that neither 0 nor 1 comes out
    uniform = (bits >> np.uint64(11) | np.uint64(1)).view(np.int64) * 2.0**-53
    noise: np.ndarray = -np.log(-np.log(uniform)).astype(np.float32)
    return noise


@lru_cache(maxsize=8)
def _steps(size: int) -> np.ndarray:
    return np.arange(1, size + 1, dtype=np.uint64) * np.uint64(_STEP)


def mix(seed: int, position: int) -> int:
    """Hash seed and position to a generator seed, so that neighbours share nothing."""
    # the CPU generator uses the low 32 bits of its seed
    return _mixed(seed, position) & 0xFFFFFFFF


def _mixed(seed: int, position: int) -> int:
    """Return 64 bits of seed and position: splitmix64's finaliser."""
    z = (seed * _STEP + position * 0xD1B54A32D192ED03 + _STEP) & _MASK64
    z = ((z ^ (z >> 30)) * _FACTORS[0]) & _MASK64
    z = ((z ^ (z >> 27)) * _FACTORS[1]) & _MASK64
    return z ^ (z >> 31)
