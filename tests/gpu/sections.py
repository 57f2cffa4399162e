"""What `check.py` measures, section by section."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from trained import quantized, trained
from transformers import LlamaConfig, LlamaForCausalLM

from space_cli.compile.cuda import CudaGraphModel, _ancestry
from space_cli.compile.cuda_attention import BlockTensors, attend, attend_plainly
from space_cli.compile.cuda_engine import GraphEngine
from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.decoder import decode
from space_cli.core.drafting import ChainDrafter
from space_cli.core.engine import EagerEngine
from space_cli.core.sampling import Sampler, Sampling
from space_cli.core.stopping import StopRule

if TYPE_CHECKING:
    from check import Run

SIZES = (1, 8, 16, 32, 36, 64)
_PREFIX = 256
# layers, hidden, intermediate, heads, key heads, vocabulary: SmolLM2-135M, Llama 3.2 1B, Llama 2 7B
SHAPES = {
    "7B": (32, 4096, 11008, 32, 32, 32000),
    "1B": (16, 2048, 8192, 32, 8, 128256),
    "0.1B": (30, 576, 1536, 9, 3, 49152),
}
# rows of whole blocks of 64, as 4-bit kernels on a CPU want them
_DRY_SHAPES = {"tiny": (2, 64, 128, 4, 2, 300)}


def release() -> None:
    """Give back what a section held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _wait(run: Run) -> None:
    if not run.dry:
        torch.cuda.synchronize()


def _median_seconds(run: Run, call: Callable[[], Any], *, calls: int = 20, warm_ups: int = 4) -> float:
    """Return the median wall time of a call, with what it started on the device."""
    calls, warm_ups = (2, 1) if run.dry else (calls, warm_ups)
    taken = []
    for index in range(warm_ups + calls):
        _wait(run)
        began = time.perf_counter()
        call()
        _wait(run)
        if index >= warm_ups:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def bandwidth(run: Run) -> None:
    """Measure what a device-to-device copy moves, bytes read and written, and what reading alone does."""
    size = 2**20 if run.dry else 2**32
    source = torch.empty(size // 4, device=run.device).normal_()
    target = torch.empty_like(source)
    seconds = _median_seconds(run, lambda: target.copy_(source))
    run.row("copy", gigabytes_per_second=2 * size / seconds / 1e9)
    run.note("copy_bytes_per_second", 2 * size / seconds)
    seconds = _median_seconds(run, source.sum)
    run.row("sum (read only)", gigabytes_per_second=size / seconds / 1e9)


def kernels(run: Run) -> None:
    """Hold the attention kernels against plain PyTorch, and a row's bits in a tree against its bits alone."""
    lengths = (0, 64, 300) if run.dry else (0, 1, 31, 60, 63, 64, 127, 500, 1000, 1990)
    for dtype in (torch.float32,) if run.dry else (torch.bfloat16, torch.float16, torch.float32):
        for heads, key_heads, width in ((32, 32, 128), (9, 3, 64), (8, 1, 96)):
            worst, equal = 0.0, 0
            for length in lengths:
                error, same = _one_attention(run, dtype, heads, key_heads, width, length)
                worst, equal = max(worst, error), equal + same
            run.row(
                f"attention {str(dtype)[6:]} {heads}/{key_heads} x {width}",
                relative_error=worst,
                bit_equal=f"{equal}/{len(lengths)}",
            )


def _one_attention(
    run: Run, dtype: torch.dtype, heads: int, key_heads: int, width: int, length: int
) -> tuple[float, int]:
    """Return the relative error of a tree, and how many of a path's rows have the same bits when run one by one."""
    generator = torch.Generator().manual_seed(length)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(run.device, dtype)

    tree, path, rows = Block.tree([0, 0, 2, 1, 3], 2), [0, 2, 3, 5], 32
    query, new = random(1, heads, rows, width), random(2, 1, key_heads, rows, width)
    text_query, text = random(heads, len(path), width), random(2, key_heads, len(path), width)
    query[0][:, path], new[:, 0][:, :, path] = text_query, text
    states = random(2, key_heads, 2048, width)
    told = _told(run, tree, rows, length)
    expected = attend_plainly(query, new[0], new[1], states.clone(), told, width**-0.5)[:, : tree.num_slots].float()
    kept = states.clone()
    found = attend(query, new[0], new[1], kept, *told, width**-0.5)
    error = (found[:, : tree.num_slots].float() - expected).norm() / expected.norm()
    same = 0
    for index, slot in enumerate(path):
        query[0][:, 0], new[:, 0][:, :, 0] = text_query[:, index], text[:, :, index]
        told = _told(run, AR_BLOCK, rows, length + index)
        same += torch.equal(attend(query, new[0], new[1], states, *told, width**-0.5)[0, 0], found[0, slot])
    return error.item(), int(same == len(path))


def _told(run: Run, block: Block, rows: int, length: int) -> BlockTensors:
    depths, ancestors = (torch.from_numpy(each.copy()).to(run.device) for each in _ancestry(block, rows))
    return BlockTensors(
        torch.tensor([length], dtype=torch.int32, device=run.device), depths, ancestors.view(rows, rows)
    )


def _shapes(run: Run) -> dict[str, tuple[int, ...]]:
    return _DRY_SHAPES if run.dry else SHAPES


def random_model(run: Run, name: str) -> LlamaForCausalLM:
    """Return a Llama of random weights, made on the device."""
    layers, hidden, intermediate, heads, key_heads, vocabulary = _shapes(run)[name]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=name != "7B",
        initializer_range=0.2 if run.dry else 0.02,
    )
    own = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if run.dry else torch.bfloat16)
    try:
        torch.manual_seed(0)
        with torch.device(run.device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(own)
    return model.eval()


@torch.inference_mode()
def steps(run: Run) -> None:
    """Time steps of random models: as transformers runs them, as graphs, with fused kernels; plain and invariant."""
    if run.dry:
        # minutes of compilation would show nothing that counts on a GPU
        torch.compile = partial(torch.compile, backend="eager")
    bytes_per_second = run.told.get("bandwidth", {}).get("copy_bytes_per_second")
    for name in _shapes(run):
        if run.left < 60 and not run.dry:
            run.failed[f"steps: {name}"] = f"not begun: {run.left:.0f} s left"
            continue
        began = time.monotonic()
        model = random_model(run, name)
        read = sum(each.nbytes for each in model.parameters())
        if not model.config.tie_word_embeddings:
            read -= model.get_input_embeddings().weight.nbytes
        run.note(f"{name}: bytes read by a step", read)
        run.note(f"{name}: seconds to make", time.monotonic() - began)
        table = _Steps(run, name, read, bytes_per_second)
        eager = EagerEngine(model, max_length=_PREFIX + 64, max_slots=64)
        table.time("eager", eager, (1, 32))
        for fused in (False, True):
            try:
                program = CudaGraphModel(model, fused=fused)
                kind = "fused graph" if fused else "graph"
                for numerics, sizes in (("invariant", SIZES), ("plain", (1, 36) if fused else SIZES)):
                    engine = GraphEngine(model, program, max_length=1500, max_slots=64, numerics=numerics)
                    table.time(f"{kind}, {numerics}", engine, sizes)
                _profile(run, f"{name}, {kind}", engine, program)
            except Exception:  # noqa: BLE001  # one fault must not cost the other figures
                run.fault(f"{name}, {'fused' if fused else 'not fused'}")
        _generate(run, name, model)
        del model, eager, engine, program
        release()
        run.write(complete=False)


class _Steps:
    """Rows of step times of one model."""

    def __init__(self, run: Run, name: str, read: int, bytes_per_second: float | None) -> None:
        self._run, self._name, self._read, self._bytes_per_second = run, name, read, bytes_per_second

    def time(self, kind: str, engine: EagerEngine, sizes: Sequence[int]) -> None:
        """Time calls of each size behind a prefix, and note the first of them, which captures or compiles."""
        run, alone = self._run, None
        engine.prefill([index % 7 for index in range(_PREFIX)])
        for size in sizes:
            block = Block.chain(size - 1, 0)

            def step(block: Block = block) -> None:
                logits = engine.run(block, [5] * block.num_slots)
                if engine.top_k is None:
                    logits.argmax(dim=-1).tolist()
                engine.rollback()

            began = time.perf_counter()
            step()
            first = time.perf_counter() - began
            seconds = _median_seconds(run, step)
            alone = alone or seconds
            numbers = {"ms": seconds * 1e3, "to_one_slot": seconds / alone, "gb_per_second": self._read / seconds / 1e9}
            if self._bytes_per_second:
                numbers["of_copy_bandwidth"] = self._read / seconds / self._bytes_per_second
            run.row(f"{self._name}, {kind}, {size} slots", **numbers, first_s=first)


def _profile(run: Run, name: str, engine: GraphEngine, program: CudaGraphModel) -> None:
    """Note the time of a replayed graph alone, which kernels it is spent in, and that nothing else waits."""
    if run.dry:
        return
    step = next(step for (rows, _), step in program._steps.items() if rows == 32)
    graph_seconds = _median_seconds(run, step.graph.replay)
    run.row(f"{name}, 32 rows, the graph alone", ms=graph_seconds * 1e3)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            engine.run(AR_BLOCK, [5])
            engine.commit([0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # the one is the wait for the most probable tokens
    run.row(f"{name}, a step", waits=sum("synchroniz" in str(each.message) for each in told))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step.graph.replay()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
    run.note(
        f"{name}: kernels of 32 rows",
        [(event.key[:120], event.count, round(event.device_time_total / 1e3, 4)) for event in events[:25]],
    )


def _generate(run: Run, name: str, model: LlamaForCausalLM) -> None:
    """Time transformers' `generate`."""
    tokens = 4 if run.dry else 32
    prompt = torch.tensor([[index % 7 for index in range(_PREFIX)]], device=model.device)

    def generate() -> None:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens,
                       do_sample=False, pad_token_id=0)  # fmt: skip

    seconds = _median_seconds(run, generate, calls=1, warm_ups=1)
    run.row(
        f"{name}, hf generate, prompt of {_PREFIX} included",
        tokens_per_second=tokens / seconds,
        ms=seconds / tokens * 1e3,
    )


@torch.inference_mode()
def exact(run: Run) -> None:
    """Count rows of equal bits and tokens in common: AR against blocks, whose drafts are right now and then."""
    for name in [name for name in _shapes(run) if name != "7B"]:
        model = random_model(run, name)
        for fused in (False,) if run.dry else (False, True):
            program = CudaGraphModel(model, fused=fused)
            told = f"{name}{', fused' if fused else ''}"
            _bits(run, told, model, program)
            for block, what in ((Block.tree([0, 0, 2, 2, 1, 4], 3), "tree"), (Block.chain(7, 3), "chain of 32 slots")):
                _agree(run, f"{told}, {what}", model, program, block)
        del model, program
        release()


def _bits(run: Run, name: str, model: LlamaForCausalLM, program: CudaGraphModel) -> None:
    """Compare a text's logits alone with those in a block, in tiles of 32, of 64, and in plain sizes."""
    tokens = [(7 * index) % 250 + 1 for index in range(_PREFIX + 24)]
    prefix, following = tokens[:_PREFIX], tokens[_PREFIX:]
    alone = _logits(model, program, prefix, following, AR_BLOCK, "invariant")
    for what, block, numerics in (
        ("a block of 8, tile of 32", Block.chain(7, 0), "invariant"),
        ("a block of 32, tile of 32", Block.chain(7, 3), "invariant"),
        ("a block of 40, tile of 64", Block.chain(7, 4), "invariant"),
        ("plain, 1 row", AR_BLOCK, "plain"),
        ("plain, 8 rows", Block.chain(7, 0), "plain"),
    ):
        found = _logits(model, program, prefix, following, block, numerics)
        same = sum(torch.equal(one, other) for one, other in zip(alone, found, strict=True))
        gap = max((one - other).abs().max().item() for one, other in zip(alone, found, strict=True))
        run.row(f"{name}: AR in a tile of 32 against {what}", bit_equal=f"{same}/{len(alone)}", largest_gap=gap)


def _logits(
    model: LlamaForCausalLM,
    program: CudaGraphModel,
    prefix: Sequence[int],
    following: Sequence[int],
    block: Block,
    numerics: Any,
) -> list[torch.Tensor]:
    engine = GraphEngine(model, program, max_length=512, max_slots=block.num_slots, numerics=numerics)
    engine.prefill(list(prefix))
    rows: list[torch.Tensor] = []
    for start in range(0, len(following), block.num_tokens):
        ids = [*following[start : start + block.num_tokens], *[3] * (block.num_slots - block.num_tokens)]
        rows += engine.run(block, ids)[: block.num_tokens].float()
        engine.commit(range(block.num_tokens))
    return rows


def _agree(run: Run, name: str, model: LlamaForCausalLM, program: CudaGraphModel, block: Block) -> None:
    """Generate with drafts of which half are right, and count the tokens in common with AR."""
    answers, tokens, same, longest = 2 if run.dry else 6, 24 if run.dry else 160, 0, 0
    for answer in range(answers):
        prompt = [(answer * 31 + 7 * index) % 250 + 1 for index in range(40)]
        ar = _tokens(model, program, prompt, tokens, None)
        turns = count()

        def half_right(
            so_far: Sequence[int], guesses: Sequence[int], ar: list[int] = ar, turns: Any = turns
        ) -> list[int]:
            right = [*ar[len(so_far) - 40 :], *guesses, *guesses]
            depths = block.offsets[1 : block.num_tokens]
            return [right[depth - 1] ^ (next(turns) % 3 == 0) for depth in depths]

        found = _tokens(model, program, prompt, tokens, ChainDrafter(block, half_right))
        common = next((at for at, pair in enumerate(zip(ar, found, strict=False)) if pair[0] != pair[1]), tokens)
        same, longest = same + (found == ar), longest + common
    run.row(f"{name}: identical to AR", answers=f"{same}/{answers}", tokens=f"{longest}/{answers * tokens}")


def _tokens(
    model: LlamaForCausalLM, program: CudaGraphModel, prompt: Sequence[int], tokens: int, drafts: ChainDrafter | None
) -> list[int]:
    steps = decode(
        model,
        prompt,
        stop=StopRule(tokens),
        sampler=Sampler.from_sampling(Sampling()),
        mask_token_ids=[3],
        drafts=drafts,
        compiled=program,
    )
    return [token for step in steps for token in step.tokens]


SECTIONS = {
    "bandwidth": bandwidth,
    "kernels": kernels,
    "steps": steps,
    "exact": exact,
    "trained": trained,
    "quantized": quantized,
}
MIN_SECONDS = {"bandwidth": 5, "kernels": 20, "steps": 60, "exact": 40, "trained": 40, "quantized": 30}
"""What a section needs to be worth beginning."""
