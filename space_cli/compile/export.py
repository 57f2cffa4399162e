"""From a model to a compiled one on disk, by `torch.export` and AOTInductor."""

from __future__ import annotations

import gc
import inspect
import json
import warnings
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from space_cli.compile import torch_private
from space_cli.compile.operators import SHIMS
from space_cli.compile.packing import LANES, Adapter, fused_groups, packed_layers
from space_cli.compile.workplace import workplace
from space_cli.core.attention import check_arguments, has_replaceable_attention
from space_cli.errors import RunFailed, first_line

MAX_CALL_SLOTS = 512
"""Q of the largest block that a compiled model takes."""
_ATTENTION = "space_compiled"
_COMPILING_BYTES = 64 * 2**20
_KERNEL_TYPES = (torch.float32, torch.bfloat16)
INDUCTOR_CONFIGS = {
    # a loop over a few rows is done before a second thread has woken up
    "cpp.min_chunk_size": 16384,
    # else every layer computes the cosines of its positions anew
    "realize_cpu_opcount_threshold": 6,
    "aot_inductor.package_constants_in_so": False,
    # 280 MB in the folder for temporary files, which stay there
    "aot_inductor.precompile_headers": False,
}
STATES, GROUPS = "space_states", "space_groups"


def unsupported_reason(model: PreTrainedModel) -> str | None:
    """Return in a few words why a model cannot be compiled, or None if it can."""
    if model.device.type != "cpu":
        return "it is not on a CPU"
    if model.dtype not in _KERNEL_TYPES:
        return f"its dtype is {str(model.dtype).removeprefix('torch.')}"
    if getattr(model, "is_quantized", False):
        return "its weights are quantised"
    # an adapter's own are part of what is compiled
    if any(torch_private.has_forward_hooks(module) and "lora_B" not in name for name, module in model.named_modules()):
        return "hooks watch its layers"
    if not has_replaceable_attention(model):
        return "its attention is its own"
    return None


def compile_model(model: PreTrainedModel, package: Path, adapter: Adapter | None = None) -> None:
    """Compile a model for blocks of 1 to `MAX_CALL_SLOTS` slots; takes a minute or more.

    Raises:
        RunFailed: it cannot be exported, or there is no C++ compiler.
    """
    config = model.config
    own, config._attn_implementation = config._attn_implementation, _ATTENTION
    slots = 8
    example = (torch.ones(1, slots, dtype=torch.int64), torch.arange(slots)[None], torch.zeros(1, 1, slots, slots))
    size, logits_to_keep = (torch.export.Dim(name, min=1, max=MAX_CALL_SLOTS) for name in ("slots", "logits_to_keep"))
    shapes = ({1: size}, {1: size}, {2: size, 3: size}, {0: logits_to_keep})
    try:
        with ExitStack() as stack:
            place = stack.enter_context(workplace(package.parent, _COMPILING_BYTES))
            stack.enter_context(torch.no_grad())
            stack.enter_context(warnings.catch_warnings(action="ignore"))  # torch warns of its own parts
            groups = fused_groups(model, adapter, own)
            stack.enter_context(packed_layers(model, groups, adapter, meta=True))
            # one slot is a size like any other
            stack.enter_context(torch_private.sizes_of_one_are_dynamic())
            exported = torch.export.export(
                CompiledCall(model), (*example, first_slots(slots - 1)), dynamic_shapes=shapes, strict=False
            )
            stack.enter_context(torch_private.inductor_cache_in(str(place)))
            metadata = {STATES: json.dumps(_states_of(exported)), GROUPS: json.dumps(groups)}
            settings = {
                **INDUCTOR_CONFIGS,
                "aot_inductor.custom_ops_to_c_shims": SHIMS,
                "aot_inductor.metadata": metadata,
            }
            unfinished = torch_private.compile_package(exported, place / "program.pt2", settings)
            unfinished.replace(package)
    except RunFailed:
        raise
    except Exception as error:  # whatever in a foreign model defeats a compiler, the eager engine runs it
        raise RunFailed(f"the model could not be compiled: {type(error).__name__}: {first_line(error)}") from error
    finally:
        config._attn_implementation = own
        torch_private.forget_exported()
        gc.collect()


def _states_of(exported: torch.export.ExportedProgram) -> list[list[int]]:
    """Return by layer how many heads its keys have, their width, and that of its values."""
    states = {}
    for node in exported.graph.nodes:
        if node.target is torch.ops.space.cached_attention.default:
            _, key, value, layer, _ = node.args
            key, value = key.meta["val"], value.meta["val"]
            states[layer] = [int(key.shape[1]), int(key.shape[3]), int(value.shape[3])]
    return [states[layer] for layer in range(len(states))]


@lru_cache
def first_slots(count: int) -> torch.Tensor:
    """Return the indices of a block's first slots."""
    return torch.arange(count)


class CompiledCall(nn.Module):
    """The call that is compiled."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor, logits_to_keep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (W, V) logits of the slots to keep, the most probable tokens of each and their probabilities.

        The mask's shape alone is read. A model that cannot leave logits out computes those of all slots.
        """
        call = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask, "use_cache": False}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            call["logits_to_keep"] = logits_to_keep
        logits = self.model(**call).logits[0].contiguous()
        return logits, *torch.ops.space.likely(logits)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  # the block says who sees whom
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Stand for a layer's attention while the model is exported."""
    check_arguments(kwargs)
    if query.shape[3] % LANES or value.shape[3] % LANES:
        raise NotImplementedError(f"the width of its heads is no multiple of {LANES}")
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    query, key, value = (each if each.stride(3) == 1 else each.contiguous() for each in (query, key, value))
    return torch.ops.space.cached_attention(query, key, value, module.layer_idx, scaling), None


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
