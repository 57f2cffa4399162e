"""Training data without a data set: the model writes questions and answers them.

Behind the opening of a user's turn a chat model writes what users say to it; its greedy answers to that are the very
text that masks must foresee.

Source: Magpie (arXiv 2406.08464).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from space_cli.chat.templates import DEFAULT_TEMPLATE, Escaper, Turn, has_own_template, render, split_template
from space_cli.core.sampling import mix
from space_cli.core.stream import is_repetitive
from space_cli.errors import UsageProblem, writing
from space_cli.models.loading import LoadedModel
from space_cli.training.batch import Request, answer_in_batches
from space_cli.training.chat_format import prompt_ids
from space_cli.training.data import OWN_DATA, Conversation
from space_cli.training.start import identity

_QUESTION_TOKENS = 96
_MIN_QUESTION = 4
_TEMPERATURE = 0.8
_FRUITLESS_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class OwnData:
    """Settings of the model's own questions.

    Attributes:
        count: questions wanted.
        answer_tokens: most tokens of an answer.
        batch_size: answers written at once.
        seed: of the questions; answers are greedy.
        seconds: nothing is begun after them; None waits for all.
    """

    count: int
    answer_tokens: int
    batch_size: int
    seed: int
    seconds: float | None = None


def own_examples(
    loaded: LoadedModel,
    settings: OwnData,
    *,
    template: str | None,
    file: Path,
    on_progress: Callable[[int, int, float], None],
) -> list[Conversation]:
    """Return the model's questions with its answers, without duplicates and loops.

    Args:
        loaded: the model, before any training.
        settings: how many, and how.
        template: in place of the tokenizer's chat template.
        file: JSON lines of what was asked and answered so far; read first, and added to.
        on_progress: gets answers so far, answers wanted, and tokens per second.

    Raises:
        UsageProblem: the model asks nothing that could be used.
        RunFailed: the file cannot be written.
    """
    base = str(identity(loaded)["weights"])
    known = _read(file, base)
    opening, closing = _turn_of_a_user(loaded, template)
    began, written, fruitless, rounds = time.monotonic(), 0, 0, len(known)
    while len(known) < settings.count and fruitless < _FRUITLESS_ROUNDS:
        if settings.seconds is not None and known and time.monotonic() - began > settings.seconds:
            break
        rounds += 1
        before = len(known)
        asked = _questions(loaded, settings, opening, closing, number=rounds)
        new = {_essence(question): question for question in asked if _essence(question) not in known}
        for question, ids in _answered(loaded, settings, list(new.values()), template):
            answer = loaded.decode(ids, skip_special_tokens=True).strip()
            written += len(ids)
            if answer and not is_repetitive(ids):
                known[_essence(question)] = (question, answer)
                _append(file, base, question, answer)
            on_progress(min(len(known), settings.count), settings.count, written / (time.monotonic() - began))
        fruitless = 0 if len(known) > before else fruitless + 1
    if not known:
        raise UsageProblem(f"{loaded.name} asks itself nothing that can be learned from", hint="give --data a file")
    pairs = list(known.values())[: settings.count]
    return [Conversation((Turn("user", asked), Turn("assistant", said)), OWN_DATA) for asked, said in pairs]


def _turn_of_a_user(loaded: LoadedModel, template: str | None) -> tuple[list[int], str]:
    """Return the token ids up to the start of a user's turn, and the text that ends the turn."""
    if has_own_template(loaded.tokenizer, template):
        seam = Escaper.of((), loaded.tokenizer).seam
        opening, _, closing = render([Turn("user", seam)], loaded.tokenizer, OWN_DATA, asks=True).partition(seam)
        ids = list(loaded.tokenizer(opening, add_special_tokens=False)["input_ids"])
    else:
        opening, closing = split_template(template or DEFAULT_TEMPLATE)
        ids = loaded.encode(opening)
    ids = ids or [loaded.tokenizer.bos_token_id or min(loaded.eos_token_ids, default=0)]
    return ids, closing.strip()


def _questions(
    loaded: LoadedModel, settings: OwnData, opening: Sequence[int], closing: str, *, number: int
) -> list[str]:
    """Sample a batch of user turns."""
    requests = [
        Request(tuple(opening), _QUESTION_TOKENS, _TEMPERATURE, mix(mix(settings.seed, number), row))
        for row in range(settings.batch_size)
    ]
    found = answer_in_batches(loaded.model, requests, rows=settings.batch_size, eos_token_ids=loaded.eos_token_ids)
    questions = []
    for _, ids in found:
        ended = ids[-1] in loaded.eos_token_ids
        text = loaded.decode(ids[:-1] if ended else ids)
        text, sign, _ = text.partition(closing) if closing else (text, "", "")
        # a question cut off by length is dropped
        if (ended or sign) and len(ids) >= _MIN_QUESTION and not is_repetitive(ids):
            questions.append(text.strip())
    return [question for question in questions if question]


def _answered(
    loaded: LoadedModel, settings: OwnData, questions: Sequence[str], template: str | None
) -> list[tuple[str, list[int]]]:
    """Answer questions greedily."""
    examples = [Conversation((Turn("user", each), Turn("assistant", ".")), OWN_DATA) for each in questions]
    prompts = [prompt_ids(each, loaded.tokenizer, template=template)[0] for each in examples]
    requests = [Request(tuple(ids), settings.answer_tokens) for ids in prompts]
    found = answer_in_batches(loaded.model, requests, rows=settings.batch_size, eos_token_ids=loaded.eos_token_ids)
    return [(questions[number], ids) for number, ids in found]


def _essence(question: str) -> str:
    """Return the key by which questions count as equal: their first words, lower-cased."""
    return " ".join(question.lower().split()[:12])


def _read(file: Path, base: str) -> dict[str, tuple[str, str]]:
    """Return what an earlier run of the same base kept; an incomplete last line is dropped."""
    known = {}
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
            if row["base"] != base:
                continue
            known[_essence(row["question"])] = (str(row["question"]), str(row["answer"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return known


def _append(file: Path, base: str, question: str, answer: str) -> None:
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.write("\n" + json.dumps({"base": base, "question": question, "answer": answer}) + "\n")
