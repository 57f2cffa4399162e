"""Chooses the engine of a model and measures the costs of its steps; both are cached on disk."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import reduce
from itertools import chain, takewhile
from pathlib import Path
from typing import Literal

import torch

from space_cli.compile.compiled_model import CompiledModel
from space_cli.compile.export import compile_model, unsupported_reason
from space_cli.compile.fingerprint import fingerprint
from space_cli.compile.toolchain import build_kernels, check_compiler, load_kernels, machine
from space_cli.compile.workplace import used
from space_cli.core.costs import MAX_BLOCK_SLOTS, SIZES, StepCosts, measure_costs
from space_cli.core.decoder import decode
from space_cli.core.drafting import AcceptanceStats, AdaptiveDrafter, Drafter
from space_cli.core.engine import Compiled, engine_for
from space_cli.core.quantized import has_quantized_layers
from space_cli.core.sampling import Sampler
from space_cli.core.stopping import StopRule
from space_cli.core.stream import Step
from space_cli.errors import RunFailed, UsageProblem, first_line, writing
from space_cli.files import atomic_write
from space_cli.models.adapter import adapter_updates
from space_cli.models.agreement import agrees
from space_cli.models.graphs import cuda_graph_model
from space_cli.models.kernels import engine_folder, problem_met
from space_cli.models.loading import LoadedModel
from space_cli.models.memory import available_memory
from space_cli.models.refusals import note_refusal, refusal_of
from space_cli.models.speeds import PROMPT, ROUNDS, Speed, Speeds, measure_speed, read_speeds, write_speeds

EngineName = Literal["auto", "eager", "compiled"]
"""eager: the model as transformers runs it. compiled: compiled for this machine. auto: the faster one, where a compiled
model is on disk already, or where so many tokens are to come that compiling pays; else eager."""

# a token saves some milliseconds of dispatch, and more the more weights there are
_TOKENS_WORTH_COMPILING, _BYTES_THAT_SAVE_AS_MUCH = 4000, 100 * 2**20
# of the weights in memory once it is compiled and loaded: the model, packed ones, what is not given back
_COPIES = 3
_PREFIX_LENGTH, _PROBE_LENGTH, _PROBE_TOKENS, _PROBE_SECONDS = 256, 4, 48, 0.4


def prepare(
    loaded: LoadedModel,
    *,
    engine: EngineName = "auto",
    tokens: int = 0,
    on_compile: Callable[[], None] = lambda: None,
    on_eager: Callable[[str], None] = lambda _: None,
) -> LoadedModel:
    """Return the model with its engine; adaptive drafting needs `measured` as well.

    Args:
        loaded: as `load_model` gave it.
        engine: which one.
        tokens: to be generated in this run at most, for `auto`.
        on_compile: called before a compilation, which takes a minute or more (docs/engines.md).
        on_eager: called where `auto` would have a compiled model and has to do without, with the reason.

    Raises:
        UsageProblem: engine is compiled and the model cannot be.
        RunFailed: engine is compiled and there is no compiler, no room for it, or it computes something else.
    """
    try:
        compiled = _compiled(loaded, engine, tokens, on_compile)
    except RunFailed as error:
        if engine == "compiled":
            raise
        on_eager(str(error))
        compiled = None
    return replace(loaded, compiled=compiled, stats={})


def measured(loaded: LoadedModel, *, fresh: bool = False) -> LoadedModel:
    """Return the model with the costs of its steps, from disk, or measured now if there are none or with `fresh`."""
    compiled_key = None if loaded.compiled is None else fingerprint(loaded.model)
    file = engine_folder() / f"costs-{_speed_key(loaded, compiled_key)}.json"
    costs = None if fresh else _read_costs(file)
    if costs is None:
        limit = loaded.context_length or _PREFIX_LENGTH + MAX_BLOCK_SLOTS
        length = max(1, min(_PREFIX_LENGTH, limit - MAX_BLOCK_SLOTS))
        costs = measure_costs(
            engine_for(loaded.model, loaded.compiled, max_length=length, max_slots=MAX_BLOCK_SLOTS), length
        )
        drafting = _steps(
            loaded, AdaptiveDrafter(AcceptanceStats(costs, loaded.masks_per_group), loaded.masks_per_group)
        )
        beside = statistics.median(step.seconds - costs.seconds[step.slots] for step in drafting)
        costs = replace(costs, overhead=max(0.0, beside))
        _write_costs(costs, file)
    return replace(loaded, costs=costs, stats={})


def _steps(loaded: LoadedModel, drafts: Drafter) -> list[Step]:
    """Return the steps of a short generation without the first, which includes the prefill.

    It stops early if steps are slow, so that loading a large model is not delayed.
    """
    steps = decode(
        loaded.model,
        [index % 7 for index in range(_PROBE_LENGTH)],
        stop=StopRule(_PROBE_TOKENS),
        sampler=Sampler(),
        drafts=drafts,
        mask_token_ids=loaded.mask_token_ids,
        compiled=loaded.compiled,
    )
    next(steps)
    began = time.perf_counter()
    return [next(steps), *takewhile(lambda _: time.perf_counter() - began < _PROBE_SECONDS, steps)]


def _compiled(loaded: LoadedModel, engine: EngineName, tokens: int, on_compile: Callable[[], None]) -> Compiled | None:
    if engine == "eager":
        return None
    if loaded.device.startswith("cuda"):
        required = engine == "compiled"
        fused = required or _is_worth_compiling(loaded, tokens)
        return cuda_graph_model(loaded, fused=fused, required=required, on_compile=on_compile)
    reason = unsupported_reason(loaded.model)
    if reason is not None:
        if engine == "compiled":
            raise UsageProblem(f"--engine compiled: {loaded.name}: {reason}", hint="use --engine eager")
        return None
    model_key = fingerprint(loaded.model)
    package = engine_folder() / f"program-{model_key}.pt2"
    refused, timed = package.with_suffix(".refused"), engine_folder() / f"speeds-{_speed_key(loaded, model_key)}.json"
    if engine == "compiled":
        return _ready(loaded, package, refused, on_compile=on_compile)
    # without kernels a GGUF file was unpacked
    problem = None if loaded.gguf is None else problem_met()
    if problem is not None:
        raise RunFailed(problem)
    is_worth_it, known = _is_worth_compiling(loaded, tokens), read_speeds(timed)
    if not (package.exists() or is_worth_it) or (known is not None and not known.compiled_is_faster):
        return None
    refusal = refusal_of(refused)
    if refusal is not None and not package.exists():
        raise RunFailed(refusal)
    may_compile = is_worth_it and refusal is None
    compiled = _ready(loaded, package, refused, on_compile=on_compile if may_compile else None)
    return compiled if _is_faster(loaded, compiled, timed) else None


def _is_worth_compiling(loaded: LoadedModel, tokens: int) -> bool:
    # quantised layers need shape-invariant attention, so they are always compiled
    if has_quantized_layers(loaded.model):
        return True
    return tokens * max(1, _size(loaded) / _BYTES_THAT_SAVE_AS_MUCH) >= _TOKENS_WORTH_COMPILING


def _size(loaded: LoadedModel) -> int:
    return sum(tensor.nbytes for tensor in chain(loaded.model.parameters(), loaded.model.buffers()))


def _is_faster(loaded: LoadedModel, compiled: CompiledModel, timed: Path) -> bool:
    """Return whether the compiled model is faster than the eager one, as measured before or now."""
    speeds = read_speeds(timed)
    if speeds is None:
        prompt = min(PROMPT, (loaded.context_length or PROMPT + 1) - 1)
        # `run_by` None is the eager engine
        rounds = [
            [
                measure_speed(engine_for(loaded.model, run_by, max_length=prompt, max_slots=1), prompt)
                for run_by in (None, compiled)
            ]
            for _ in range(ROUNDS)
        ]
        speeds = Speeds(*(reduce(Speed.fastest, found) for found in zip(*rounds, strict=True)))
        if not speeds.is_doubtful:
            write_speeds(speeds, timed)
    return speeds.compiled_is_faster


def _ready(
    loaded: LoadedModel, package: Path, refused: Path, *, on_compile: Callable[[], None] | None
) -> CompiledModel:
    """Load the compiled model; compile it if it is missing or damaged, unless `on_compile` is None.

    Raises:
        RunFailed: there is none and compiling fails. A failed compilation is noted on disk.
    """
    if package.exists():
        try:
            return _checked(loaded, package)
        except RunFailed:
            if on_compile is None or package.exists():  # nothing is wrong with what is on disk
                raise
    if on_compile is None:
        raise RunFailed(f"{package}: there is none")
    _check_room(loaded)
    check_compiler()
    with writing(package.parent):
        package.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    on_compile()
    try:
        load_kernels(build_kernels(package.parent))
        compile_model(loaded.model, package, adapter_updates(loaded.model))
        compiled = _checked(loaded, package)
    except RunFailed as error:
        note_refusal(refused, str(error))
        raise
    refused.unlink(missing_ok=True)
    return compiled


def _check_room(loaded: LoadedModel) -> None:
    """Refuse to compile a model that would not fit into memory."""
    needed, free = (_COPIES - 1) * _size(loaded), available_memory()
    if needed > free:
        raise RunFailed(
            f"compiling {loaded.name} needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free",
            hint="close other programs, or use --engine eager",
        )


def _checked(loaded: LoadedModel, package: Path) -> CompiledModel:
    """Load the compiled model and check that it computes what the eager model computes.

    Raises:
        RunFailed: it cannot be loaded or differs; it is then removed.
    """
    model = loaded.model
    try:
        compiled = CompiledModel(package, build_kernels(package.parent), model, adapter_updates(model))
        same = agrees(compiled, model)
    except RuntimeError as error:
        package.unlink(missing_ok=True)
        raise RunFailed(f"{package}: cannot be run: {first_line(error)}") from error
    if not same:
        package.unlink(missing_ok=True)
        raise RunFailed(f"{loaded.name}, compiled, computes something else", hint="use --engine eager")
    used(package)
    return compiled


def _speed_key(loaded: LoadedModel, compiled: str | None) -> str:
    """Return a hash of what the cost of a step depends on; `compiled` is the fingerprint of the one that runs."""
    config = loaded.model.config.to_json_string()
    inputs = (machine(), loaded.device, loaded.dtype, torch.get_num_threads(), compiled, config)
    return hashlib.sha256(repr(inputs).encode()).hexdigest()[:32]


def _read_costs(file: Path) -> StepCosts | None:
    try:
        saved = json.loads(file.read_bytes())
        seconds = {size: float(saved["seconds"][str(size)]) for size in SIZES}
        return StepCosts(seconds, float(saved["overhead"]))
    except (OSError, ValueError, TypeError, KeyError):  # not there, or not ours
        return None


def _write_costs(costs: StepCosts, file: Path) -> None:
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_write(file, json.dumps(asdict(costs)))
    except OSError:  # measured again the next time
        return
