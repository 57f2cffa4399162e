"""Chat templates with ways of their own: every answer is learned, with the end that decoding stops at."""

import copy

import pytest
from transformers import GenerationConfig

from space_cli.chat.templates import Turn, request
from space_cli.core.collator import IGNORED
from space_cli.models.stops import repair, stop_ids, turn_end
from space_cli.training.chat_format import encode, prompt_ids
from space_cli.training.data import Conversation

EOS = "<|endoftext|>"
TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "[gMASK]",
    "<sop>",
    "<think>",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# microsoft/Phi-3-mini-4k-instruct: the end of text behind every finished rendering
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# THUDM/glm-4-9b-chat-hf: no end of turn
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# deepseek-ai/DeepSeek-R1-Distill-*: the prompt opens a thought, finished answers are shown without
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}"
    "<|assistant|>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


@pytest.fixture
def family(tiny_tokenizer):
    def make(template):
        from tokenizers import AddedToken

        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.add_tokens([AddedToken(token, special=token != "<think>") for token in TOKENS])
        tokenizer.chat_template = template
        return tokenizer

    return make


def said(*turns):
    return Conversation(tuple(Turn(*turn.split(" ", 1)) for turn in turns), "data.jsonl:1")


def learned(example, tokenizer):
    encoded = encode(example, tokenizer, template=None, max_length=10**6)
    text, runs = encoded.input_ids, []
    for place, label in enumerate(encoded.labels):
        if label != IGNORED and (place == 0 or encoded.labels[place - 1] == IGNORED):
            runs.append([])
        if label != IGNORED:
            runs[-1].append(text[place])
    return runs


TWO = said("user q", "assistant a", "user r", "assistant b")


@pytest.mark.parametrize(
    ("template", "end", "answers"),
    [
        (CHATML, "<|im_end|>", ["a<|im_end|>", "b<|im_end|>"]),
        (PHI3, "<|end|>", ["a<|end|>", "b<|end|>"]),
        (GLM, "<|user|>", ["a<|user|>", "b<|user|>"]),
        (R1, "<|im_end|>", ["a<|im_end|>", "\n</think>\n\nb<|im_end|>"]),
    ],
)
def test_every_answer_is_learned_with_the_end_that_decoding_stops_at(family, template, end, answers):
    tokenizer = family(template)

    runs = learned(TWO, tokenizer)

    assert [tokenizer.decode(run) for run in runs] == answers
    assert turn_end(tokenizer) == end
    stops = stop_ids(tokenizer, GenerationConfig(eos_token_id=tokenizer.eos_token_id))
    assert {run[-1] for run in runs} <= stops


@pytest.mark.parametrize("template", [CHATML, PHI3, GLM, R1])
def test_the_last_prompt_is_that_of_inference(family, template):
    tokenizer = family(template)

    *_, last = prompt_ids(TWO, tokenizer, template=None)

    assert last == request(TWO.turns[:-1], tokenizer, template=None).token_ids


def test_a_thought_in_the_data_is_learned(family):
    tokenizer = family(R1)

    (run,) = learned(said("user q", "assistant <think>\nhm\n</think>\n\na"), tokenizer)

    assert tokenizer.decode(run) == "hm\n</think>\n\na<|im_end|>"


def test_an_answer_that_begins_as_a_thought_does_is_one_all_the_same(family):
    tokenizer = family(R1)

    runs = learned(said("user q", "assistant <thing>", "user r", "assistant <th"), tokenizer)

    assert [tokenizer.decode(run) for run in runs] == ["<thing><|im_end|>", "\n</think>\n\n<th<|im_end|>"]


# Stop ids


def test_the_end_of_a_turn_stops_where_the_generation_config_names_another(family):
    tokenizer = family(CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=[7])) == {7, tokenizer.eos_token_id, end}
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=None)) == {tokenizer.eos_token_id, end}


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}", "{{ raise_exception('no') }}", "{% if %}"])
def test_a_template_that_names_no_end_adds_none(family, template):
    tokenizer = family(template)

    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=5)) == {5, tokenizer.eos_token_id}


# Generation configs that cannot be saved


def test_sampling_beside_do_sample_false_is_repaired_with_a_word(tmp_path):
    config = GenerationConfig(do_sample=False, temperature=0.9, top_p=0.6, pad_token_id=0)
    with pytest.raises(ValueError, match="temperature"):
        config.save_pretrained(tmp_path)

    assert "do_sample is set to true" in repair(config)

    config.save_pretrained(tmp_path)
    assert repair(config) is None
