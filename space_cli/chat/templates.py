r"""How a conversation becomes what a model is given: the tokenizer's chat template, or one with a single gap.

Special tokens come from the tokenizer and the template alone. Where a text spells one out, a seam is put inside it,
over which no token reaches, so that it is tokenised as ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from space_cli.errors import UsageProblem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEMPLATE = "Human:{}\nAssistant:"
"""The template where a tokenizer has none of its own: that of the SPACE paper's models."""

Role = Literal["system", "user", "assistant", "tool"]
_TAIL = 64


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a conversation.

    Attributes:
        fields: what else the chat template is given of it, as the calls of an assistant.
    """

    role: Role
    content: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prefix:
    """The prefix of a conversation, as text and as the tokens that the model read or wrote."""

    text: str
    token_ids: list[int]


def request(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None,
    prefixes: Iterable[Prefix] = (),
    tools: Sequence[Mapping[str, Any]] = (),
) -> Prefix:
    """Return the prompt for an answer to the last turn.

    Args:
        turns: the last one asks.
        tokenizer: of the model.
        template: a template like `DEFAULT_TEMPLATE` in place of the tokenizer's chat template.
        prefixes: beginnings whose tokens stay as they were: a model does not always split its own words the way a
            tokenizer would.
        tools: functions that the model may call, as OpenAI's interface describes them.

    Raises:
        UsageProblem: `template` has not exactly one {}, or the chat template refuses the conversation.
    """
    escaper = Escaper.of([[turn.content, turn.fields] for turn in turns] + [list(tools)], tokenizer)
    turns, seam = escape_turns(turns, escaper, tokenizer, template=template), escaper.seam
    if has_own_template(tokenizer, template):
        tools = escaper.json(list(tools))
        seamed, lead = render(turns, tokenizer, "the conversation", asks=True, tools=tools), list[int]()
    elif tools or any(turn.role == "tool" for turn in turns):
        raise UsageProblem("only a chat template can tell a model of tools", hint="choose a model that has one")
    else:
        end = str(tokenizer.eos_token or "")
        pieces = fill_template(turns, DEFAULT_TEMPLATE if template is None else template)
        seamed = "".join(text + end if is_answer else text for text, is_answer in pieces)
        lead = lead_ids(seamed.split(seam)[0], tokenizer)
    text = seamed.replace(seam, "")
    fitting = [prefix for prefix in prefixes if text.startswith(prefix.text)]
    begun = max(fitting, key=lambda prefix: len(prefix.text), default=None)
    ids, before = (lead, "") if begun is None else (list(begun.token_ids), begun.text[-_TAIL:])
    for part in _behind(seamed, 0 if begun is None else len(begun.text), seam).split(seam):
        if part:
            ids = ids + ids_behind(before, part, tokenizer)
            before = part
    return Prefix(text, ids)


def _behind(seamed: str, count: int, seam: str) -> str:
    """Return what follows the first `count` characters, seams not counted."""
    place = 0
    while count:
        count -= seamed[place] != seam
        place += 1
    return seamed[place:]


def has_own_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> bool:
    """Return whether conversations are rendered by the tokenizer's chat template, which `template` replaces."""
    return template is None and bool(tokenizer.chat_template)


def fill_template(turns: Sequence[Turn], template: str) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of a conversation in a template with one gap, and whether each is an answer.

    In front of each answer, and of the answer that is asked for, the template is filled once with all turns since the
    answer before.
    """
    head, tail = split_template(template)
    asked: list[str] = []
    for turn in turns:
        if turn.role != "assistant":
            asked.append(turn.content)
            continue
        yield head + "\n\n".join(filter(None, asked)) + tail, False
        yield turn.content, True
        asked = []
    if asked:
        yield head + "\n\n".join(filter(None, asked)) + tail, False


def split_template(template: str) -> tuple[str, str]:
    """Split a template at its gap."""
    if template.count("{}") != 1:
        raise UsageProblem(f"the template {template!r} must hold {{}} once", hint="the user's text goes there")
    head, tail = template.split("{}")
    return head, tail


def render(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    *,
    asks: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Render turns by the chat template; with `asks`, up to the start of the next answer."""
    messages = [{"role": turn.role, "content": turn.content, **turn.fields} for turn in turns]
    given: dict[str, Any] = {}
    functions = [dict(tool) for tool in tools]
    if functions and "tools" not in str(tokenizer.get_chat_template(None, functions)):
        raise UsageProblem("the chat template of this model takes no tools", hint="choose a model whose does")
    if functions:
        given["tools"] = functions
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks, **given))
    except (TemplateError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageProblem(f"{where}: the chat template refuses the conversation: {reason}") from error


def _texts_in(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _texts_in(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _texts_in(inner)


@dataclass(frozen=True, slots=True)
class Escaper:
    """Escapes special tokens in texts: puts a seam inside each, and no token spans a seam.

    Attributes:
        seam: a character that none of the texts has.
        special: the texts of the special tokens.
    """

    seam: str
    special: frozenset[str]

    @classmethod
    def of(cls, values: Any, tokenizer: PreTrainedTokenizerBase) -> Escaper:
        """Return an escaper for the texts in a JSON value."""
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        used = set().union(*_texts_in(values))
        return cls(next(sign for sign in map(chr, range(0xF0000, 0xFFFFE)) if sign not in used), frozenset(special))

    def text(self, text: str) -> str:
        """Return a text with a seam inside whatever would become a special token."""
        found = sorted((token for token in self.special if len(token) > 1 and token in text), key=len, reverse=True)
        if not found:
            return text
        return re.sub("|".join(map(re.escape, found)), lambda match: match[0][0] + self.seam + match[0][1:], text)

    def json(self, value: Any) -> Any:
        """Return a JSON value with every text in it escaped, keys included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.json(inner) for key, inner in value.items()}
        if isinstance(value, Sequence):
            return [self.json(inner) for inner in value]
        return value


def escape_turns(
    turns: Sequence[Turn], escaper: Escaper, tokenizer: PreTrainedTokenizerBase, *, template: str | None
) -> list[Turn]:
    """Return turns with special tokens escaped."""
    if template is not None and template.startswith("{}"):
        turns = [Turn(turns[0].role, without_lead(turns[0].content, tokenizer)), *turns[1:]]
    return [Turn(turn.role, escaper.text(turn.content), escaper.json(turn.fields)) for turn in turns]


def lead_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer puts before any text, unless `text` already begins with them."""
    plain, whole = ids_of("a", tokenizer), list(tokenizer("a")["input_ids"])
    lead = whole[: next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)]
    return [] if lead and ids_of(text, tokenizer)[: len(lead)] == lead else lead


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenise a text on its own: with beginning-of-text ids once, without end-of-text ids."""
    return lead_ids(text, tokenizer) + ids_of(text, tokenizer)


def without_lead(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a text without the beginning-of-text token that the tokenizer adds anyway."""
    lead = tokenizer.convert_ids_to_tokens(lead_ids("", tokenizer))
    return text.removeprefix("".join(lead))


def ids_behind(before: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenise `text` as the continuation of `before`, whose ids stay as they are.

    Many SentencePiece tokenizers put a space in front of whatever they are given, which is right only at the start.
    """
    if not before:
        return ids_of(text, tokenizer)
    head, whole = ids_of(before, tokenizer), ids_of(before + text, tokenizer)
    return whole[len(head) :] if whole[: len(head)] == head else ids_of(text, tokenizer)


def ids_of(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenise `text` without special tokens around it."""
    # verbose: a text longer than the model takes is cut and counted later, no reason for a warning
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
