from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MASK_IDS

from space_cli.core.block import Block
from space_cli.core.costs import ASSUMED_COSTS, MAX_BLOCK_SLOTS, SIZES, StepCosts
from space_cli.core.decoder import decode
from space_cli.core.drafting import EVERYTHING, AcceptanceStats, AdaptiveDrafter, ChainDrafter, Strategy, Verified
from space_cli.core.sampling import Sampler, Sampling
from space_cli.core.stopping import StopRule
from space_cli.core.stream import Generation

PROMPT = [17, 3, 250, 44, 17, 3, 250, 91, 8]
SAMPLINGS = [Sampling(), Sampling(0.8, seed=3), Sampling(1.1, top_k=40, repetition_penalty=1.2, seed=11)]
FREE = StepCosts(dict.fromkeys(SIZES, 1.0))
RUINOUS = StepCosts({size: 1.0 if size == 1 else 1000.0 for size in SIZES})
LINEAR = StepCosts({size: 1 + size / 10 for size in SIZES})


def adaptive(costs, masks, strategy=EVERYTHING, **arguments):
    return AdaptiveDrafter(AcceptanceStats(costs, masks), masks, strategy, **arguments)


def generate(model, drafts, *, sampling=SAMPLINGS[0], tokens=24):
    steps = decode(
        model,
        PROMPT,
        stop=StopRule(tokens),
        sampler=Sampler.from_sampling(sampling),
        mask_token_ids=MASK_IDS,
        drafts=drafts,
    )
    return Generation(list(steps))


@st.composite
def costs(draw):
    seconds = draw(st.lists(st.floats(0.01, 10), min_size=len(SIZES), max_size=len(SIZES)))
    return StepCosts(dict(zip(SIZES, seconds, strict=True)), overhead=draw(st.floats(0, 1)))


strategies = st.builds(
    Strategy,
    width=st.integers(0, 4),
    copies=st.booleans(),
)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@settings(max_examples=15)
@given(costs=costs(), masks=st.integers(0, len(MASK_IDS)), strategy=strategies)
def test_whatever_a_step_costs_the_output_is_that_of_ar(tiny_models, family, sampling, costs, masks, strategy):
    model = tiny_models[family]
    expected = generate(model, None, sampling=sampling).tokens

    found = generate(model, adaptive(costs, masks, strategy), sampling=sampling)

    assert found.tokens == expected
    assert {step.slots for step in found.steps} <= set(SIZES)


def test_where_no_block_pays_the_steps_are_those_of_ar(tiny_models):
    found = generate(tiny_models["llama"], adaptive(RUINOUS, len(MASK_IDS)))

    assert [step.slots for step in found.steps] == [1] * 24


def test_where_slots_are_free_blocks_are_large(tiny_models):
    found = generate(tiny_models["llama"], adaptive(FREE, len(MASK_IDS)))

    assert max(step.slots for step in found.steps) > 8


def steps_over(text, drafts, *, done, costs=ASSUMED_COSTS):
    """Decode where `text` is what the model says; return the steps and the seconds that they took by `costs`."""
    steps, seconds = [], 0.0
    while done < len(text) - MAX_BLOCK_SLOTS:
        proposal, begin, path = drafts.draft(text[:done]), done, [0]
        block = proposal.block
        while following := [s for s in block.children[path[-1]] if proposal.candidates[s - 1] == text[done]]:
            path.append(following[0])
            done += 1
        done += 1
        steps.append(Verified(proposal, path, text[begin:done], costs.by_slots[block.num_slots]))
        seconds += steps[-1].seconds
        drafts.observe(steps[-1])
    return steps, seconds


def words(count, *, of=14, seed=0):
    return torch.randint(0, of, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_a_text_that_repeats_itself_comes_in_ever_longer_steps():
    steps, _ = steps_over([5, 9, 2, 7, 11, 3] * 40, adaptive(ASSUMED_COSTS, 0), done=12)

    assert max(len(step.tokens) for step in steps) > 20


def test_text_without_repeats_is_left_to_ar_and_the_first_repeat_is_not_missed():
    text = [*range(80), 3, 4, 5, 6, *range(7, 60)]
    steps, _ = steps_over(text, adaptive(ASSUMED_COSTS, 0), done=50)

    assert [len(step.proposal.candidates) for step in steps[:30]] == [0] * 30
    assert max(len(step.tokens) for step in steps) > 8


def test_what_was_accepted_before_is_where_the_next_answer_begins():
    # few words at random: copies seem probable and hardly ever hold
    text, stats = words(300), AcceptanceStats(LINEAR, 0)

    first, _ = steps_over(text[:80], AdaptiveDrafter(stats, 0), done=20, costs=LINEAR)
    steps_over(text, AdaptiveDrafter(stats, 0), done=20, costs=LINEAR)
    again, _ = steps_over(text[:80], AdaptiveDrafter(stats, 0), done=20, costs=LINEAR)

    assert sum(step.proposal.block.num_slots for step in again) < sum(s.proposal.block.num_slots for s in first)


def test_a_checkpoint_says_what_is_expected_of_masks():
    ours, known = AcceptanceStats(LINEAR, 3), AcceptanceStats(LINEAR, 3, [0.9, 0.7, 0.6, 0.5])

    # the guess takes a slot itself, as a tenth of the price of a step here
    slot = known.prices[2] - known.prices[1]
    assert known.values == pytest.approx([0.9 - slot, 0.7 - slot, 0.6 - slot])
    assert AcceptanceStats(LINEAR, 3, [0.9]).values[1:] == ours.values[1:]


def test_a_text_that_is_expected_is_copied_from_its_beginning():
    text = words(120, of=1000)

    alone, _ = steps_over(text, adaptive(LINEAR, 0), done=2, costs=LINEAR)
    copied, _ = steps_over(text, adaptive(LINEAR, 0, texts=[text]), done=2, costs=LINEAR)

    assert len(copied) < len(alone) / 3


@pytest.mark.parametrize("dearer", [1.3, 3.0, 20.0])
def test_where_drafts_never_pay_what_they_lose_is_a_bounded_share_of_time(dearer):
    """Costs measured beforehand say that slots are free, and masks say that they are sure; both are wrong."""
    stats = AcceptanceStats(FREE, 3, [0.95, 0.9, 0.85])
    drafter, plain, seconds = AdaptiveDrafter(stats, 3), 0, 0.0
    for _ in range(4000):
        proposal = drafter.draft([1])
        took = 1.0 if proposal.block.num_slots == 1 else dearer
        drafter.observe(Verified(replace(proposal, guesses=[5, 5, 5]), [0], [1], took))
        plain, seconds = plain + 1, seconds + took

    # half a hundredth, what may be lost at first, and the steps that tell how dear they are
    assert seconds < 1.005 * plain + 8 + 4 * dearer


def test_a_chain_puts_one_prediction_per_position_and_asks_for_substitutes(tiny_models):
    seen = []

    def substitute(_, candidates):
        seen.append(list(candidates))
        return candidates

    drafts = ChainDrafter(Block.chain(3, 3), substitute)
    found = generate(tiny_models["llama"], drafts)

    assert len(seen) == len(found.steps)
    assert all(len(candidates) == 3 for candidates in seen)


@given(costs=costs())
def test_costs_never_fall_with_the_size(costs):
    table = costs.by_slots

    assert len(table) == MAX_BLOCK_SLOTS + 1
    assert table == sorted(table)
    assert all(table[size] <= costs.seconds[size] + costs.overhead for size in SIZES)
    assert table[-1] == costs.seconds[MAX_BLOCK_SLOTS] + costs.overhead
