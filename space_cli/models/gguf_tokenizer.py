"""Builds a tokenizer from the metadata of a GGUF file; it gives the token ids that llama.cpp gives.

Source: llama.cpp's `src/llama-vocab.cpp`, whose patterns these are; where it spells them out for its own engine, the
tokenizer.json that it names is followed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from space_cli.errors import UsageProblem

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# not the tokenizer.json's classes of letters: what is no letter from a to z counts as a capital, and a mark as neither
_CAPITAL, _SMALL = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_HEADED = r"[^\r\n\p{L}\p{N}]?"
_CASED = (
    f"{_HEADED}{_CAPITAL}*{_SMALL}+%(end)s|{_HEADED}{_CAPITAL}+{_SMALL}*%(end)s"
    r"|%(digits)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_DIGITS = (r"\p{N}", *_GPT2)
_LLAMA3 = (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _MARKS,)
_QWEN2 = (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _MARKS,)
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_GPT4O = (_CASED % {"end": _CONTRACTIONS + "?", "digits": r"\p{N}{1,3}"},)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

_SPLITS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "gigachat", "mellum"), _GPT2),
    **dict.fromkeys(("a.x-4.0", "modern-bert", "granite-docling"), _GPT2),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    "mellum2": _DIGITS,
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("lfm2", "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    **dict.fromkeys(("solar-open", "grok-2"), _QWEN2),
    "qwen35": _QWEN35,
    "tekken": (_CASED % {"end": "", "digits": r"\p{N}"},),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), _GPT4O),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK3),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "(?:(?!\\s)[一-龥ࠀ-一가-\ud7ff])+", r"\p{N}"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", *_GPT2, "[0-9][0-9][0-9]"),
}
"""Patterns by `tokenizer.ggml.pre`; what one leaves, the next one splits."""

_WHOLE_WORDS_FIRST = {*(name for name, split in _SPLITS.items() if split is _LLAMA3), "tekken"} - {
    "dbrx",
    "smaug-bpe",
    "glm4",
    "chatglm-bpe",
}
"""Those that look a word up as it is before they merge its letters, and put BOS in front by default."""

_ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "[e~["),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    # those of code infilling
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
}
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")


def gguf_tokenizer(metadata: Mapping[str, Any], where: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer that the metadata describe, with its chat template.

    Raises:
        UsageProblem: of a kind that is not supported, or damaged.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UsageProblem(
            f"{where}: its tokenizer is of kind {kind!r}, which is not supported", hint="supported: gpt2 and llama"
        )
    tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(metadata.get("tokenizer.ggml.tokens") or [])]
    ids = {token: number for number, token in enumerate(tokens)}
    if not tokens or len(ids) < len(tokens):
        raise UsageProblem(f"{where}: is damaged: its vocabulary is empty or has a token twice")
    tokenizer = _byte_level(metadata, ids, where) if kind == "gpt2" else _sentencepiece(metadata, ids)
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    ends = end_ids(metadata)
    special = {n for n, type_ in enumerate(types) if type_ in (_UNKNOWN, _CONTROL)} | ends
    strips = _strips(metadata)
    tokenizer.add_special_tokens([_added(tokens[n], strips=strips) for n in sorted(special)])
    tokenizer.add_tokens(
        [AddedToken(tokens[n], normalized=False) for n, type_ in enumerate(types) if type_ == _USER_DEFINED]
    )
    roles = _roles(metadata, kind)
    tokenizer.post_processor = _surroundings(metadata, roles, tokens)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=metadata.get(f"{metadata.get('general.architecture')}.context_length"),
        # what has a role is taken for special wherever it stands, which a comma is not
        **{name: tokens[number] for name, number in roles.items() if number in special},
    )
    fast.chat_template = metadata.get("tokenizer.chat_template")
    return fast


def end_ids(metadata: Mapping[str, Any]) -> frozenset[int]:
    """Return the ids that end an answer: those named by the metadata, and known end-of-turn tokens."""
    tokens: Sequence[str] = metadata.get("tokenizer.ggml.tokens") or []
    ends = {number for number, token in enumerate(tokens) if token in _ENDS}
    ids = (metadata.get(f"tokenizer.ggml.{key}") for key in _END_KEYS)
    ends |= {number for number in ids if isinstance(number, int) and 0 <= number < len(tokens)}
    texts = {tokens[number] for number in ends}
    # in these families <|end|> ends one of the parts of an answer
    if "<|end|>" in texts and (
        {"<|return|>", "<|call|>"} <= texts or ("<|flush|>" in texts and texts & {"<|call|>", "<|calls|>"})
    ):
        ends -= {number for number in ends if tokens[number] == "<|end|>"}
    if "<|tool_response>" in texts:
        ends -= {number for number in ends if tokens[number] == "</s>"}
    return frozenset(ends)


def _byte_level(metadata: Mapping[str, Any], ids: dict[str, int], where: str) -> Tokenizer:
    """Return byte-level BPE as the metadata have it."""
    pre = metadata.get("tokenizer.ggml.pre") or "default"
    if pre not in _SPLITS:
        raise UsageProblem(
            f"{where}: its pre-tokenizer {pre!r} is not supported", hint=f"supported: {', '.join(sorted(_SPLITS))}"
        )
    merges = []
    for merge in metadata.get("tokenizer.ggml.merges") or []:
        # the first part may be a space
        place = merge.find(" ", 1)
        pair = (merge[:place], merge[place + 1 :])
        if place > 0 and pair[0] in ids and pair[1] in ids and pair[0] + pair[1] in ids:
            merges.append(pair)
    model = models.BPE(vocab=ids, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST)
    tokenizer = Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], ids: dict[str, int]) -> Tokenizer:
    """Return SentencePiece's BPE, which merges the neighbours with the highest score first."""
    scores = metadata.get("tokenizer.ggml.scores") or [-float(number) for number in range(len(ids))]
    merges = [
        (-scores[number], token[:place], token[place:])
        for token, number in ids.items()
        for place in range(1, len(token))
        if token[:place] in ids and token[place:] in ids
    ]
    merges.sort(key=lambda merge: merge[0])
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    model = models.BPE(
        vocab=ids,
        merges=[(left, right) for _, left, right in merges],
        unk_token=next((token for token, number in ids.items() if number == unknown), None),
        fuse_unk=False,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if has_prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)
    return tokenizer


def _strips(metadata: Mapping[str, Any]) -> bool:
    """Return whether special tokens strip the white space after them, as those of a few models do."""
    name = str(metadata.get("general.name", "")).lower()
    return "phi-3" in name or "phi3" in name


def _added(token: str, *, strips: bool) -> AddedToken:
    strips = strips and token not in ("<unk>", "<s>", "<|endoftext|>")
    return AddedToken(token, normalized=False, special=True, rstrip=strips)


def _roles(metadata: Mapping[str, Any], kind: str) -> dict[str, int]:
    """Return the ids of tokens with a role, by transformers' names."""
    default = {"bos": 1, "eos": 2, "unknown": 0} if kind == "llama" else {}
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    count = len(metadata["tokenizer.ggml.tokens"])
    ids = {names[role]: metadata.get(f"tokenizer.ggml.{role}_token_id", default.get(role)) for role in names}
    return {name: number for name, number in ids.items() if isinstance(number, int) and 0 <= number < count}


def _surroundings(metadata: Mapping[str, Any], roles: Mapping[str, int], tokens: Sequence[str]) -> Any:
    """Return the post-processor that adds BOS and EOS as the metadata say."""
    is_sentencepiece = metadata["tokenizer.ggml.model"] == "llama"
    by_default = is_sentencepiece or metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS_FIRST
    front = roles.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", by_default) else None
    behind = roles.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if front is None and behind is None:
        return processors.ByteLevel(trim_offsets=False)
    pieces = [*([] if front is None else [tokens[front]]), "$A", *([] if behind is None else [tokens[behind]])]
    special = [(tokens[number], number) for number in (front, behind) if number is not None]
    return processors.TemplateProcessing(single=pieces, special_tokens=special)
