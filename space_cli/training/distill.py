"""Self-distillation: the base model answers the training prompts, so that masks learn the model's own continuations.

Answers are kept on disk as they come, and a run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from space_cli.core.sampling import mix
from space_cli.core.stream import is_repetitive
from space_cli.errors import writing
from space_cli.training.batch import Request, answer_in_batches


@dataclass(frozen=True, slots=True)
class Distillation:
    """Settings of distillation.

    Attributes:
        max_new_tokens: of an answer.
        temperatures: taken in turn, prompt by prompt; 0 is greedy.
        batch_size: prompts answered at once.
        seed: of the sampled ones.
        seconds: no answer is awaited after them; None waits for all.
        fingerprint: of the model; answers of another one in the same file are not taken for its own.
    """

    max_new_tokens: int
    temperatures: tuple[float, ...]
    batch_size: int
    seed: int
    fingerprint: str
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class _Request:
    prompt_ids: tuple[int, ...]
    temperature: float
    key: str


def distil(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: Distillation,
    *,
    eos_token_ids: frozenset[int],
    file: Path,
    on_progress: Callable[[int, int, float], None],
) -> list[tuple[list[int], list[int]]]:
    """Return (prompt, answer) pairs of token ids; empty and repetitive answers are left out.

    Args:
        model: the base, before any training.
        prompts: token ids, each up to where an answer begins.
        settings: how answers are made.
        eos_token_ids: every id that ends an answer; answers keep it.
        file: JSON lines of what has been answered so far; read first, and added to as answers end.
        on_progress: gets prompts answered, prompts in all, and tokens per second.

    Raises:
        RunFailed: the file cannot be written.
    """
    requests = [_request(ids, number, settings) for number, ids in enumerate(prompts)]
    answered = _read(file)
    waiting = [request for request in requests if request.key not in answered]
    # longest first, so that running out of memory happens at once
    waiting.sort(key=lambda request: -len(request.prompt_ids))
    done, written, began = len(requests) - len(waiting), 0, time.monotonic()
    on_progress(done, len(requests), 0.0)
    for request, answer in _answer(model, waiting, settings, eos_token_ids):
        _append(file, {request.key: answer})
        answered[request.key] = answer
        done, written = done + 1, written + len(answer)
        on_progress(done, len(requests), written / (time.monotonic() - began))
        if settings.seconds is not None and time.monotonic() - began > settings.seconds:
            break
    pairs = [(list(each.prompt_ids), answered[each.key]) for each in requests if each.key in answered]
    # looping text would teach the masks to loop
    return [(prompt, answer) for prompt, answer in pairs if len(answer) > 1 and not is_repetitive(answer)]


def _request(prompt_ids: Sequence[int], number: int, settings: Distillation) -> _Request:
    temperature = settings.temperatures[number % len(settings.temperatures)]
    inputs = json.dumps([list(prompt_ids), temperature, settings.max_new_tokens, settings.seed, settings.fingerprint])
    return _Request(tuple(prompt_ids), temperature, hashlib.sha256(inputs.encode()).hexdigest()[:32])


def _answer(
    model: PreTrainedModel, waiting: Sequence[_Request], settings: Distillation, eos_token_ids: frozenset[int]
) -> Iterator[tuple[_Request, list[int]]]:
    requests = [
        Request(each.prompt_ids, settings.max_new_tokens, each.temperature, mix(settings.seed, int(each.key[:8], 16)))
        for each in waiting
    ]
    for number, answer in answer_in_batches(model, requests, rows=settings.batch_size, eos_token_ids=eos_token_ids):
        yield waiting[number], answer


def _read(file: Path) -> dict[str, list[int]]:
    """Return the answers of an earlier run; an incomplete last line is dropped."""
    answers = {}
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
            answers[str(row["key"])] = [int(token) for token in row["token_ids"]]
        except (ValueError, KeyError, TypeError):
            continue
    return answers


def _append(file: Path, answers: dict[str, list[int]]) -> None:
    lines = [json.dumps({"key": key, "token_ids": ids}) for key, ids in answers.items()]
    with writing(file), file.open("a", encoding="utf-8") as stream:
        # an incomplete last line of an earlier run must not swallow this run's first one
        stream.write("\n" + "\n".join(lines) + "\n")
