import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import chain_visibility, mask_by_definition
from strategies import blocks

from space_cli.core.block import AR_BLOCK, Block


@given(st.integers(0, 7), st.integers(0, 7))
def test_chain_sees_what_the_paper_says(candidates, masks):
    block = Block.chain(candidates, masks)

    pairs = {(row, column) for row, column in torch.from_numpy(block.visibility).nonzero().tolist()}

    assert block.num_slots == (candidates + 1) * (masks + 1)
    assert pairs == chain_visibility(candidates, masks)


@given(st.integers(0, 7), st.integers(1, 7))
def test_chain_positions_are_those_of_the_paper(candidates, masks):
    block = Block.chain(candidates, masks)

    groups = [i + j for i in range(candidates + 1) for j in range(1, masks + 1)]

    assert list(block.offsets) == [*range(candidates + 1), *groups]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(blocks(), st.integers(0, 9), st.integers(0, 9))
def test_mask_and_positions_follow_from_parents(dtype, block, prefix, unused):
    end = prefix + block.num_slots

    mask = block.attention_mask(prefix, num_keys=end + unused, dtype=dtype)

    assert torch.equal(mask[..., :end] == 0, mask_by_definition(block, prefix))
    assert (mask[mask != 0] == torch.finfo(dtype).min).all()
    assert (mask[..., end:] != 0).all()
    assert torch.equal(block.attention_mask(prefix, dtype=dtype), mask[..., :end])
    assert block.position_ids(prefix)[0].tolist() == [prefix + int(row.sum()) - 1 for row in block.visibility]


@given(blocks())
def test_head_and_candidates_come_first_and_groups_are_blind_to_each_other(block):
    groups = [slot for anchor in block.anchors for slot in block.group(anchor)]

    assert groups == list(range(block.num_tokens, block.num_slots))
    for one in block.anchors:
        for other in block.anchors:
            if one != other:
                assert not block.visibility[list(block.group(one))][:, list(block.group(other))].any()


@given(blocks())
def test_no_token_slot_sees_a_mask(block):
    tokens, masks = block.num_tokens, block.num_slots - block.num_tokens

    assert block.visibility[:tokens, tokens:].sum() == 0
    assert masks == len(block.anchors) * block.masks


def test_ar_block_is_one_slot():
    assert AR_BLOCK.num_slots == 1


def test_mask_ids_are_shared_or_distinct():
    block = Block.chain(1, 2)

    assert block.mask_token_ids([9]) == [9, 9, 9, 9]
    assert block.mask_token_ids([7, 8, 9]) == [7, 8, 7, 8]
    with pytest.raises(ValueError, match="need 1 or 3 ids"):
        Block.chain(1, 3).mask_token_ids([7, 8])


@pytest.mark.parametrize(
    ("parents", "masks", "anchors"),
    [([1], 1, None), ([0], -1, None), ([0], 1, [2]), ([0], 1, [1, 0]), ([0, 3], 1, None)],
)
def test_impossible_blocks_are_refused(parents, masks, anchors):
    with pytest.raises(ValueError, match=r"comes before|cannot have|stand behind|ascend"):
        Block.tree(parents, masks, anchors=anchors)
