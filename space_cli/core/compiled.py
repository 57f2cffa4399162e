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
import os
import platform
import subprocess
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import transformers
from torch import nn
from torch.fx.experimental import _config as symbolic_shapes
from torch.fx.experimental import proxy_tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from space_cli.core.attention import has_replaceable_attention
from space_cli.core.block import Block
from space_cli.core.cache import KVCache
from space_cli.core.choose import LIKELY, Likely
from space_cli.errors import RunFailed

MOST_SLOTS = 128
"""Q of the largest block that a program takes."""
_ATTENTION = "space_compiled"
KERNELS = Path(__file__).parent / "kernels"
_KERNEL_TYPES = (torch.float32, torch.bfloat16)
_LANES = 16
# inputs that stand together in a tile of weights
_DEPTH = {torch.float32: 1, torch.bfloat16: 2}
_loaded: dict[str, ctypes.CDLL] = {}
# what attention layers ask of their kernel beyond the plain product of softmaxes
_FOREIGN_ARGUMENTS = ("position_bias", "s_aux", "softcap", "head_mask")
_INDUCTOR_CONFIGS = {
    # a loop over a few rows is done before a second thread has woken up
    "cpp.min_chunk_size": 16384,
    # else every layer computes the cosines of its positions anew
    "realize_cpu_opcount_threshold": 6,
    "aot_inductor.package_constants_in_so": False,
}
_STATES, _TOGETHER = "space_states", "space_together"


class Program:
    """A compiled model, loaded.

    Args:
        package: what `compile_program` wrote for a model of this architecture.
        kernels: what `build_kernels` wrote.
        model: whose weights it computes with.
    """

    def __init__(self, package: Path, kernels: Path, model: PreTrainedModel) -> None:
        self._kernels = load_kernels(kernels)
        # `torch._inductor.aoti_load_package` wraps this in a second of imports and a walk over each call's arguments
        self._package = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1)
        told = self._package.get_metadata()
        self._states: list[list[int]] = json.loads(told[_STATES])
        self._dtype = model.dtype
        with torch.no_grad(), _packed_linears(model, json.loads(told[_TOGETHER])):
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
        call.parents, call.length = _parents(block), cache.length
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
    if any(module._forward_hooks for module in model.modules()):
        return "it is an adapter, whose layers tell masks from text as they run"
    if not has_replaceable_attention(model):
        return "its attention is its own"
    return None


def fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of everything that a compiled program depends on: architecture, versions and machine."""
    tensors = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in _tensors(model)]
    told = (model.config.to_json_string(), _toolchain(), _INDUCTOR_CONFIGS, tensors)
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


def machine() -> tuple[str, ...]:
    """Return versions and processor, on which compiled code depends."""
    capability = torch.backends.cpu.get_cpu_capability()
    versions = torch.__version__, transformers.__version__
    return *versions, platform.machine(), capability, instructions(), _processor_flags()


def compile_program(model: PreTrainedModel, package: Path) -> None:
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
            together = _with_one_input(model, own)
            stack.enter_context(_packed_linears(model, together, hollow=True))
            # one slot is a size like any other
            stack.enter_context(symbolic_shapes.patch(backed_size_oblivious=True))  # type: ignore[attr-defined]
            exported = torch.export.export(
                _Step(model), (*example, _first(slots - 1)), dynamic_shapes=shapes, strict=False
            )
            scratch = stack.enter_context(TemporaryDirectory(dir=package.parent))
            stack.enter_context(fresh_cache(dir=scratch))
            told = {_STATES: json.dumps(_states_of(exported)), _TOGETHER: json.dumps(together)}
            unfinished = torch._inductor.aoti_compile_and_package(
                exported,
                package_path=str(Path(scratch, "program.pt2")),
                inductor_configs={
                    **_INDUCTOR_CONFIGS,
                    "aot_inductor.custom_ops_to_c_shims": _SHIMS,
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


def _with_one_input(model: PreTrainedModel, attention: str) -> list[list[str]]:
    """Return names of the linear layers that fill tiles, those together that one after another take the same tensor."""
    names = {module: name for name, module in model.named_modules() if _fills_tiles(module)}
    calls: list[tuple[str, torch.Tensor]] = []
    with ExitStack() as stack:
        for module in names:

            def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                calls.append((names[module], inputs[0]))

            stack.callback(module.register_forward_pre_hook(note).remove)
        own, model.config._attn_implementation = model.config._attn_implementation, attention
        try:
            model(input_ids=torch.ones(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
        finally:
            model.config._attn_implementation = own
    if len(calls) > len({name for name, _ in calls}):  # layers that are called twice may have other company each time
        return [[name] for name in dict(calls)]
    together: list[list[str]] = []
    before = None
    for name, states in calls:
        kind = id(states), _has_bias(cast(nn.Linear, model.get_submodule(name)))
        if kind == before:
            together[-1].append(name)
        else:
            together.append([name])
        before = kind
    return together


def instructions() -> str:
    """Return for which processor kernels are compiled, as `-march` names it: the one at hand, or that of `SPACE_CPU`."""
    return os.environ.get("SPACE_CPU") or "native"


def compiler_command(processor: str) -> list[str]:
    """Return how a library of kernels is compiled for a processor, sources and output apart."""
    # contracted or not as the compiler likes, a row could round one way alone and another way in a block
    exact = "-ffp-contract=off"
    return [
        *(os.environ.get("CXX", "c++"), "-O3", f"-march={processor}", exact, "-fopenmp", "-fPIC", "-shared"),
        "-std=c++20",
    ]


def build_kernels(folder: Path) -> Path:
    """Return the library of our kernels, compiled into a folder where it is not there yet.

    Raises:
        RunFailed: there is no C++ compiler, or it fails.
    """
    library = folder / f"kernels-{_toolchain()[:16]}.so"
    if library.exists():
        return library
    unfinished = library.with_suffix(f".{os.getpid()}")
    torch_folder = Path(torch.__file__).parent
    command = [*compiler_command(instructions()), f"-I{torch_folder / 'include'}", "-o", str(unfinished)]
    command += [*map(str, sorted(KERNELS.glob("*.cpp"))), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        first = next((line for line in said if "error" in line), said[0])
        raise RunFailed(f"no C++ compiler that works: {first}") from error
    unfinished.replace(library)
    return library


def load_kernels(library: Path) -> ctypes.CDLL:
    """Return the library of our kernels; programs loaded later find them in it."""
    # programs find what was loaded first, and all libraries of one version are alike
    if "kernels" not in _loaded:
        _loaded["kernels"] = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return _loaded["kernels"]


class _PackedLinears(nn.Module):
    """Linear layers over one input, with their weights in the tiles of `kernels/linear.cpp`."""

    def __init__(self, linears: Sequence[nn.Linear], *, hollow: bool) -> None:
        super().__init__()
        weight, depth = linears[0].weight, _DEPTH[linears[0].weight.dtype]
        if hollow:  # memory that is not written to takes no room
            tiles = sum(linear.out_features for linear in linears) // _LANES
            packed = weight.new_empty(tiles, weight.shape[1] // depth, _LANES, depth)
        else:
            packed = torch.cat([_tiles(linear.weight.detach(), depth) for linear in linears])
        self.register_buffer("packed", packed)
        biases = [linear.bias.detach() for linear in linears if _has_bias(linear)]
        self.register_buffer("bias", torch.cat(biases) if biases else None)
        self._ends = [0]
        for linear in linears:
            self._ends.append(self._ends[-1] + linear.out_features)
        self._done: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def output(self, states: torch.Tensor, index: int) -> torch.Tensor:
        """Return the (..., outputs) of one of the layers; all are computed when the first is asked for."""
        if self._done is None or self._done[0] is not states:
            found = torch.ops.space.packed_linear(states.contiguous(), self.packed, self.bias, self._ends[-1])
            self._done = (states, [found[..., start:end] for start, end in pairwise(self._ends)])
        output = self._done[1][index]
        if index == len(self._ends) - 2:
            self._done = None
        return output


class _PackedLinear(nn.Module):
    """Stands in the place of one of them."""

    def __init__(self, linears: _PackedLinears, index: int) -> None:
        super().__init__()
        if index == 0:
            self.linears = linears
        # not registered twice
        self._linears, self._index = [linears], index

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # as nn.Linear names it
        """Return (..., outputs)."""
        return self._linears[0].output(input, self._index)


def _has_bias(linear: nn.Linear) -> bool:
    bias: torch.Tensor | None = linear.bias
    return bias is not None


def _tiles(weight: torch.Tensor, depth: int) -> torch.Tensor:
    """Return (outputs / 16, width / depth, 16, depth) of (outputs, width) weights."""
    return weight.view(-1, _LANES, weight.shape[1] // depth, depth).transpose(1, 2).contiguous()


def _fills_tiles(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, and no kind of its own, whose sizes fill whole tiles."""
    if not isinstance(module, nn.Linear) or module.__class__.__name__ != "Linear":
        return False
    depth = _DEPTH.get(module.weight.dtype)
    return depth is not None and not module.out_features % _LANES and not module.in_features % depth


@contextmanager
def _packed_linears(model: nn.Module, together: Sequence[Sequence[str]], *, hollow: bool = False) -> Iterator[None]:
    """Put packed layers in place of a model's linear ones for a while; hollow ones have shapes, but no weights."""
    own = {name: cast(nn.Linear, model.get_submodule(name)) for name in chain(*together)}
    for names in together:
        linears = _PackedLinears([own[name] for name in names], hollow=hollow)
        for index, name in enumerate(names):
            model.set_submodule(name, _PackedLinear(linears, index))
    try:
        yield
    finally:
        for name, linear in own.items():
            model.set_submodule(name, linear)


def _toolchain() -> str:
    """Return a hash of versions, machine and sources, of what calls the program too."""
    digest = hashlib.sha256(repr(machine()).encode())
    for source in (Path(__file__), *sorted(KERNELS.glob("*.[ch]*"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()


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


def _processor_flags() -> str:
    """Return what instructions the processor has, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("flags")), platform.processor())


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
    if query.shape[3] % _LANES or value.shape[3] % _LANES:
        raise NotImplementedError(f"the width of its heads is no multiple of {_LANES}")
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    query, key, value = (each if each.stride(3) == 1 else each.contiguous() for each in (query, key, value))
    return torch.ops.space.cached_attention(query, key, value, module.layer_idx, scaling), None


def _attention_shape(query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_: float) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _linear_shape(states: torch.Tensor, _: torch.Tensor, __: torch.Tensor | None, outputs: int) -> torch.Tensor:
    return states.new_empty(*states.shape[:-1], outputs)


def _likely_shape(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], LIKELY)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)


# programs call `kernels/shims.cpp` straight; there is nothing to dispatch to
_OPERATORS = torch.library.Library("space", "DEF")  # it lives as long as this name
_OPERATORS.define("cached_attention(Tensor query, Tensor key, Tensor value, int layer, float scaling) -> Tensor")
_OPERATORS.define("packed_linear(Tensor input, Tensor packed, Tensor? bias, int outputs) -> Tensor")
_OPERATORS.define("likely(Tensor logits) -> (Tensor, Tensor)")
torch.library.register_fake("space::cached_attention", _attention_shape, lib=_OPERATORS)
torch.library.register_fake("space::packed_linear", _linear_shape, lib=_OPERATORS)
torch.library.register_fake("space::likely", _likely_shape, lib=_OPERATORS)
_SHIMS = {
    torch.ops.space.cached_attention.default: [
        "AOTITorchError aoti_torch_cpu_cached_attention(AtenTensorHandle query, AtenTensorHandle key, "
        "AtenTensorHandle value, int64_t layer, double scaling, AtenTensorHandle* made)"
    ],
    torch.ops.space.packed_linear.default: [
        "AOTITorchError aoti_torch_cpu_packed_linear(AtenTensorHandle input, AtenTensorHandle packed, "
        "AtenTensorHandle* bias, int64_t outputs, AtenTensorHandle* made)"
    ],
    torch.ops.space.likely.default: [
        "AOTITorchError aoti_torch_cpu_likely(AtenTensorHandle logits, AtenTensorHandle* tokens, "
        "AtenTensorHandle* shares)"
    ],
}
AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
