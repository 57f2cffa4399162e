import json

import pytest
import torch
from oracles import hf_greedy

from space_cli.core.block import AR_BLOCK, Block
from space_cli.core.decoder import decode
from space_cli.core.drafting import ChainDrafter
from space_cli.core.sampling import Sampler, Sampling
from space_cli.core.stopping import StopRule
from space_cli.core.stream import Generation
from space_cli.models.loading import load_model
from space_cli.tasks.suites import load_suite

PROBLEMS = load_suite("humaneval").prompts[:6]


@pytest.fixture(scope="module")
def nano():
    torch.set_num_threads(1)
    return load_model("nano", dtype="float32")


def answer(nano, prompt, block, *, sampling=None, tokens=48):
    steps = decode(
        nano.model,
        nano.encode(prompt),
        stop=StopRule(tokens),
        sampler=Sampler.from_sampling(sampling or Sampling()),
        drafts=ChainDrafter(block),
        mask_token_ids=nano.mask_token_ids,
    )
    return Generation(list(steps))


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.task_id)
def test_space_equals_ar_and_transformers(nano, problem):
    block = Block.chain(nano.candidates, nano.masks_per_group)

    space = answer(nano, problem.turns[0], block)

    assert space.tokens == answer(nano, problem.turns[0], AR_BLOCK).tokens
    assert space.tokens == hf_greedy(nano.model, nano.encode(problem.turns[0]), 48)


def test_sampled_space_equals_sampled_ar(nano):
    block, sampling = Block.chain(nano.candidates, nano.masks_per_group), Sampling(0.8, seed=5)

    outputs = [answer(nano, PROBLEMS[0].turns[0], shape, sampling=sampling).tokens for shape in (block, AR_BLOCK)]

    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("options", [(), ("--numerics", "same-shape"), ("--temperature", "0.8", "--draws", "100")])
def test_bfloat16_is_lossless_and_exact_where_the_kernels_are(run_space, options):
    done = run_space(
        "verify-lossless", "--model", "nano", "--dtype", "bfloat16", "--limit", "4", "-q", "--json", "-", *options
    )

    record = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    # the command says of this machine whether a token has the same bits alone and in a block; then texts never part
    exact = record["kernels"]["bit_equal"] == record["kernels"]["positions"]
    parted = {divergence["prompt"] for divergence in record["divergences"]}
    assert record["lossless"]
    assert record["identical"] == record["prompts"] - len(parted) == 4 - len(parted)
    assert not (exact and parted)


def test_masks_have_learned_to_guess(nano):
    """Guards the shipped weights: untrained masks bring 1.0 token per step."""
    block = Block.chain(nano.candidates, nano.masks_per_group)

    generations = [answer(nano, problem.turns[0], block) for problem in PROBLEMS]

    tokens, steps = (sum(map(len, parts)) for parts in zip(*((g.tokens, g.steps) for g in generations), strict=True))
    assert tokens / steps > 1.3


def test_every_humaneval_prompt_fits(nano):
    longest = max(len(nano.encode(prompt.turns[0])) for prompt in load_suite("humaneval").prompts)

    assert longest + 256 <= nano.context_length


def test_weights_are_small_and_hold_no_code(nano):
    from pathlib import Path

    files = list(Path(nano.source).iterdir())

    assert {file.suffix for file in files} <= {".json", ".safetensors", ".jinja"}
    assert sum(file.stat().st_size for file in files) < 60_000_000
