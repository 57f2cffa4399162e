"""Structured outputs by OpenAI's own client: from pydantic, by schema, and as any object."""

import json
from typing import Literal

import jsonschema
import openai
import pydantic
import pytest

MESSAGES = [{"role": "user", "content": "Describe a person."}]


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    mood: Literal["glad", "sad"]
    numbers: list[int] = pydantic.Field(max_length=2)


@pytest.fixture
def client(server):
    with openai.OpenAI(**server.key_and_base(), max_retries=0) as client:
        yield client


def test_pydantic_models_come_back(client):
    whole = client.chat.completions.parse(model="nano", messages=MESSAGES, response_format=Person, max_tokens=200)
    with client.chat.completions.stream(
        model="nano", messages=MESSAGES, response_format=Person, max_tokens=200
    ) as stream:
        streamed = stream.get_final_completion()

    assert isinstance(whole.choices[0].message.parsed, Person)
    assert streamed.choices[0].message.parsed == whole.choices[0].message.parsed


def test_a_schema_holds_for_sampled_answers_too(client):
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}
    reply = client.chat.completions.create(
        model="nano",
        messages=MESSAGES,
        response_format={"type": "json_schema", "json_schema": {"name": "flags", "schema": schema, "strict": True}},
        temperature=1.3,
        seed=4,
        n=3,
    )

    for choice in reply.choices:
        jsonschema.validate(json.loads(choice.message.content), schema)


def test_any_object(client):
    reply = client.chat.completions.create(
        model="nano", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=40
    ).choices[0]

    assert reply.message.content.startswith("{")


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}},
        {"type": "yaml"},
    ],
)
def test_what_is_no_form_is_refused(client, response_format):
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="nano", messages=MESSAGES, response_format=response_format)
