"""Packed low-bit layers made of a float checkpoint when it is loaded."""

import json
import shutil

import gguf as ggml
import pytest
import torch
from ggufs import llama_file
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from space_cli.bench.llama_cpp import convert
from space_cli.compile.fingerprint import fingerprint
from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.engine import engine_for
from space_cli.core.quantized import QuantizedEmbedding, QuantizedLinear, WeightType, num_parameters
from space_cli.errors import UsageProblem
from space_cli.models import quantization
from space_cli.models.adapter import attach_adapter, low_rank, save_adapter
from space_cli.models.checkpoint import SpaceConfig
from space_cli.models.kernels import kernels_problem
from space_cli.models.loading import load_model
from space_cli.models.quantization import PACKED, check_packing, pack_layers
from space_cli.models.reference import reference_model

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler, which packed layers need")
WHOLE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
IDS = torch.tensor([[5, 9, 40, 7, 3]])


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory):
    """A checkpoint whose rows are whole blocks."""
    return saved(tiny_model(**WHOLE), tiny_tokenizer, tmp_path_factory.mktemp("whole"))


def rounded(weights, kind):
    """The weights as the `gguf` package rounds and reads them."""
    type_ = ggml.GGMLQuantizationType[kind]
    blocks = ggml.quants.quantize(weights.detach().float().numpy(), type_)
    return torch.from_numpy(ggml.quants.dequantize(blocks, type_))


@torch.inference_mode()
def rows(model, block, slot_ids):
    engine = engine_for(model, None, max_length=32, max_slots=8)
    engine.prefill([5, 9, 40])
    return engine.run(block, slot_ids).clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(("quantization", "kind"), [("q8_0", "Q8_0"), ("q4_0", "Q4_0")])
@torch.inference_mode()
def test_logits_are_those_of_a_gguf_file_of_these_weights(quantization, kind, is_tied, dtype, tiny_tokenizer, tmp_path):
    model = tiny_model(**WHOLE, tie_word_embeddings=is_tied, dtype=dtype)
    file = llama_file(tmp_path / "same.gguf", model, tiny_tokenizer, kind=kind, output_kind="Q8_0")
    packed = load_model(str(saved(model, tiny_tokenizer, tmp_path / "folder")), quantization=quantization)

    expected = load_model(str(file)).model

    assert torch.equal(packed.model(IDS).logits, expected(IDS).logits)
    assert not torch.equal(packed.model(IDS).logits, model.float()(IDS).logits)
    assert (packed.quantization, packed.dtype) == (quantization, "float32")
    assert num_parameters(packed.model) == num_parameters(expected) == model.num_parameters()
    assert {each.dtype for each in packed.model.parameters()} == {torch.uint8, torch.float32}
    is_shared = packed.model.lm_head.weight is packed.model.model.embed_tokens.weight
    assert is_shared is is_tied


@given(
    data=st.fixed_dictionaries(
        {"vocab_size": st.integers(1, 70), "hidden_size": st.integers(1, 20), "intermediate_size": st.integers(1, 130)}
    ),
    quantization=st.sampled_from(list(PACKED)),
)
@settings(max_examples=25)
def test_layers_of_any_size_hold_what_gguf_makes_of_them(data, quantization):
    assert kernels_problem() is None
    sizes = data | {"hidden_size": 16 * data["hidden_size"], "head_dim": 16}
    model = tiny_model(**sizes, num_hidden_layers=1, pad_token_id=None, eos_token_id=None, bos_token_id=None)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}

    pack_layers(model, quantization, "this")

    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear | QuantizedEmbedding):
            weights = before[f"{name}.weight"]
            own = WeightType.Q8_0 if name == "lm_head" else PACKED[quantization]
            # llama.cpp falls back to 16 bits where a row is no whole number of blocks
            assert layer.weight_type is (WeightType.F16 if weights.shape[1] % 32 else own)
            assert torch.equal(layer.dequantized().weight, rounded(weights, layer.weight_type.name))
    assert sum(isinstance(each, QuantizedLinear) for each in model.modules()) == 8
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)


@torch.inference_mode()
def test_layers_with_biases_and_odd_rows_compute_what_their_own_weights_do(tiny_tokenizer, tmp_path):
    model = tiny_model("llama", hidden_size=48, head_dim=16, attention_bias=True, mlp_bias=True)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(3))
    loaded = load_model(str(saved(model, tiny_tokenizer, tmp_path)), quantization="q8_0")
    layer = loaded.model.model.layers[0]

    found, expected = loaded.model(IDS).logits, reference_model(loaded.model)(IDS).logits

    assert (layer.mlp.up_proj.weight_type, layer.mlp.down_proj.weight_type) == (WeightType.F16, WeightType.Q8_0)
    assert torch.equal(layer.mlp.up_proj.bias, model.model.layers[0].mlp.up_proj.bias)
    assert (found - expected).abs().max() < 0.05 * expected.std()
    assert (found - model(IDS).logits).abs().max() < 0.1 * expected.std()


@torch.inference_mode()
def test_a_token_has_the_same_bits_alone_and_in_a_block(folder):
    model = load_model(str(folder), quantization="q4_0").model

    alone, in_block = rows(model, AR_BLOCK, [3]), rows(model, Block.tree([0, 1, 0], 0), [3, 11, 200, 8])

    assert torch.equal(in_block[:1], alone)


def test_what_is_computed_once_is_computed_in_float32(tiny_tokenizer, tmp_path):
    # 8 ** 0.5, by which embeddings are multiplied, is another number in bfloat16
    model = tiny_model("Gemma3Text", hidden_size=96, dtype=torch.bfloat16)
    saved(model, tiny_tokenizer, tmp_path)

    packed, plain = (load_model(str(tmp_path), dtype="float32", quantization=each).model for each in ("q8_0", "none"))

    assert isinstance(packed.lm_head, QuantizedLinear)
    # embeddings that multiply what they look up stay as they are
    assert torch.equal(packed.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    own, expected = (dict(each.named_buffers()) for each in (packed, plain))
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) and own[name].dtype == torch.float32 for name in own)


def test_trained_through_they_are_the_rounded_weights_unpacked(folder):
    state = load_model(str(folder), quantization="q4_0", weights="dense", dtype="bfloat16").model.state_dict()

    whole = tiny_model(**WHOLE).state_dict()

    assert {each.dtype for each in state.values()} == {torch.bfloat16}
    for name, weights in whole.items():
        if weights.ndim == 2:
            kind = "Q8_0" if name == "lm_head.weight" else "Q4_0"
            assert torch.equal(state[name], rounded(weights, kind).bfloat16())


@torch.inference_mode()
def test_an_adapter_is_laid_over_them_and_leaves_text_as_it_is(folder, tmp_path):
    plain = load_model(str(folder))
    torch.manual_seed(0)
    masks = attach_adapter(plain.model, 2, low_rank(plain.model, 4))
    for name, parameter in plain.model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(plain.model, tmp_path)
    fields = {"mask_token_ids": masks, "candidates": 2, "masks_per_group": 2, "base_model": str(folder)}
    SpaceConfig(method="adapter", **fields).save(tmp_path)
    base = load_model(str(folder), quantization="q8_0")

    tuned = load_model(str(tmp_path), quantization="q8_0")

    block, ids = Block.chain(1, 2), [3, 11, *masks, *masks]
    text, found = rows(base.model, Block.chain(1, 0), ids[:2]), rows(tuned.model, block, ids)
    assert tuned.mask_token_ids == tuple(masks)
    assert torch.equal(found[:2], text)
    assert (found - rows(plain.model, block, ids)).abs().max() < 0.2 * text.std()


def test_programs_of_other_types_are_others(folder):
    kinds = ("none", *PACKED)

    keys = {fingerprint(load_model(str(folder), dtype="float32", quantization=each).model) for each in kinds}

    assert len(keys) == len(kinds)


@pytest.mark.parametrize(("quantization", "kind"), [("q8_0", "Q8_0"), ("q4_0", "Q4_0")])
def test_llama_cpp_gets_the_same_bits(quantization, kind, folder, tiny_tokenizer, tmp_path):
    file = llama_file(tmp_path / "own.gguf", tiny_model(**WHOLE), tiny_tokenizer, kind=kind, output_kind="Q8_0")

    convert(load_model(str(folder), quantization=quantization).model, tmp_path / "converted.gguf")

    own, converted = (
        {each.name: (each.tensor_type.name, each.data.tobytes()) for each in ggml.GGUFReader(path).tensors}
        for path in (file, tmp_path / "converted.gguf")
    )
    assert own == converted


# Refusals


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dtype": "bfloat16"}, "--quantization q8_0 computes in float32, not in bfloat16; leave --dtype out"),
        ({"quantization": "q5_0"}, "unknown quantization 'q5_0'; use none, q8_0, q4_0, int8, nf4 or fp4"),
    ],
)
def test_what_it_cannot_do_is_told(folder, options, told):
    with pytest.raises(UsageProblem) as raised:
        load_model(str(folder), **{"quantization": "q8_0"} | options)

    assert str(raised.value) == told


@pytest.mark.parametrize("device", ["cuda", "cuda:all", "mps"])
def test_other_devices_are_refused(tiny_models, device):
    with pytest.raises(UsageProblem) as raised:
        check_packing("it", tiny_models["llama"].config, "q4_0", device=device, dtype="auto")

    told = f"--quantization q4_0 computes on a CPU, not on {device}; give --device cpu, or int8 or nf4"
    assert str(raised.value) == told


def test_experts_are_refused(tiny_tokenizer, tmp_path):
    saved(tiny_model("mixtral", **WHOLE), tiny_tokenizer, tmp_path)

    with pytest.raises(UsageProblem, match=r"packs linear layers, which hold only \d+% of its weights; leave it out"):
        load_model(str(tmp_path), quantization="q8_0")


def test_weights_that_are_quantised_already_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    pytest.importorskip("bitsandbytes", reason="the extra 'quantization' is not installed")

    with pytest.raises(UsageProblem, match="its weights are quantised as they are; leave --quantization out"):
        load_model(str(tmp_path), quantization="q8_0")


def test_without_a_compiler_it_says_so(folder, monkeypatch):
    monkeypatch.setattr(quantization, "kernels_problem", lambda: "no C++ compiler that works: c++")

    with pytest.raises(UsageProblem, match=r"needs kernels that cannot be built: no C\+\+ compiler that works"):
        load_model(str(folder), quantization="q8_0")


# The command


def test_commands_take_it(run_space, folder, tmp_path):
    options = ("--model", folder, "--max-new-tokens", 8, "--json", "-", "--quantization")

    plain, packed, refused = (
        run_space("chat", *options, *how, "--prompt", "def", "--raw", "--engine", "eager")
        for how in (["none"], ["q8_0"], ["q8_0", "--dtype", "bfloat16"])
    )

    assert (plain.returncode, packed.returncode, refused.returncode) == (0, 0, 2), packed.stderr
    assert json.loads(packed.stdout)["tokens"] == 8
    assert refused.stderr == ("space: --quantization q8_0 computes in float32, not in bfloat16; leave --dtype out\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "def add(a, b):"}\n')
    suite = ("--suite", "prompts.jsonl", "--report", "proof.md", "--engine", "eager")
    verified = run_space("verify-lossless", *options, "q4_0", *suite)
    assert verified.returncode == 0, verified.stderr
    record = json.loads(verified.stdout)
    assert (record["lossless"], record["environment"]["quantization"]) == (True, "q4_0")
    assert r"float32 · q4\_0 · cpu" in (tmp_path / "proof.md").read_text()


@pytest.mark.slow
def test_nano_is_lossless_compiled(run_space):
    options = ("--model", "nano", "--suite", "humaneval", "--limit", 2, "--max-new-tokens", 40, "--against", "ar,hf")

    done = run_space("verify-lossless", *options, "--quantization", "q8_0", "--json", "-")

    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["environment"]["engine"] == "compiled"
    assert all(answer["identical"]["ar"] for answer in record["answers"])


@pytest.mark.slow
def test_an_adapter_is_trained_over_them(run_space, folder, tmp_path):
    examples = [{"prompt": f"say {n}", "response": f"def f{n}(x): return x + {n}"} for n in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in examples))
    how = ("--quantization", "q8_0", "--quiet")
    options = ("--max-steps", 2, "--distill", "off", "--held-out", 2, "--candidates", 2)

    trained = run_space("train", "--model", folder, "--data", "data.jsonl", "--output", "out", *options, *how)
    full = run_space("train", "--model", folder, "--data", "data.jsonl", "--output", "o", "--method", "full", *how)

    assert trained.returncode == 0, trained.stderr
    assert (full.returncode, "cannot train quantised weights" in full.stderr) == (2, True)
    assert json.loads((tmp_path / "out" / "space_config.json").read_text())["method"] == "adapter"
    suite = ("--suite", "data.jsonl", "--limit", 1, "--max-new-tokens", 12, "--engine", "eager")
    checked = run_space("verify-lossless", "--model", "out", *suite, *how)
    assert checked.returncode == 0, checked.stderr + checked.stdout
