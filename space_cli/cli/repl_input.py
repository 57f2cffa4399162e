"""What is typed into `space chat`: completion, keys, history, and texts of several lines."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args, get_origin

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, NestedCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from space_cli.chat.session import ChatSettings

QUOTES = '"""'


class CommandCompleter(Completer):
    """Completes commands and their arguments; prompt_toolkit does not count the slash as part of a word."""

    def __init__(self, commands: Iterable[str]) -> None:
        settings = {name: _choices(field.annotation) for name, field in ChatSettings.model_fields.items()}
        following = {"set": settings} | {name: settings[name] for name in ("mode", "live", "color")}
        names = [command.removeprefix("/") for command in commands]
        self._completer = NestedCompleter.from_nested_dict({name: following.get(name) for name in names})

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Yield the completions of a command or its argument."""
        if document.text.startswith("/") and document.cursor_position:
            inner = Document(document.text[1:], document.cursor_position - 1)
            yield from self._completer.get_completions(inner, complete_event)


def _choices(annotation: object) -> set[str] | None:
    """Return the values of a setting that has a few."""
    return set(get_args(annotation)) if get_origin(annotation) is Literal else None


def key_bindings() -> KeyBindings:
    """Enter sends unless a quoted text is open; Alt-Enter begins a line."""
    keys = KeyBindings()

    @Condition
    def is_open() -> bool:
        from prompt_toolkit.application import get_app

        text = get_app().current_buffer.text
        return text.lstrip().startswith(QUOTES) and text.count(QUOTES) < 2

    @keys.add("enter", filter=~is_open)
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def input_history(state: Path | None) -> History:
    """Return the history of what was typed, kept in a folder for this user alone; in memory without one."""
    if state is None:
        return InMemoryHistory()
    file = state / "history"
    try:
        state.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))


def unquoted(text: str) -> str:
    """Return a text without the quotes that let it have several lines."""
    inner = text.strip()
    if inner.startswith(QUOTES) and inner.endswith(QUOTES) and len(inner) >= 2 * len(QUOTES):
        return inner.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text
