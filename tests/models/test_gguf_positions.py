"""Rotary positions of GGUF files whose frequencies are divided one by one, as Llama 3.1 and later have them."""

import math
import shutil

import numpy as np
import pytest
import torch
from ggufs import llama_file
from tiny import lively, llama_of_whole_blocks

from space_cli.core.block import Block
from space_cli.core.engine import engine_for
from space_cli.errors import UsageProblem
from space_cli.models.engines import prepare
from space_cli.models.loading import load_model

# as far apart as words of a long text: only long waves are divided
FAR = torch.tensor([[0, 300, 1500, 4000, 9000, 20000]])
IDS = torch.tensor([[5, 9, 40, 7, 3, 11]])


def llama(**rope):
    """A random Llama that looks back with preference."""
    return lively(llama_of_whole_blocks(**rope), 0.15)


def llama3(factor):
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    }


def divisors(factor, *, theta=500000.0, size=32, context=8192):
    """What llama.cpp's converter writes (`convert_hf_to_gguf.py`, LlamaModel.generate_extra_tensors)."""
    found = []
    for place in range(0, size, 2):
        wave = 2 * math.pi * theta ** (place / size)
        if wave < context / 4:
            found.append(1.0)
        elif wave > context:
            found.append(factor)
        else:
            smooth = (context / wave - 1) / 3
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_divided_frequencies_are_those_of_llama_3(tiny_tokenizer, tmp_path, factor):
    model = llama(**llama3(factor))
    plain = llama(rope_theta=500000.0)
    file = llama_file(tmp_path / "new.gguf", model, tiny_tokenizer, divisors=divisors(factor))

    loaded = load_model(str(file), dtype="float32").model

    expected = model(IDS, position_ids=FAR).logits
    assert torch.equal(loaded(IDS, position_ids=FAR).logits, expected)
    assert (plain(IDS, position_ids=FAR).logits - expected).abs().max() > 0.1 * expected.std()
    # a folder saved from it keeps them
    loaded.save_pretrained(tmp_path / "saved")
    saved = load_model_of_folder(tmp_path / "saved")
    assert torch.equal(saved(IDS, position_ids=FAR).logits, expected)


def load_model_of_folder(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_compiled_they_are_too(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, plain = llama(**llama3(8.0)), llama(rope_theta=500000.0)
    file = llama_file(tmp_path / "new.gguf", model, tiny_tokenizer, divisors=divisors(8.0))
    loaded = prepare(load_model(str(file), dtype="float32"), engine="compiled")

    found = []
    for own, run_by in ((model, None), (loaded.model, loaded.compiled), (plain, None)):
        engine = engine_for(own, run_by, max_length=256, max_slots=8)
        with torch.inference_mode():
            engine.prefill([token % 300 for token in range(1, 241)])
            found.append(engine.run(Block.chain(3, 0), [9, 8, 7, 6]).clone())

    assert loaded.compiled is not None
    assert (found[0] - found[1]).abs().max() < 1e-3 * found[0].std()
    assert (found[0] - found[2]).abs().max() > 0.1 * found[0].std()


def test_frequencies_divided_otherwise_are_refused(tiny_tokenizer, tmp_path):
    model = llama()
    file = llama_file(tmp_path / "other.gguf", model, tiny_tokenizer, divisors=np.linspace(1, 3, 16, dtype=np.float32))

    with pytest.raises(UsageProblem, match=r"other than those of Llama 3\.1; take the model in its original format"):
        load_model(str(file))


def test_frequencies_divided_by_one_are_plain(tiny_tokenizer, tmp_path):
    model = llama()
    file = llama_file(tmp_path / "ones.gguf", model, tiny_tokenizer, divisors=np.ones(16, np.float32))

    loaded = load_model(str(file), dtype="float32").model

    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
