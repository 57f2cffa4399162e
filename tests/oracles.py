"""Independent answers to compare with."""

import torch


def mask_by_definition(block, prefix_length):
    """The block's mask by the words of the method, slot by slot."""
    parents = block.parents
    mask = torch.zeros(1, 1, block.num_slots, prefix_length + block.num_slots, dtype=torch.bool)
    for row in range(block.num_slots):
        mask[0, 0, row, :prefix_length] = True
        seen = row
        while seen != -1:
            mask[0, 0, row, prefix_length + seen] = True
            seen = parents[seen]
    return mask


def hf_greedy(model, prompt, max_new_tokens):
    """Transformers' own greedy output, nothing ending it early."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def chain_visibility(candidates, masks):
    """Who sees whom in the paper's chain, from section 1 of the method: pairs of (slot, seen slot)."""
    head, pairs = 0, set()
    group_start = {i: candidates + 1 + i * masks for i in range(candidates + 1)}
    for i in range(candidates + 1):
        pairs |= {(i, seen) for seen in (head, *range(1, i + 1))}
        for j in range(masks):
            mask = group_start[i] + j
            pairs |= {(mask, seen) for seen in (head, *range(1, i + 1))}
            pairs |= {(mask, group_start[i] + earlier) for earlier in range(j + 1)}
    return pairs
