"""Weights that compute nothing: refused at load, and never judged where it shows later."""

import pytest
import torch
from running import refusal
from tiny import lively

from space_cli.core.sampling import Sampler, Sampling, TopK
from space_cli.errors import RunFailed


@pytest.fixture
def broken(tiny_model_dir, tmp_path):
    """Return the tiny checkpoint with the first layer's weights changed."""

    def make(change):
        from safetensors.torch import load_file, save_file

        folder = tmp_path / "broken"
        folder.mkdir()
        for file in tiny_model_dir.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def one_nan(state):
    state["model.layers.0.mlp.down_proj.weight"][3, 2] = torch.nan


def one_infinity(state):
    state["model.layers.0.mlp.down_proj.weight"][3, 2] = torch.inf


def zeroed(state):
    state["lm_head.weight"].zero_()


@pytest.mark.parametrize(
    ("change", "what", "command"),
    [
        (one_nan, "are NaN", ("verify-lossless", "--limit", "1", "--quiet")),
        (one_nan, "are NaN", ("bench", "--limit", "1", "--quiet")),
        (one_infinity, "are NaN", ("chat", "--prompt", "x")),
        (zeroed, "all its logits are equal", ("models", "check")),
    ],
)
def test_broken_weights_are_reported_by_every_command(space, broken, change, what, command):
    folder = broken(change)
    model = [folder] if command[0] == "models" else ["--model", folder]

    assert what in refusal(space(*command, *model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=3, seed=1)])
def test_no_token_is_chosen_from_logits_that_are_no_numbers(dtype, value, sampling):
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    logits[1] = value
    step_logits = Sampler.from_sampling(sampling).step_logits(logits.to(dtype))

    assert 0 <= step_logits.token(0, [1]) < 50
    with pytest.raises(RunFailed, match="not finite"):
        step_logits.token(1, [1])


def test_nor_from_likely_ones():
    top_k = TopK(torch.zeros(2, 4, dtype=torch.int64), torch.tensor([[0.9, 0.1, 0, 0], [torch.nan] * 4]))
    step_logits = Sampler().step_logits(torch.zeros(2, 50), top_k)

    assert step_logits.token(0, [1]) == 0
    with pytest.raises(RunFailed, match="not finite"):
        step_logits.token(1, [1])


def test_a_model_that_breaks_behind_a_longer_text_gets_no_verdict(space, tiny_models, tiny_model_dir, tmp_path):
    import copy

    model = copy.deepcopy(lively(tiny_models["llama"]))
    # a token that no probe looks at
    (row,) = space_token(tiny_model_dir)
    model.get_input_embeddings().weight.data[row] = torch.nan
    folder = tmp_path / "late"
    for file in tiny_model_dir.iterdir():
        folder.mkdir(exist_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(folder)
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "Q"}\n')

    done = space(
        "verify-lossless", "--model", folder, "--suite", "p.jsonl", "--dtype", "float32", "--max-new-tokens", "4"
    )

    assert done.returncode == 3, done
    assert "not finite" in done.stderr
    assert "LOSSLESS" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("NO VERDICT: an error ended the run after 4 tokens of 1 answers")


def space_token(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)("Q", add_special_tokens=False)["input_ids"]
