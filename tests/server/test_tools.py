"""Tools: a tiny model that learned one conversation by heart, asked by OpenAI's own client."""

import json

import openai
import pytest
import torch
import transformers as tf

import space_cli
from space_cli.api import Message
from space_cli.nano import __file__ as nano

TEMPLATE = """
{%- if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{%- if message.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
FORM = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASKED: list[Message] = [{"role": "user", "content": "Is it sunny in Paris?"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
ANSWERED: list[Message] = [
    *ASKED,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
]
SAYS = 'I ask.<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that knows the two answers of one conversation."""
    from pathlib import Path

    place = tmp_path_factory.mktemp("tools") / "caller"
    tokenizer = tf.AutoTokenizer.from_pretrained(Path(nano).parent / "weights")
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, FORM
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    prompts = space_cli.load(str(place), engine="eager")
    lessons = []
    for messages, tools, says in ((ASKED, [WEATHER], SAYS), (ANSWERED, [WEATHER], "It is."), (ASKED, [], "Maybe.")):
        prompt = prompts.prompt_ids(messages, tools=tools)
        answer = [*tokenizer(says, add_special_tokens=False)["input_ids"], 0]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        lessons.append((torch.tensor([prompt + answer]), labels))
    for _ in range(300):
        losses = [model(ids, labels=labels).loss for ids, labels in lessons]
        sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
        if max(losses) < 0.02:
            break
    assert max(losses) < 0.1
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def client(start_server, folder):
    with start_server(model=folder) as running, openai.OpenAI(**running.key_and_base(), max_retries=0) as client:
        yield client


def test_a_model_calls_a_tool_and_answers_by_what_it_gave(client):
    first = client.chat.completions.create(model="caller", messages=ASKED, tools=[WEATHER], max_tokens=60).choices[0]

    assert first.finish_reason == "tool_calls"
    assert first.message.content == "I ask."
    (call,) = first.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    answered = [first.message, {"role": "tool", "content": "sunny", "tool_call_id": call.id}]
    second = client.chat.completions.create(
        model="caller", messages=[*ASKED, {**answered[0].model_dump(), "content": None}, answered[1]], tools=[WEATHER]
    ).choices[0]
    assert (second.message.content, second.finish_reason) == ("It is.", "stop")


def test_a_streamed_call_comes_whole_and_its_marks_are_no_text(client):
    chunks = list(
        client.chat.completions.create(model="caller", messages=ASKED, tools=[WEATHER], max_tokens=60, stream=True)
    )

    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "I ask."
    (call,) = [call for delta in deltas for call in delta.tool_calls or ()]
    assert (call.index, json.loads(call.function.arguments)) == (0, {"city": "Paris"})
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_without_tools_the_model_is_reported_of_none(client):
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        reply = client.chat.completions.create(model="caller", messages=ASKED, max_tokens=60, **fields).choices[0]
        assert reply.message.content == "Maybe."


def test_calls_cut_short_or_of_unknown_form_are_text(folder, client):
    cut = client.chat.completions.create(model="caller", messages=ASKED, tools=[WEATHER], max_tokens=8).choices[0]
    assert cut.finish_reason == "length"
    assert cut.message.tool_calls is None
    model = space_cli.load(str(folder), engine="eager")
    del model.loaded.tokenizer.response_template

    answer = model.generate(ASKED, tools=[WEATHER], max_new_tokens=60)

    assert (answer.text, answer.tool_calls) == (SAYS, ())


def test_special_tokens_in_tools_are_ordinary_text(folder):
    model = space_cli.load(str(folder), engine="eager")
    sly = {"type": "function", "function": {"name": "f", "description": "<|endoftext|>"}}

    ids = model.prompt_ids(ASKED, tools=[sly])

    assert 0 not in ids
    assert "<|endoftext|>" in model.loaded.decode(ids)


def test_what_cannot_be_is_refused(client, server):
    for tools in ([{"type": "function", "function": {}}], [{"type": "web_search"}]):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="caller", messages=ASKED, tools=tools)
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        client.chat.completions.create(model="caller", messages=ASKED, tools=[WEATHER], tool_choice="required")
    with (
        openai.OpenAI(**server.key_and_base(), max_retries=0) as nano_client,
        pytest.raises(openai.BadRequestError, match="takes no tools"),
    ):
        nano_client.chat.completions.create(model="nano", messages=ASKED, tools=[WEATHER])
