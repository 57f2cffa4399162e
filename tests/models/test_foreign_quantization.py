"""Checkpoints whose config says that their weights are quantised."""

import json

import pytest
from running import refusal
from transformers import PretrainedConfig

from space_cli.models.support import is_bitsandbytes


@pytest.mark.parametrize(
    "fields",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "mxfp4"},
        {"bits": 4},
    ],
)
def test_other_quantisations_are_one_line_that_says_which_are_read(space, tiny_model_dir, tmp_path, fields):
    folder = tmp_path / "quantised"
    folder.mkdir()
    for file in tiny_model_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": fields}))

    line = refusal(space("models", "check", folder))

    assert f"quantised by {fields.get('quant_method', 'unknown')}; supported are bitsandbytes" in line


@pytest.mark.parametrize(
    ("fields", "is_own"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, True),
        ({"load_in_4bit": True}, True),
        ({"quant_method": "gptq", "load_in_4bit": False}, False),
    ],
)
def test_bitsandbytes_is_known_by_its_fields(fields, is_own):
    assert is_bitsandbytes(fields) is is_own
    assert PretrainedConfig(quantization_config=fields).quantization_config == fields
