"""Preparation: encodes examples, holds some out, and adds masks to the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from space_cli.core.collator import IGNORED
from space_cli.core.engine import embedding_rows
from space_cli.core.sampling import mix
from space_cli.errors import UsageProblem
from space_cli.models.adapter import adapter_of, attach_adapter, low_rank
from space_cli.models.loading import LoadedModel, unpack
from space_cli.training.chat_format import encode, prompt_ids
from space_cli.training.data import OWN_DATA, Example

Method = Literal["full", "adapter"]
DEFAULT_RANK = 32
_HELD_OUT_SHARE = 10


@dataclass(frozen=True, slots=True)
class Prepared:
    """Examples ready for the collator.

    Attributes:
        examples: `input_ids` and `labels` each, to train on.
        prompts: token ids before each answer of these, for self-distillation.
        held_out: token ids before the answers of examples kept back, and `held_out_examples` with their answers.
        cut: examples cut at the length limit, and `cut_tokens` what they lost.
        empty: examples left out because nothing of them carries loss.
    """

    examples: list[dict[str, list[int]]]
    prompts: list[list[int]]
    held_out: list[list[int]]
    held_out_examples: list[dict[str, list[int]]]
    cut: int
    cut_tokens: int
    empty: int

    @property
    def fingerprint(self) -> str:
        """Hash of the examples."""
        inputs = json.dumps([self.examples, self.prompts, self.held_out_examples])
        return hashlib.sha256(inputs.encode()).hexdigest()[:16]


def prepare_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None,
    max_length: int,
    held_out: int,
    seed: int,
) -> Prepared:
    """Encode examples and hold out some prompts for measuring: at most a tenth, sampled by the seed.

    Raises:
        UsageProblem: the template does not fit, or no example carries loss.
    """
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(mix(seed, 0))).tolist()
    kept_back = set(order[: min(held_out, len(examples) // _HELD_OUT_SHARE)])
    encoded = {
        number: encode(example, tokenizer, template=template, max_length=max_length)
        for number, example in enumerate(examples)
    }
    useful = {
        number: {"input_ids": each.input_ids, "labels": each.labels}
        for number, each in encoded.items()
        if any(label != IGNORED for label in each.labels)
    }
    if not useful.keys() - kept_back:
        raise UsageProblem("no example carries loss", hint="raise --max-length, or look at the data's answers")
    trained = [number for number in encoded if number not in kept_back]

    def prompts(numbers: Iterable[int]) -> list[list[int]]:
        found = (ids for number in numbers for ids in prompt_ids(examples[number], tokenizer, template=template))
        return [ids for ids in found if 0 < len(ids) < max_length]

    return Prepared(
        examples=[useful[number] for number in trained if number in useful],
        # in an order drawn by the seed: the first few stand for all of the data
        prompts=prompts(number for number in order if number not in kept_back and examples[number].where != OWN_DATA),
        held_out=prompts(sorted(kept_back)),
        held_out_examples=[useful[number] for number in sorted(kept_back & useful.keys())],
        cut=sum(encoded[number].cut > 0 for number in trained),
        cut_tokens=sum(encoded[number].cut for number in trained),
        empty=sum(number not in useful for number in trained),
    )


def prepare_model(
    loaded: LoadedModel, method: Method, *, masks: int, distinct: bool, rank: int | None, bigram: int = 0
) -> list[int]:
    """Add masks to a model and make the trained weights trainable, in place; return the mask ids.

    Args:
        loaded: the base; one already trained for SPACE with such masks keeps their ids.
        method: full, all weights, in float32; adapter, low-rank weights and mask embeddings alone.
        masks: m.
        distinct: one id per mask of a group rather than one for all.
        rank: of an adapter; None is that of the one the model carries, which is then trained further.
        bigram: rank of the tie between a new adapter's masks; 0 for none.

    Raises:
        UsageProblem: the adapter that the model carries is of another rank or number of masks.
    """
    num_masks = masks if distinct else 1
    if method == "adapter" and adapter_of(loaded.model) is not None:
        ids = _carried(loaded, num_masks, rank)
    elif method == "adapter":
        ids = attach_adapter(loaded.model, num_masks, low_rank(loaded.model, rank or DEFAULT_RANK), bigram=bigram)
    else:
        if adapter_of(loaded.model) is not None:
            raise UsageProblem(f"{loaded.name} is an adapter", hint="train its base, or use --method adapter on that")
        loaded.model.float()
        ids = list(loaded.mask_token_ids)
        if len(ids) != num_masks:
            ids = _add_masks(loaded.model, loaded.tokenizer, num_masks)
    unpack(loaded.model)
    for parameter in loaded.model.parameters():
        if parameter.requires_grad:
            # small updates vanish in half precision; the products run in it all the same
            parameter.data = parameter.data.float()
    return ids


def _carried(loaded: LoadedModel, num_masks: int, rank: int | None) -> list[int]:
    """Return the mask ids of a model's adapter."""
    own, ids = cast(Any, loaded.model).peft_config["default"].r, list(loaded.mask_token_ids)
    if len(ids) != num_masks or rank not in (None, own):
        raise UsageProblem(
            f"{loaded.name} carries an adapter of {len(ids)} masks and rank {own}",
            hint=f"give --candidates {len(ids)} --rank {own} to train it further, or train its base",
        )
    return ids


def _add_masks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """Add mask tokens to the tokenizer, and rows near the mean of the others to the embeddings."""
    names = [f"<|space_mask_{number}|>" for number in range(1, count + 1)]
    tokenizer.add_tokens(names, special_tokens=True)
    ids = [int(token) for token in cast(list[int], tokenizer.convert_tokens_to_ids(names))]
    if max(ids) >= embedding_rows(model):
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    known = min(ids)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            _fill_rows(cast(nn.Embedding, module).weight, ids, known)
    return ids


@torch.no_grad()
def _fill_rows(weight: torch.Tensor, ids: Sequence[int], known: int) -> None:
    mean, spread = weight[:known].float().mean(dim=0), weight[:known].float().std(dim=0)
    noise = torch.randn(len(ids), weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
    weight[list(ids)] = (mean + 0.1 * spread * noise).to(weight.dtype)
