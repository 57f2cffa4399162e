"""The names of PyTorch that it does not promise to keep, all in one place: where to look when PyTorch changes.

Source: torch 2.13, `torch/_inductor/__init__.py`, `torch/fx/experimental`, `torch/nn/modules/module.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.fx.experimental import _config as symbolic_shapes
from torch.fx.experimental import proxy_tensor


def load_package(package: Path) -> Any:
    """Return a model that AOTInductor compiled, loaded.

    `torch._inductor.aoti_load_package` wraps this in a second of imports and a walk over each call's arguments.
    """
    return torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1)


def compile_package(exported: torch.export.ExportedProgram, package: Path, settings: Mapping[str, Any]) -> Path:
    """Compile an exported model with AOTInductor and its settings; return where the package was written."""
    written = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(package), inductor_configs=dict(settings)
    )
    return Path(written)


def inductor_cache_in(folder: str) -> AbstractContextManager[Any]:
    """Let the compiler keep its files in a folder for the time of a compilation."""
    from torch._inductor.utils import fresh_cache  # takes a second to import

    return cast(AbstractContextManager[Any], fresh_cache(dir=folder))


def sizes_of_one_are_dynamic() -> AbstractContextManager[Any]:
    """Export a dimension that may be 1 as one that may be any size."""
    patch = symbolic_shapes.patch  # type: ignore[attr-defined]
    return cast(AbstractContextManager[Any], patch(backed_size_oblivious=True))


def forget_exported() -> None:
    """Free the graph of the last export, which holds copies of all weights."""
    proxy_tensor._FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT.clear()


def recompile_limit(limit: int) -> AbstractContextManager[Any]:
    """Let `torch.compile` compile so many versions of a call."""
    return cast(AbstractContextManager[Any], torch._dynamo.config.patch(recompile_limit=limit))


def compiled_call(module: nn.Module) -> Callable[..., Any]:
    """Return a module's call, to be compiled for each shape when first made with it."""
    return torch.compile(module._call_impl, dynamic=False)


def use_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Make a module run this in place of its call; None gives it its own back."""
    module._compiled_call_impl = call


def has_forward_hooks(module: nn.Module) -> bool:
    """Return whether anything watches what a module returns."""
    return bool(module._forward_hooks)
