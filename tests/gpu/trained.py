"""The sections of `check.py` that need trained or quantised weights."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from space_cli.bench.measure import measure
from space_cli.bench.methods import METHODS
from space_cli.core.block import Block
from space_cli.core.engine import EagerEngine, engine_for
from space_cli.core.sampling import Sampling
from space_cli.models.engines import measured, prepare
from space_cli.models.loading import load_model
from space_cli.tasks.plan import Settings, plan
from space_cli.tasks.suites import load_suite
from space_cli.verify.compare import Comparison, compare

if TYPE_CHECKING:
    from check import Run

_PROMPTS = (
    "def add(a, b):\n",
    "def is_prime(n):\n    # whether n is a prime number\n",
    "def reverse_words(text):\n    # the words of a text in reverse order\n",
    "class Stack:\n    # a stack of values\n\n    def __init__(self):\n",
    "def fibonacci(n):\n    # the first n Fibonacci numbers: fibonacci(5) is [0, 1, 1, 2, 3]\n",
    "import json\n\n\ndef read_rows(path):\n    # the rows of a JSON Lines file\n",
)


class _Quiet:
    """A view that shows nothing."""

    def started(self, suite: str, task_id: str, method: str) -> None:
        """An answer begins."""

    def stepped(self, method: str, step: Any) -> None:
        """A model call has ended."""

    def finished(self, method: str) -> None:
        """An answer is complete."""


def trained(run: Run) -> None:
    """Compare methods on trained models, and verify that SPACE's text is that of plain decoding."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prompts.jsonl")
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in _PROMPTS))
        suite = load_suite(str(file))
    for name in run.models:
        try:
            _one_model(run, name, suite)
        except Exception:  # noqa: BLE001  # one fault must not cost the other figures
            run.fault(name)
        run.write(complete=False)


def _one_model(run: Run, name: str, suite: Any) -> None:
    dtype = "float32" if run.dry else "bfloat16"
    loaded = load_model(name, dtype=dtype, device=run.device)
    # a dry run goes the same way: an engine for a GPU, its graphs off
    loaded = replace(
        prepare(replace(loaded, device="cuda"), engine="auto" if run.dry else "compiled"), device=run.device
    )
    began = time.monotonic()
    loaded = measured(loaded, fresh=True)
    short = Path(name).name
    run.note(f"{short}: ms by slots", {size: 1e3 * each for size, each in loaded.costs.seconds.items()})
    run.note(f"{short}: ms beside the model", 1e3 * loaded.costs.overhead)
    run.note(f"{short}: seconds to measure", time.monotonic() - began)
    settings = Settings(12 if run.dry else 128, Sampling())
    planned = plan(loaded, [suite], settings, limit=2 if run.dry else None)
    names = ["ar", *(["space"] if loaded.candidates else []), "space-lookup", "hf"]
    samples = [each for some in measure(planned.prompts, [METHODS[each] for each in names], _Quiet()) for each in some]
    for method in names:
        own = [sample for sample in samples if sample.method == method]
        tokens, seconds = sum(each.tokens for each in own), sum(each.seconds for each in own)
        run.row(
            f"{short}, bench, {method}",
            tokens_per_second=tokens / seconds,
            tokens_per_step=tokens / max(1, sum(each.steps for each in own)),
            first_step_ms=1e3 * statistics.median(each.first_step_seconds for each in own),
            identical=f"{sum(bool(each.identical) for each in own)}/{len(own)}",
        )
    k = loaded.candidates or 5
    for drafts in ("adaptive", "mixed") if loaded.candidates else ("mixed",):
        block = Block.chain(k, k if loaded.candidates else 0)
        comparison = Comparison(block, drafts, ("ar", "hf"))
        answers = list(compare(planned.prompts, comparison, _Quiet()))
        for against in ("ar", "hf"):
            divergences = [each for answer in answers for each in answer.divergences if each.against == against]
            run.row(
                f"{short}, verify-lossless, {drafts} drafts, {block.num_slots} slots, {against}",
                identical=f"{sum(answer.identical[against] for answer in answers)}/{len(answers)}",
                ties=sum(each.verdict == "tie" for each in divergences),
                violations=sum(each.verdict == "violation" for each in divergences),
            )
        run.note(f"{short}: {drafts}", [each.model_dump() for answer in answers for each in answer.divergences])


@torch.inference_mode()
def quantized(run: Run) -> None:
    """Time steps of int8 and nf4 weights, as they are and as graphs."""
    if find_spec("bitsandbytes") is None:
        run.note("left out", "bitsandbytes is not installed")
        return
    from sections import SIZES, random_model

    name = "tiny" if run.dry else "1B"
    with tempfile.TemporaryDirectory() as folder:
        random_model(run, name).save_pretrained(folder)
        for kind in ("int8", "nf4"):
            try:
                _one_quantization(run, name, kind, folder, SIZES)
            except Exception:  # noqa: BLE001  # one fault must not cost the other figures
                run.fault(kind)


def _one_quantization(run: Run, name: str, kind: str, folder: str, sizes: tuple[int, ...]) -> None:
    from sections import _Steps

    dtype = torch.float32 if run.dry else torch.bfloat16
    config = (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        if kind == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype)
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config, device_map={"": run.device}
    ).eval()
    read = sum(each.nbytes for each in model.parameters())
    table = _Steps(run, f"{name} {kind}", read, None)
    table.time("eager", EagerEngine(model, max_length=400, max_slots=64), (1, 32))
    from space_cli.compile.cuda import CudaGraphModel

    program = CudaGraphModel(model)
    for numerics, some in (("invariant", (1, 32, 64)), ("plain", sizes)):
        engine = engine_for(model, program, max_length=400, max_slots=64, numerics=numerics)
        table.time(f"graph, {numerics}", engine, some)
