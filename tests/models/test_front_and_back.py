"""What stands in front of a text and behind it, in bench, verify, chat and training."""

import copy

import pytest
from tokenizers import processors
from transformers import Phi3Config

from space_cli.chat.templates import Turn, encode, request
from space_cli.core.engine import context_length
from space_cli.training.chat_format import prompt_ids
from space_cli.training.data import Completion


@pytest.fixture
def framed(tiny_tokenizer):
    """A tokenizer that puts a beginning in front of every text and an end behind it."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    frame = [("<s>", tokenizer.bos_token_id), (tokenizer.eos_token, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {tokenizer.eos_token}", special_tokens=frame
    )
    return tokenizer


@pytest.mark.parametrize("text", ["def f():", "<s>def f():"])
def test_one_beginning_and_no_end_whoever_asks(framed, text):
    assert framed(text)["input_ids"][-1] == framed.eos_token_id
    expected = [framed.bos_token_id, *framed("def f():", add_special_tokens=False)["input_ids"]]

    assert encode(text, framed) == expected
    assert request([Turn("user", text)], framed, template="{}").token_ids == expected
    assert prompt_ids(Completion(text, "x", ""), framed, template=None) == (expected,)


def test_bench_and_verify_give_that_too(framed, tiny_models, tmp_path, space):
    import json

    tiny_models["llama"].save_pretrained(tmp_path / "m")
    framed.save_pretrained(tmp_path / "m")
    (tmp_path / "p.jsonl").write_text('{"prompt": "<s>def f():"}\n')

    done = space(
        "bench", "--model", "m", "--suite", "p.jsonl", "--methods", "ar", "--max-new-tokens", "2",
        "--dtype", "float32", "--json", "r.json",
    )  # fmt: skip

    assert done.returncode == 0, done
    (sample,) = json.loads((tmp_path / "r.json").read_text())["samples"]
    assert sample["prompt_tokens"] == len(encode("def f():", framed))


def test_long_rope_ends_the_context_where_its_factors_change():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    config = Phi3Config(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=256,
        original_max_position_embeddings=64, rope_parameters=rope, pad_token_id=0,
    )  # fmt: skip

    assert context_length(config) == 64
    assert context_length(Phi3Config(max_position_embeddings=256, sliding_window=None)) == 256
