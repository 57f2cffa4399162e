import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import hf_greedy
from strategies import blocks
from tiny import MASK_IDS, VOCABULARY, in_all, tiny_configs

from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.decoder import decode
from space_cli.core.drafting import ChainDrafter
from space_cli.core.sampling import Sampler, Sampling
from space_cli.core.stopping import StopRule
from space_cli.core.stream import Generation
from space_cli.errors import UsageProblem

FAMILIES = list(tiny_configs())
PROMPT = [17, 3, 250, 44, 91, 8]
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.8, seed=3),
    Sampling(temperature=1.3, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=11),
]


def generate(model, block=AR_BLOCK, *, prompt=PROMPT, stop=None, sampling=SAMPLINGS[0], drafter=None, masks=MASK_IDS):
    steps = decode(
        model,
        prompt,
        stop=stop or StopRule(24),
        sampler=Sampler.from_sampling(sampling),
        mask_token_ids=masks if block.masks <= len(masks) else masks[:1],
        drafts=ChainDrafter(block, drafter),
    )
    return Generation(list(steps))


def drafter_of(block, expected, prompt, rights):
    """Drafts that are right where `rights` says so, and else wrong."""

    def draft(tokens, _):
        done = len(tokens) - len(prompt)
        following = [*expected[done:], *[0] * 99]
        return [
            following[depth - 1] if next(rights) else (following[depth - 1] + 1) % VOCABULARY
            for depth in block.offsets[1 : block.num_tokens]
        ]

    return draft


def one_character_a_token(ids):
    return "".join(chr(0x4E00 + token) for token in ids)


def endless(values):
    while True:
        yield from values


@pytest.mark.parametrize("family", FAMILIES)
def test_ar_equals_transformers_generate(tiny_models, family):
    model = tiny_models[family]

    tokens = generate(model, stop=StopRule(60)).tokens

    assert tokens == hf_greedy(model, PROMPT, 60)
    assert len(set(tokens)) > 8, "the text loops and proves nothing"


@pytest.mark.parametrize("family", in_all(FAMILIES))
@settings(max_examples=12)
@given(block=blocks(), rights=st.lists(st.booleans(), min_size=1, max_size=12), sampling=st.sampled_from(SAMPLINGS))
def test_any_drafts_in_any_block_give_the_output_of_ar(tiny_models, family, block, rights, sampling):
    model = tiny_models[family]
    expected = generate(model, sampling=sampling).tokens

    found = generate(model, block, sampling=sampling, drafter=drafter_of(block, expected, PROMPT, endless(rights)))

    assert found.tokens == expected


@pytest.mark.parametrize("sampling", SAMPLINGS)
@settings(max_examples=25)
@given(block=blocks())
def test_the_models_own_drafts_give_the_output_of_ar(tiny_models, block, sampling):
    model = tiny_models["llama"]

    assert generate(model, block, sampling=sampling).tokens == generate(model, sampling=sampling).tokens


def test_right_drafts_are_all_accepted(tiny_models):
    model, block = tiny_models["llama"], Block.chain(5, 5)
    expected = generate(model).tokens

    found = generate(model, block, drafter=drafter_of(block, expected, PROMPT, endless([True])), masks=(296,))

    assert [len(step.tokens) for step in found.steps] == [6, 6, 6, 6]
    assert [step.accepted for step in found.steps] == [5, 5, 5, 5]
    assert all(step.slots == 36 for step in found.steps)


def test_wrong_drafts_cost_steps_but_no_token(tiny_models):
    model, block = tiny_models["llama"], Block.chain(5, 5)
    expected = generate(model).tokens

    found = generate(model, block, drafter=drafter_of(block, expected, PROMPT, endless([False])), masks=(296,))

    assert [step.accepted for step in found.steps] == [0] * 24
    assert found.tokens == expected


def test_rollback_leaves_the_cache_as_if_never_drafted(tiny_models):
    from space_cli.core.engine import EagerEngine

    model, block = tiny_models["llama"], Block.chain(2, 2)
    drafted, fresh = (EagerEngine(model, max_length=20, max_slots=block.num_slots) for _ in range(2))

    with torch.inference_mode():
        for engine in (drafted, fresh):
            engine.prefill(PROMPT)
        drafted.run(block, [5, 6, 7, *[296] * 6])
        drafted.commit([])
        after, expected = (engine.run(block, [9, 8, 7, *[296] * 6]) for engine in (drafted, fresh))

    assert drafted.length == fresh.length
    assert torch.equal(after, expected)


def test_a_branch_of_a_tree_is_moved_to_the_front_of_the_cache(tiny_models):
    from space_cli.core.engine import EagerEngine

    model, block = tiny_models["llama"], Block.tree([0, 0, 2], 0)
    branched, straight = (EagerEngine(model, max_length=20, max_slots=block.num_slots) for _ in range(2))

    with torch.inference_mode():
        for engine in (branched, straight):
            engine.prefill(PROMPT)
        branched.run(block, [5, 99, 6, 7])
        branched.commit([0, 2, 3])
        straight.prefill([*PROMPT, 5, 6, 7])
        after, expected = (engine.run(block, [1, 2, 3, 4]) for engine in (branched, straight))

    assert torch.allclose(after, expected, atol=1e-4)


@pytest.mark.parametrize("position", range(1, 12))
def test_end_of_sequence_inside_accepted_candidates_ends_there(tiny_models, position):
    model, block = tiny_models["llama"], Block.chain(3, 3)
    expected = generate(model).tokens
    end = expected[position - 1]
    stop = StopRule(24, frozenset({end, 999}))
    draft = drafter_of(block, expected, PROMPT, endless([True]))

    found = generate(model, block, stop=stop, drafter=draft)

    assert found.tokens == expected[: expected.index(end) + 1]
    assert found.finish_reason == "eos"


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9])
def test_max_new_tokens_is_exact(tiny_models, count):
    model, block = tiny_models["llama"], Block.chain(3, 3)
    expected = generate(model).tokens

    found = generate(model, block, stop=StopRule(count), drafter=drafter_of(block, expected, PROMPT, endless([True])))

    assert found.tokens == expected[:count]
    assert found.finish_reason == "length"


@pytest.mark.parametrize("start", range(6))
def test_a_stop_string_across_the_tokens_of_a_step(tiny_models, start):
    model, block = tiny_models["llama"], Block.chain(3, 3)
    expected = generate(model).tokens
    stop_string = one_character_a_token(expected[start : start + 3])
    stop = StopRule(24, stop_strings=(stop_string,), decode=one_character_a_token)
    draft = drafter_of(block, expected, PROMPT, endless([True]))

    found = generate(model, block, stop=stop, drafter=draft)

    assert found.tokens == expected[: one_character_a_token(expected).index(stop_string) + 3]
    assert found.finish_reason == "stop_string"


def test_a_prompt_of_one_token(tiny_models):
    model = tiny_models["llama"]

    assert generate(model, Block.chain(3, 3), prompt=[5]).tokens == hf_greedy(model, [5], 24)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_generation_up_to_the_last_position_of_the_context(tiny_models, family):
    model = tiny_models[family]
    prompt = [(7 * i) % 290 + 1 for i in range(240)]

    found = generate(model, Block.chain(3, 3), prompt=prompt, stop=StopRule(16))

    assert found.tokens == generate(model, prompt=prompt, stop=StopRule(16)).tokens
    assert len(found.tokens) == 16


def test_what_exceeds_the_context_is_refused_before_it_starts(tiny_models):
    with pytest.raises(UsageProblem, match="250 prompt tokens and 24 new ones exceed the model's context of 256"):
        generate(tiny_models["llama"], prompt=[1] * 250)


def test_an_empty_prompt_is_refused(tiny_models):
    with pytest.raises(ValueError, match="empty"):
        generate(tiny_models["llama"], prompt=[])


def test_inference_mode_does_not_leak_between_steps(tiny_models):
    steps = decode(tiny_models["llama"], PROMPT, stop=StopRule(4), sampler=Sampler())

    next(steps)

    assert not torch.is_inference_mode_enabled()
