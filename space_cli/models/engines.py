"""Which engine runs a model, and what its steps cost: chosen once a model is loaded, kept on disk for the next time."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import takewhile
from pathlib import Path
from typing import Literal

import psutil
import torch
from platformdirs import user_cache_path

from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.choose import Chooser
from space_cli.core.compiled import Program, build_kernels, compile_program, fingerprint, machine, why_not
from space_cli.core.costs import MOST_SLOTS, SIZES, StepCosts, measure_costs
from space_cli.core.cuda import GraphProgram
from space_cli.core.decoder import decode
from space_cli.core.drafting import AdaptiveDrafts, Drafts, Experience
from space_cli.core.engine import EagerEngine, engine_for
from space_cli.core.stopping import StopRule
from space_cli.core.stream import Step
from space_cli.errors import RunFailed, UsageProblem
from space_cli.files import write_whole
from space_cli.models.graphs import graph_program
from space_cli.models.loading import LoadedModel

EngineName = Literal["auto", "eager", "compiled"]
"""eager: the model as transformers runs it. compiled: as a program of its own. auto: compiled where that is on disk
already, or where so many tokens are to come that compiling pays."""

_TOKENS_WORTH_COMPILING = 4000
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
    program = _program(loaded, engine, tokens, on_compile)
    accepted = () if loaded.space is None else loaded.space.accepted_by_depth
    return replace(loaded, program=program, experience=Experience(loaded.masks_per_group, accepted))


def measured(loaded: LoadedModel, *, fresh: bool = False) -> LoadedModel:
    """Return the model with the costs of its steps: those on disk, or measured now where there are none or `fresh`."""
    file = _folder() / f"costs-{_speed_key(loaded)}.json"
    costs = None if fresh else _read_costs(file)
    if costs is None:
        limit = loaded.context_length or _PREFIX_LENGTH + MOST_SLOTS
        length = max(1, min(_PREFIX_LENGTH, limit - MOST_SLOTS))
        costs = measure_costs(engine_for(loaded.model, loaded.program, max_length=length, max_slots=MOST_SLOTS), length)
        drafting = _steps(loaded, AdaptiveDrafts(costs, loaded.masks_per_group))
        beside = statistics.median(step.seconds - costs.seconds[step.slots] for step in drafting)
        costs = replace(costs, overhead=max(0.0, beside))
        _write_costs(costs, file)
    return replace(loaded, costs=costs)


def _steps(loaded: LoadedModel, drafts: Drafts) -> list[Step]:
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
        fused = required or tokens >= _TOKENS_WORTH_COMPILING
        return graph_program(loaded, fused=fused, required=required, on_compile=on_compile)
    reason = why_not(loaded.model)
    if reason is not None:
        if engine == "compiled":
            raise UsageProblem(f"--engine compiled: {loaded.name}: {reason}", hint="use --engine eager")
        return None
    package = _folder() / f"program-{fingerprint(loaded.model)}.pt2"
    refused = package.with_suffix(".refused")
    if engine == "auto" and not package.exists() and (tokens < _TOKENS_WORTH_COMPILING or refused.exists()):
        return None
    try:
        package.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not package.exists():
            _check_room(loaded)
            on_compile()
            compile_program(loaded.model, package)
        return _checked(loaded, package)
    except (OSError, RunFailed) as error:
        if engine == "compiled":
            raise error if isinstance(error, RunFailed) else RunFailed(f"{package}: {error.strerror}") from error
        _leave_mark(refused, str(error))
        return None


def _check_room(loaded: LoadedModel) -> None:
    """Refuse to compile what would not fit into memory."""
    size = sum(tensor.nbytes for tensor in loaded.model.parameters())
    needed, free = (_COPIES - 1) * size, psutil.virtual_memory().available
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
        program = Program(package, build_kernels(package.parent), model)
        prefix, tokens = [1, 2, 3], [2, 3, 1, 2]
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
    allowed = own.std() * (1e-2 if model.dtype == torch.float32 else 0.5)
    if not (own - compiled).abs().max() <= allowed:
        package.unlink(missing_ok=True)
        raise RunFailed(f"{loaded.name}, compiled, computes something else", hint="use --engine eager")
    return program


def _folder() -> Path:
    return user_cache_path("space") / "engines"


def _speed_key(loaded: LoadedModel) -> str:
    """Return a hash of what the cost of a step depends on."""
    program = None if loaded.program is None else fingerprint(loaded.model)
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


def _leave_mark(file: Path, reason: str) -> None:
    """Note why a model was not compiled, so that `auto` does not try again at every start."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(file, reason)
    except OSError:
        return
