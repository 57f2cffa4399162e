r"""From an example to token ids and labels: the tokenizer's chat template, a template with one gap, or plain text.

What a model is given at inference and what it answers are tokenised as two pieces, so that training meets exactly the
prompt's tokens that inference does. An example is a script of such pieces:

    lead     "Human:{}\nAssistant:"        answer     end     next prompt      answer
    BOS      no loss                       loss       loss    no loss          loss
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from space_cli.chat.templates import (
    DEFAULT_TEMPLATE,
    Escaper,
    Turn,
    escape_turns,
    fill_template,
    has_own_template,
    ids_behind,
    lead_ids,
    render,
    without_lead,
)
from space_cli.core.collator import IGNORED
from space_cli.errors import UsageProblem
from space_cli.models.stops import turn_end
from space_cli.training.data import Completion, Example, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THOUGHT, _CLOSED = "<think>", "</think>"
"""What some templates open an answer with, and what closes it."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded example for the collator.

    Attributes:
        input_ids: at most `max_length` of them.
        labels: the same ids, or -100 where no loss is carried; all -100 if nothing learned is left of a cut example.
        cut: tokens cut off at the end.
    """

    input_ids: list[int]
    labels: list[int]
    cut: int


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, *, template: str | None, max_length: int) -> Encoded:
    """Return the ids and labels of `example`.

    Loss is carried by the assistant's turns with the token that ends them, by completions and by texts. Special tokens
    come from the tokenizer and the template alone: where the data spell one out, it is tokenised as ordinary text.

    Args:
        example: what to train on.
        tokenizer: of the model to train.
        template: a template like `DEFAULT_TEMPLATE` that takes the place of the tokenizer's chat template.
        max_length: in tokens.

    Raises:
        UsageProblem: `template` has not exactly one {}; the chat template refuses the conversation, or renders it so
            that what a model would be given is no beginning of the whole.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for ids, learned in _tokenised(example, tokenizer, template):
        input_ids += ids
        labels += ids if learned else [IGNORED] * len(ids)
    return Encoded(input_ids[:max_length], labels[:max_length], max(0, len(input_ids) - max_length))


def prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase, *, template: str | None) -> tuple[list[int], ...]:
    """Return the prompt ids before each answer that carries loss in `encode`; none for texts.

    Raises:
        UsageProblem: as `encode` does.
    """
    if isinstance(example, Text):
        return ()
    prompts, before = [], list[int]()
    for ids, learned in _tokenised(example, tokenizer, template):
        if learned:
            prompts.append(before)
        before = before + ids
    return tuple(prompts)


def rendered(example: Example, tokenizer: PreTrainedTokenizerBase, *, template: str | None) -> str:
    """Return the text that `encode` tokenizes, special tokens included.

    Raises:
        UsageProblem: as `encode` does.
    """
    script = _script(example, tokenizer, template)
    end = str(tokenizer.eos_token or "")
    texts = (piece.text.replace(script.seam, "") + (end if piece.ends else "") for piece in script.pieces)
    return str(tokenizer.decode(script.lead)) + "".join(texts)


# A script: the pieces of an example


@dataclass(frozen=True, slots=True)
class _Piece:
    """A piece of text that is tokenized separately.

    Attributes:
        text: with seams in it.
        learned: whether it carries loss.
        ends: whether the end-of-text token follows it.
    """

    text: str
    learned: bool
    ends: bool = False


@dataclass(frozen=True, slots=True)
class _Script:
    """The pieces of an example; one without loss stands before each learned one, but in a text.

    Attributes:
        pieces: in order.
        seam: a sign that none of the data holds; no token reaches over it.
        lead: ids that go in front.
    """

    pieces: list[_Piece]
    seam: str
    lead: list[int]


def _script(example: Example, tokenizer: PreTrainedTokenizerBase, template: str | None) -> _Script:
    if isinstance(example, Text):
        escaper = Escaper.of(example.text, tokenizer)
        text = escaper.text(without_lead(example.text, tokenizer))
        return _with_lead([_Piece(text, learned=True, ends=True)], escaper.seam, tokenizer)
    if isinstance(example, Completion):
        escaper = Escaper.of([example.prompt, example.completion], tokenizer)
        prompt = _Piece(escaper.text(without_lead(example.prompt, tokenizer)), learned=False)
        completion = _Piece(escaper.text(example.completion), learned=True, ends=True)
        return _with_lead([prompt, completion], escaper.seam, tokenizer)
    escaper = Escaper.of([turn.content for turn in example.turns], tokenizer)
    turns = escape_turns(example.turns, escaper, tokenizer, template=template)
    while turns[-1].role != "assistant":  # turns without an answer carry no loss
        turns.pop()
    if has_own_template(tokenizer, template):
        return _Script(_chat_pieces(turns, tokenizer, where=example.where), escaper.seam, lead=[])
    return _with_lead(
        _template_pieces(turns, DEFAULT_TEMPLATE if template is None else template), escaper.seam, tokenizer
    )


def _with_lead(pieces: list[_Piece], seam: str, tokenizer: PreTrainedTokenizerBase) -> _Script:
    """Put in front what the tokenizer puts in front of any text, unless the template has done so."""
    return _Script(pieces, seam, lead_ids(pieces[0].text.split(seam)[0], tokenizer))


def _template_pieces(turns: list[Turn], template: str) -> list[_Piece]:
    """Return the pieces of the filled template; a first turn that answers nothing carries no loss."""
    first = 2 if turns[0].role == "assistant" else 0
    return [
        _Piece(text, learned=is_answer and index >= first, ends=is_answer)
        for index, (text, is_answer) in enumerate(fill_template(turns, template))
    ]


def _chat_pieces(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, *, where: str) -> list[_Piece]:
    """Cut the rendered conversation where each prompt ends and where each answer does.

    An answer that the whole shows otherwise than its model gave it (Qwen3 drops the thinking of earlier answers)
    carries no loss; the last one must stand as given.
    """
    whole, end = render(turns, tokenizer, where), turn_end(tokenizer)
    pieces: list[_Piece] = []
    done = 0
    for index in (n for n in range(1, len(turns)) if turns[n].role == "assistant"):
        is_last = index == len(turns) - 1
        until = whole if is_last else render(turns[: index + 1], tokenizer, where)
        prompt = render(turns[:index], tokenizer, where, asks=True)
        begin = len(prompt) if until.startswith(prompt) else _before_thought(prompt, until)
        stop, close = _end_of_answer(whole, until, begin, end, is_last=is_last) if begin is not None else (0, "")
        if begin is None or not (done <= begin < stop and whole[:begin] == until[:begin]):
            if is_last:
                problem = f"{where}: the chat template does not put the last answer behind its prompt"
                raise UsageProblem(problem, hint=f"use a template like {DEFAULT_TEMPLATE!r}")
            continue
        answer = whole[begin:stop] + close
        ends = is_last and not (end and answer.endswith(end))
        opened = prompt[begin:] if is_last else ""
        if opened:
            answer = _with_thought(turns[index].content, answer, end or "")
        pieces += [_Piece(whole[done:begin] + opened, learned=False), _Piece(answer, learned=True, ends=ends)]
        done = stop
    return pieces


def _before_thought(prompt: str, until: str) -> int | None:
    """Return where a prompt ends but for the thought that its template opens (R1's); None where it differs in more."""
    begin = len(prompt.rstrip().removesuffix(_THOUGHT))
    return begin if begin < len(prompt.rstrip()) and until.startswith(prompt[:begin]) else None


def _with_thought(content: str, shown: str, end: str) -> str:
    """Return an answer behind a prompt that opened a thought: its own thought, or none, closed at once."""
    if _CLOSED in content:
        return content.lstrip().removeprefix(_THOUGHT).lstrip("\n") + end
    return f"\n{_CLOSED}\n\n{shown}"


def _end_of_answer(whole: str, until: str, begin: int, end: str | None, *, is_last: bool) -> tuple[int, str]:
    """Return where an answer ends in the whole, with its end of turn, and an end that the whole has not there itself.

    What a template writes behind the end of a turn (a newline, mostly) is never generated. `until` is the whole up to
    this answer, were it the last; behind it a template may have put what closes every conversation (Phi-3's).
    """
    shared = next((n for n, (one, other) in enumerate(zip(whole, until, strict=False)) if one != other), len(until))
    place = whole.find(end, begin) if end else -1
    if end and place >= 0:
        # shown otherwise than it was given, unless the two have all of it in common
        return (place + len(end), "") if place <= shared else (0, "")
    if not is_last and shared < len(until):
        return 0, ""
    if end:
        return len(until.rstrip()), end
    return len(until), ""


# Tokens of a script


def _tokenised(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: str | None
) -> Iterator[tuple[list[int], bool]]:
    """Yield the ids of each piece and whether it is learned."""
    script = _script(example, tokenizer, template)
    before = ""
    yield script.lead, False
    for piece in script.pieces:
        ids: list[int] = []
        for text in filter(None, piece.text.split(script.seam)):
            ids += ids_behind(before, text, tokenizer)
            before = text
        if piece.ends and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
            before = str(tokenizer.eos_token)
        yield ids, piece.learned
