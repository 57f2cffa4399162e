from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MASK_IDS

from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.choose import Chooser, Sampling
from space_cli.core.costs import ASSUMED_COSTS, MOST_SLOTS, SIZES, StepCosts
from space_cli.core.decoder import decode
from space_cli.core.drafting import AdaptiveDrafts, ChainDrafts, Experience, Proposal, _Contest, _Context
from space_cli.core.stopping import StopRule
from space_cli.core.stream import Generation

PROMPT = [17, 3, 250, 44, 17, 3, 250, 91, 8]
SAMPLINGS = [Sampling(), Sampling(0.8, seed=3), Sampling(1.1, top_k=40, repetition_penalty=1.2, seed=11)]
FREE = StepCosts(dict.fromkeys(SIZES, 1.0))
RUINOUS = StepCosts({size: 1.0 if size == 1 else 1000.0 for size in SIZES})


def generate(model, drafts, *, sampling=SAMPLINGS[0], tokens=24):
    steps = decode(
        model,
        PROMPT,
        stop=StopRule(tokens),
        chooser=Chooser.from_sampling(sampling),
        mask_token_ids=MASK_IDS,
        drafts=drafts,
    )
    return Generation(list(steps))


@st.composite
def costs(draw):
    seconds = draw(st.lists(st.floats(0.01, 10), min_size=len(SIZES), max_size=len(SIZES)))
    return StepCosts(dict(zip(SIZES, seconds, strict=True)), overhead=draw(st.floats(0, 1)))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@settings(max_examples=15)
@given(costs=costs(), masks=st.integers(0, len(MASK_IDS)), lookup=st.booleans())
def test_whatever_a_step_costs_the_output_is_that_of_ar(tiny_models, family, sampling, costs, masks, lookup):
    model = tiny_models[family]
    expected = generate(model, None, sampling=sampling).tokens

    found = generate(model, AdaptiveDrafts(costs, masks, lookup), sampling=sampling)

    assert found.tokens == expected
    assert {step.slots for step in found.steps} <= set(SIZES)


def test_where_no_block_pays_the_steps_are_those_of_ar(tiny_models):
    found = generate(tiny_models["llama"], AdaptiveDrafts(RUINOUS, len(MASK_IDS)))

    # but for a trial of eight steps
    assert [step.slots for step in found.steps][:16] == [1] * 16


def test_where_slots_are_free_blocks_are_large(tiny_models):
    found = generate(tiny_models["llama"], AdaptiveDrafts(FREE, len(MASK_IDS)))

    assert max(step.slots for step in found.steps) > 8


def steps_over(text, drafts, *, done):
    """Return how many tokens each step brings where `text` is what the model says."""
    lengths, proposal = [], drafts.first(text[:done])
    while done < len(text) - MOST_SLOTS:
        block, right = proposal.block, [0]
        while following := [s for s in block.children[right[-1]] if proposal.candidates[s - 1] == text[done]]:
            right.append(following[0])
            done += 1
        done += 1
        lengths.append(len(right))
        cost = drafts.costs.by_slots[block.num_slots]
        proposal = drafts.following(None, proposal, right, text[:done], cost)
    return lengths


def test_a_text_that_repeats_itself_comes_in_ever_longer_steps():
    lengths = steps_over([5, 9, 2, 7, 11, 3] * 40, AdaptiveDrafts(ASSUMED_COSTS, 0), done=12)

    assert max(lengths) > 20


def test_experience_begins_with_what_a_checkpoint_says_was_accepted():
    ours, told = Experience(3), Experience(3, [0.9, 0.7, 0.6, 0.5])

    assert [average.value for average in told.values] == [0.9, 0.7, 0.6]
    assert [average.value for average in Experience(3, [0.9]).values][1:] == [each.value for each in ours.values][1:]


def test_experience_of_one_answer_serves_the_next():
    # a text of few words at random: copies seem likely and hardly ever hold
    text = torch.randint(0, 14, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    costs, experience = StepCosts({size: 1 + size / 10 for size in SIZES}), Experience(0)
    proposed = []
    for drafts in (AdaptiveDrafts(costs, 0, experience=experience) for _ in range(2)):
        drafts.first(text[:20])
        blocks = [
            drafts.following(None, Proposal(AR_BLOCK, []), [0], text[:done], costs.by_slots[1]).block
            for done in range(21, 60)
        ]
        proposed.append(sum(block.num_slots for block in blocks))
        steps_over(text, drafts, done=60)

    assert proposed[1] < proposed[0]


def test_text_without_repeats_is_left_to_ar_and_the_first_repeat_is_not_missed():
    drafts, tokens = AdaptiveDrafts(ASSUMED_COSTS, 0), list(range(50))
    proposal = drafts.first(tokens)
    for token in range(50, 80):
        assert proposal.block.num_slots == 1
        tokens.append(token)
        proposal = drafts.following(None, proposal, [0], tokens, ASSUMED_COSTS.by_slots[1])
    for token in (3, 4, 5, 6):
        tokens.append(token)
        proposal = drafts.following(None, proposal, [0], tokens, ASSUMED_COSTS.by_slots[1])

    assert list(proposal.candidates[:3]) == [7, 8, 9]


def shares(contest, steps, **rates):
    """Take steps of so many tokens a second by each way; return the share of steps that each got."""
    taken = Counter()
    for _ in range(steps):
        taken[contest.way] += 1
        contest.took(rates[contest.way], 1.0)
    return {way: taken[way] / steps for way in rates}


@pytest.mark.parametrize("best", ["planned", "chain", "copies"])
def test_the_fastest_way_to_draft_gets_nearly_all_steps(best):
    rates = {"planned": 1.0, "chain": 1.0, "copies": 1.0} | {best: 1.1}

    assert shares(_Contest(list(rates)), 2000, **rates)[best] > 0.9


def test_where_another_way_becomes_faster_it_is_found_out():
    contest = _Contest(["planned", "chain", "copies"])
    shares(contest, 700, planned=1, chain=3, copies=2)

    shares(contest, 3000, planned=4, chain=3, copies=2)

    assert shares(contest, 700, planned=4, chain=3, copies=2)["planned"] > 0.9


def test_where_copying_is_slower_than_plain_ar_it_rests_and_a_long_match_wakes_it():
    # words at random, so that copies fail; a step that checks any takes three times as long as plain AR
    words = torch.randint(0, 14, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    text = [*range(100, 150), *words]
    drafts, slots = AdaptiveDrafts(FREE, 0), []
    proposal = drafts.first(text[:20])
    for done in range(21, len(text)):
        proposal = drafts.following(None, proposal, [0], text[:done], 3.0 if proposal.block.num_slots > 1 else 1.0)
        slots.append(proposal.block.num_slots)
    # the beginning comes again
    for token in range(100, 112):
        text.append(token)
        proposal = drafts.following(None, proposal, [0], text, 1.0)

    assert slots.count(1) < len(slots)
    assert slots[100:].count(1) > 200
    assert list(proposal.candidates[:3]) == [112, 113, 114]


@given(tokens=st.lists(st.integers(0, 3), min_size=2, max_size=40))
def test_a_copy_continues_the_newest_place_with_the_longest_match(tokens):
    context = _Context()
    for end in range(1, len(tokens)):  # as it grows in an answer
        context.continuation(tokens[:end])

    found, match = context.continuation(tokens)

    def matches(end):
        length = 0
        while length < end and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        return length

    # brute force: up to four tokens decide the place, the newest first; beyond, the length alone is told
    places = [(min(matches(end), 4), end) for end in range(1, len(tokens)) if matches(end)]
    if not places:
        assert (found, match) == ([], 0)
        return
    _, end = max(places)
    assert match == min(matches(end), 16)
    assert found[: len(tokens) - end] == tokens[end : end + len(found)]


@given(costs=costs())
def test_costs_never_fall_with_the_size(costs):
    table = costs.by_slots

    assert len(table) == MOST_SLOTS + 1
    assert table == sorted(table)
    assert all(table[size] <= costs.seconds[size] + costs.overhead for size in SIZES)
    assert table[-1] == costs.seconds[MOST_SLOTS] + costs.overhead


def test_a_chain_puts_one_guess_per_position_and_asks_a_drafter(tiny_models):
    seen = []

    def drafter(_, candidates):
        seen.append(list(candidates))
        return candidates

    drafts = ChainDrafts(Block.chain(3, 3), drafter)
    found = generate(tiny_models["llama"], drafts)

    assert isinstance(drafts.first(PROMPT), Proposal)
    assert len(seen) == len(found.steps) + 1
    assert all(len(candidates) == 3 for candidates in seen)
