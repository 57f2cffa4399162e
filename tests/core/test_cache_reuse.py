"""One cache over several generations: only what is new is computed, and nothing else changes."""

from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MASK_IDS

from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.cache import KVCache
from space_cli.core.decoder import decode
from space_cli.core.drafting import ChainDrafter
from space_cli.core.sampling import Sampler
from space_cli.core.stopping import StopRule

SHAPES = {"ar": AR_BLOCK, "space": Block.chain(3, 3)}


def answer(model, prompt_ids, shape, *, tokens=12, cache=None):
    stop, mask_ids = StopRule(tokens), MASK_IDS
    return decode(
        model,
        prompt_ids,
        stop=stop,
        sampler=Sampler(),
        drafts=ChainDrafter(SHAPES[shape]),
        mask_token_ids=mask_ids,
        cache=cache,
    )


def emitted(steps):
    return [token for step in steps for token in step.tokens]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_later_turn_computes_its_own_tokens_alone(tiny_models, shape):
    model, cache, conversation = tiny_models["llama"], KVCache(), []

    for turn in ([5, 9, 7, 30], [11, 12, 13], [40, 41]):
        before = len(conversation)
        conversation += turn
        steps = list(answer(model, conversation, shape, cache=cache))
        assert emitted(steps) == emitted(answer(model, conversation, shape))
        # of what was there before, the newest token alone was never in the cache; the newest of all is the head
        assert steps[0].prefilled == len(turn) - 1 + (before > 0)
        conversation += emitted(steps)


@settings(max_examples=40)
@given(data=st.data())
def test_any_row_of_conversations_on_one_cache_is_as_if_each_were_new(tiny_models, data):
    model, cache = tiny_models["qwen2"], KVCache()
    token_ids = st.lists(st.integers(1, 290), min_size=1, max_size=12)
    prompt_ids = data.draw(token_ids)
    for _ in range(data.draw(st.integers(1, 4))):
        shape = data.draw(st.sampled_from(sorted(SHAPES)))
        steps, left_after = [], data.draw(st.integers(1, 14))
        generation = answer(model, prompt_ids, shape, cache=cache)
        for step in generation:
            steps.append(step)
            if len(steps) == left_after:  # as by Ctrl-C
                generation.close()
                break
        assert emitted(steps) == emitted(answer(model, prompt_ids, shape))[: len(emitted(steps))]
        # undone, edited or gone on from
        said = prompt_ids + emitted(steps)
        prompt_ids = said[: data.draw(st.integers(0, len(said)))] + data.draw(token_ids)


def test_a_generation_that_failed_within_a_call_leaves_a_usable_cache(tiny_models, monkeypatch):
    model, cache, prompt_ids = tiny_models["llama"], KVCache(), [5, 9, 7, 30, 8]
    generation = answer(model, prompt_ids, "space", cache=cache)
    next(generation)

    with monkeypatch.context() as patch:
        # after the first layer has written its keys
        patch.setattr(model.base_model.layers[1], "forward", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(generation)

    steps = list(answer(model, prompt_ids, "space", cache=cache))
    assert emitted(steps) == emitted(answer(model, prompt_ids, "space"))
    assert steps[0].prefilled == 0
