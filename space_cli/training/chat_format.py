r"""From an example to token ids and labels: the tokenizer's chat template, a form with one gap, or plain text.

What a model is given at inference and what it answers are tokenised as two pieces, so that training meets exactly the
prompt's tokens that inference does. An example is a script of such pieces:

    lead     "Human:{}\nAssistant:"        answer     end     next prompt      answer
    BOS      no loss                       loss       loss    no loss          loss
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from space_cli.core.collator import IGNORED
from space_cli.errors import UsageProblem
from space_cli.models.prompting import (
    DEFAULT_TEMPLATE,
    Turn,
    ids_behind,
    lead_ids,
    render,
    seam_for,
    special_tokens,
    split_template,
    taken_apart,
)
from space_cli.training.data import Completion, Example, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example as the collator takes it.

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
        template: a form like `DEFAULT_TEMPLATE` that takes the place of the tokenizer's chat template.
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
    """Return what stands before each answer that `encode` gives loss to, as a model is given it; nothing for texts.

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
    """Return the text that `encode` makes tokens of, special tokens included.

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
    """Text that is tokenised by itself.

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
    special = special_tokens(tokenizer)
    if isinstance(example, Text):
        seam = seam_for([example.text])
        text = taken_apart(example.text, special, seam)
        return _with_lead([_Piece(text, learned=True, ends=True)], seam, tokenizer)
    if isinstance(example, Completion):
        seam = seam_for([example.prompt, example.completion])
        prompt, completion = (taken_apart(text, special, seam) for text in (example.prompt, example.completion))
        return _with_lead([_Piece(prompt, learned=False), _Piece(completion, learned=True, ends=True)], seam, tokenizer)
    seam = seam_for([turn.content for turn in example.turns])
    turns = [Turn(turn.role, taken_apart(turn.content, special, seam)) for turn in example.turns]
    while turns[-1].role != "assistant":  # nothing is learned of what nobody answers
        turns.pop()
    if template is None and tokenizer.chat_template:
        ends = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
        return _Script(_chat_pieces(turns, tokenizer, ends=ends, where=example.where), seam, lead=[])
    return _with_lead(_form_pieces(turns, DEFAULT_TEMPLATE if template is None else template), seam, tokenizer)


def _with_lead(pieces: list[_Piece], seam: str, tokenizer: PreTrainedTokenizerBase) -> _Script:
    """Put in front what the tokenizer puts in front of any text, unless the template has done so."""
    return _Script(pieces, seam, lead_ids(pieces[0].text.split(seam)[0], tokenizer))


def _form_pieces(turns: list[Turn], template: str) -> list[_Piece]:
    """Fill the form once for each answer, with all that was said since the one before."""
    head, tail = split_template(template)
    pieces: list[_Piece] = []
    asked: list[str] = []
    for index, turn in enumerate(turns):
        if turn.role != "assistant":
            asked.append(turn.content)
            continue
        request = "\n\n".join(filter(None, asked))
        pieces += [_Piece(head + request + tail, learned=False), _Piece(turn.content, learned=index > 0, ends=True)]
        asked = []
    return pieces


def _chat_pieces(
    turns: list[Turn], tokenizer: PreTrainedTokenizerBase, *, ends: tuple[str, ...], where: str
) -> list[_Piece]:
    """Cut the rendered conversation where each prompt ends and where each answer does.

    An answer that the whole shows otherwise than its model gave it (Qwen3 drops the thinking of earlier answers)
    carries no loss; the last one must stand as given.
    """
    whole = render(turns, tokenizer, where)
    pieces: list[_Piece] = []
    done = 0
    for index in (n for n in range(1, len(turns)) if turns[n].role == "assistant"):
        is_last = index == len(turns) - 1
        prompt = render(turns[:index], tokenizer, where, asks=True)
        until = whole if is_last else render(turns[: index + 1], tokenizer, where)
        if not (whole.startswith(until) and until.startswith(prompt) and done <= len(prompt) < len(until)):
            if is_last:
                problem = f"{where}: the chat template does not put the last answer behind its prompt"
                raise UsageProblem(problem, hint=f"use a template like {DEFAULT_TEMPLATE!r}")
            continue
        answer = until[len(prompt) :]
        # what a template writes behind the end of a turn (a newline, mostly) is never generated
        closed = answer.rstrip() if answer.rstrip().endswith(ends) else ""
        # without any end of turn the model would not learn to stop
        ending = _Piece(closed or answer, learned=True, ends=is_last and not closed)
        pieces += [_Piece(whole[done : len(prompt)], learned=False), ending]
        done = len(prompt) + len(ending.text)
    return pieces


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
