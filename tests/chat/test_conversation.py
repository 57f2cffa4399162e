import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space_cli.chat.conversation import Chat, load_turns
from space_cli.chat.templates import Turn, request
from space_cli.errors import UsageProblem

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def chatml(tiny_tokenizer):
    """A tokenizer with ChatML's template, whose special tokens are its own."""
    from copy import deepcopy

    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def loaded(tokenizer):
    """What a conversation needs of a loaded model."""

    def decode(token_ids, *, skip_special_tokens=False):
        return str(tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    return SimpleNamespace(name="tiny", tokenizer=tokenizer, decode=decode)


@pytest.mark.parametrize("template", [None, "Human:{}\nAssistant:", "{}"])
def test_a_later_request_goes_on_behind_the_very_tokens_of_the_answer(chatml, template):
    chat = Chat(loaded(chatml), template=template)
    end = chatml.convert_tokens_to_ids("<|im_end|>" if template is None else "<|endoftext|>")
    # letter by letter, as no tokenizer would split it
    answer = [*(chatml("d")["input_ids"] + chatml("e")["input_ids"] + chatml("f")["input_ids"]), end]
    chat.turns.append(Turn("user", "def?"))
    asked = chat.request()
    chat.answered(asked, answer)

    chat.turns.append(Turn("user", "again"))
    later = chat.request()

    assert chat.turns[1] == Turn("assistant", "def")
    assert later.token_ids[: len(asked.token_ids) + len(answer)] == [*asked.token_ids, *answer]
    assert chatml.decode(later.token_ids).endswith(later.text[len(asked.text) :])


def test_an_answer_cut_short_is_closed_by_the_template(chatml):
    chat = Chat(loaded(chatml), template=None)
    chat.turns.append(Turn("user", "go on"))
    asked = chat.request()
    chat.answered(asked, chatml("abc")["input_ids"])

    chat.turns.append(Turn("user", "more"))

    assert (
        chat.request().text == asked.text + "abc<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("template", [None, "Human:{}\nAssistant:"])
def test_special_tokens_in_a_request_are_ordinary_text(chatml, template):
    asked = request([Turn("user", "x<|im_end|><|endoftext|>y")], chatml, template=template)

    special = set(chatml.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    inside = [token for token in asked.token_ids if token in special]
    assert "x<|im_end|><|endoftext|>y" in asked.text
    assert inside == ([chatml.convert_tokens_to_ids("<|im_end|>")] if template is None else [])
    assert chatml.decode(asked.token_ids) == asked.text


def test_undo_forgets_a_request_with_its_answer_and_drop_oldest_the_first(chatml):
    turns = [Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")]
    chat = Chat(loaded(chatml), template=None, turns=turns)

    assert chat.drop_oldest()
    assert chat.turns == [turns[0], *turns[3:]]
    assert not chat.drop_oldest()
    assert chat.undo() == "c"
    assert chat.undo() is None
    assert chat.turns == [turns[0]]


def test_the_system_text_is_set_changed_and_taken_away(chatml):
    chat = Chat(loaded(chatml), template=None, turns=[Turn("user", "a")])

    chat.system = "be brief"
    chat.system = "be long"
    assert chat.turns == [Turn("system", "be long"), Turn("user", "a")]

    chat.system = ""
    assert chat.turns == [Turn("user", "a")]


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=6))
def test_what_was_saved_is_loaded(tmp_path_factory, chatml, texts):
    file = tmp_path_factory.getbasetemp() / "chat.json"
    turns = [Turn("assistant" if n % 2 else "user", text) for n, text in enumerate(texts)]

    Chat(loaded(chatml), template=None, turns=turns).save(file)

    assert load_turns(file)[0] == turns


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "no saved conversation"),
        ("[]", "no saved conversation"),
        (json.dumps({"model": "m", "turns": [{"role": "robot", "content": "x"}]}), "turns.0.role"),
        (json.dumps({"model": "m", "turns": [{"role": "user"}]}), "turns.0.content"),
        (json.dumps({"model": "m", "turns": [], "code": "x"}), "code"),
        ("\udcff", "no saved conversation"),
    ],
)
def test_what_is_no_saved_conversation_is_reported(tmp_path, content, expected):
    (tmp_path / "chat.json").write_bytes(content.encode("utf-8", "surrogateescape"))

    with pytest.raises(UsageProblem, match=expected):
        load_turns(tmp_path / "chat.json")


def test_a_file_that_is_not_there_is_reported(tmp_path):
    with pytest.raises(UsageProblem, match=r"absent\.json: No such file"):
        load_turns(tmp_path / "absent.json")
