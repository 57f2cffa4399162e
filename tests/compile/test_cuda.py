"""The engine of CUDA graphs on a CPU: the same code, its graphs off and its attention in plain PyTorch."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import hf_greedy, mask_by_definition
from strategies import blocks
from tiny import MASK_IDS, more_tiny_configs, tiny_configs
from transformers import AutoModelForCausalLM

from space_cli.compile.cuda import SIZES, TILES, CudaGraphModel, _ancestry, rows_of, unsupported_reason
from space_cli.compile.cuda_attention import BlockTensors, attend_plainly
from space_cli.compile.cuda_engine import GraphEngine
from space_cli.core.block import Block
from space_cli.core.cache import KVCache
from space_cli.core.costs import ASSUMED_COSTS
from space_cli.core.decoder import decode
from space_cli.core.drafting import AcceptanceStats, AdaptiveDrafter, ChainDrafter
from space_cli.core.engine import EagerEngine, engine_for
from space_cli.core.sampling import TOP_K, Sampler, Sampling
from space_cli.core.stopping import StopRule
from space_cli.errors import RunFailed
from space_cli.models.adapter import attach_adapter, low_rank

PROMPT = [17, 3, 250, 44, 91, 8]


@pytest.fixture(scope="module")
def model(tiny_models):
    return tiny_models["llama"]


@pytest.fixture(scope="module")
def program(model):
    return CudaGraphModel(model)


def generate(model, program, *, prompt=PROMPT, drafts=None, sampling=None, tokens=40, masks=MASK_IDS, **arguments):
    steps = decode(
        model,
        prompt,
        stop=StopRule(tokens),
        sampler=Sampler.from_sampling(sampling or Sampling()),
        mask_token_ids=masks,
        drafts=drafts,
        compiled=program,
        **arguments,
    )
    return [token for step in steps for token in step.tokens]


def test_a_program_is_run_by_its_engine(model, program):
    assert isinstance(engine_for(model, program, max_length=9, max_slots=1), GraphEngine)


@settings(max_examples=20)
@given(block=blocks(), length=st.integers(0, 150), numerics=st.sampled_from(["plain", "invariant"]))
def test_a_step_computes_what_the_model_computes(model, program, block, length, numerics):
    prefix = [(5 * index) % 299 for index in range(length)]
    arguments = {"max_length": 200, "max_slots": block.num_slots}
    engines = [
        EagerEngine(model, **arguments),
        GraphEngine(model, program, numerics=numerics, **arguments),
    ]
    with torch.inference_mode():
        for engine in engines:
            engine.prefill(prefix)
        eager, found = (engine.run(block, list(range(block.num_slots))) for engine in engines)

    assert engines[0].length == engines[1].length == length + block.num_slots
    assert (eager - found).abs().max() <= 1e-4 * eager.std()


@given(block=blocks(max_candidates=9), spare=st.integers(0, 9))
def test_ancestors_are_those_of_the_mask_in_the_order_of_the_text(block, spare):
    rows = block.num_slots + spare
    depths, ancestors = _ancestry(block, rows)
    seen = mask_by_definition(block, 0)[0, 0]

    for slot, path in enumerate(ancestors.reshape(rows, rows)[: block.num_slots]):
        known = [ancestor for ancestor in path if ancestor >= 0]
        assert sorted(known) == torch.nonzero(seen[slot])[:, 0].tolist()
        assert [block.offsets[ancestor] for ancestor in known] == list(range(depths[slot] + 1))
    for slot, path in enumerate(ancestors.reshape(rows, rows)[block.num_slots :], start=block.num_slots):
        assert (depths[slot], path[0], set(path[1:])) == (-1, slot, {-1})


@settings(max_examples=10)
@given(
    block=blocks(max_masks=3),
    sampling=st.sampled_from([Sampling(), Sampling(0.9, seed=2), Sampling(0.7, top_k=9, seed=4)]),
)
def test_space_equals_ar_and_the_eager_engine(model, program, block, sampling):
    drafted = generate(model, program, drafts=ChainDrafter(block), sampling=sampling)

    assert drafted == generate(model, program, sampling=sampling) == generate(model, None, sampling=sampling)


@pytest.mark.parametrize("family", sorted(tiny_configs()))
def test_every_family_gives_what_generate_gives(tiny_models, family):
    model = tiny_models[family]
    if unsupported_reason(model) is not None:
        pytest.skip(unsupported_reason(model))
    drafts = AdaptiveDrafter(AcceptanceStats(ASSUMED_COSTS, 3), 3)

    assert generate(model, CudaGraphModel(model), drafts=drafts) == hf_greedy(model, PROMPT, 40)


def test_branches_that_were_accepted_are_moved_in_all_layers_at_once(model, program):
    tree = Block.tree([0, 0, 2], 1)
    right = generate(model, None, tokens=30)
    turns = iter(range(1000))

    def second_branch(tokens, _):
        done = len(tokens) - len(PROMPT)
        following = [*right[done : done + 2], 0, 0][:2]
        # the first branch is wrong; now and then so is the second one
        return [(following[0] + 1) % 299, following[0] + (next(turns) % 5 == 4), following[1]]

    steps = list(
        decode(
            model,
            PROMPT,
            stop=StopRule(30),
            sampler=Sampler(),
            mask_token_ids=MASK_IDS,
            drafts=ChainDrafter(tree, second_branch),
            compiled=program,
        )
    )

    assert [token for step in steps for token in step.tokens] == right
    assert {step.accepted for step in steps[:-1]} == {0, 2}


def test_the_most_probable_tokens_are_the_first_of_equal_ones_with_their_probabilities(model, program):
    own = model.lm_head.weight.data
    # three tokens with the largest logit, or the smallest
    model.lm_head.weight.data = torch.cat(
        [own[:5], own[5:6] * 9, own[6:7], own[5:6] * 9, own[8:9], own[5:6] * 9, own[10:]]
    )
    try:
        with torch.inference_mode():
            engine = GraphEngine(model, program, max_length=30, max_slots=6)
            engine.prefill([1, 2])
            logits = engine.run(Block.chain(5, 0), [5, 9, 7, 1, 2, 3])
    finally:
        model.lm_head.weight.data = own
    tokens, probs = engine.top_k

    assert tokens.shape == probs.shape == (6, TOP_K)
    assert torch.equal(tokens[:, 0], logits.argmax(dim=-1))
    assert torch.allclose(probs, logits.softmax(dim=-1).topk(TOP_K).values, atol=1e-6)
    assert any(row[:3] == [5, 7, 9] for row in tokens.tolist())


def test_a_longer_text_gets_longer_buffers_and_keeps_what_it_holds(model):
    program, prompt = CudaGraphModel(model), PROMPT
    with torch.inference_mode():
        engine = GraphEngine(model, program, max_length=60, max_slots=4)
        engine.prefill(prompt)
        kept = engine.run(Block.chain(3, 0), [1, 2, 3, 4])
        engine.rollback()
        program.lend(engine.cache, 5000)
        again = engine.run(Block.chain(3, 0), [1, 2, 3, 4])

    assert engine.cache.layer(0).keys.shape[2] == 8192
    assert torch.equal(kept, again)


def test_two_texts_in_turn_do_not_disturb_each_other(model, program):
    prompts = [PROMPT, [9, 9, 4, 1, 230]]
    alone = [generate(model, program, prompt=prompt, tokens=20) for prompt in prompts]
    caches = [KVCache(), KVCache()]
    steps = [
        decode(
            model,
            prompt,
            stop=StopRule(20),
            sampler=Sampler(),
            mask_token_ids=MASK_IDS,
            drafts=ChainDrafter(Block.chain(2, 2)),
            compiled=program,
            cache=cache,
        )
        for prompt, cache in zip(prompts, caches, strict=True)
    ]

    found = [[], []]
    for _ in range(20):
        for each, tokens in zip(steps, found, strict=True):
            tokens += [token for step in [next(each, None)] if step for token in step.tokens]

    assert found == alone
    # and what is held serves the next answer, by this engine or the other
    for engine in (program, None):
        longer = [*prompts[0], *alone[0][:10], 7]
        assert generate(model, engine, prompt=longer, tokens=10, cache=caches[0]) == generate(
            model, None, prompt=longer, tokens=10
        )


def test_nothing_of_a_step_stays_on_the_model(model, program):
    before = {name: set(vars(module)) for name, module in model.named_modules()}

    generate(model, program)

    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("slots", "sizes", "rows"),
    [
        (1, TILES, 32),
        (32, TILES, 32),
        (33, TILES, 64),
        (65, TILES, 128),
        (1, SIZES, 1),
        (7, SIZES, 8),
        (81, SIZES, 128),
    ],
)
def test_blocks_are_filled_up_to_few_sizes(slots, sizes, rows):
    assert rows_of(slots, sizes) == rows


def test_a_model_with_an_attention_of_its_own_is_reported_beforehand(model):
    assert unsupported_reason(model) is None
    model.set_attn_implementation("eager")
    try:
        assert unsupported_reason(model) == "its attention is its own"
    finally:
        model.set_attn_implementation("sdpa")


def test_keys_and_values_of_different_widths_are_refused():
    model = AutoModelForCausalLM.from_config(more_tiny_configs()["DeepseekV2"])

    with pytest.raises(RunFailed, match="different shapes"):
        CudaGraphModel(model)


@torch.no_grad()
def test_the_plain_attention_is_a_softmax_over_what_a_row_sees():
    torch.manual_seed(0)
    block, length = Block.tree([0, 0, 2], 2), 9
    rows = block.num_slots
    query, key, value = torch.randn(1, 4, rows, 8), torch.randn(1, 2, rows, 8), torch.randn(1, 2, rows, 8)
    states = torch.randn(2, 2, 40, 8)
    depths, ancestors = (torch.from_numpy(each) for each in _ancestry(block, rows))
    tensors = BlockTensors(torch.tensor([length], dtype=torch.int32), depths, ancestors.view(rows, rows))
    seen = mask_by_definition(block, length)[0, 0]

    found = attend_plainly(query, key, value, states, tensors, 0.3)

    for row in range(rows):
        for head in range(4):
            keys, values = (
                torch.cat([states[kind, head // 2, :length], (key, value)[kind][0, head // 2]]) for kind in (0, 1)
            )
            shares = (keys @ query[0, head, row] * 0.3)[seen[row]].softmax(dim=0)
            assert torch.allclose(found[0, row, head], shares @ values[seen[row]], atol=1e-5)


def test_an_adapter_drafts_in_graphs_and_leaves_the_text_to_its_base(tiny_models):
    base = tiny_models["qwen2"]
    adapted = copy.deepcopy(base)
    ids = attach_adapter(adapted, 3, low_rank(adapted, 4))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.3
    program, block = CudaGraphModel(adapted.eval()), Block.chain(3, 3)
    expected = generate(base, None)

    def drafts():
        seen.clear()
        return ChainDrafter(block, lambda _, candidates: seen.append(list(candidates)) or candidates)

    seen = []
    arguments = {"stop": StopRule(40), "sampler": Sampler(), "mask_token_ids": ids}
    found = [
        token
        for step in decode(adapted, PROMPT, drafts=drafts(), compiled=program, **arguments)
        for token in step.tokens
    ]
    guessed = list(seen)
    eager = [token for step in decode(adapted, PROMPT, drafts=drafts(), **arguments) for token in step.tokens]

    assert generate(adapted, program) == found == eager == expected
    # the masks' own weights are at work
    assert guessed == seen
    assert len({tuple(each) for each in guessed}) > 3
    assert {has_masks for _, has_masks in program._steps} == {True, False}
