import shutil
from functools import wraps

import pytest
import torch
import transformers as tf
from tiny import MASK_IDS, VOCABULARY, lively, tiny_configs

from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.decoder import decode
from space_cli.core.drafting import ChainDrafter
from space_cli.core.sampling import Sampler
from space_cli.core.stopping import StopRule
from space_cli.errors import UsageProblem
from space_cli.models import support
from space_cli.models.loading import load_model

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}


@pytest.fixture
def copied(tiny_model_dir, tmp_path):
    folder = tmp_path / "copied"
    shutil.copytree(tiny_model_dir, folder)
    return folder


def test_a_space_checkpoint_knows_its_masks(tiny_model_dir):
    loaded = load_model(str(tiny_model_dir), dtype="float32")

    assert loaded.mask_token_ids == MASK_IDS
    assert (loaded.candidates, loaded.masks_per_group) == (3, 3)
    assert loaded.eos_token_ids == {0}
    assert loaded.context_length == 256
    assert loaded.decode(loaded.encode("def add(a, b):")) == "def add(a, b):"


def test_a_plain_model_is_not_trained_for_space(copied):
    (copied / "space_config.json").unlink()

    loaded = load_model(str(copied))

    assert (loaded.candidates, loaded.mask_token_ids, loaded.space) == (0, (), None)


def test_models_file_gives_what_the_checkpoint_does_not_say(copied, tmp_path):
    (copied / "space_config.json").unlink()
    file = tmp_path / "models.toml"
    file.write_text(
        f'[models.mine]\nsource = "./{copied.name}"\nmask_token_ids = [299]\ncandidates = 5\nmasks_per_group = 5\n'
        'prompt_template = "Human:{}"\n'
    )

    loaded = load_model("mine", models_file=file)

    assert (loaded.mask_token_ids, loaded.candidates, loaded.prompt_template) == ((299,), 5, "Human:{}")


def test_mask_ids_outside_the_embeddings_are_refused(copied, tmp_path):
    (copied / "space_config.json").unlink()
    file = tmp_path / "models.toml"
    file.write_text(f'[models.mine]\nsource = "./{copied.name}"\nmask_token_ids = [300]\ncandidates = 5\n')

    with pytest.raises(UsageProblem, match=r"\[300\] lie outside its 300 embedding rows"):
        load_model("mine", models_file=file)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_are_honoured(tiny_model_dir, dtype):
    loaded = load_model(str(tiny_model_dir), dtype=dtype)

    assert str(loaded.model.dtype) == f"torch.{dtype}"
    assert loaded.dtype == dtype


@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp4"])
def test_quantised_weights_decode_as_their_own_ar(tiny_tokenizer, tmp_path, quantization):
    pytest.importorskip("bitsandbytes", reason="the extra 'quantization' is not installed")
    config = tf.LlamaConfig(**SMALL | HEADS | {"hidden_size": 128, "intermediate_size": 256}, eos_token_id=0)
    lively(tf.AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="float32", quantization=quantization)

    outputs = [
        [
            token
            for step in decode(
                loaded.model,
                [5, 9, 33],
                drafts=ChainDrafter(block),
                mask_token_ids=MASK_IDS,
                stop=StopRule(20),
                sampler=Sampler(),
            )
            for token in step.tokens
        ]
        for block in (AR_BLOCK, Block.chain(3, 3))
    ]

    assert loaded.model.is_quantized
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"quantization": "q4"}, "unknown quantization 'q4'"),
    ],
)
def test_unknown_settings_are_reported(tiny_model_dir, options, message):
    with pytest.raises(UsageProblem, match=message):
        load_model(str(tiny_model_dir), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is absent")
def test_an_absent_device_is_reported(tiny_model_dir):
    with pytest.raises(UsageProblem, match="no cuda device on this machine"):
        load_model(str(tiny_model_dir), device="cuda")


def test_an_empty_folder_is_reported(tmp_path):
    with pytest.raises(UsageProblem, match="not a complete model folder"):
        load_model(str(tmp_path))


def test_weights_that_are_missing_are_reported(copied):
    (copied / "model.safetensors").unlink()

    with pytest.raises(UsageProblem, match="not a complete model folder"):
        load_model(str(copied))


def test_pickled_weights_are_not_read(copied):
    (copied / "model.safetensors").unlink()
    torch.save({}, copied / "pytorch_model.bin")

    with pytest.raises(UsageProblem, match="not a complete model folder"):
        load_model(str(copied))


def test_a_model_with_code_of_its_own_is_refused(copied):
    config = (copied / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "their_own"')
    (copied / "config.json").write_text(config.replace("{", '{"auto_map": {"AutoConfig": "theirs.Config"},', 1))

    with pytest.raises(UsageProblem, match="code of its own, which space never runs"):
        load_model(str(copied))


@pytest.mark.parametrize("family", list(tiny_configs()))
def test_families_pass_the_probe(tiny_models, family):
    support.check_config(tiny_models[family].config, family)
    support.check_block(tiny_models[family], family)


@pytest.mark.parametrize(
    "config",
    [
        tf.MambaConfig(**SMALL),
        tf.RwkvConfig(**SMALL, attention_hidden_size=32),
        tf.Lfm2Config(**SMALL, **HEADS, layer_types=["conv", "full_attention"]),
        tf.Qwen3NextConfig(**SMALL, **HEADS, layer_types=["linear_attention", "full_attention"]),
        tf.ViTConfig(),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_cannot_work_are_refused_by_their_config(config):
    with pytest.raises(UsageProblem, match="does not work with SPACE"):
        support.check_config(config, "it")


def test_a_window_shorter_than_a_block_is_refused():
    config = tf.MistralConfig(**SMALL, **HEADS, sliding_window=4)
    model = lively(tf.AutoModelForCausalLM.from_config(config))

    with pytest.raises(UsageProblem, match="window is shorter than a block"):
        support.check_block(model, "it")


@pytest.mark.parametrize(
    "config",
    [
        tf.MptConfig(vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=2, max_seq_len=256),
        tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_head=4, n_layer=2),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_count_slots_instead_of_positions_are_refused(config):
    model = lively(tf.AutoModelForCausalLM.from_config(config))

    with pytest.raises(UsageProblem, match="does not work with SPACE"):
        support.check_block(model, "it")


def test_a_model_that_ignores_the_mask_is_refused(tiny_models, monkeypatch):
    model = tiny_models["llama"]
    forward = type(model).forward

    @wraps(forward)
    def ignoring(self, **given):
        return forward(self, **given | {"attention_mask": None})

    monkeypatch.setattr(type(model), "forward", ignoring)

    with pytest.raises(UsageProblem, match="ignores a 4-D mask or positions"):
        support.check_block(model, "it")
