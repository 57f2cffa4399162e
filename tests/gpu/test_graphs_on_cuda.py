"""What only a GPU can show of graphs: that they are captured, exact in half precision, and wait once a step."""

import warnings

import pytest
import torch
import transformers as tf
from tiny import MASK_IDS, lively

from space_cli.compile.cuda import CudaGraphModel
from space_cli.compile.cuda_engine import GraphEngine
from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.decoder import decode
from space_cli.core.drafting import ChainDrafter
from space_cli.core.engine import EagerEngine
from space_cli.core.sampling import Sampler
from space_cli.core.stopping import StopRule

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
PROMPT = [17, 3, 250, 44, 91, 8]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(request):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
    )
    return lively(tf.LlamaForCausalLM(config), 0.1).to("cuda", request.param)


@pytest.fixture(scope="module", params=[False, True], ids=["graphs", "fused"])
def program(request, model):
    return CudaGraphModel(model, fused=request.param)


def generate(model, program, drafts=None):
    arguments = {"stop": StopRule(200), "sampler": Sampler(), "mask_token_ids": MASK_IDS}
    steps = decode(model, PROMPT, drafts=drafts, compiled=program, **arguments)
    return [token for step in steps for token in step.tokens]


@pytest.mark.parametrize("block", [Block.chain(3, 3), Block.tree([0, 0, 2, 1, 3], 2)], ids=["chain", "tree"])
def test_space_equals_ar_in_any_dtype(model, program, block):
    expected = generate(model, program)
    turns = iter(range(10_000))

    def half_right(tokens, _):
        right = [*expected[len(tokens) - len(PROMPT) :], *[1] * block.num_slots]
        return [right[depth - 1] ^ (next(turns) % 3 == 0) for depth in block.offsets[1 : block.num_tokens]]

    assert generate(model, program, ChainDrafter(block, half_right)) == expected


@torch.inference_mode()
def test_a_graph_computes_what_the_model_computes(model, program):
    engines = [
        EagerEngine(model, max_length=200, max_slots=32),
        GraphEngine(model, program, max_length=200, max_slots=32),
    ]
    for block, committed in ((AR_BLOCK, [0]), (Block.tree([0, 0, 2], 2), [0, 2]), (Block.chain(7, 3), [0, 1, 2])):
        logits = []
        for engine in engines:
            engine.prefill(list(range(70)))
            for _ in range(3):  # captured, then replayed
                found = engine.run(block, list(range(block.num_slots))).float()
                engine.commit(committed)
            logits.append(found)
        assert (logits[0] - logits[1]).abs().max() <= logits[0].std() * (1e-3 if model.dtype == torch.float32 else 0.3)


@torch.inference_mode()
def test_a_step_waits_once(model, program):
    engine = GraphEngine(model, program, max_length=100, max_slots=8)
    engine.prefill(PROMPT)
    engine.run(AR_BLOCK, [5])
    engine.commit([0])

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            engine.run(Block.tree([0, 0], 0), [5, 6, 7])
            engine.commit([0, 2])
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert sum("synchroniz" in str(each.message) for each in told) == 1
