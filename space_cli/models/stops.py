"""The ids that end an answer: found once, for training, distillation, measuring and decoding alike.

A model may be trained to end its turns with one token while its generation config names another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from space_cli.chat.templates import Turn, render
from space_cli.errors import UsageProblem

_ASKED, _ANSWERED = "Which colour?", "Green43"
_SAMPLED_ONLY = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


def stop_ids(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig) -> frozenset[int]:
    """Return every id that ends an answer: the generation config's, the tokenizer's, and the chat template's."""
    named = config.eos_token_id
    found = {named} if isinstance(named, int) else set(named or ())
    found |= {tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set()
    end = turn_end(tokenizer)
    return frozenset(found if end is None else found | {cast(int, tokenizer.convert_tokens_to_ids(end))})


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the token that stands behind an answer in the chat template; None where there is none.

    In a template without an end of turn (GLM's) that is the mark of the next speaker, with which such models end.
    """
    if not tokenizer.chat_template:
        return None
    asked, answered = Turn("user", _ASKED), Turn("assistant", _ANSWERED)
    for turns in ([asked, answered, asked], [asked, answered]):
        try:
            text = render(turns, tokenizer, "the template")
        except UsageProblem:
            continue
        behind = text.partition(_ANSWERED)[2].lstrip()
        known = [token.content for token in tokenizer.added_tokens_decoder.values()] + tokenizer.all_special_tokens
        return max((token for token in known if token and behind.startswith(token)), key=len, default=None)
    return None


def repair(config: GenerationConfig) -> str | None:
    """Repair a generation config in place so that it can be saved; return what was changed, or None.

    Published ones can say `do_sample: false` beside a temperature, which transformers refuses to write.

    Raises:
        UsageProblem: it is beyond repair.
    """
    word = None
    try:
        config.validate(strict=True)
    except ValueError:
        if not config.do_sample and any(getattr(config, name, None) is not None for name in _SAMPLED_ONLY):
            config.do_sample = True
            word = "generation_config.json: do_sample is set to true, since sampling is configured beside it"
        try:
            config.validate(strict=True)
        except ValueError as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageProblem(f"generation_config.json cannot be saved: {reason}", hint="mend it first") from error
    return word


@contextmanager
def no_defaults_of_its_own(model: PreTrainedModel) -> Iterator[None]:
    """Keep `generate` from filling in what many checkpoints ask for: sampling, penalties, beams, another cache."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
