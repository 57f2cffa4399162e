"""Every accepted architecture passes through the command from a folder, with drafts of every acceptance length."""

import json

import pytest
from tiny import lively, more_tiny_configs, tiny_configs

from space_cli.cli.app import run

CONFIGS = tiny_configs() | more_tiny_configs()
PROMPTS = ("def add(a, b):\n", "for x in", "q")


@pytest.fixture
def family_dir(request, tiny_tokenizer, tmp_path):
    """A model folder of one family, never trained for SPACE."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float32)
    lively(model, 0.2 if request.param in tiny_configs() else 0.8).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# half precision can turn an expert's choice, which moves a logit by more than any rounding of it
EXPERTS = {"mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "DeepseekV2", "DeepseekV3", "Llama4Text", "GptOss"}


@pytest.mark.parametrize(
    ("family_dir", "dtype"),
    [(family, "float32") for family in CONFIGS] + [(family, "bfloat16") for family in CONFIGS if family not in EXPERTS],
    indirect=["family_dir"],
)
def test_a_family_is_lossless(family_dir, tmp_path, capsys, dtype):
    suite = tmp_path / "prompts.jsonl"
    suite.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    options = ("--drafts", "mixed", "--candidates", "3", "--max-new-tokens", "40", "--dtype", dtype)

    code = run(["verify-lossless", "--model", str(family_dir), "--suite", str(suite), *options, "-q", "--json", "-"])

    record = json.loads(capsys.readouterr().out)
    assert code == 0, record["divergences"]
    assert record["never_accepted"] == []
    if dtype == "float32":
        assert record["identical"] == len(PROMPTS)
    distinct = {token for answer in record["answers"] for token in answer["token_ids"]}
    assert len(distinct) > 12, "the text loops and proves nothing"
