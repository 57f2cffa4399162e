"""An answer's text is what stands behind its prompt's."""

import json
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space_cli.core.stopping import StopRule, TextStream, text_behind

PIECES = ["<s>", "▁", "▁She", "saw", "▁▁▁▁", "\n", "é", "x", "<|end|>"]


def decode(token_ids, skip=True):
    """A SentencePiece decoder: one leading space is dropped; special tokens show nothing."""
    shown = "".join(PIECES[token] for token in token_ids if not (skip and PIECES[token].startswith("<")))
    return shown.replace("▁", " ").removeprefix(" ")


tokens = st.lists(st.integers(0, len(PIECES) - 1), max_size=40)


@given(tokens, tokens)
def test_it_is_what_decoding_both_gives_behind_the_prompts(prompt, answer):
    whole = decode([*prompt, *answer])

    assert text_behind(decode, prompt, answer) == whole[len(decode(prompt)) :]


@given(tokens, tokens)
def test_a_stream_gives_the_same_in_pieces(prompt, answer):
    stream = TextStream(decode, prompt)

    assert "".join(map(stream.push, answer)) + stream.flush() == text_behind(decode, prompt, answer)


def test_a_leading_space_stays():
    assert text_behind(decode, [0, 3], [2, 3]) == " Shesaw"
    assert text_behind(decode, [3, 5, *[8] * 50], [4, 7]) == "    x"


def test_a_stop_string_that_begins_with_a_space_is_found_at_once():
    rule = StopRule(9, stop_strings=(" She",), decode=decode)

    assert rule.begin([3]).push(2) == "stop_string"


MODEL = Path(__file__).parents[3] / "shared" / "models" / "stories260K-hf"


@pytest.mark.skipif(not MODEL.is_dir(), reason="stories260K is not there")
def test_chat_and_bench_keep_the_space_of_a_sentencepiece_model(space, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    (tmp_path / "p.jsonl").write_text('{"prompt": "Lily went to the park."}\n')
    fast = ("--model", MODEL, "--max-new-tokens", "8")

    chatted = space("chat", "--raw", "--mode", "ar", "--prompt", "Lily went to the park.", *fast, "--json", "-")
    shown = space("chat", "--raw", "--mode", "ar", "--prompt", "Lily went to the park.", *fast)
    space("bench", "--suite", "p.jsonl", "--methods", "ar", *fast, "--json", "b.json")

    record = json.loads(chatted.stdout)
    prompt = tokenizer("Lily went to the park.")["input_ids"]
    whole = partial(tokenizer.decode, skip_special_tokens=True)
    expected = whole([*prompt, *record["token_ids"]])[len(whole(prompt)) :]
    assert expected.startswith(" ")
    assert record["text"] == expected
    assert shown.stdout == expected + "\n"
    sample = json.loads((tmp_path / "b.json").read_text())["samples"][0]
    assert sample["text"] == "".join(sample["text_by_step"]) == expected
