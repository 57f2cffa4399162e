import copy
import json

import numpy as np
import pytest
import torch
from tiny import in_all, tiny_configs, tiny_model

from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.decoder import decode
from space_cli.core.drafting import ChainDrafter
from space_cli.core.sampling import Sampler
from space_cli.core.stopping import StopRule
from space_cli.errors import UsageProblem
from space_cli.models.adapter import (
    adapter_of,
    attach_adapter,
    bigram_of,
    load_adapter,
    load_adapter_weights,
    low_rank,
    save_adapter,
)
from space_cli.models.checkpoint import ADAPTER_FILE

FAMILIES = (*tiny_configs(), "Falcon", "Gemma2", "GptOss", "Cohere2")
PROMPT = [17, 3, 250, 44, 91, 8]


def trained(model, bigram=0):
    """A copy of a model with an adapter whose every weight has moved."""
    adapted = copy.deepcopy(model)
    ids = attach_adapter(adapted, 3, low_rank(adapted, 4), bigram=bigram)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return adapted.eval(), ids


def answer(model, block, masks=()):
    steps = decode(
        model, PROMPT, stop=StopRule(24), sampler=Sampler(), drafts=ChainDrafter(block), mask_token_ids=masks
    )
    return [token for step in steps for token in step.tokens]


@pytest.fixture(params=in_all(FAMILIES))
def base(request):
    return tiny_model(request.param)


@torch.inference_mode()
def test_what_is_no_mask_is_bit_for_bit_the_base(base):
    adapted, ids = trained(base)
    silenced = copy.deepcopy(adapted)
    for name, parameter in silenced.named_parameters():
        if "lora_" in name:
            parameter.data.zero_()

    text, with_masks = torch.tensor([PROMPT]), torch.tensor([[*PROMPT, *ids]])

    assert torch.equal(adapted(text).logits, base(text).logits)
    # the same call with updates that are zero everywhere: of the base's own shape
    mixed, expected = adapted(with_masks).logits, silenced(with_masks).logits
    # experts run the tokens that chose them as one product, whose shape the masks' choices change
    if type(base).__name__ not in ("MixtralForCausalLM", "GptOssForCausalLM"):
        assert torch.equal(mixed[:, : len(PROMPT)], expected[:, : len(PROMPT)])
    assert not torch.allclose(mixed[:, len(PROMPT) :], expected[:, len(PROMPT) :])


def test_a_bigram_is_saved_loaded_and_changes_drafts_alone(tmp_path):
    base = tiny_model("llama")
    adapted, ids = trained(base, bigram=5)
    previous, following = bigram_of(adapted).previous, bigram_of(adapted).following
    expected = answer(base, AR_BLOCK)

    save_adapter(adapted, tmp_path)
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path, masks=3)

    assert np.array_equal(bigram_of(loaded).previous, previous)
    assert np.array_equal(bigram_of(loaded).following, following)
    drafted = [[], []]
    for seen, bigram in zip(drafted, (None, bigram_of(loaded)), strict=True):
        steps = list(
            decode(
                loaded.eval(),
                PROMPT,
                stop=StopRule(24),
                sampler=Sampler(),
                drafts=ChainDrafter(Block.chain(3, 3), bigram=bigram),
                mask_token_ids=ids,
            )
        )
        seen += [step.candidates for step in steps]
        assert [token for step in steps for token in step.tokens] == expected
    assert drafted[0] != drafted[1]


def test_an_adapter_takes_the_dtype_of_its_base(tmp_path):
    adapted, _ = trained(tiny_model("llama"), bigram=5)
    save_adapter(adapted, tmp_path)
    base = tiny_model("llama").to(torch.bfloat16)

    load_adapter(base, tmp_path, masks=3)

    assert base.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in base.parameters()} == {torch.bfloat16}


def test_a_bigram_of_another_vocabulary_is_refused(tmp_path):
    adapted, _ = trained(tiny_model("llama"), bigram=5)
    save_adapter(adapted, tmp_path)
    other, _ = trained(tiny_model("llama"), bigram=4)

    with pytest.raises(UsageProblem, match="does not fit this base model"):
        load_adapter_weights(other, tmp_path)


def test_space_with_an_adapter_gives_the_output_of_the_untouched_base(base):
    adapted, ids = trained(base)

    expected = answer(base, AR_BLOCK)

    assert answer(adapted, Block.chain(3, 3), ids) == expected
    assert answer(adapted, AR_BLOCK) == expected


@torch.inference_mode()
def test_saving_and_loading_and_copying_keep_the_adapter(base, tmp_path):
    adapted, ids = trained(base)
    with_masks = torch.tensor([[*PROMPT, *ids]])

    save_adapter(adapted, tmp_path)
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path, masks=3)

    expected = adapted(with_masks).logits
    assert torch.equal(loaded(with_masks).logits, expected)
    assert torch.equal(copy.deepcopy(adapted)(with_masks).logits, expected)
    assert {file.suffix for file in tmp_path.iterdir()} <= {".json", ".safetensors", ".md"}


def test_only_the_adapter_is_trained(tiny_models):
    adapted, ids = trained(tiny_models["llama"])
    before = {name: tensor.clone() for name, tensor in tiny_models["llama"].state_dict().items()}

    logits = adapted(torch.tensor([[*PROMPT, *ids]])).logits
    logits[:, -3:].logsumexp(-1).sum().backward()

    graded = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert graded
    assert all("lora_" in name or name.endswith(".masks") for name in graded)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_models["llama"].state_dict().items())


def test_calls_without_masks_skip_the_adapter(tiny_models):
    adapted, ids = trained(tiny_models["llama"])
    layers = adapter_of(adapted).layers

    adapted(torch.tensor([PROMPT]))
    without = {layer.disable_adapters for layer in layers}
    adapted(torch.tensor([[*PROMPT, *ids]]))

    assert without == {True}
    assert {layer.disable_adapters for layer in layers} == {False}


@pytest.mark.parametrize("damage", ["absent", "truncated", "other model", "no config"])
def test_a_damaged_adapter_is_reported(tiny_models, tmp_path, damage):
    save_adapter(trained(tiny_models["llama"])[0], tmp_path)
    file = tmp_path / ADAPTER_FILE
    if damage == "absent":
        file.unlink()
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:100])
    if damage == "no config":
        (tmp_path / "adapter_config.json").unlink()
    family = "gpt2" if damage == "other model" else "llama"

    with pytest.raises(UsageProblem, match=r"not a readable adapter|does not fit|no adapter can be laid"):
        load_adapter(copy.deepcopy(tiny_models[family]), tmp_path, masks=3)


def test_an_adapter_checkpoint_is_loaded_by_the_commands(
    run_space, tiny_models, tiny_tokenizer, prompts_file, tmp_path
):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny_models["llama"].save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    adapted, ids = trained(tiny_models["llama"])
    folder.mkdir()
    save_adapter(adapted, folder)
    config = {
        "method": "adapter",
        "mask_token_ids": ids,
        "candidates": 3,
        "masks_per_group": 3,
        "base_model": str(base),
    }
    (folder / "space_config.json").write_text(json.dumps(config))

    done = run_space(
        "bench",
        "--model",
        folder,
        "--suite",
        prompts_file,
        "--dtype",
        "float32",
        "--max-new-tokens",
        "12",
        "--json",
        "-",
    )

    checked = run_space(
        "verify-lossless", "--model", folder, "--suite", prompts_file, "--max-new-tokens", "12", "--json", "-"
    )
    record = json.loads(checked.stdout)
    assert checked.returncode == 0, checked.stderr
    assert {row["against"] for row in record["rows"]} == {"ar", "hf", "base", "drafts"}
    assert record["identical"] == 2
    assert done.returncode == 0, done.stderr
    assert all(result["identical"] for result in json.loads(done.stdout)["results"])
