import copy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space_cli.chat.templates import DEFAULT_TEMPLATE, Turn, request
from space_cli.core.collator import IGNORED
from space_cli.errors import UsageProblem
from space_cli.training.chat_format import encode, prompt_ids, rendered
from space_cli.training.data import Completion, Conversation, Text, read_examples

SHARED = Path(__file__).parents[3] / "shared" / "data"
END = "<|endoftext|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
# the last answer is shown with its thinking, those before it without
QWEN3 = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and loop.last %}<think></think>\n{% endif %}{{ m.content }}",
)

# what fools a tokenizer: special tokens spelled out, pieces of them, seams, braces, spaces at the ends
SPELLED = [END, "<|mask1|>", "<|im_end|>", "<|im_end", "|>", "<", "{}", "{", "\U000f0000", " ", "\n", "é", "\u2028"]
texts = st.lists(st.sampled_from(SPELLED) | st.text(max_size=5), min_size=1, max_size=6).map("".join).filter(str.strip)
turns = st.lists(st.builds(Turn, st.sampled_from(["user", "assistant"]), texts), max_size=4).map(
    lambda said: (Turn("user", "q"), *said, Turn("assistant", "a"))
)
conversations = st.builds(Conversation, turns, st.just("data.jsonl:1"))
completions = st.builds(Completion, texts, texts, st.just("data.jsonl:1"))
plain_texts = st.builds(Text, texts, st.just("data.jsonl:1"))


@pytest.fixture(scope="module")
def chatml(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mask1|>", "<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module")
def with_bos(tiny_tokenizer):
    """The tokenizer with a beginning of text that it puts in front by itself."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    front = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=front)
    return tokenizer


@pytest.fixture(scope="module", params=["form", "bos", "chatml"])
def tokenizer(request, tiny_tokenizer, with_bos, chatml):
    return {"form": tiny_tokenizer, "bos": with_bos, "chatml": chatml}[request.param]


def said(*turns):
    return Conversation(tuple(Turn(*turn.split(" ", 1)) for turn in turns), "data.jsonl:1")


def learned(encoded):
    """The runs of ids that carry loss."""
    runs, is_open = [], False
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if label != IGNORED:
            runs = [*runs[:-1], [*runs[-1], token]] if is_open else [*runs, [token]]
        is_open = label != IGNORED
    return runs


def whole(example, tokenizer, template=None):
    return encode(example, tokenizer, template=template, max_length=10**9)


# What holds of every example


@given(example=conversations | completions | plain_texts)
def test_labels_are_the_ids_or_carry_no_loss(tokenizer, example):
    encoded = whole(example, tokenizer)

    assert len(encoded.labels) == len(encoded.input_ids)
    assert all(label in (token, IGNORED) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    assert any(label != IGNORED for label in encoded.labels)


@given(example=conversations | completions | plain_texts)
def test_decoding_gives_the_text_that_is_shown(tokenizer, example):
    assert tokenizer.decode(whole(example, tokenizer).input_ids) == rendered(example, tokenizer, template=None)


@given(example=conversations | completions)
def test_each_prompt_is_a_beginning_of_the_ids_and_loss_begins_behind_it(tokenizer, example):
    encoded = whole(example, tokenizer)

    prompts = prompt_ids(example, tokenizer, template=None)

    assert len(prompts) == len(learned(encoded))
    for prompt in prompts:
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.labels[len(prompt) - 1] == IGNORED != encoded.labels[len(prompt)]


@given(example=completions)
def test_the_learned_part_of_a_pair_is_the_completion_and_its_end(tokenizer, example):
    (run,) = learned(whole(example, tokenizer))

    assert tokenizer.decode(run) == example.completion + END
    assert run[-1] == tokenizer.eos_token_id


@given(example=conversations)
def test_the_learned_parts_of_a_conversation_are_its_answers_and_their_ends(tokenizer, example):
    end = "<|im_end|>" if tokenizer.chat_template else END

    runs = learned(whole(example, tokenizer))

    answers = [turn.content for turn in example.turns if turn.role == "assistant"]
    assert [tokenizer.decode(run) for run in runs] == [answer + end for answer in answers]


@given(example=completions | plain_texts)
def test_no_special_token_comes_from_the_data(tokenizer, example):
    special = [token for token in whole(example, tokenizer).input_ids if token in tokenizer.all_special_ids]

    assert tokenizer.decode(special) == (tokenizer.bos_token or "") + END


@given(example=conversations)
def test_no_special_token_comes_from_an_answer(tokenizer, example):
    runs = learned(whole(example, tokenizer))

    assert all(set(tokenizer.all_special_ids).isdisjoint(run[:-1]) for run in runs)


@given(example=conversations | completions | plain_texts, max_length=st.integers(1, 40))
def test_what_is_too_long_is_cut_at_its_end_and_counted(tokenizer, example, max_length):
    uncut = whole(example, tokenizer)

    encoded = encode(example, tokenizer, template=None, max_length=max_length)

    assert uncut.cut == 0
    assert encoded.input_ids == uncut.input_ids[:max_length]
    assert encoded.labels == uncut.labels[:max_length]
    assert encoded.cut == max(0, len(uncut.input_ids) - max_length)


# Prompts are those of inference


@given(text=st.text(min_size=1, max_size=30).filter(str.strip))
def test_the_prompt_is_tokenised_as_at_inference(tokenizer, text):
    completion = Completion(text, "a", "data.jsonl:1")
    conversation = said(f"user {text}", "assistant a")

    assert prompt_ids(completion, tokenizer, template=None) == (tokenizer(text)["input_ids"],)
    assert prompt_ids(conversation, tokenizer, template="<{}>") == (tokenizer(f"<{text}>")["input_ids"],)


@given(text=st.text(max_size=30))
def test_the_prompt_of_a_chat_template_is_tokenised_as_at_inference(chatml, text):
    history = [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]
    asked = [*history, {"role": "user", "content": text}]

    first, second = prompt_ids(
        Conversation(tuple(Turn(**turn) for turn in [*asked, history[1]]), "data.jsonl:1"), chatml, template=None
    )

    assert first == chatml.apply_chat_template(history[:1], add_generation_prompt=True)["input_ids"]
    assert second == chatml.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]


@given(turns=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=9)), min_size=1))
@pytest.mark.parametrize("template", [None, "<{}>", "{}:", "<s>{}</s>"])
def test_whatever_is_said_before_an_answer_training_meets_the_text_of_inference(with_bos, template, turns):
    before = [Turn(*turn) for turn in turns if turn[0] != "assistant"] or [Turn("user", "q")]
    before = [*(Turn(*turn) for turn in turns), *before]

    (*_, prompt) = prompt_ids(Conversation((*before, Turn("assistant", "a")), "x"), with_bos, template=template)

    assert with_bos.decode(prompt) == with_bos.decode(request(before, with_bos, template=template).token_ids)


def test_a_text_has_no_prompt(tokenizer):
    assert prompt_ids(Text("abc", "data.jsonl:1"), tokenizer, template=None) == ()


def test_the_beginning_of_text_stands_in_front_once(with_bos):
    bos = with_bos.bos_token_id

    for example in (Text("<s>a", ""), Completion("<s>a", "b", ""), said("user <s>a", "assistant b")):
        for template in (DEFAULT_TEMPLATE, "<s>{}:"):
            encoded = whole(example, with_bos, template)

            assert encoded.input_ids[0] == bos
            assert encoded.labels[0] == IGNORED
            assert encoded.input_ids.count(bos) == 1


def test_without_an_end_of_text_nothing_is_appended(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None

    assert tokenizer.decode(whole(Text("a", ""), tokenizer).input_ids) == "a"
    assert rendered(Completion("a", "b", ""), tokenizer, template=None) == "ab"


@pytest.fixture(scope="module")
def spacing():
    """A tokenizer that puts a space in front of whatever it is given, and behind special tokens, as Llama 2's does."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"▁": 0, "a": 1, "b": 2, "</s>": 3}, []))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Replace("▁", " ")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_an_answer_gets_no_space_that_the_tokenizer_puts_in_front_of_texts(spacing):
    encoded = whole(Completion("ab", " ba", ""), spacing)

    assert encoded.input_ids == [0, 1, 2, 0, 2, 1, 3]
    assert encoded.labels == [IGNORED] * 3 + [0, 2, 1, 3]


def test_a_later_prompt_gets_the_spaces_that_the_tokenizer_puts_into_the_whole(spacing):
    example = said("user a", "assistant b", "user b", "assistant a")

    first, second = prompt_ids(example, spacing, template="b{}a")

    assert first == spacing("baa")["input_ids"] == [0, 2, 1, 1]
    assert second == spacing("baab</s>bba")["input_ids"] == [0, 2, 1, 1, 2, 3, 0, 2, 2, 1]


# Forms


def test_a_form_is_filled_once_for_each_answer(tiny_tokenizer):
    example = said("system s", "user q", "assistant a", "user r", "user {}", "assistant b", "user t")

    text = rendered(example, tiny_tokenizer, template=None)

    assert text == f"Human:s\n\nq\nAssistant:a{END}Human:r\n\n{{}}\nAssistant:b{END}"


def test_a_template_takes_the_place_of_the_chat_template(chatml):
    assert rendered(said("user q", "assistant a"), chatml, template="Q{}A") == f"QqAa{END}"


def test_special_tokens_of_a_template_are_special(chatml):
    start = chatml.convert_tokens_to_ids("<|im_start|>")

    (prompt,) = prompt_ids(said("user <|im_start|>", "assistant a"), chatml, template="<|im_start|>{}\n")

    assert prompt.count(start) == 1
    assert prompt[0] == start


@pytest.mark.parametrize("template", ["", "Human:", "{}{}", "Human:{text}"])
def test_a_template_without_its_one_gap_is_refused(tiny_tokenizer, template):
    with pytest.raises(UsageProblem, match=r"must hold \{\} once; the user's text goes there"):
        whole(said("user q", "assistant a"), tiny_tokenizer, template)


@pytest.mark.parametrize("template", [None, "Q{}A"])
def test_a_first_turn_that_answers_nothing_carries_no_loss(chatml, template):
    example = said("assistant hello", "user q", "assistant a")

    runs = learned(whole(example, chatml, template))

    assert [chatml.decode(run) for run in runs] == ["a" + ("<|im_end|>" if template is None else END)]


# Chat templates


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_what_a_template_writes_behind_the_end_of_a_turn_carries_no_loss(chatml):
    encoded = whole(said("user q", "assistant a", "user r", "assistant b"), chatml)

    text = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nr<|im_end|>\n"
    assert chatml.decode(encoded.input_ids) == f"{text}<|im_start|>assistant\nb<|im_end|>"
    assert [chatml.decode(run) for run in learned(encoded)] == ["a<|im_end|>", "b<|im_end|>"]


def test_a_template_that_writes_its_own_beginning_gets_no_other(with_bos):
    tokenizer = with_template(with_bos, LLAMA2)

    text = rendered(said("user q ", "assistant a", "user r", "assistant b"), tokenizer, template=None)

    assert text == f"<s>[INST] q [/INST] a {END}<s>[INST] r [/INST] b {END}"
    runs = learned(whole(said("user q ", "assistant a"), tokenizer))
    assert [tokenizer.decode(run) for run in runs] == [f" a {END}"]


def test_a_template_without_an_end_of_turn_gets_the_end_of_text_behind_the_last_answer(chatml):
    tokenizer = with_template(chatml, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")

    text = rendered(said("user q", "assistant a", "user r", "assistant b"), tokenizer, template=None)

    assert text == f"user: q\nassistant: a\nuser: r\nassistant: b\n{END}"


def test_an_answer_that_later_turns_show_otherwise_carries_no_loss(chatml):
    tokenizer = with_template(chatml, QWEN3)
    example = said("user q", "assistant a", "user r", "assistant b")

    runs = learned(whole(example, tokenizer))

    assert [tokenizer.decode(run) for run in runs] == ["<think></think>\nb<|im_end|>"]
    assert len(prompt_ids(example, tokenizer, template=None)) == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages[::-1] %}{{ m.content }}{% endfor %}", "does not put the last answer behind its prompt"),
        ("{{ messages[0].content }}", "does not put the last answer behind its prompt; use a template like 'Human:{}"),
        ("{{ raise_exception('System role\nnot supported') }}", "refuses the conversation: System role not supported"),
        ("{{ messages[0].content + 1 }}", "refuses the conversation: can only concatenate str"),
        ("{% if %}", "refuses the conversation: "),
    ],
)
def test_a_template_that_does_not_fit_is_reported_in_one_line(chatml, template, message):
    with pytest.raises(UsageProblem) as problem:
        whole(said("user q", "assistant a"), with_template(chatml, template))

    assert str(problem.value).startswith("data.jsonl:1: the chat template ")
    assert message in str(problem.value)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("name", ["gpteacher_codegen.jsonl.gz", "oasst_en_pairs.jsonl.gz"])
def test_real_data_are_encoded(tokenizer, name):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not there")
    examples = read_examples(str(SHARED / name), limit=50).examples

    for example in examples:
        encoded = whole(example, tokenizer)

        answers = [turn.content for turn in example.turns if turn.role == "assistant"]
        end = "<|im_end|>" if tokenizer.chat_template else END
        assert [tokenizer.decode(run) for run in learned(encoded)] == [answer + end for answer in answers]
