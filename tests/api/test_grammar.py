"""Answers under a schema: all of them hold, and drafts change nothing of them."""

import json
import random

import jsonschema
import pytest
import torch

import space_cli
from space_cli.api.grammar import grammar_for

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SHAPE = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"kind": {"const": "circle"}, "radius": {"type": "integer", "minimum": 1, "maximum": 99}},
            "required": ["kind", "radius"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {"kind": {"const": "square"}, "label": {"type": ["string", "null"], "maxLength": 8}},
            "required": ["kind", "label"],
            "additionalProperties": False,
        },
    ]
}
TREE = {
    "$defs": {
        "leaf": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}, "date": {"type": "string", "pattern": "^20[0-9]{2}-[01][0-9]$"}},
            "required": ["on", "date"],
            "additionalProperties": False,
        }
    },
    "type": "array",
    "items": {"$ref": "#/$defs/leaf"},
    "minItems": 1,
    "maxItems": 2,
}
SCHEMAS = {"person": PERSON, "shape": SHAPE, "tree": TREE}


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return space_cli.load("nano", engine="eager", dtype="float32")


def check(model, schema, prompt, **options):
    """Answer with and without drafts; return the answer with."""
    drafted = model.generate(prompt, json_schema=schema, max_new_tokens=160, **options)
    plain = model.generate(prompt, json_schema=schema, max_new_tokens=160, mode="ar", **options)
    assert drafted.token_ids == plain.token_ids
    assert drafted.finish_reason == "eos"
    jsonschema.validate(json.loads(drafted.text), schema)
    return drafted


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3}, {"repetition_penalty": 1.3}])
def test_answers_hold_and_equal_ar(model, name, options):
    check(model, SCHEMAS[name], "Describe it as JSON.", **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_hundred_prompts(model, name):
    words = random.Random(1)
    for seed in range(100):
        prompt = " ".join(words.choices(["def", "return", "a", "JSON", "class", "self", "of", "{", "]", "red"], k=8))
        check(model, SCHEMAS[name], prompt, temperature=(seed % 3) * 0.7, seed=seed)


def test_what_is_forced_costs_no_call_of_its_own(model):
    answer = check(model, PERSON, "Describe a person as JSON.")

    assert len(answer.steps) < 0.7 * len(answer.token_ids)


def test_candidates_are_grammatical(model):
    answer = model.generate("Describe a person as JSON.", json_schema=PERSON, max_new_tokens=80)

    grammar, tokens = grammar_for(model.loaded, PERSON, 0), []
    for step in answer.steps:
        # every slot holds the first token of a continuation, or one behind a candidate that stands in front of it
        assert all(
            grammar.allowed([*tokens, *prefix], [token])
            for prefix, token in first_candidates(step)
            if model.loaded.eos_token_ids.isdisjoint(prefix)
        )
        tokens += step.tokens


def first_candidates(step):
    """Yield accepted candidates, and those that stood beside the correction, behind the tokens in front of them."""
    accepted = step.tokens[: step.accepted]
    for place, token in enumerate(accepted):
        yield accepted[:place], token
    for token in step.rejected:
        yield accepted, token


def test_json_mode_is_any_object(model):
    answer = model.generate("x = ", raw=True, json_mode=True, max_new_tokens=200, temperature=1.0, seed=2)

    assert answer.text.startswith("{")
    if answer.finish_reason == "eos":
        assert isinstance(json.loads(answer.text), dict)


@pytest.mark.parametrize("schema", [{"type": "objekt"}, {"$ref": "#/none"}, {"type": "string", "pattern": "(?=x)"}])
def test_a_schema_that_cannot_be_followed_is_refused_in_one_line(model, schema):
    with pytest.raises(space_cli.UsageProblem, match="schema") as caught:
        model.generate("x", json_schema=schema)

    assert "\n" not in str(caught.value)


def test_the_command_answers_by_a_schema(run_space, tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SHAPE))

    done = run_space("chat", "--model", "nano", "--prompt", "A shape.", "--schema", file, "--engine", "eager")
    anything = run_space("chat", "--model", "nano", "--prompt", "{}", "--json-mode", "--engine", "eager")

    jsonschema.validate(json.loads(done.stdout), SHAPE)
    assert anything.stdout.startswith("{")


@pytest.mark.parametrize(
    ("text", "options"),
    [("[1]", ()), ("{", ()), (None, ()), ("{}", ("--json-mode",))],
    ids=["list", "cut", "none", "two"],
)
def test_wrong_schema_files_are_reported_in_one_line(run_space, tmp_path, text, options):
    file = tmp_path / "schema.json"
    if text is not None:
        file.write_text(text)

    done = run_space("chat", "--model", "nano", "--prompt", "x", "--schema", file, *options)

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--schema" in done.stderr
