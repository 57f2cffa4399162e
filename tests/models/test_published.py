"""The layout of the authors' checkpoint: Llama, mask id 32002 beyond the tokenizer, k = 5, no space_config.json."""

import json

import pytest

MODELS_FILE = """
[models.published]
source = "published"
mask_token_ids = [32002]
candidates = 5
masks_per_group = 5
prompt_template = "Human:{}\\nAssistant:"
"""


@pytest.fixture
def published(tmp_path, tiny_tokenizer):
    """A tiny model of that shape, and the file that names it."""
    from tiny import tiny_model

    tiny_model("llama", vocab_size=32003).save_pretrained(tmp_path / "published")
    tiny_tokenizer.save_pretrained(tmp_path / "published")
    (tmp_path / "mine.toml").write_text(MODELS_FILE)
    return "--models-file", tmp_path / "mine.toml", "--model", "published", "--dtype", "float32"


def test_it_decodes_losslessly_with_its_own_masks(run_space, published, prompts_file):
    options = ("--suite", prompts_file, "--max-new-tokens", "24", "-q", "--json", "-")

    done = run_space("verify-lossless", *published, *options)

    record = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert record["identical"] == 2
    assert {row["against"] for row in record["rows"]} == {"ar", "hf", "drafts"}


@pytest.mark.parametrize("method", ["full", "adapter"])
def test_it_is_trained_further(run_space, published, tmp_path, method):
    rows = [{"instruction": f"Add {n}.", "output": f"a + {n}"} for n in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--method", method, "--masks", "single", "--max-steps", "4", "--distill", "off", "--answer-tokens", "12")

    done = run_space("train", *published, "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out", *options)

    assert done.returncode == 0, done.stderr
    assert "Human:Add 0.\nAssistant:a + 0" in done.stderr
    # an adapter's masks stand behind the vocabulary
    expected = {"full": [32002], "adapter": [32003]}[method]
    assert json.loads((tmp_path / "out" / "space_config.json").read_text())["mask_token_ids"] == expected
