"""A compiled model: one program for blocks of all shapes, with packed weights and an attention of our own.

A small model's eager step is spent on dispatch, a large one's on matrix products over weights that are not packed for
them. `torch.export` and AOTInductor answer the first: the whole call becomes one C++ library, for any number of slots.
Two operators of our own answer the second. `space::linear` multiplies by packed weights (`kernels/linear.cpp`).
`space::attend` appends to the cache and reads its used part only (`kernels/attend.cpp`); so the program knows neither
the cache nor its length, and one compilation serves prompts and blocks of every size. Both give a row the same bits
whatever rows stand beside it.

Source: PyTorch's AOTInductor (`torch/_inductor/__init__.py`).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import transformers
from torch import nn
from torch.fx.experimental import _config as symbolic_shapes
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from space_cli.core.attention import has_replaceable_attention
from space_cli.core.block import Block
from space_cli.core.cache import KVCache
from space_cli.errors import RunFailed

MOST_SLOTS = 128
"""Q of the largest block that a program takes."""
_ATTENTION = "space_compiled"
_KERNELS = [Path(__file__).parent / "kernels" / name for name in ("attend.cpp", "linear.cpp")]
_KERNEL_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_ADDRESS, _SIZE = ctypes.c_void_p, ctypes.c_int64
_KERNEL_ARGUMENTS = [
    *[_ADDRESS, _SIZE, _SIZE] * 3,
    *[_ADDRESS] * 3,
    ctypes.POINTER(ctypes.c_int32),
    *[_SIZE] * 7,
    ctypes.c_float,
]
_LANES = 16
# inputs that stand together in a tile of weights
_DEPTH = {torch.float32: 1, torch.bfloat16: 2}
_loaded: dict[str, ctypes.CDLL] = {}
# what attention layers ask of their kernel beyond the plain product of softmaxes
_FOREIGN_ARGUMENTS = ("position_bias", "s_aux", "softcap", "head_mask")
_INDUCTOR_CONFIGS = {
    "freezing": True,
    # a loop over a few rows is done before a second thread has woken up
    "cpp.min_chunk_size": 16384,
}


class Program:
    """A compiled model, loaded.

    Args:
        package: what `compile_program` wrote.
        kernel: what `build_kernels` wrote.
        dtype: of the model.
    """

    def __init__(self, package: Path, kernel: Path, dtype: torch.dtype) -> None:
        self._kernel = load_kernel(kernel, dtype)
        # `torch._inductor.aoti_load_package` wraps this in a second of imports and a walk over each call's arguments
        self._package = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1)

    def run(self, block: Block, input_ids: torch.Tensor, position_ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Run a block behind what a cache holds; return (Q, V) logits. The cache then holds all slots.

        Args:
            block: its shape.
            input_ids: (1, Q) int64.
            position_ids: (1, Q) int64.
            cache: with room for the block.
        """
        call = _Call(self._kernel, block, cache)
        _Call.current = call
        try:
            # the program reads its mask's shape alone
            mask = torch.empty(1, 1, 1, 1).expand(1, 1, block.num_slots, block.num_slots)
            logits: torch.Tensor = self._package.boxed_run([input_ids, position_ids, mask])[0]
        finally:
            _Call.current = None
        for layer in cache.layers:
            layer.length += block.num_slots
        return logits


class _Call:
    """What `space::attend` must know of the running call beyond its arguments."""

    current: _Call | None = None

    def __init__(self, kernel: Any, block: Block, cache: KVCache) -> None:
        self._kernel, self._cache = kernel, cache
        self._parents = (ctypes.c_int32 * block.num_slots)(*block.parents)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, index: int, scaling: float
    ) -> torch.Tensor:
        layer = self._cache.layer(index)
        if not layer.is_initialized:
            layer.lazy_initialization(key, value)
        layer.make_room(layer.length + key.shape[2])
        query, key, value = (each if each.stride(3) == 1 else each.contiguous() for each in (query, key, value))
        _, heads, rows, width = query.shape
        value_width = value.shape[3]
        output = query.new_empty(1, rows, heads, value_width)
        self._kernel(
            *(query.data_ptr(), *query.stride()[1:3], key.data_ptr(), *key.stride()[1:3]),
            *(value.data_ptr(), *value.stride()[1:3], layer.keys.data_ptr(), layer.values.data_ptr()),
            *(output.data_ptr(), self._parents, rows, heads, key.shape[1], width, value_width),
            *(layer.length, layer.keys.shape[2], scaling),
        )
        return output


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
    """Return a hash of everything that a compiled program depends on: weights, config, versions and machine."""
    told = (model.config.to_json_string(), _toolchain(), _INDUCTOR_CONFIGS, weights_digest(model))
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]


def weights_digest(model: PreTrainedModel) -> str:
    """Return a hash of the weights as they are in memory."""
    digest = hashlib.sha256()
    # not state_dict: asked for it, bitsandbytes unpacks its 4-bit weights, and computes with other kernels from then on
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def machine() -> tuple[str, ...]:
    """Return versions and processor, on which compiled code depends."""
    capability = torch.backends.cpu.get_cpu_capability()
    return torch.__version__, transformers.__version__, platform.machine(), capability, _processor_flags()


def compile_program(model: PreTrainedModel, package: Path) -> None:
    """Compile a model for blocks of 1 to `MOST_SLOTS` slots; takes from 10 seconds up, and as much disk as its weights.

    Raises:
        RunFailed: it cannot be exported, or there is no C++ compiler.
    """
    from torch._inductor.utils import fresh_cache  # takes a second to import

    config = model.config
    own, config._attn_implementation = config._attn_implementation, _ATTENTION
    slots = 8
    example = (torch.ones(1, slots, dtype=torch.int64), torch.arange(slots)[None], torch.zeros(1, 1, slots, slots))
    size = torch.export.Dim("slots", min=1, max=MOST_SLOTS)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_packed_linears(model))
            stack.enter_context(warnings.catch_warnings(action="ignore"))  # torch warns of its own parts
            # one slot is a size like any other
            stack.enter_context(symbolic_shapes.patch(backed_size_oblivious=True))  # type: ignore[attr-defined]
            exported = torch.export.export(
                _Step(model), example, dynamic_shapes=({1: size}, {1: size}, {2: size, 3: size}), strict=False
            )
            # what the compiler leaves behind has the weights in it
            scratch = stack.enter_context(TemporaryDirectory(dir=package.parent))
            stack.enter_context(fresh_cache(dir=scratch))
            unfinished = torch._inductor.aoti_compile_and_package(
                exported,
                package_path=str(Path(scratch, "program.pt2")),
                inductor_configs=dict(_INDUCTOR_CONFIGS),
            )
            Path(unfinished).replace(package)
    except Exception as error:  # whatever in a foreign model defeats a compiler, the eager engine runs it
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise RunFailed(f"the model could not be compiled: {type(error).__name__}: {first}") from error
    finally:
        config._attn_implementation = own


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
    command = [os.environ.get("CXX", "c++"), "-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-fPIC"]
    command += ["-shared", "-std=c++20", f"-I{torch_folder / 'include'}", "-o", str(unfinished), *map(str, _KERNELS)]
    command += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise RunFailed(f"no C++ compiler that works: {said.strip().splitlines()[0]}") from error
    unfinished.replace(library)
    return library


def load_kernel(library: Path, dtype: torch.dtype) -> Any:
    """Return the attention kernel for states of a dtype, as a C function; the library registers the linear one."""
    # an operator can be registered once in a process, and all libraries of one version are alike
    if "kernels" not in _loaded:
        _loaded["kernels"] = ctypes.CDLL(str(library))
    kernel = getattr(_loaded["kernels"], f"space_attend_{_KERNEL_TYPES[dtype]}")
    kernel.argtypes, kernel.restype = _KERNEL_ARGUMENTS, None
    return kernel


class _PackedLinear(nn.Module):
    """A linear layer with its weights in the tiles of `kernels/linear.cpp`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.outputs = linear.out_features
        depth = _DEPTH[linear.weight.dtype]
        tiles = linear.weight.detach().view(-1, _LANES, linear.in_features // depth, depth)
        self.register_buffer("packed", tiles.transpose(1, 2).contiguous())
        bias: torch.Tensor | None = linear.bias
        self.register_buffer("bias", bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # as nn.Linear names it
        """Return (..., outputs)."""
        output: torch.Tensor = torch.ops.space.linear(input, self.packed, self.bias, self.outputs)
        return output


def _fills_tiles(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, and no kind of its own, whose sizes fill whole tiles."""
    if not isinstance(module, nn.Linear) or module.__class__.__name__ != "Linear":
        return False
    depth = _DEPTH.get(module.weight.dtype)
    return depth is not None and not module.out_features % _LANES and not module.in_features % depth


@contextmanager
def _packed_linears(model: nn.Module) -> Iterator[None]:
    """Put packed layers in place of a model's linear ones for a while."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if _fills_tiles(child)
    ]
    for parent, name, child in found:
        setattr(parent, name, _PackedLinear(cast(nn.Linear, child)))
    try:
        yield
    finally:
        for parent, name, child in found:
            setattr(parent, name, child)


def _toolchain() -> str:
    """Return a hash of versions, machine and kernel sources."""
    digest = hashlib.sha256(repr(machine()).encode())
    for source in sorted(_KERNELS[0].parent.glob("*.[ch]*")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


class _Step(nn.Module):
    """The call that is compiled."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return (Q, V) logits; the mask's shape alone is read."""
        call = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask, "use_cache": False}
        logits: torch.Tensor = self.model(**call).logits
        return logits[0]


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
    return torch.ops.space.attend(query, key, value, module.layer_idx, scaling), None


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scaling: float) -> torch.Tensor:
    """Run `space::attend` for the call that is under way."""
    assert _Call.current is not None
    return _Call.current.attend(query, key, value, layer, scaling)


def _attend_shape(query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_: float) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _linear_shape(input: torch.Tensor, _: torch.Tensor, __: torch.Tensor | None, outputs: int) -> torch.Tensor:  # noqa: A002
    return input.new_empty(*input.shape[:-1], outputs)


_OPERATORS = torch.library.Library("space", "DEF")  # it lives as long as this name
_OPERATORS.define("attend(Tensor query, Tensor key, Tensor value, int layer, float scaling) -> Tensor")
_OPERATORS.define("linear(Tensor input, Tensor packed, Tensor? bias, int outputs) -> Tensor")
_OPERATORS.impl("attend", _attend, "CPU")
torch.library.register_fake("space::attend", _attend_shape, lib=_OPERATORS)
torch.library.register_fake("space::linear", _linear_shape, lib=_OPERATORS)
AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
