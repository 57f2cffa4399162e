import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from space_cli.cli.repl_input import CommandCompleter


@pytest.mark.parametrize(
    ("typed", "completions"),
    [
        ("/mo", {"mode", "model"}),
        ("/mode ", {"ar", "space"}),
        ("/set te", {"temperature"}),
        ("/set live ", {"steps", "text"}),
        ("/model na", set()),
        ("ask /mo", set()),
    ],
)
def test_commands_settings_and_their_values_complete(typed, completions):
    completer = CommandCompleter(["/mode", "/model", "/set", "/live", "/color", "/save"])

    found = {each.text for each in completer.get_completions(Document(typed), CompleteEvent())}

    assert found == completions
