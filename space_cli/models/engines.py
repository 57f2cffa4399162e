"""Which engine runs a model, and what its steps cost: chosen once a model is loaded, kept on disk for the next time."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import chain, takewhile
from pathlib import Path
from typing import Literal

import torch

from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.choose import Chooser
from space_cli.core.compiled import Program, compile_program, fingerprint, why_not
from space_cli.core.costs import MOST_SLOTS, SIZES, StepCosts, measure_costs
from space_cli.core.cuda import GraphProgram
from space_cli.core.decoder import decode
from space_cli.core.drafting import AcceptanceStats, AdaptiveDrafter, Drafter
from space_cli.core.engine import EagerEngine, embedding_rows, engine_for
from space_cli.core.quantized import has_quantized_layers
from space_cli.core.stopping import StopRule
from space_cli.core.stream import Step
from space_cli.core.toolchain import build_kernels, load_kernels, machine
from space_cli.errors import RunFailed, UsageProblem
from space_cli.files import write_whole
from space_cli.models.adapter import adapter_updates
from space_cli.models.graphs import graph_program
from space_cli.models.kernels import engine_folder
from space_cli.models.loading import LoadedModel
from space_cli.models.memory import available_memory
from space_cli.models.refusals import is_refused, note_refusal
from space_cli.models.speeds import PROMPT, Speeds, measure_speed, read_speeds, write_speeds

EngineName = Literal["auto", "eager", "compiled"]
"""eager: the model as transformers runs it. compiled: as a program of its own. auto: the faster one, where a program is
on disk already, or where so many tokens are to come that compiling pays; else eager."""

# a token saves some milliseconds of dispatch, and more the more weights there are
_TOKENS_WORTH_COMPILING, _BYTES_THAT_SAVE_AS_MUCH = 4000, 100 * 2**20
# of the weights in memory once a program is compiled and loaded: the model, packed ones, what is not given back
_COPIES = 3
_PREFIX_LENGTH, _PROBE_LENGTH, _PROBE_TOKENS, _PROBE_SECONDS = 256, 4, 48, 0.4


def prepare(
    loaded: LoadedModel,
    *,
    engine: EngineName = "auto",
    tokens: int = 0,
    on_compile: Callable[[], None] = lambda: None,
) -> LoadedModel:
    """Return the model with its engine; what its steps cost, adaptive drafts are to ask of `measured`.

    Args:
        loaded: as `load_model` gave it.
        engine: which one.
        tokens: to be generated in this run at most, for `auto`.
        on_compile: called before a compilation, which takes from ten seconds up.

    Raises:
        UsageProblem: engine is compiled and the model cannot be.
        RunFailed: engine is compiled and there is no compiler, no room for the program, or it computes something else.
    """
    return replace(loaded, program=_program(loaded, engine, tokens, on_compile), stats={})


def measured(loaded: LoadedModel, *, fresh: bool = False) -> LoadedModel:
    """Return the model with the costs of its steps: those on disk, or measured now where there are none or `fresh`."""
    program = None if loaded.program is None else fingerprint(loaded.model)
    file = engine_folder() / f"costs-{_speed_key(loaded, program)}.json"
    costs = None if fresh else _read_costs(file)
    if costs is None:
        limit = loaded.context_length or _PREFIX_LENGTH + MOST_SLOTS
        length = max(1, min(_PREFIX_LENGTH, limit - MOST_SLOTS))
        costs = measure_costs(engine_for(loaded.model, loaded.program, max_length=length, max_slots=MOST_SLOTS), length)
        drafting = _steps(
            loaded, AdaptiveDrafter(AcceptanceStats(costs, loaded.masks_per_group), loaded.masks_per_group)
        )
        beside = statistics.median(step.seconds - costs.seconds[step.slots] for step in drafting)
        costs = replace(costs, overhead=max(0.0, beside))
        _write_costs(costs, file)
    return replace(loaded, costs=costs, stats={})


def _steps(loaded: LoadedModel, drafts: Drafter) -> list[Step]:
    """Return the steps of a short generation, without the first, which has the prompt in it.

    It ends sooner where steps take long: a start must not wait for a large model, nor for a busy machine.
    """
    steps = decode(
        loaded.model,
        [index % 7 for index in range(_PROBE_LENGTH)],
        stop=StopRule(_PROBE_TOKENS),
        chooser=Chooser(),
        drafts=drafts,
        mask_token_ids=loaded.mask_token_ids,
        program=loaded.program,
    )
    next(steps)
    began = time.perf_counter()
    return [next(steps), *takewhile(lambda _: time.perf_counter() - began < _PROBE_SECONDS, steps)]


def _program(
    loaded: LoadedModel, engine: EngineName, tokens: int, on_compile: Callable[[], None]
) -> Program | GraphProgram | None:
    if engine == "eager":
        return None
    if loaded.device.startswith("cuda"):
        required = engine == "compiled"
        fused = required or _is_worth_compiling(loaded, tokens)
        return graph_program(loaded, fused=fused, required=required, on_compile=on_compile)
    reason = why_not(loaded.model)
    if reason is not None:
        if engine == "compiled":
            raise UsageProblem(f"--engine compiled: {loaded.name}: {reason}", hint="use --engine eager")
        return None
    program_key = fingerprint(loaded.model)
    package = engine_folder() / f"program-{program_key}.pt2"
    refused, timed = package.with_suffix(".refused"), engine_folder() / f"speeds-{_speed_key(loaded, program_key)}.json"
    is_asked_for = engine == "compiled"
    may_compile = is_asked_for or (_is_worth_compiling(loaded, tokens) and not is_refused(refused))
    if not is_asked_for:
        known = read_speeds(timed)
        if not (package.exists() or may_compile) or (known is not None and not known.compiled_is_faster):
            return None
    try:
        program = _ready(loaded, package, refused, on_compile=on_compile if may_compile else None)
    except RunFailed:
        if is_asked_for:
            raise
        return None
    return program if is_asked_for or _is_faster(loaded, program, timed) else None


def _is_worth_compiling(loaded: LoadedModel, tokens: int) -> bool:
    # what rounds activations to 8 bits must not meet attention that rounds by the shape of a call
    if has_quantized_layers(loaded.model):
        return True
    return tokens * max(1, _size(loaded) / _BYTES_THAT_SAVE_AS_MUCH) >= _TOKENS_WORTH_COMPILING


def _size(loaded: LoadedModel) -> int:
    return sum(tensor.nbytes for tensor in chain(loaded.model.parameters(), loaded.model.buffers()))


def _is_faster(loaded: LoadedModel, program: Program, timed: Path) -> bool:
    """Return whether a program is faster than the model itself: as measured before, or now."""
    speeds = read_speeds(timed)
    if speeds is None:
        prompt = min(PROMPT, (loaded.context_length or PROMPT + 1) - 1)
        found = [
            measure_speed(engine_for(loaded.model, run_by, max_length=prompt, max_slots=1), prompt)
            for run_by in (None, program)
        ]
        speeds = Speeds(*found)
        write_speeds(speeds, timed)
    return speeds.compiled_is_faster


def _ready(loaded: LoadedModel, package: Path, refused: Path, *, on_compile: Callable[[], None] | None) -> Program:
    """Return the program on disk, made where it is not there or is damaged, unless `on_compile` is None.

    Raises:
        RunFailed: there is none and none can be made. What only a compilation could tell is noted.
    """
    if package.exists():
        try:
            return _checked(loaded, package)
        except RunFailed:
            if on_compile is None or package.exists():  # nothing is wrong with the program
                raise
    if on_compile is None:
        raise RunFailed(f"{package}: there is none")
    _check_room(loaded)
    try:
        package.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RunFailed(f"{package.parent}: {error.strerror}") from error
    on_compile()
    try:
        load_kernels(build_kernels(package.parent))
        compile_program(loaded.model, package, adapter_updates(loaded.model))
        program = _checked(loaded, package)
    except RunFailed as error:
        note_refusal(refused, str(error))
        raise
    refused.unlink(missing_ok=True)
    return program


def _check_room(loaded: LoadedModel) -> None:
    """Refuse to compile what would not fit into memory."""
    needed, free = (_COPIES - 1) * _size(loaded), available_memory()
    if needed > free:
        raise RunFailed(
            f"compiling {loaded.name} needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free",
            hint="use --engine eager",
        )


@torch.inference_mode()
def _checked(loaded: LoadedModel, package: Path) -> Program:
    """Return the program on disk, once it has computed what the model itself computes.

    Raises:
        RunFailed: it cannot be loaded or differs; it is then removed.
    """
    model = loaded.model
    try:
        program = Program(package, build_kernels(package.parent), model, adapter_updates(model))
        # ordinary words: behind a few control tokens half precision can be off by whole spreads (SmolLM2)
        size = embedding_rows(model)
        prefix, tokens = [size // 2, size // 3, size // 5], [size // 3, size // 7, size // 2, size // 3]
        logits = []
        for run_by in (None, program):
            engine: EagerEngine = engine_for(model, run_by, max_length=len(prefix) + 8, max_slots=8)
            engine.prefill(prefix)
            alone = engine.run(AR_BLOCK, tokens[:1])
            engine.abandon()
            logits.append(torch.cat([alone, engine.run(Block.tree([0, 0, 2], 0), tokens)]).float())
    except RuntimeError as error:
        package.unlink(missing_ok=True)
        raise RunFailed(f"{package}: cannot be run: {str(error).splitlines()[0]}") from error
    own, compiled = logits
    # kernels round differently; a wrong program is off by whole spreads
    allowed = own.std() * (1e-2 if model.dtype == torch.float32 and not has_quantized_layers(model) else 0.5)
    if not (own - compiled).abs().max() <= allowed:
        package.unlink(missing_ok=True)
        raise RunFailed(f"{loaded.name}, compiled, computes something else", hint="use --engine eager")
    return program


def _speed_key(loaded: LoadedModel, program: str | None) -> str:
    """Return a hash of what the cost of a step depends on; `program` is the fingerprint of the one that runs."""
    config = loaded.model.config.to_json_string()
    told = (machine(), loaded.device, loaded.dtype, torch.get_num_threads(), program, config)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]


def _read_costs(file: Path) -> StepCosts | None:
    try:
        told = json.loads(file.read_bytes())
        seconds = {size: float(told["seconds"][str(size)]) for size in SIZES}
        return StepCosts(seconds, float(told["overhead"]))
    except (OSError, ValueError, TypeError, KeyError):  # not there, or not ours
        return None


def _write_costs(costs: StepCosts, file: Path) -> None:
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(file, json.dumps(asdict(costs)))
    except OSError:  # measured again the next time
        return
