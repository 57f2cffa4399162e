"""The tokenizer of nano: 4096 byte-level BPE tokens in which an indentation is one token and a newline another.

python -m space_cli.nano.tokenizer
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from space_cli.nano import recipe_parser

END = "<|endoftext|>"
SPECIAL = [END, "<|user|>", "<|assistant|>", "<|system|>"]
# a run of spaces stays whole, digits stand alone, and `_name` is a piece as ` name` is
_PIECES = r"\n| {2,}|[ _]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"
_CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train(texts: Iterable[str], vocabulary: int = 4096) -> PreTrainedTokenizerFast:
    """Return a tokenizer trained on `texts`; it puts the end-of-text token in front of a prompt, as training does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=24,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        chat_template=_CHAT,
    )


def main() -> None:
    """Train on functions.jsonl."""
    root = recipe_parser(__doc__).parse_args().root
    rows = map(json.loads, (root / "functions.jsonl").read_text("utf-8").splitlines())
    train(row["prompt"] + row["completion"] for row in rows).save_pretrained(root / "tokenizer")


if __name__ == "__main__":
    main()
