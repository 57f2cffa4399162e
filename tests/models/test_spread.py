"""A model over several devices, as far as one CPU can tell: hooks carry states between layers of different places."""

from dataclasses import replace

import pytest
import torch

from space_cli.compile import cuda
from space_cli.core.block import Block
from space_cli.core.decoder import decode
from space_cli.core.drafting import ChainDrafter
from space_cli.core.sampling import Sampler
from space_cli.core.stopping import StopRule
from space_cli.models import loading
from space_cli.models.engines import prepare

PLACES = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture
def spread(tiny_model_dir, monkeypatch):
    """A model of which one layer has no weights on the device of the others."""
    monkeypatch.setattr(loading, "_device", lambda device: device)
    monkeypatch.setattr(loading, "_OVER_ALL", PLACES)
    return loading.load_model(str(tiny_model_dir), dtype="float32", device=loading.SPREAD)


def tokens_of(loaded):
    steps = decode(
        loaded.model,
        [5, 9, 33],
        stop=StopRule(20),
        sampler=Sampler(),
        drafts=ChainDrafter(Block.chain(2, 2)),
        mask_token_ids=loaded.mask_token_ids,
        compiled=loaded.compiled,
    )
    return [token for step in steps for token in step.tokens]


def test_layers_in_different_places_decode_as_one_model(spread, tiny_model_dir):
    assert {each.device.type for each in spread.model.parameters()} == {"cpu", "meta"}

    assert tokens_of(spread) == tokens_of(loading.load_model(str(tiny_model_dir), dtype="float32", device="cpu"))


def test_layers_on_several_devices_are_left_to_transformers(spread):
    assert cuda.unsupported_reason(spread.model) == "its layers are on several devices"
    assert prepare(spread).compiled is None


def test_a_model_on_all_gpus_of_one_still_runs_as_graphs(tiny_model_dir):
    loaded = loading.load_model(str(tiny_model_dir), dtype="float32", device="cpu")

    assert isinstance(prepare(replace(loaded, device=loading.SPREAD)).compiled, cuda.CudaGraphModel)


def test_without_a_gpu_the_device_is_refused(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(loading.UsageProblem, match="no cuda device"):
        loading.load_model(str(tiny_model_dir), device=loading.SPREAD)
