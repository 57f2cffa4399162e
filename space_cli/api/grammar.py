"""Answers that follow a JSON schema: at each place only tokens that can still lead to a match are allowed.

The library that knows them is llguidance. It is asked row by row, each with its own history, so that drafts stay exact:
what a row allows depends on the tokens in front of it alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from space_cli.core.engine import embedding_rows
from space_cli.core.stream import common_prefix_length
from space_cli.errors import RunFailed, UsageProblem, first_line

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from space_cli.models.loading import LoadedModel

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
# spacing as json.dumps writes it, so that spaces are forced too
_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def grammar_for(loaded: LoadedModel, schema: Mapping[str, Any], prompt_length: int) -> Grammar:
    """Return the grammar of a schema for answers that follow a prompt of this length.

    Raises:
        UsageProblem: llguidance is not installed, or knows no grammar for the schema or the model's tokenizer.
    """
    if find_spec("llguidance") is None:
        raise UsageProblem("a schema needs llguidance", hint="pip install 'space-decoding[schema]'")
    from llguidance import LLMatcher

    try:
        rules = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_FORM)
    except ValueError as error:
        raise UsageProblem(f"the schema cannot be followed: {first_line(error)}") from error
    matcher = LLMatcher(_tokenizer(loaded.tokenizer, embedding_rows(loaded.model), loaded.eos_token_ids), rules)
    if matcher.is_error():
        raise UsageProblem(f"the schema cannot be followed: {first_line(matcher.get_error())}")
    return Grammar(matcher, prompt_length, loaded.eos_token_ids)


@lru_cache(maxsize=4)
def _tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int, eos_token_ids: frozenset[int]) -> LLTokenizer:
    from llguidance.hf import from_tokenizer

    if not isinstance(tokenizer, PreTrainedTokenizerFast) or not eos_token_ids:
        raise UsageProblem("a schema needs a fast tokenizer with an end of text")
    return from_tokenizer(tokenizer, n_vocab=max(rows, len(tokenizer)), eos_token=sorted(eos_token_ids))


class Grammar(LogitsProcessor):
    """A logits processor that masks the tokens a grammar forbids.

    Args:
        matcher: at its beginning.
        prompt_length: tokens in front of the answer.
        ends: tokens that end it; nothing behind them counts.
    """

    def __init__(self, matcher: LLMatcher, prompt_length: int, ends: frozenset[int]) -> None:
        self._matcher, self._prompt_length, self._ends = matcher, prompt_length, ends
        self._taken: list[int] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the masked scores; of several rows (those of masks) only the first has its full history."""
        if not self._go_to(input_ids[0, self._prompt_length :].tolist()):
            return scores
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        forbidden = np.unpackbits(bits, count=scores.shape[-1], bitorder="little") == 0
        scores = cast(torch.FloatTensor, scores.clone())
        scores[0].masked_fill_(torch.from_numpy(forbidden).to(scores.device), -torch.inf)
        return scores

    def forced(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens that must follow because the grammar leaves no choice."""
        return self._matcher.compute_ff_tokens() if self._go_to(tokens[self._prompt_length :]) else []

    def allowed(self, tokens: Sequence[int], following: Sequence[int]) -> int:
        """Return how many of the tokens in `following` the grammar accepts."""
        if not self._go_to(tokens[self._prompt_length :]):
            return len(following)
        return self._matcher.validate_tokens(list(following))

    def _go_to(self, answer: Sequence[int]) -> bool:
        """Advance the matcher to the end of these tokens; return whether the answer continues there."""
        taken = self._taken
        common = len(taken) if list(answer[: len(taken)]) == taken else common_prefix_length(taken, answer)
        if not self._ends.isdisjoint(answer[common:]):
            return False
        if common < len(self._taken):
            self._matcher.rollback(len(self._taken) - common)
        if common < len(answer):
            self._matcher.consume_tokens(list(answer[common:]))
        self._taken = list(answer)
        self._check()
        return True

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RunFailed(f"the grammar failed: {first_line(self._matcher.get_error())}")
