"""Models whose weights stay in the few bits of their file, alone and under an adapter, compiled or as they are."""

import shutil

import pytest
import torch
from ggufs import llama_file
from tiny import llama_of_whole_blocks

from space_cli.compile.compiled_model import CompiledModel
from space_cli.compile.export import compile_model
from space_cli.compile.fingerprint import fingerprint
from space_cli.compile.toolchain import build_kernels, load_kernels
from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.engine import engine_for
from space_cli.core.quantized import QuantizedLinear, dequantize, has_quantized_layers, num_parameters
from space_cli.models.adapter import adapter_updates, attach_adapter, low_rank
from space_cli.models.gguf import gguf_config
from space_cli.models.gguf_dense import load_dense
from space_cli.models.gguf_file import read_gguf
from space_cli.models.gguf_weights import load_packed
from space_cli.models.reference import reference_model

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler, which quantised layers need")
PREFIX, TOKENS = [5, 9, 40, 7], [3, 11, 200, 8]
BLOCK = Block.tree([0, 1, 0], 2, anchors=[0, 3])


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    library = build_kernels(tmp_path_factory.mktemp("kernels"))
    load_kernels(library)
    return library


@pytest.fixture(scope="module")
def gguf(tiny_tokenizer, tmp_path_factory):
    return read_gguf(
        llama_file(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama_of_whole_blocks(), tiny_tokenizer, kind="Q4_1")
    )


@pytest.fixture
def packed(gguf, library):
    assert library.exists()
    return load_packed(gguf, gguf_config(gguf))


def rows(model, program, slot_ids, block):
    """Logits of a block's slots behind the prefix."""
    with torch.inference_mode():
        engine = engine_for(model, program, max_length=64, max_slots=32)
        engine.prefill(PREFIX)
        return engine.run(block, slot_ids).clone()


def compiled(model, library):
    adapter = adapter_updates(model)
    package = library.parent / f"{fingerprint(model)}.pt2"
    if not package.exists():
        compile_model(model, package, adapter)
    return CompiledModel(package, library, model, adapter)


def test_packed_weights_are_the_files_own(gguf, packed):
    dense = load_dense(gguf, gguf_config(gguf), torch.float32)

    assert has_quantized_layers(packed)
    assert num_parameters(packed) == dense.num_parameters()
    assert all(isinstance(layer.mlp.up_proj, QuantizedLinear) for layer in packed.model.layers)
    dequantize(packed)
    state = packed.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in dense.state_dict().items())


def test_packed_weights_compute_what_dequantised_ones_do_up_to_8_bits(packed):
    ids = torch.tensor([[5, 9, 40, 7, 3]])

    own, reference = packed(ids).logits, reference_model(packed)(ids).logits

    assert not has_quantized_layers(reference_model(packed))
    assert 0 < (own - reference).abs().max() < 0.1 * reference.std()


@pytest.mark.slow
def test_a_token_has_the_same_bits_alone_in_a_block_and_under_an_adapter(packed, library):
    torch.manual_seed(0)
    base = compiled(packed, library)
    alone = rows(packed, base, TOKENS[:1], AR_BLOCK)
    in_block = rows(packed, base, TOKENS, Block.tree([0, 1, 0], 0))

    masks = attach_adapter(packed, 2, low_rank(packed, 8))
    for name, parameter in packed.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with_masks = [*TOKENS, *masks, *masks]
    found = rows(packed, compiled(packed, library), with_masks, BLOCK)
    plain = rows(packed, None, with_masks, BLOCK)

    assert torch.equal(in_block[:1], alone)
    # masks stand last, and text rows keep the bits that the base gives them
    assert torch.equal(found[:4], in_block)
    # transformers and peft, up to roundings; without the update masks are off by whole spreads
    assert (found - plain).abs().max() < 0.2 * plain.std()
    for name, parameter in packed.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    bare = rows(packed, None, with_masks, BLOCK)
    assert (bare - plain)[4:].abs().max() > 0.5 * plain.std()
