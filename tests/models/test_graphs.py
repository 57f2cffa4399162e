from dataclasses import replace

import pytest
import torch
import transformers as tf
from tiny import MASK_IDS, lively

from space_cli.compile import cuda
from space_cli.compile.cuda import CudaGraphModel
from space_cli.core.block import Block
from space_cli.core.decoder import decode
from space_cli.core.drafting import ChainDrafter
from space_cli.core.sampling import Sampler
from space_cli.core.stopping import StopRule
from space_cli.errors import RunFailed, UsageProblem
from space_cli.models import graphs
from space_cli.models.engines import prepare
from space_cli.models.graphs import cuda_graph_model
from space_cli.models.loading import LoadedModel

ENOUGH = 1_000_000


def loaded_model():
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    return LoadedModel(
        name="tiny",
        source="tiny",
        model=lively(tf.LlamaForCausalLM(config)),
        tokenizer=None,
        space=None,
        dtype="float32",
        device="cpu",
        context_length=2048,
        eos_token_ids=frozenset(),
        mask_token_ids=MASK_IDS,
        candidates=2,
        masks_per_group=3,
        prompt_template=None,
    )


def tokens_of(loaded):
    steps = decode(
        loaded.model,
        [5, 9, 33],
        stop=StopRule(20),
        sampler=Sampler(),
        drafts=ChainDrafter(Block.chain(2, 2)),
        mask_token_ids=MASK_IDS,
        compiled=loaded.compiled,
    )
    return [token for step in steps for token in step.tokens]


def on_cuda(loaded):
    """As it would be on a GPU; it stays on the CPU, where graphs are off."""
    return replace(loaded, device="cuda")


def test_a_model_on_a_gpu_runs_as_graphs():
    loaded = prepare(on_cuda(loaded_model()))

    assert isinstance(loaded.compiled, CudaGraphModel)
    assert tokens_of(loaded) == tokens_of(loaded_model())
    assert prepare(on_cuda(loaded_model()), engine="eager").compiled is None


@pytest.mark.parametrize(("engine", "tokens", "fused"), [("auto", 10, 0), ("auto", ENOUGH, 1), ("compiled", 10, 1)])
def test_kernels_are_fused_where_it_is_asked_for_or_pays(monkeypatch, engine, tokens, fused):
    said = []
    monkeypatch.setattr(cuda.torch, "compile", lambda call, **_: said.append("compiled") or call)

    loaded = prepare(on_cuda(loaded_model()), engine=engine, tokens=tokens, on_compile=lambda: said.append("compiling"))

    assert said == ["compiling", "compiled"][: 2 * fused]
    assert tokens_of(loaded) == tokens_of(loaded_model())


def test_a_model_that_cannot_have_graphs_says_why():
    loaded = loaded_model()
    loaded.model.set_attn_implementation("eager")

    with pytest.raises(UsageProblem, match="attention is its own"):
        prepare(on_cuda(loaded), engine="compiled")
    assert prepare(on_cuda(loaded)).compiled is None


def test_graphs_that_compute_something_else_are_never_used(monkeypatch):
    def wrong(logits):
        logits.mul_(-1)
        return own(logits)

    own = cuda._top_k
    monkeypatch.setattr(cuda, "_top_k", wrong)

    with pytest.raises(RunFailed, match="computes something else"):
        cuda_graph_model(loaded_model(), fused=False, required=True)
    assert cuda_graph_model(loaded_model(), fused=False, required=False) is None


def test_what_defeats_the_capture_leaves_the_eager_engine(monkeypatch):
    def fails(*_):
        raise torch.AcceleratorError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphs.CudaGraphModel, "_first", fails)

    with pytest.raises(RunFailed, match=r"cannot be captured: .*operation not permitted when stream is capturing;"):
        cuda_graph_model(loaded_model(), fused=False, required=True)
    assert prepare(on_cuda(loaded_model())).compiled is None
