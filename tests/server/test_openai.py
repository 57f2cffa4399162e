"""OpenAI's own client, as programs use it."""

import asyncio
import json

import openai
import pytest

MESSAGES = [{"role": "user", "content": "Write a function that adds two numbers."}]
PROMPT = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n"


@pytest.fixture
def client(server):
    with openai.OpenAI(**server.key_and_base(), max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def chat(run_space_once):
    """What `space chat` answers; remembered."""
    known = {}

    def ask(*options):
        if options not in known:
            done = run_space_once(
                "chat", "--model", "nano", "--engine", "eager", "--dtype", "float32", "--json", "-", *options
            )
            known[options] = json.loads(done.stdout)
        return known[options]

    return ask


def test_a_chat_answers_as_the_command_does(client, chat):
    for options, fields in (
        ((), {}),
        (
            ("--temperature", "0.8", "--top-p", "0.9", "--seed", "7"),
            {"temperature": 0.8, "top_p": 0.9, "seed": 7},
        ),
    ):
        own = chat("--prompt", MESSAGES[0]["content"], "--max-new-tokens", "60", *options)

        reply = client.chat.completions.create(model="nano", messages=MESSAGES, max_completion_tokens=60, **fields)

        assert reply.choices[0].message.content == own["text"]
        assert reply.usage.completion_tokens == own["tokens"]
        assert reply.usage.prompt_tokens == own["prompt_tokens"]


def test_a_stream_is_the_whole_answer_in_pieces(client):
    whole = client.chat.completions.create(model="nano", messages=MESSAGES, max_tokens=60)

    chunks = list(
        client.chat.completions.create(
            model="nano", messages=MESSAGES, max_tokens=60, stream=True, stream_options={"include_usage": True}
        )
    )

    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    # several tokens came out of some model calls
    assert chunks[-1].usage.completion_tokens_details.accepted_prediction_tokens > 0
    assert len(pieces) < whole.usage.completion_tokens


def test_a_stream_that_is_left_ends_the_request(client):
    stream = client.chat.completions.create(
        model="nano", messages=MESSAGES, max_tokens=4000, temperature=1.5, seed=1, stream=True
    )
    next(iter(stream))

    stream.close()

    reply = client.chat.completions.create(model="nano", messages=MESSAGES, max_tokens=4)
    assert reply.usage.completion_tokens == 4


def test_a_prediction_is_a_draft(client):
    fields = {"model": "nano", "messages": MESSAGES, "max_tokens": 60, "temperature": 1.2, "seed": 9}
    plain = client.chat.completions.create(**fields)
    text = plain.choices[0].message.content

    for content in (text, [{"type": "text", "text": text}]):
        reply = client.chat.completions.create(**fields, prediction={"type": "content", "content": content})

        assert reply.choices[0].message.content == text
        accepted = reply.usage.completion_tokens_details.accepted_prediction_tokens
        assert accepted > plain.usage.completion_tokens_details.accepted_prediction_tokens


def test_several_requests_at_once_answer_as_each_alone(server):
    prompts = [PROMPT, "class Stack:\n", "import os\n", "for x in range(3):\n"]

    async def ask(together):
        async with openai.AsyncOpenAI(**server.key_and_base(), max_retries=0) as client:

            def one(prompt):
                return client.completions.create(model="nano", prompt=prompt, max_tokens=50, temperature=0.7, seed=3)

            if together:
                return await asyncio.gather(*map(one, prompts))
            return [await one(prompt) for prompt in prompts]

    alone, together = asyncio.run(ask(together=False)), asyncio.run(ask(together=True))

    assert [reply.choices[0].text for reply in alone] == [reply.choices[0].text for reply in together]


def test_completions_go_on_behind_the_prompt(client, chat):
    own = chat("--prompt", PROMPT, "--raw", "--max-new-tokens", "40")

    reply = client.completions.create(model="nano", prompt=PROMPT, max_tokens=40)
    echoed = client.completions.create(model="nano", prompt=[PROMPT, "import"], max_tokens=40, echo=True, n=2)
    pieces = list(client.completions.create(model="nano", prompt=PROMPT, max_tokens=40, stream=True))

    assert reply.choices[0].text == own["text"]
    assert [choice.index for choice in echoed.choices] == [0, 1, 2, 3]
    assert echoed.choices[1].text == PROMPT + own["text"]
    assert echoed.choices[3].text.startswith("import")
    assert "".join(chunk.choices[0].text for chunk in pieces) == own["text"]


def test_tokens_are_a_prompt_too(client):
    by_text = client.completions.create(model="nano", prompt="import os", max_tokens=8, logprobs=0)
    again = client.completions.create(model="nano", prompt=[5, 6, 7], max_tokens=8)

    assert by_text.usage.completion_tokens == 8
    assert again.usage.prompt_tokens == 3


def test_further_answers_have_further_seeds(client):
    def texts(n, seed):
        reply = client.completions.create(model="nano", prompt=PROMPT, max_tokens=20, temperature=1.2, seed=seed, n=n)
        return [choice.text for choice in reply.choices], reply.usage

    three, usage = texts(3, 11)

    assert len(set(three)) > 1
    assert three[2] == texts(1, 13)[0][0]
    assert usage.prompt_tokens == texts(1, 13)[1].prompt_tokens


def test_what_samples_is_honoured(client):
    plain = client.completions.create(model="nano", prompt="x = 1\n" * 8, max_tokens=40).choices[0]
    penalised = client.completions.create(
        model="nano", prompt="x = 1\n" * 8, max_tokens=40, frequency_penalty=2.0
    ).choices[0]
    narrow = client.completions.create(
        model="nano", prompt=PROMPT, max_tokens=40, temperature=1.5, seed=2, extra_body={"top_k": 1}
    ).choices[0]
    greedy = client.completions.create(model="nano", prompt=PROMPT, max_tokens=40).choices[0]

    assert penalised.text != plain.text
    assert narrow.text == greedy.text


def test_an_answer_ends_in_front_of_a_stop(client):
    whole = client.completions.create(model="nano", prompt=PROMPT, max_tokens=40).choices[0].text
    stop = whole[10:14]

    for stops in (stop, [stop, "never to come"]):
        reply = client.completions.create(model="nano", prompt=PROMPT, max_tokens=40, stop=stops).choices[0]
        assert (reply.text, reply.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_log_probabilities_of_both_kinds(client):
    reply = client.chat.completions.create(
        model="nano", messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=2
    ).choices[0]
    streamed = client.chat.completions.create(
        model="nano", messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=2, stream=True
    )
    text = client.completions.create(model="nano", prompt=PROMPT, max_tokens=6, logprobs=3).choices[0]

    tokens = reply.logprobs.content
    assert "".join(token.token for token in tokens) == reply.message.content
    assert all(token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob for token in tokens)
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in tokens)
    by_chunk = [chunk.choices[0].logprobs for chunk in streamed]
    assert [token.token for each in by_chunk if each for token in each.content] == [token.token for token in tokens]
    assert text.logprobs.text_offset[0] == 0
    assert len(text.logprobs.tokens) == len(text.logprobs.top_logprobs) == 6
    assert "".join(text.logprobs.tokens) == text.text


def test_models_are_those_of_the_list(client):
    assert "nano" in [model.id for model in client.models.list()]
    assert client.models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        client.models.retrieve("/etc/passwd")


@pytest.mark.parametrize(
    ("fields", "kind", "reason"),
    [
        ({"model": "gpt-4o"}, openai.NotFoundError, "gpt-4o"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, openai.BadRequestError, "context"),
        ({"messages": [{"role": "user", "content": "x" * 500_000}]}, openai.BadRequestError, "context"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, openai.BadRequestError, "content"),
        ({"logit_bias": {"1": 5}}, openai.BadRequestError, "logit_bias"),
        ({"modalities": ["audio"]}, openai.BadRequestError, "modalities"),
        ({"n": 100}, openai.BadRequestError, "n: "),
        ({"stop": [""]}, openai.BadRequestError, "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_is_refused_in_openais_form(client, fields, kind, reason, stream):
    request = {"model": "nano", "messages": MESSAGES, "max_tokens": 4, "stream": stream} | fields

    with pytest.raises(kind, match=reason) as caught:
        client.chat.completions.create(**request)

    assert caught.value.body["type"]
    assert "/" not in caught.value.body["message"].replace("/v1/models", "")


@pytest.mark.parametrize("prompt", [[], [10**9], [-1], [[5], []]])
def test_prompts_without_sense_are_refused(client, prompt):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="nano", prompt=prompt, max_tokens=4)
