import copy
import platform

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from space_cli.core.attention import KEY_TILE, invariant_attention, least_rows, padded_length
from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.engine import EagerEngine, default_numerics

HALF = [torch.bfloat16, torch.float16]
# bits are a matter of the kernels at hand; `space verify-lossless` measures them on each machine
measured_kernels = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="measured on x86-64 alone, with AMX and without"
)
# of AVX2's, a block and a row alone differ in the last bit of float16 and float32
wide_kernels = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="equal with AVX-512 alone"
)
WIDE = [pytest.param(dtype, marks=wide_kernels) for dtype in (torch.float16, torch.float32)]


@st.composite
def calls(draw):
    """A block of queries over a prefix, and the row to look at."""
    width = draw(st.sampled_from([16, 32, 64, 80, 128]))
    groups, per_group = draw(st.sampled_from([(4, 1), (2, 2), (1, 4), (2, 3)]))
    prefix = draw(st.integers(1, 1200))
    rows = draw(st.integers(2, 36))
    return width, groups, per_group, prefix, rows, draw(st.integers(0, rows - 1)), draw(st.integers(0, 2**31))


def tensors(call, dtype):
    """Queries, whole tiles of keys and values, and the mask of a chain of tokens."""
    width, groups, per_group, prefix, rows, _, seed = call
    generator = torch.Generator().manual_seed(seed)
    shown = padded_length(prefix + rows)
    query = torch.randn(1, groups * per_group, rows, width, generator=generator).to(dtype)
    key, value = (torch.randn(1, groups, shown, width, generator=generator).to(dtype) for _ in range(2))
    visible = torch.arange(shown) <= prefix + torch.arange(rows)[:, None]
    mask = torch.zeros(1, 1, rows, shown, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
    return query, key, value, mask


@measured_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, *WIDE])
@settings(max_examples=60)
@given(call=calls())
def test_a_row_has_the_same_bits_alone_and_in_any_block(dtype, call):
    query, key, value, mask = tensors(call, dtype)
    prefix, row = call[3], call[5]
    alone_shown = padded_length(prefix + row + 1)

    together = invariant_attention(None, query, key, value, mask)[0][:, row]
    alone = invariant_attention(
        None,
        query[:, :, row : row + 1],
        key[:, :, :alone_shown],
        value[:, :, :alone_shown],
        mask[:, :, row : row + 1, :alone_shown],
    )[0][:, 0]

    assert torch.equal(together, alone)


@measured_kernels
@settings(max_examples=30)
@given(call=calls())
def test_a_call_of_generate_has_the_bits_of_ours(call):
    query, key, value, mask = tensors(call, torch.bfloat16)
    used = call[3] + 1

    ours = invariant_attention(None, query[:, :, :1], key, value, mask[:, :, :1])[0]
    growing_cache = invariant_attention(None, query[:, :, :1], key[:, :, :used], value[:, :, :used], None)[0]

    assert torch.equal(ours, growing_cache)


@measured_kernels
@pytest.mark.parametrize("dtype", HALF)
@settings(max_examples=30)
@given(call=calls(), row=st.integers(0, 1199))
def test_a_row_of_a_whole_prompt_has_the_bits_it_has_alone(dtype, call, row):
    query, key, value, _ = tensors(call, dtype)
    prompt, row = call[3] + 1, min(row, call[3])
    queries = query[:, :, :1].repeat(1, 1, prompt, 1)

    whole = invariant_attention(None, queries, key[:, :, :prompt], value[:, :, :prompt], None)[0][:, row]
    alone = invariant_attention(None, query[:, :, :1], key[:, :, : row + 1], value[:, :, : row + 1], None)[0][:, 0]

    assert torch.equal(whole, alone)


@settings(max_examples=30)
@given(call=calls())
def test_it_is_attention(call):
    query, key, value, mask = tensors(call, torch.float32)
    per_group = call[2]
    repeated = [states.repeat_interleave(per_group, dim=1) for states in (key, value)]

    expected = functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask).transpose(1, 2)

    assert torch.allclose(invariant_attention(None, query, key, value, mask)[0], expected, atol=1e-5)
    boolean = invariant_attention(None, query, key, value, mask == 0)[0]
    assert torch.allclose(boolean, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_few_rows_are_enough_or_a_whole_tile_is_taken(dtype):
    assert 1 <= least_rows(dtype, 64) <= 32


def test_half_precision_on_a_cpu_is_invariant_by_default(tiny_models):
    llama = tiny_models["llama"]
    half = copy.deepcopy(llama).to(torch.bfloat16)
    eager = copy.deepcopy(half)
    eager.set_attn_implementation("eager")

    assert default_numerics(half) == "invariant"
    assert default_numerics(llama) == "plain"
    assert default_numerics(eager) == "plain"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("length", [3, KEY_TILE - 4, KEY_TILE + 1])
def test_invariant_calls_compute_what_plain_ones_do(tiny_models, family, length):
    model = copy.deepcopy(tiny_models[family])
    model.config.max_position_embeddings = 2048
    length = min(length, 200) if family == "gpt2" else length
    for block in (AR_BLOCK, Block.chain(2, 2), Block.tree([0, 0, 1], 1)):
        engines = [
            EagerEngine(model, max_length=length + 8, max_slots=block.num_slots, numerics=numerics)
            for numerics in ("plain", "invariant")
        ]
        with torch.inference_mode():
            for engine in engines:
                engine.prefill([3 + n % 250 for n in range(length)])
            for _ in range(3):
                plain, invariant = (engine.run(block, [7] * block.num_slots) for engine in engines)
                for engine in engines:
                    engine.commit([0])

                assert torch.allclose(plain, invariant, atol=1e-3)
        assert model.config._attn_implementation == "sdpa"
