"""Self-distillation: the base model's own answers to the training prompts, so that masks learn what it will really say.

Answers are kept on disk as they come, and a run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from space_cli.core.choose import mix
from space_cli.core.stream import is_repetitive
from space_cli.errors import unwritten
from space_cli.models.stops import no_defaults_of_its_own


@dataclass(frozen=True, slots=True)
class Distillation:
    """How answers are made.

    Attributes:
        max_new_tokens: of an answer.
        temperatures: taken in turn, prompt by prompt; 0 is greedy.
        batch_size: prompts answered at once.
        seed: of the sampled ones.
        fingerprint: of the model; answers of another one in the same file are not taken for its own.
    """

    max_new_tokens: int
    temperatures: tuple[float, ...]
    batch_size: int
    seed: int
    fingerprint: str


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
    on_progress: Callable[[int, int], None],
) -> list[tuple[list[int], list[int]]]:
    """Return pairs of prompt and answer, token ids each; empty and repetitive answers are left out.

    Args:
        model: the base, before any training.
        prompts: token ids, each up to where an answer begins.
        settings: how answers are made.
        eos_token_ids: every id that ends an answer; answers keep it.
        file: JSON lines of what has been answered so far; read first, and added to batch by batch.
        on_progress: gets prompts answered and prompts in all.

    Raises:
        RunFailed: the file cannot be written.
    """
    requests = [_request(ids, number, settings) for number, ids in enumerate(prompts)]
    answered = _read(file)
    waiting = [request for request in requests if request.key not in answered]
    # prompts of like length share a batch; the longest first, so that what does not fit the memory fails at once
    waiting.sort(key=lambda request: (request.temperature, -len(request.prompt_ids)))
    on_progress(len(requests) - len(waiting), len(requests))
    for batch in _batches(waiting, settings.batch_size):
        found = _answer(model, batch, settings, eos_token_ids)
        _append(file, dict(zip((request.key for request in batch), found, strict=True)))
        answered |= dict(zip((request.key for request in batch), found, strict=True))
        on_progress(sum(request.key in answered for request in requests), len(requests))
    pairs = [(list(request.prompt_ids), answered[request.key]) for request in requests]
    # looping text would teach the masks to loop
    return [(prompt, answer) for prompt, answer in pairs if len(answer) > 1 and not is_repetitive(answer)]


def _request(prompt_ids: Sequence[int], number: int, settings: Distillation) -> _Request:
    temperature = settings.temperatures[number % len(settings.temperatures)]
    told = json.dumps([list(prompt_ids), temperature, settings.max_new_tokens, settings.seed, settings.fingerprint])
    return _Request(tuple(prompt_ids), temperature, hashlib.sha256(told.encode()).hexdigest()[:32])


def _batches(requests: Sequence[_Request], size: int) -> list[Sequence[_Request]]:
    batches: list[Sequence[_Request]] = []
    for temperature in sorted({request.temperature for request in requests}):
        alike = [request for request in requests if request.temperature == temperature]
        batches += [alike[start : start + size] for start in range(0, len(alike), size)]
    return batches


@torch.inference_mode()
def _answer(
    model: PreTrainedModel, batch: Sequence[_Request], settings: Distillation, eos_token_ids: frozenset[int]
) -> list[list[int]]:
    """Answer prompts of one temperature at once with transformers' `generate`."""
    temperature, padding = batch[0].temperature, min(eos_token_ids, default=0)
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=sorted(eos_token_ids) or None,
        pad_token_id=padding,
        **options,
    )
    width = max(len(request.prompt_ids) for request in batch)
    rows = [[padding] * (width - len(request.prompt_ids)) + list(request.prompt_ids) for request in batch]
    masks = [[0] * (width - len(request.prompt_ids)) + [1] * len(request.prompt_ids) for request in batch]
    torch.manual_seed(mix(settings.seed, int(batch[0].key[:8], 16)))
    with no_defaults_of_its_own(model):
        output = model.generate(  # type: ignore[operator]  # mixed in by transformers where mypy does not see it
            torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(masks, device=model.device),
            generation_config=config,
        )
    return [_until_end(row, eos_token_ids) for row in output[:, width:].tolist()]


def _until_end(row: list[int], eos_token_ids: frozenset[int]) -> list[int]:
    end = next((index for index, token in enumerate(row) if token in eos_token_ids), len(row) - 1)
    return row[: end + 1]


def _read(file: Path) -> dict[str, list[int]]:
    """Return the answers of an earlier run; a last line that was cut off is forgotten."""
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
    try:
        with file.open("a", encoding="utf-8") as stream:
            # a line that an earlier run could not finish must not swallow the first of this one
            stream.write("\n" + "\n".join(lines) + "\n")
    except OSError as error:
        raise unwritten(file, error) from error
