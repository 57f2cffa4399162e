"""A compiled model: one program for blocks of all shapes, with packed weights and an attention of our own.

A small model's eager step is spent on dispatch, a large one's on matrix products over weights that are not packed for
them. `torch.export` and AOTInductor answer the first: the whole call becomes one C++ library, for any number of slots.
Two operators of our own answer the second. `space::packed_linear` multiplies by packed weights (`kernels/linear.cpp`),
those of layers with the same input, as of queries, keys and values, in one go. `space::cached_attention` appends to the
cache and reads its used part only (`kernels/attend.cpp`); so the program knows neither the cache nor its length, and
one compilation serves prompts and blocks of every size. Both give a row the same bits whatever rows stand beside it.
The program has no weights in it: they are packed when it is loaded, and models of one architecture share it.

Source: PyTorch's AOTInductor (`torch/_inductor/__init__.py`).
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import inspect
import json
import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as symbolic_shapes
from torch.fx.experimental import proxy_tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from space_cli.core.attention import has_replaceable_attention
from space_cli.core.block import Block
from space_cli.core.cache import KVCache
from space_cli.core.choose import LIKELY, Likely
from space_cli.core.packing import LANES, SHIMS, Adapter, fused_groups, packed_layers
from space_cli.core.toolchain import load_kernels, toolchain_digest
from space_cli.errors import RunFailed

MOST_SLOTS = 512
"""Q of the largest block that a program takes."""
_ATTENTION = "space_compiled"
_KERNEL_TYPES = (torch.float32, torch.bfloat16)
# what attention layers ask of their kernel beyond the plain product of softmaxes
_FOREIGN_ARGUMENTS = ("position_bias", "s_aux", "softcap", "head_mask")
_INDUCTOR_CONFIGS = {
    # a loop over a few rows is done before a second thread has woken up
    "cpp.min_chunk_size": 16384,
    # else every layer computes the cosines of its positions anew
    "realize_cpu_opcount_threshold": 6,
    "aot_inductor.package_constants_in_so": False,
}
_STATES, _GROUPS = "space_states", "space_groups"


class Program:
    """A compiled model, loaded.

    Args:
        package: what `compile_program` wrote for a model of this architecture.
        kernels: what `build_kernels` wrote.
        model: whose weights it computes with.
        adapter: that the model carries.
    """

    def __init__(self, package: Path, kernels: Path, model: PreTrainedModel, adapter: Adapter | None = None) -> None:
        self._kernels = load_kernels(kernels)
        # `torch._inductor.aoti_load_package` wraps this in a second of imports and a walk over each call's arguments
        self._package = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1)
        told = self._package.get_metadata()
        self._states: list[list[int]] = json.loads(told[_STATES])
        self._dtype = model.dtype
        with torch.no_grad(), packed_layers(model, json.loads(told[_GROUPS]), adapter):
            step = _Step(model)
            tensors = {
                name: tensor.detach()
                for name, tensor in chain(
                    step.named_parameters(remove_duplicate=False), step.named_buffers(remove_duplicate=False)
                )
            }
        asked = self._package.get_constant_fqns()
        unknown = [name for name in asked if name not in tensors]
        if unknown:
            raise RuntimeError(f"it asks for {unknown[0]}, which the model does not have")
        # held here: the package takes them where they lie, and kernels want them where vectors do not straddle lines
        self._weights = {name: tensors[name] for name in asked}
        self._package.load_constants(self._weights, False, True, True)
        self._known: tuple[weakref.ref[KVCache], int, _Call] | None = None

    def run(
        self, block: Block, input_ids: torch.Tensor, position_ids: torch.Tensor, cache: KVCache, *, wanted: int
    ) -> tuple[torch.Tensor, Likely]:
        """Run a block behind what a cache holds; return logits, and which are largest. The cache then holds all slots.

        Args:
            block: its shape.
            input_ids: (1, Q) int64.
            position_ids: (1, Q) int64.
            cache: with room for the block.
            wanted: W, of how many slots logits (W, V) are to be computed, from the first one on.
        """
        call = self._call(cache, block.num_slots)
        call.parents, call.length, call.tokens = _parents(block), cache.length, block.num_tokens
        self._kernels.space_begin(ctypes.byref(call))
        inputs = [input_ids, position_ids, _mask_like(block.num_slots), _first(wanted)]
        logits, tokens, shares = self._package.boxed_run(inputs)
        for layer in cache.layers:
            layer.length += block.num_slots
        return logits, Likely(tokens, shares)

    def _call(self, cache: KVCache, slots: int) -> _Call:
        """Return where a cache's buffers are, which have room for so many slots more."""
        if self._known is not None:
            known, allocations, call = self._known
            fits = cache.length + slots <= call.capacity
            if known() is cache and cache.extent.allocations == allocations and fits:
                return call
        layers = [cache.layer(index) for index in range(len(self._states))]
        for layer, (heads, width, value_width) in zip(layers, self._states, strict=True):
            if not layer.is_initialized:
                keys, values = (torch.empty(1, heads, 0, size, dtype=self._dtype) for size in (width, value_width))
                layer.lazy_initialization(keys, values)
            layer.make_room(layer.length + slots)
        addresses = ctypes.c_void_p * len(layers)
        call = _Call(
            keys=addresses(*[layer.keys.data_ptr() for layer in layers]),
            values=addresses(*[layer.values.data_ptr() for layer in layers]),
            capacity=layers[0].keys.shape[2],
        )
        self._known = weakref.ref(cache), cache.extent.allocations, call
        return call


class _Call(ctypes.Structure):
    """What `space::cached_attention` must know of the running call beyond its arguments; as in `kernels/kernels.h`."""

    _fields_ = (
        ("keys", ctypes.POINTER(ctypes.c_void_p)),
        ("values", ctypes.POINTER(ctypes.c_void_p)),
        ("parents", ctypes.POINTER(ctypes.c_int32)),
        ("length", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
    )


@lru_cache(maxsize=4096)
def _parents(block: Block) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * block.num_slots)(*block.parents)


@lru_cache
def _mask_like(slots: int) -> torch.Tensor:
    """Return a mask of some shape; a program reads nothing else of it."""
    return torch.empty(1, 1, 1, 1).expand(1, 1, slots, slots)


@lru_cache
def _first(rows: int) -> torch.Tensor:
    return torch.arange(rows)


def why_not(model: PreTrainedModel) -> str | None:
    """Return in a few words why a model cannot be compiled, or None where it may be."""
    if model.device.type != "cpu":
        return "it is not on a CPU"
    if model.dtype not in _KERNEL_TYPES:
        return f"its dtype is {str(model.dtype).removeprefix('torch.')}"
    if getattr(model, "is_quantized", False):
        return "its weights are quantised"
    # an adapter's own are part of what is compiled
    if any(module._forward_hooks and "lora_B" not in name for name, module in model.named_modules()):
        return "hooks watch its layers"
    if not has_replaceable_attention(model):
        return "its attention is its own"
    return None


def fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of everything that a compiled program depends on: architecture, versions and machine."""
    tensors = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in _tensors(model)]
    types = [(name, module.weight_type) for name, module in model.named_modules() if hasattr(module, "weight_type")]
    toolchain = toolchain_digest("compiled.py", "packing.py", "quantized.py")
    told = (model.config.to_json_string(), toolchain, _INDUCTOR_CONFIGS, tensors, types)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]


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


def compile_program(model: PreTrainedModel, package: Path, adapter: Adapter | None = None) -> None:
    """Compile a model for blocks of 1 to `MOST_SLOTS` slots; takes from 10 seconds up.

    Raises:
        RunFailed: it cannot be exported, or there is no C++ compiler.
    """
    from torch._inductor.utils import fresh_cache  # takes a second to import

    config = model.config
    own, config._attn_implementation = config._attn_implementation, _ATTENTION
    slots = 8
    example = (torch.ones(1, slots, dtype=torch.int64), torch.arange(slots)[None], torch.zeros(1, 1, slots, slots))
    size, wanted = (torch.export.Dim(name, min=1, max=MOST_SLOTS) for name in ("slots", "wanted"))
    shapes = ({1: size}, {1: size}, {2: size, 3: size}, {0: wanted})
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(warnings.catch_warnings(action="ignore"))  # torch warns of its own parts
            groups = fused_groups(model, adapter, own)
            stack.enter_context(packed_layers(model, groups, adapter, hollow=True))
            # one slot is a size like any other
            stack.enter_context(symbolic_shapes.patch(backed_size_oblivious=True))  # type: ignore[attr-defined]
            exported = torch.export.export(
                _Step(model), (*example, _first(slots - 1)), dynamic_shapes=shapes, strict=False
            )
            scratch = stack.enter_context(TemporaryDirectory(dir=package.parent))
            stack.enter_context(fresh_cache(dir=scratch))
            told = {_STATES: json.dumps(_states_of(exported)), _GROUPS: json.dumps(groups)}
            unfinished = torch._inductor.aoti_compile_and_package(
                exported,
                package_path=str(Path(scratch, "program.pt2")),
                inductor_configs={
                    **_INDUCTOR_CONFIGS,
                    "aot_inductor.custom_ops_to_c_shims": {**SHIMS, **_SHIMS},
                    "aot_inductor.metadata": told,
                },
            )
            Path(unfinished).replace(package)
    except Exception as error:  # whatever in a foreign model defeats a compiler, the eager engine runs it
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise RunFailed(f"the model could not be compiled: {type(error).__name__}: {first}") from error
    finally:
        config._attn_implementation = own
        # it keeps the graph, and copies of all weights with it
        proxy_tensor._FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT.clear()
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


class _Step(nn.Module):
    """The call that is compiled."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor, wanted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (W, V) logits of the slots wanted, the likeliest tokens of each and their shares.

        The mask's shape alone is read. A model that cannot leave logits out computes those of all slots.
        """
        call = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask, "use_cache": False}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            call["logits_to_keep"] = wanted
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
    foreign = [name for name in _FOREIGN_ARGUMENTS if kwargs.get(name) is not None]
    if foreign:
        raise NotImplementedError(f"its attention takes {', '.join(foreign)}")
    if query.shape[3] % LANES or value.shape[3] % LANES:
        raise NotImplementedError(f"the width of its heads is no multiple of {LANES}")
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    query, key, value = (each if each.stride(3) == 1 else each.contiguous() for each in (query, key, value))
    return torch.ops.space.cached_attention(query, key, value, module.layer_idx, scaling), None


def _attention_shape(query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_: float) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _likely_shape(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], LIKELY)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)


# programs call `kernels/shims.cpp` straight; there is nothing to dispatch to
_OPERATORS = torch.library.Library("space", "FRAGMENT")  # it lives as long as this name
_OPERATORS.define("cached_attention(Tensor query, Tensor key, Tensor value, int layer, float scaling) -> Tensor")
_OPERATORS.define("likely(Tensor logits) -> (Tensor, Tensor)")
torch.library.register_fake("space::cached_attention", _attention_shape, lib=_OPERATORS)
torch.library.register_fake("space::likely", _likely_shape, lib=_OPERATORS)
_SHIMS = {
    torch.ops.space.cached_attention.default: [
        "AOTITorchError aoti_torch_cpu_cached_attention(AtenTensorHandle query, AtenTensorHandle key, "
        "AtenTensorHandle value, int64_t layer, double scaling, AtenTensorHandle* made)"
    ],
    torch.ops.space.likely.default: [
        "AOTITorchError aoti_torch_cpu_likely(AtenTensorHandle logits, AtenTensorHandle* tokens, "
        "AtenTensorHandle* shares)"
    ],
}
AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
