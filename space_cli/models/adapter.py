"""Adapters: the base model frozen, with low-rank weights and mask embeddings that act on mask slots alone.

Mask ids lie behind the base's vocabulary, so no text can hold one, and the id of a slot tells its kind. Whatever is no
mask goes through the base's own weights and gets an exact zero added: SPACE then equals the untouched base model.

The low-rank layers are peft's, quantised bases included; what peft has no word for, a gate per slot, is laid over them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from space_cli.compile.packing import Adapter, LowRank
from space_cli.core.drafting import Bigram
from space_cli.errors import UsageProblem, first_line
from space_cli.models.checkpoint import ADAPTER_FILE

_MASKS_KEY = "mask_embeddings"
_BIGRAM_PREFIX = "bigram."
_INNER = 256
_ROWS_FOR_MEAN = _ROWS_AT_ONCE = 4096
_EXPERTS = re.compile(r"experts|router|mlp\.gate$|moe\.gate$")


def low_rank(model: PreTrainedModel, rank: int) -> LoraConfig:
    """Return peft's config of an adapter on all linear layers but the output embeddings, experts and their routers.

    Experts get tokens sorted anew, where no gate per slot holds. Layers are named one by one: peft would extend its own
    "all-linear" to expert weights.
    """
    output = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output and not _EXPERTS.search(name)
    ]
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)


class SlotGate:
    """Knows which slots of a call are masks; as a forward hook, zeroes a low-rank update for all others.

    Attributes:
        is_mask: (B, S) bool.
        only_masks: whether all of them are.
    """

    def __init__(self) -> None:
        self.is_mask: torch.Tensor | None = None
        self.only_masks = False

    def __call__(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """Return the update (..., D) of mask slots, zero for all others."""
        assert self.is_mask is not None
        # experts and routers see the slots of a batch in one row
        gate = self.is_mask.reshape(output.shape[:-1]).to(output.device)
        return output * gate[..., None].to(output.dtype)


class BigramLayer(nn.Module):
    """What a token says of the next one, of low rank, to be added to the logits of the mask that guesses that one.

    Masks guess independently of each other; this ties a guess to the token in front of it, which may be a guess itself.
    It reads the base's embeddings of both, and has no part in the model's calls.

    Args:
        masks: m.
        width: D.
        rank: r.

    Attributes:
        inner: (D, 256), and `previous` (256, r): of the token in front, with a SiLU between.
        following: (D, r).
        gates: (m, r), by mask.
    """

    def __init__(self, masks: int, width: int, rank: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner = nn.Parameter(torch.randn(width, _INNER, generator=generator) * width**-0.5)
        self.previous = nn.Parameter(torch.randn(_INNER, rank, generator=generator) * _INNER**-0.5)
        self.following = nn.Parameter(torch.zeros(width, rank))
        self.gates = nn.Parameter(torch.ones(masks, rank))

    def forward(
        self, logits: torch.Tensor, embeddings: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Return (S, V) logits with what (S) tokens say of the next ones.

        Args:
            logits: (S, V).
            embeddings: (V, D) of all tokens.
            tokens: (S) int64.
            mask: (S) int64, which one of a group guesses; 0 is the first.
        """
        before = self.of_previous(embeddings[tokens]) * self.gates[mask.clamp(max=len(self.gates) - 1)]
        return torch.addmm(logits, before.to(logits.dtype), self.of_following(embeddings).to(logits.dtype).t())

    def of_previous(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return (S, r) of the (S, D) embeddings of tokens in front."""
        inner = _normed(embeddings) @ self.inner.to(embeddings.dtype)
        return functional.silu(inner) @ self.previous.to(embeddings.dtype)

    def of_following(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return (S, r) of the (S, D) embeddings of tokens that may follow."""
        return _normed(embeddings) @ self.following.to(embeddings.dtype)


def _normed(embeddings: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(embeddings, embeddings.shape[-1:])


class MaskEmbedding(nn.Module):
    """The base's input embeddings with trained rows for mask ids behind the vocabulary; sets the gate of each call.

    Args:
        base: the model's own embeddings, which stay as they are.
        masks: number of mask ids.
        layers: the low-rank layers, switched off in calls without masks: plain decoding pays nothing for them.
        gate: shared with the layers' hooks.

    Attributes:
        bigram: ties the masks' guesses; None without one.
        masks_known: whether the running call has masks, where the caller tells; None is read off the ids, which on a
            GPU waits for them and cannot be part of a graph.
    """

    def __init__(self, base: nn.Embedding, masks: int, layers: Sequence[LoraLayer], gate: SlotGate) -> None:
        super().__init__()
        self.base, self.layers, self.gate = base, layers, gate
        self.bigram: BigramLayer | None = None
        self.masks_known: bool | None = None
        rows = torch.arange(0, base.num_embeddings, max(1, base.num_embeddings // _ROWS_FOR_MEAN))
        with torch.no_grad():
            # through the base's forward: some models scale what they look up
            embeddings = base(rows.to(base.weight.device)).float()
        noise = torch.randn(masks, embeddings.shape[-1], generator=torch.Generator().manual_seed(0)).to(
            embeddings.device
        )
        self.masks = nn.Parameter(embeddings.mean(dim=0) + 0.1 * embeddings.std(dim=0) * noise)

    @property
    def num_embeddings(self) -> int:
        """Ids that can be read, masks included."""
        return self.base.num_embeddings + len(self.masks)

    @property
    def num_text_embeddings(self) -> int:
        """Ids of text, which come before those of masks."""
        return self.base.num_embeddings

    @property
    def weight(self) -> torch.Tensor:
        """The base's rows, of which output embeddings may be a view."""
        return self.base.weight

    @property
    def text_embeddings(self) -> torch.Tensor:
        """(V, D), of all tokens of text."""
        with torch.no_grad():
            rows: torch.Tensor = self.base(torch.arange(self.base.num_embeddings, device=self.masks.device))
        return rows

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return (B, S, D) embeddings of (B, S) ids."""
        size = self.base.num_embeddings
        is_mask = input_ids >= size
        self.gate.is_mask = is_mask
        active = bool(is_mask.any()) if self.masks_known is None else self.masks_known
        if self.layers and self.layers[0].disable_adapters is active:
            for layer in self.layers:
                layer._disable_adapters = not active
        text: torch.Tensor = self.base(input_ids.masked_fill(is_mask, 0))
        if not active:
            return text
        masks = self.masks[(input_ids - size).clamp(min=0)].to(text.dtype)
        return torch.where(is_mask[..., None], masks, text)


def attach_adapter(model: PreTrainedModel, masks: int, lora: LoraConfig, *, bigram: int = 0) -> list[int]:
    """Freeze the model and add a new adapter in place; return the mask ids.

    Args:
        model: the base.
        masks: number of mask ids.
        lora: peft's config of the low-rank layers.
        bigram: rank of the tie between neighbouring masks; 0 for none.

    Raises:
        UsageProblem: the model has no linear layers that can carry an adapter.
    """
    for parameter in model.parameters():
        parameter.requires_grad = False
    base = cast(nn.Embedding, model.get_input_embeddings())
    try:
        with warnings.catch_warnings():
            # peft tells of transposed layers and unused patterns, which it then handles itself
            warnings.simplefilter("ignore")
            inject_adapter_in_model(lora, model)
    except ValueError as error:
        raise UsageProblem(f"no adapter can be laid over this model: {first_line(error)}") from error
    # transformers' own mark: quantised weights may then be trained upon, and checkpointing lets gradients through
    cast(Any, model)._hf_peft_config_loaded = True
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    gate = SlotGate()
    for layer in layers:
        layer.lora_B["default"].register_forward_hook(gate)
    embedding = MaskEmbedding(base, masks, layers, gate)
    if bigram:
        embedding.bigram = BigramLayer(masks, embedding.masks.shape[1], bigram).to(base.weight.device)
    model.set_input_embeddings(embedding)
    return list(range(base.num_embeddings, base.num_embeddings + masks))


def adapter_of(model: PreTrainedModel) -> MaskEmbedding | None:
    """Return the adapter's embeddings, or None if there is no adapter."""
    embedding = model.get_input_embeddings()
    return embedding if isinstance(embedding, MaskEmbedding) else None


def bigram_of(model: PreTrainedModel) -> Bigram | None:
    """Return what ties the guesses of the adapter's masks, as drafts use it, or None if there is none."""
    embedding = adapter_of(model)
    if embedding is None or embedding.bigram is None:
        return None
    layer, before, after = embedding.bigram, [], []
    with torch.inference_mode():
        for ids in torch.arange(embedding.num_text_embeddings, device=embedding.masks.device).split(_ROWS_AT_ONCE):
            rows = embedding.base(ids.to(embedding.base.weight.device)).float()
            before.append(layer.of_previous(rows).cpu())
            after.append(layer.of_following(rows).cpu())
        gates = layer.gates.detach().float().cpu().numpy()
    return Bigram(torch.cat(before).numpy(), torch.cat(after).numpy(), gates)


def adapter_updates(model: PreTrainedModel) -> Adapter | None:
    """Return the adapter's updates as the compiled engine needs them, or None if there is no adapter."""
    embedding = adapter_of(model)
    if embedding is None:
        return None
    updates = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            down, up = (cast(nn.Linear, each["default"]).weight.detach() for each in (layer.lora_A, layer.lora_B))
            updates[path] = LowRank(down, up * layer.scaling["default"])
    path = next(path for path, module in model.named_modules() if module is embedding)
    return Adapter(path, embedding.masks.detach(), updates)


def trained_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return what an adapter adds to its base: low-rank weights, mask embeddings and the tie between masks."""
    embedding = adapter_of(model)
    assert embedding is not None
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in get_peft_model_state_dict(model).items()}
    state[_MASKS_KEY] = embedding.masks.detach().cpu()
    if embedding.bigram is not None:
        weights = embedding.bigram.state_dict()
        state |= {_BIGRAM_PREFIX + name: weight.detach().cpu() for name, weight in weights.items()}
    return state


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapter into a folder, its weights under a temporary name first; the base is not written."""
    lora = cast(LoraConfig, cast(Any, model).peft_config["default"])
    lora.save_pretrained(str(folder))
    part = folder / f".{ADAPTER_FILE}.part"
    save_file(trained_state(model), part)
    part.replace(folder / ADAPTER_FILE)


def load_adapter(model: PreTrainedModel, folder: Path, *, masks: int) -> None:
    """Load the adapter of a folder onto its base model, in place and in the model's dtype.

    Raises:
        UsageProblem: the adapter's files are absent or damaged, or belong to another model.
    """
    try:
        lora = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise UsageProblem(f"{folder}: not a readable adapter: {first_line(error)}") from error
    dtype = model.dtype
    attach_adapter(model, masks, cast(LoraConfig, lora))
    load_adapter_weights(model, folder)
    # float32, as peft leaves them, would pass for the dtype of the model
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def load_adapter_weights(model: PreTrainedModel, folder: Path) -> None:
    """Fill the adapter that a model carries with the weights of a folder.

    Raises:
        UsageProblem: the file is absent or damaged, or belongs to another model.
    """
    file, adapter = folder / ADAPTER_FILE, adapter_of(model)
    assert adapter is not None
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageProblem(f"{file}: not a readable adapter: {first_line(error)}") from error
    embeddings = state.pop(_MASKS_KEY, None)
    bigram = {
        name.removeprefix(_BIGRAM_PREFIX): state.pop(name) for name in [*state] if name.startswith(_BIGRAM_PREFIX)
    }
    misfit = UsageProblem(f"{file}: does not fit this base model", hint="load it on the model it was trained on")
    if embeddings is None or embeddings.shape != adapter.masks.shape:
        raise misfit
    try:
        result: Any = set_peft_model_state_dict(model, state)
    except RuntimeError as error:
        raise misfit from error
    if result.unexpected_keys or any("lora_" in name for name in result.missing_keys):
        raise misfit
    if bigram and adapter.bigram is None:
        rank = bigram["gates"].shape[-1] if "gates" in bigram else 0
        adapter.bigram = BigramLayer(len(adapter.masks), adapter.masks.shape[1], rank).to(adapter.masks.device)
    try:
        if adapter.bigram is not None:
            adapter.bigram.load_state_dict(bigram)
    except RuntimeError as error:
        raise misfit from error
    with torch.no_grad():
        adapter.masks.copy_(embeddings)
