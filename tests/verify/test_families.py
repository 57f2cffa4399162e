"""Every accepted architecture passes through the command from a folder, with drafts of every acceptance length."""

import json

import pytest
from tiny import in_all, more_tiny_configs, tiny_configs, tiny_model

from space_cli.cli.app import run

FAMILIES = (*tiny_configs(), *more_tiny_configs())
PROMPTS = ("def add(a, b):\n", "for x in", "q")


@pytest.fixture
def family_dir(request, tiny_tokenizer, tmp_path):
    """A model folder of one family, never trained for SPACE."""
    tiny_model(request.param).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# half precision can turn an expert's choice, which moves a logit by more than any rounding of it
EXPERTS = {"mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "DeepseekV2", "DeepseekV3", "Llama4Text", "GptOss"}


@pytest.mark.parametrize("family_dir", FAMILIES, indirect=True)
def test_a_family_is_lossless(family_dir, tmp_path, capsys):
    _check(family_dir, tmp_path, capsys, "float32")


@pytest.mark.parametrize("family_dir", in_all([each for each in FAMILIES if each not in EXPERTS]), indirect=True)
def test_a_family_is_lossless_in_half_precision(family_dir, tmp_path, capsys):
    _check(family_dir, tmp_path, capsys, "bfloat16")


def _check(family_dir, tmp_path, capsys, dtype):
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
