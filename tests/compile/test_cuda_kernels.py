"""The Triton kernels, run by Triton's interpreter where there is no GPU."""

import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import blocks

if find_spec("triton") is None:
    pytest.skip("Triton is not installed; it comes with PyTorch for CUDA", allow_module_level=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from space_cli.compile import cuda_kernels
from space_cli.compile.cuda import _ancestry
from space_cli.compile.cuda_attention import BlockTensors, attend_plainly
from space_cli.core.block import AR_BLOCK, Block

# Triton's interpreter asks numpy for numbers in a way that numpy 2.4 refuses and those before warn of
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.skipif(
        not torch.cuda.is_available() and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
        reason="Triton's interpreter does not run with numpy 2.4 or newer",
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter has no bfloat16
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


def tensors(block, rows, length):
    depths, ancestors = (torch.from_numpy(each.copy()).to(DEVICE) for each in _ancestry(block, rows))
    return BlockTensors(torch.tensor([length], dtype=torch.int32, device=DEVICE), depths, ancestors.view(rows, rows))


def random_states(seed, dtype, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=6)
@given(
    block=blocks(max_candidates=6),
    length=st.integers(0, 150),
    key_heads=st.integers(1, 2),
    per_group=st.sampled_from([1, 3, 17]),
    width=st.sampled_from([8, 24, 32]),
)
def test_kernels_compute_what_plain_pytorch_computes(dtype, block, length, key_heads, per_group, width):
    rows = block.num_slots + 3
    query = random_states(1, dtype, 1, rows, key_heads * per_group, width).transpose(1, 2)
    key, value = (random_states(seed, dtype, 1, key_heads, rows, width) for seed in (2, 3))
    held = random_states(4, dtype, 2, key_heads, 256, width)
    one, other = held.clone(), held.clone()
    block_tensors = tensors(block, rows, length)

    found = cuda_kernels.attend(query, key, value, one, block_tensors, 0.3)
    expected = attend_plainly(query, key, value, other, block_tensors, 0.3)

    assert torch.equal(one, other)
    allowed = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(found[:, : block.num_slots].float(), expected[:, : block.num_slots].float(), atol=allowed)
    assert not found[:, block.num_slots :].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [5, 60, 61, 63, 64, 120])
def test_a_row_has_the_same_bits_whatever_of_its_text_was_settled(dtype, length):
    # the second branch is the text; behind the first token it stands in slots that do not follow one another
    tree, path = Block.tree([0, 0, 2, 1, 3], 1), [0, 2, 3, 5]
    rows, heads, width = 16, 4, 16
    text = random_states(1, dtype, 3, heads, length + 4, width)
    noise = random_states(2, dtype, 3, heads, rows, width)
    states = torch.zeros(2, heads, 256, width, dtype=dtype, device=DEVICE)
    states[:, :, :length] = text[1:, :, :length]
    in_tree = noise.clone()
    in_tree[:, :, path] = text[:, :, length:]

    def run(block, each, at):
        return cuda_kernels.attend(*(part[None] for part in each), states, tensors(block, rows, at), 0.25)[0]

    together = run(tree, in_tree, length)[path]
    alone = []
    for index in range(4):
        head = noise.clone()
        head[:, :, 0] = text[:, :, length + index]
        alone.append(run(AR_BLOCK, head, length + index)[0])

    assert torch.equal(together, torch.stack(alone))
