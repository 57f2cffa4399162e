"""The Python interface: the same answers as the commands, in pieces, whole, and from coroutines."""

import asyncio
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import space_cli
from space_cli.api import GenerationSettings, Model, Options
from space_cli.api import model as module
from space_cli.core.costs import ASSUMED_COSTS, StepCosts

PROMPT = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n"


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return space_cli.load("nano", engine="eager", dtype="float32")


def test_import_is_light_and_names_are_there():
    code = (
        "import sys, space_cli; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules);"
        "assert 'load' in dir(space_cli); from space_cli import load, UsageProblem; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError):
        space_cli.nothing  # noqa: B018


def test_keyword_arguments_are_the_settings():
    assert list(Options.__annotations__) == list(GenerationSettings.model_fields)


def test_answers_equal_those_of_the_command(model, run_space):
    for options in ((), ("--temperature", "0.8", "--top-p", "0.9", "--seed", "7")):
        done = run_space(
            "chat", "--model", "nano", "--prompt", PROMPT, "--raw", "--max-new-tokens", 60, "--engine", "eager",
            "--dtype", "float32", "--json", "-", *options,
        )  # fmt: skip
        chat = json.loads(done.stdout)
        sampling = {"temperature": 0.8, "top_p": 0.9, "seed": 7} if options else {}

        answer = model.generate(PROMPT, raw=True, max_new_tokens=60, **sampling)

        assert list(answer.token_ids) == chat["token_ids"]
        assert answer.text == chat["text"]
        assert answer.prompt_tokens == chat["prompt_tokens"]


def test_drafts_change_nothing_of_an_answer(model):
    options = {"raw": True, "max_new_tokens": 80, "temperature": 0.7, "seed": 3, "frequency_penalty": 0.4}

    drafted = model.generate(PROMPT, **options)
    plain = model.generate(PROMPT, mode="ar", **options)

    assert drafted.token_ids == plain.token_ids
    assert len(drafted.steps) < len(plain.steps) == len(plain.token_ids)
    assert drafted.accepted_drafts > 0
    assert drafted.tokens_per_step > 1


def test_pieces_are_the_answer_and_say_their_step(model):
    stream = model.stream(PROMPT, raw=True, max_new_tokens=40)

    pieces = list(stream)

    whole = model.generate(PROMPT, raw=True, max_new_tokens=40)
    assert "".join(piece.text for piece in pieces) == whole.text == stream.answer.text
    assert tuple(token for piece in pieces for token in piece.step.tokens) == whole.token_ids
    assert pieces[-1].step.finish_reason == whole.finish_reason


def test_no_part_of_a_stop_string_is_ever_shown(model):
    whole = model.generate(PROMPT, raw=True, max_new_tokens=40).text
    stop = whole[12:18]

    pieces = [piece.text for piece in model.stream(PROMPT, raw=True, max_new_tokens=40, stop=[stop, "never to come"])]

    assert "".join(pieces) == whole[: whole.index(stop)]
    assert model.generate(PROMPT, raw=True, max_new_tokens=40, stop=[stop]).finish_reason == "stop_string"


def test_answers_under_way_do_not_disturb_one_another(model):
    prompts = [PROMPT, "class Stack:\n", "import os\n", "for x in range(3):\n"]
    alone = [model.generate(prompt, raw=True, max_new_tokens=30).token_ids for prompt in prompts]

    streams = [model.stream(prompt, raw=True, max_new_tokens=30) for prompt in prompts]
    running = list(streams)
    while running:
        running = [stream for stream in running if next(stream, None) is not None]

    assert [stream.answer.token_ids for stream in streams] == alone


def test_a_conversation_is_read_from_where_it_ended(model):
    first = [{"role": "user", "content": "Write a function that adds two numbers."}]
    answer = model.generate(first, max_new_tokens=40)

    more = [*first, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "And subtracts?"}]
    again = model.generate(more, max_new_tokens=8)

    assert again.cached_tokens >= answer.prompt_tokens
    assert again.token_ids == Model(model.loaded).generate(more, max_new_tokens=8).token_ids


def test_an_answer_that_is_left_gives_its_cache_back(model):
    stream = model.stream(PROMPT, raw=True, max_new_tokens=100)
    next(stream)
    before = stream.answer

    del stream

    assert before.finish_reason is None
    assert model.generate(PROMPT, raw=True, max_new_tokens=4).cached_tokens == before.prompt_tokens - 1


def test_logprobs_are_the_models_own(model):
    answer = model.generate(PROMPT, raw=True, max_new_tokens=12, temperature=1.2, seed=5, logprobs=3)

    ids = model.prompt_ids(PROMPT, raw=True)
    with torch.no_grad():
        logits = model.loaded.model(torch.tensor([[*ids, *answer.token_ids]])).logits[0].float()
    expected = logits.log_softmax(-1)
    assert len(answer.logprobs) == len(answer.token_ids)
    for place, (token, entry) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        row = expected[len(ids) - 1 + place]
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-3)
        assert [each.token_id for each in entry.top] == row.topk(3).indices.tolist()


def test_a_frequency_penalty_counts_what_the_answer_has(model):
    loop = "x = 1\n" * 8

    plain = model.generate(loop, raw=True, max_new_tokens=40).token_ids
    varied = model.generate(loop, raw=True, max_new_tokens=40, frequency_penalty=2.0).token_ids
    # the first token of an answer has nothing to be counted
    assert varied[0] == plain[0]
    assert len(set(varied)) > len(set(plain))


def test_a_prediction_saves_calls_and_changes_nothing(model):
    plain = model.generate(PROMPT, raw=True, max_new_tokens=60, temperature=1.2, seed=9)

    predicted = model.generate(PROMPT, raw=True, max_new_tokens=60, temperature=1.2, seed=9, prediction=plain.text)
    wrong = model.generate(PROMPT, raw=True, max_new_tokens=60, temperature=1.2, seed=9, prediction="no " * 50)

    assert predicted.token_ids == wrong.token_ids == plain.token_ids
    assert len(predicted.steps) < 0.6 * len(plain.steps)


def test_a_corpus_saves_calls_and_changes_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain = model.generate(PROMPT, raw=True, max_new_tokens=60)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "answer.txt").write_text(PROMPT + plain.text)

    knows = space_cli.load("nano", engine="eager", dtype="float32", corpus=[tmp_path / "corpus"])
    found = knows.generate(PROMPT, raw=True, max_new_tokens=60)

    assert found.token_ids == plain.token_ids
    assert len(found.steps) < 0.6 * len(plain.steps)


def test_coroutines_answer_as_the_others_do(model):
    async def both():
        pieces = [piece async for piece in model.astream(PROMPT, raw=True, max_new_tokens=20)]
        answers = await asyncio.gather(*(model.agenerate(PROMPT, raw=True, max_new_tokens=20) for _ in range(3)))
        return pieces, answers

    pieces, answers = asyncio.run(both())

    expected = model.generate(PROMPT, raw=True, max_new_tokens=20).text
    assert {"".join(piece.text for piece in pieces), *(answer.text for answer in answers)} == {expected}


def test_a_cancelled_coroutine_stops_within_a_step(model):
    async def cancelled():
        task = asyncio.create_task(model.agenerate("import", raw=True, max_new_tokens=400, temperature=1.5, seed=1))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await model.agenerate(PROMPT, raw=True, max_new_tokens=2)

    assert len(asyncio.run(cancelled()).token_ids) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature -1"),
        ({"heat": 1}, "heat"),
        ({"stop": [""]}, "stop"),
        ({"logprobs": 21}, "logprobs 21"),
    ],
)
def test_wrong_options_are_reported_in_one_line(model, options, message):
    with pytest.raises(space_cli.UsageProblem, match=message):
        model.generate("x", **options)


@pytest.mark.parametrize("prompt", [[], [{"role": "robot", "content": "x"}], [{"role": "user"}], "word " * 20_000])
def test_prompts_that_cannot_be_answered_are_refused(model, prompt):
    with pytest.raises(space_cli.UsageProblem):
        model.generate(prompt)


def test_step_costs_are_measured_when_an_answer_first_drafts_by_them(monkeypatch):
    found, asked = StepCosts({1: 1.0}), []
    loaded = SimpleNamespace(
        name="tiny", mask_token_ids=(1,), masks_per_group=3, prompt_template=None, costs=ASSUMED_COSTS
    )
    loaded.drafts = lambda candidates, **_: asked.append(candidates)
    measured = SimpleNamespace(**vars(loaded) | {"costs": found})
    monkeypatch.setattr(module, "measured", lambda _: measured)
    model = Model(loaded)

    model.drafts("ar")
    model.drafts("space", 2)
    assert model.loaded is loaded
    model.drafts("space")

    assert model.loaded.costs is found
    assert asked == [2, None]
