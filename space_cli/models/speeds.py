"""Times both engines of a model once and remembers on disk which is faster."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from space_cli.core.block import AR_BLOCK
from space_cli.core.engine import EagerEngine
from space_cli.core.sampling import largest
from space_cli.files import atomic_write

PROMPT = 64
"""Tokens of the prompt that is timed."""
# an answer as many are: 128 tokens to a prompt of 256
_ANSWER_STEPS, _ANSWER_PROMPTS = 128, 4
_MAX_CALLS, _SECONDS = 12, 0.15
ROUNDS = 3
"""Times that engines are timed in turn: what else the machine does meets both."""
_DOUBTFUL = 1.25


@dataclass(frozen=True)
class Speed:
    """Seconds of an engine's step of one token, and of a prompt of `PROMPT` tokens."""

    step: float
    prompt: float

    def fastest(self, other: Speed) -> Speed:
        """Return the shorter times of two measurements."""
        return Speed(min(self.step, other.step), min(self.prompt, other.prompt))

    @property
    def answer(self) -> float:
        """Seconds of an answer of typical length."""
        return _ANSWER_STEPS * self.step + _ANSWER_PROMPTS * self.prompt


@dataclass(frozen=True)
class Speeds:
    """The speeds of both engines."""

    eager: Speed
    compiled: Speed

    @property
    def compiled_is_faster(self) -> bool:
        """Whether answers take less time compiled."""
        return self.compiled.answer < self.eager.answer

    @property
    def is_doubtful(self) -> bool:
        """Whether another measurement may well find the compiled model faster."""
        return self.eager.answer <= self.compiled.answer < _DOUBTFUL * self.eager.answer


@torch.inference_mode()
def measure_speed(engine: EagerEngine, prompt: int = PROMPT) -> Speed:
    """Time an engine; half a second for a small model.

    Args:
        engine: with room for the prompt and a token; its cache is overwritten.
        prompt: its tokens, for a model whose context has no room for more.
    """
    token_ids = [index % 7 for index in range(prompt)]

    def read() -> None:
        engine.prefill([])
        engine.prefill(token_ids)

    def step() -> None:
        largest(engine.run(AR_BLOCK, [0]))
        engine.rollback()

    return Speed(prompt=_fastest(read), step=_fastest(step))


def _fastest(call: Callable[[], None]) -> float:
    """Return the shortest time of some calls after a warm-up call."""
    call()
    began, found = time.perf_counter(), list[float]()
    while len(found) < _MAX_CALLS and (not found or time.perf_counter() - began < _SECONDS):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)


def read_speeds(file: Path) -> Speeds | None:
    """Read the measurements, or return None."""
    try:
        saved = json.loads(file.read_bytes())
        return Speeds(
            **{name: Speed(float(saved[name]["step"]), float(saved[name]["prompt"])) for name in ("eager", "compiled")}
        )
    except (OSError, ValueError, TypeError, KeyError):  # not there, or not ours
        return None


def write_speeds(speeds: Speeds, file: Path) -> None:
    """Write the measurements, if possible."""
    try:
        atomic_write(file, json.dumps(asdict(speeds)))
    except OSError:  # measured again the next time
        return
