"""A conversation with one model: its turns, the tokens they were read and written in, and its file."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from space_cli.chat.templates import Prefix, Role, Turn, request
from space_cli.core.stopping import text_behind
from space_cli.errors import UsageProblem, first_invalid, opening
from space_cli.files import atomic_write
from space_cli.models.registry import located

if TYPE_CHECKING:
    from collections.abc import Sequence

    from space_cli.models.loading import LoadedModel


class _SavedTurn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Role
    content: str


class _SavedChat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    model: str
    turns: list[_SavedTurn]


class Chat:
    """A conversation: an optional system turn, then requests and answers.

    Args:
        loaded: the model that answers.
        template: a template with one {} in place of the tokenizer's own, or None.
        turns: what was said before.
    """

    def __init__(self, loaded: LoadedModel, *, template: str | None, turns: Sequence[Turn] = ()) -> None:
        self.loaded = loaded
        self.template = template
        self.turns = list(turns)
        self._prefixes: list[Prefix] = []

    @property
    def system(self) -> str:
        """The system turn's text, or nothing."""
        return self.turns[0].content if self.turns and self.turns[0].role == "system" else ""

    @system.setter
    def system(self, text: str) -> None:
        said = self.turns[1:] if self.system else self.turns
        self.turns = [Turn("system", text), *said] if text else said

    def request(self) -> Prefix:
        """Return what the model is given to answer the last turn.

        Raises:
            UsageProblem: the chat template refuses the conversation.
        """
        return request(self.turns, self.loaded.tokenizer, template=self.template, prefixes=self._prefixes)

    def answered(self, asked: Prefix, token_ids: Sequence[int]) -> None:
        """Add the model's answer to a request; its tokens are remembered as they are."""
        shown = partial(self.loaded.decode, skip_special_tokens=True)
        self.turns.append(Turn("assistant", text_behind(shown, asked.token_ids, token_ids)))
        said = asked.text + text_behind(self.loaded.decode, asked.token_ids, token_ids)
        self._prefixes.append(Prefix(said, [*asked.token_ids, *token_ids]))

    def undo(self) -> str | None:
        """Forget the last request and its answer; return the request, or None where there is none."""
        place = next((n for n in range(len(self.turns) - 1, -1, -1) if self.turns[n].role == "user"), None)
        if place is None:
            return None
        asked = self.turns[place].content
        del self.turns[place:]
        return asked

    def drop_oldest(self) -> bool:
        """Forget the first request and its answer, the system turn apart; False where only the last request is left."""
        asked = [n for n, turn in enumerate(self.turns) if turn.role == "user"]
        if len(asked) < 2:
            return False
        del self.turns[asked[0] : asked[1]]
        return True

    def save(self, file: Path) -> None:
        """Write the conversation.

        Raises:
            OSError: it could not be written.
        """
        turns = [_SavedTurn(role=turn.role, content=turn.content) for turn in self.turns]
        atomic_write(file, _SavedChat(model=located(self.loaded.name), turns=turns).model_dump_json(indent=1) + "\n")


def load_turns(file: Path) -> tuple[list[Turn], str]:
    """Return the turns of a saved conversation, and the model it was had with.

    Raises:
        UsageProblem: it cannot be read, or is none.
    """
    with opening(file):
        content = file.read_bytes()
    try:
        saved = _SavedChat.model_validate(json.loads(content))
    except ValidationError as error:
        raise UsageProblem(f"{file}: no saved conversation: {first_invalid(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UsageProblem(f"{file}: no saved conversation: {error}") from error
    return [Turn(turn.role, turn.content) for turn in saved.turns], saved.model
