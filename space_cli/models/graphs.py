"""CUDA graphs of a loaded model, checked against the eager model."""

from __future__ import annotations

from collections.abc import Callable

from space_cli.compile.cuda import CudaGraphModel, unsupported_reason
from space_cli.errors import RunFailed, UsageProblem, first_line
from space_cli.models.agreement import agrees
from space_cli.models.loading import LoadedModel


def cuda_graph_model(
    loaded: LoadedModel, *, fused: bool, required: bool, on_compile: Callable[[], None] = lambda: None
) -> CudaGraphModel | None:
    """Return the model as CUDA graphs, checked against the eager model.

    Args:
        loaded: on one CUDA device; on a CPU it runs without graphs.
        fused: whether the compiler may take its time to fuse kernels.
        required: whether to say why there can be no graphs; else None is returned then.
        on_compile: called before kernels are fused.

    Raises:
        UsageProblem: required, and the model cannot have graphs.
        RunFailed: required, and they could not be made, or compute something else.
    """
    reason = unsupported_reason(loaded.model)
    if reason is not None:
        if required:
            raise UsageProblem(f"--engine compiled: {loaded.name}: {reason}", hint="use --engine eager")
        return None
    try:
        if fused:
            on_compile()
        return _checked(loaded, CudaGraphModel(loaded.model, fused=fused))
    except RunFailed:
        if required:
            raise
    except Exception as error:  # whatever in a foreign model defeats capture or compiler, the eager engine runs it
        if required:
            raise RunFailed(
                f"{loaded.name} cannot be captured: {type(error).__name__}: {first_line(error)}",
                hint="use --engine eager",
            ) from error
    return None


def _checked(loaded: LoadedModel, compiled: CudaGraphModel) -> CudaGraphModel:
    """Return the graphs.

    Raises:
        RunFailed: it computes something else than the model.
    """
    if not agrees(compiled, loaded.model):
        raise RunFailed(f"{loaded.name}, as graphs, computes something else", hint="use --engine eager")
    return compiled
