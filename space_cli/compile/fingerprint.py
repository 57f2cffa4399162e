"""What a compiled model depends on, as a hash: its file is found by it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain

import torch
from transformers import PreTrainedModel

from space_cli.compile.export import INDUCTOR_CONFIGS
from space_cli.compile.toolchain import toolchain_digest

_SOURCES = (
    *(f"compile/{name}.py" for name in ("compiled_model", "export", "operators", "packing", "torch_private")),
    "core/quantized.py",
)


def fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of everything that a compiled model depends on: architecture, versions and machine."""
    tensors = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in _tensors(model)]
    types = [(name, module.weight_type) for name, module in model.named_modules() if hasattr(module, "weight_type")]
    toolchain = toolchain_digest(*_SOURCES)
    inputs = (model.config.to_json_string(), toolchain, INDUCTOR_CONFIGS, tensors, types)
    return hashlib.sha256(repr(inputs).encode()).hexdigest()[:32]


def weights_digest(model: PreTrainedModel) -> str:
    """Return a hash of the weights as they are in memory."""
    digest = hashlib.sha256()
    # not state_dict: asked for it, bitsandbytes unpacks its 4-bit weights, and computes with other kernels from then on
    for name, tensor in _tensors(model):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())
