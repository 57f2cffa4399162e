import ctypes
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import hf_greedy
from strategies import blocks
from tiny import MASK_IDS, lively

from space_cli.compile import packing, toolchain
from space_cli.compile.compiled_model import CompiledEngine, CompiledModel
from space_cli.compile.export import MAX_CALL_SLOTS, compile_model, unsupported_reason
from space_cli.compile.fingerprint import fingerprint, weights_digest
from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.decoder import decode
from space_cli.core.drafting import ChainDrafter
from space_cli.core.engine import EagerEngine, engine_for
from space_cli.core.pages import LargePages
from space_cli.core.sampling import Sampler, Sampling
from space_cli.core.stopping import StopRule
from space_cli.core.stream import Generation
from space_cli.errors import RunFailed
from space_cli.models.adapter import adapter_updates, attach_adapter, low_rank

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler, which the compiled engine needs")

PROMPT = [17, 3, 250, 44, 91, 8]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return toolchain.build_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def kernels(library):
    return toolchain.load_kernels(library)


# half a minute of compiling for each
PROGRAMS = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=PROGRAMS)
def pair(request, library):
    """A model and its program."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = lively(tf.LlamaForCausalLM(config), 0.15).to(request.param)
    package = library.parent / f"{fingerprint(model)}.pt2"
    compile_model(model, package)
    return model, CompiledModel(package, library, model)


def generate(model, program, *, prompt=PROMPT, drafts=None, sampling=None, tokens=40):
    steps = decode(
        model,
        prompt,
        stop=StopRule(tokens),
        sampler=Sampler.from_sampling(sampling or Sampling()),
        mask_token_ids=MASK_IDS[:1],
        drafts=drafts,
        compiled=program,
    )
    return Generation(list(steps)).tokens


@st.composite
def attention_calls(draw):
    key_heads = draw(st.integers(1, 3))
    return SimpleNamespace(
        block=draw(blocks(max_candidates=9)),
        key_heads=key_heads,
        heads=key_heads * draw(st.integers(1, 4)),
        width=16 * draw(st.integers(1, 9)),
        value_width=16 * draw(st.integers(1, 9)),
        length=draw(st.integers(0, 300)),
        spare=draw(st.integers(0, 40)),
        seed=draw(st.integers(0, 999)),
    )


def address(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def sizes(*values):
    return [ctypes.c_int64(value) for value in values]


def attend(kernels, block, query, key, value, held, capacity):
    """Call the kernel behind the (keys, values) held; return (Q, H, D) and the buffers."""
    _, heads, rows, width = query.shape
    (length, value_width), key_heads = held[1].shape[2:], key.shape[1]
    keys, values = (states.new_zeros(key_heads, capacity, states.shape[3]) for states in (key, value))
    keys[:, :length], values[:, :length] = held[0][0], held[1][0]
    output = query.new_empty(rows, heads, value_width)
    call = kernels.space_attend_bfloat16 if query.dtype == torch.bfloat16 else kernels.space_attend_float32
    states = [argument for each in (query, key, value) for argument in (address(each), *sizes(*each.stride()[1:3]))]
    call(
        *(*states, address(keys), address(values), address(output)),
        (ctypes.c_int32 * rows)(*block.parents),
        *sizes(rows, heads, key_heads, width, value_width, length, capacity),
        ctypes.c_float(width**-0.5),
    )
    return output, keys, values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=60)
@given(call=attention_calls())
def test_the_kernel_attends_as_torch_does_and_appends_to_the_cache(kernels, dtype, call):
    generator = torch.Generator().manual_seed(call.seed)

    def states(heads, rows, width):
        # rows in front of heads, as models hand them over
        return torch.randn(1, rows, heads, width, generator=generator).to(dtype).transpose(1, 2)

    rows = call.block.num_slots
    query, key = states(call.heads, rows, call.width), states(call.key_heads, rows, call.width)
    value = states(call.key_heads, rows, call.value_width)
    held = states(call.key_heads, call.length, call.width), states(call.key_heads, call.length, call.value_width)

    capacity = call.length + rows + call.spare
    found, own_keys, own_values = attend(kernels, call.block, query, key, value, held, capacity)

    keys, values = (torch.cat(pair, dim=2) for pair in zip(held, (key, value), strict=True))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(),
        keys.double(),
        values.double(),
        attn_mask=call.block.attention_mask(call.length, dtype=torch.float64),
        enable_gqa=True,
    )[0].transpose(0, 1)
    assert torch.allclose(found.double(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2)
    assert torch.equal(own_keys[:, : call.length + rows], keys[0])
    assert torch.equal(own_values[:, : call.length + rows], values[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=60)
@given(call=attention_calls(), slot=st.integers(0, 40))
def test_a_row_has_the_same_bits_alone_and_in_a_block(kernels, dtype, call, slot):
    generator = torch.Generator().manual_seed(call.seed)

    def states(heads, rows, width):
        return torch.randn(1, heads, rows, width, generator=generator).to(dtype)

    block, length = call.block, call.length
    slot %= block.num_slots
    query, key = states(call.heads, block.num_slots, call.width), states(call.key_heads, block.num_slots, call.width)
    value = states(call.key_heads, block.num_slots, call.value_width)
    held = states(call.key_heads, length, call.width), states(call.key_heads, length, call.value_width)
    in_block, *_ = attend(kernels, block, query, key, value, held, length + block.num_slots)

    seen = torch.from_numpy(block.visibility[slot]).nonzero()[:-1, 0]
    before = tuple(torch.cat([pair[0], pair[1][:, :, seen]], dim=2) for pair in zip(held, (key, value), strict=True))
    own = slice(slot, slot + 1)
    alone, *_ = attend(kernels, AR_BLOCK, query[:, :, own], key[:, :, own], value[:, :, own], before, length + 64)

    assert torch.equal(alone[0], in_block[slot])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 150),
    tiles=st.integers(1, 30),
    row=st.integers(0, 39),
    has_bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_packed_weights_multiply_as_torch_does_and_each_row_as_if_alone(
    kernels, dtype, rows, width, tiles, row, has_bias, seed
):
    torch.manual_seed(seed)
    # two layers over one input
    linears = [torch.nn.Linear(2 * width, 16 * count, bias=has_bias).to(dtype) for count in (tiles, 3)]
    packed, outputs = packing._PackedLinears(linears, [], LargePages(), meta=False), 16 * (tiles + 3)
    call = kernels.space_linear_bfloat16 if dtype == torch.bfloat16 else kernels.space_linear_float32

    def multiply(states):
        output = states.new_empty(len(states), outputs)
        bias = None if packed.bias is None else address(packed.bias)
        call(address(states), address(packed.packed), bias, address(output), *sizes(len(states), 2 * width, outputs))
        return output

    states = torch.randn(rows, 2 * width).to(dtype)
    found, alone = multiply(states), multiply(states[row % rows][None].clone())

    expected = torch.cat([linear.double()(states.double()) for linear in linears], dim=1)
    assert torch.allclose(found.double(), expected, atol=1e-5 if dtype == torch.float32 else 3e-2)
    assert torch.equal(alone[0], found[row % rows])


@settings(max_examples=12)
@given(block=blocks(), length=st.integers(1, 300))
def test_a_program_computes_what_the_model_computes(pair, block, length):
    model, program = pair
    prefix = [(5 * index) % 299 for index in range(length)]
    engines = [
        EagerEngine(model, max_length=400, max_slots=block.num_slots),
        CompiledEngine(model, program, max_length=400, max_slots=block.num_slots),
    ]
    with torch.inference_mode():
        for engine in engines:
            engine.prefill(prefix)
        eager, found = (engine.run(block, list(range(block.num_slots))).float() for engine in engines)

    assert engines[0].length == engines[1].length == length + block.num_slots
    assert (eager - found).abs().max() <= eager.std() * (1e-4 if model.dtype == torch.float32 else 0.3)


@settings(max_examples=12)
@given(block=blocks(), sampling=st.sampled_from([Sampling(), Sampling(0.9, seed=2)]))
def test_space_equals_ar_under_a_program(pair, block, sampling):
    model, program = pair

    drafted = generate(model, program, drafts=ChainDrafter(block), sampling=sampling)

    assert drafted == generate(model, program, sampling=sampling)


def test_a_prompt_longer_than_the_largest_block_and_a_prompt_of_one_token(pair):
    model, program = pair
    if model.dtype != torch.float32:
        pytest.skip("half precision rounds otherwise in transformers' kernels")
    for length in (1, 2, MAX_CALL_SLOTS, MAX_CALL_SLOTS + 2, 300):
        prompt = [(7 * index) % 299 + 1 for index in range(length)]

        assert generate(model, program, prompt=prompt) == hf_greedy(model, prompt, 40)


def test_a_cache_goes_on_from_one_engine_to_the_other(pair):
    model, program = pair
    blocks_run = [AR_BLOCK, Block.chain(3, 2)]
    with torch.inference_mode():
        first = CompiledEngine(model, program, max_length=60, max_slots=20)
        first.prefill(list(range(1, 40)))
        second = EagerEngine(model, max_length=60, max_slots=20, cache=first.cache)
        assert second.prefill(list(range(1, 45))) == 5
        fresh = EagerEngine(model, max_length=60, max_slots=20)
        fresh.prefill(list(range(1, 45)))
        for block in blocks_run:
            pairs = [engine.run(block, [9] * block.num_slots).float() for engine in (second, fresh)]
            for engine in (second, fresh):
                engine.rollback()
            assert (pairs[0] - pairs[1]).abs().max() <= pairs[1].std() * 0.3


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (lambda model: model.half(), "its dtype is float16"),
        (lambda model: model.lm_head.register_forward_hook(lambda *_: None), "hooks watch"),
        (lambda model: model.set_attn_implementation("eager"), "attention is its own"),
    ],
)
def test_what_cannot_be_compiled_is_reported_beforehand(changed, reason):
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = tf.LlamaForCausalLM(config)
    assert unsupported_reason(model) is None

    changed(model)

    assert reason in unsupported_reason(model)


def test_heads_that_the_kernel_cannot_take_are_refused_while_compiling(tmp_path):
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    model = tf.LlamaForCausalLM(config)

    with pytest.raises(RunFailed, match="multiple of 16"):
        compile_model(model, tmp_path / "program.pt2")

    assert list(tmp_path.iterdir()) == []
    assert model.config._attn_implementation == "sdpa"


def test_a_program_serves_all_models_of_its_architecture(pair, library):
    model, program = pair
    other = lively(tf.LlamaForCausalLM(model.config), 0.2).to(model.dtype)
    assert fingerprint(other) == fingerprint(model)
    assert weights_digest(other) != weights_digest(model)
    own = generate(model, program)

    of_other = CompiledModel(library.parent / f"{fingerprint(model)}.pt2", library, other)

    drafts = ChainDrafter(Block.chain(3, 2))
    assert generate(other, of_other) == generate(other, of_other, drafts=drafts) != own
    assert generate(model, program) == own
    if model.dtype == torch.float32:
        assert generate(other, of_other) == hf_greedy(other, PROMPT, 40)


def test_another_architecture_has_another_fingerprint():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    models = [tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, intermediate_size=size)) for size in (32, 48, 32)]
    models[2].bfloat16()
    assert len({fingerprint(model) for model in models}) == 3


def test_without_a_compiler_the_kernel_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")

    with pytest.raises(RunFailed, match=r"no C\+\+ compiler that works"):
        toolchain.build_kernels(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_reaches_its_masks_and_no_text_over_layers_of_any_width(library, dtype):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 112, "num_attention_heads": 3, "num_key_value_heads": 3}
    config = tf.LlamaConfig(vocab_size=300, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    model = lively(tf.LlamaForCausalLM(config), 0.15).to(dtype)
    masks = attach_adapter(model, 2, low_rank(model, 8))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    package = library.parent / f"adapted-{dtype}.pt2"
    compile_model(model, package, adapter_updates(model))
    compiled = CompiledModel(package, library, model, adapter_updates(model))
    slots = [5, 6, 7, 8, *masks * 4]

    def logits(run_by, block, token_ids):
        engine = engine_for(model, run_by, max_length=32, max_slots=len(slots))
        engine.prefill(PROMPT[:3])
        return engine.run(block, token_ids).clone().float()

    with torch.inference_mode():
        plain, found = (logits(run_by, Block.tree([0, 1, 0], 2), slots) for run_by in (None, compiled))
        alone = logits(compiled, Block.tree([0, 1, 0], 0), slots[:4])
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        bare = logits(None, Block.tree([0, 1, 0], 2), slots)

    assert torch.equal(found[:4], alone)
    # rounded to 8 bits; without the update masks are off by whole spreads
    assert (found - plain).abs().max() < 0.3 * plain.std() < (bare - plain)[4:].abs().max()
