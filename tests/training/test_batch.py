"""Answers in batches are those that `generate` gives to one prompt at a time."""

import pytest
import torch
from tiny import lively, more_tiny_configs, tiny_configs

from space_cli.training.batch import Request, answer_in_batches

CONFIGS = tiny_configs() | {name: more_tiny_configs()[name] for name in ("Falcon", "Gemma2", "Cohere2", "Olmoe")}
PROMPTS = [(5, 9, 2), (7,), (11, 12, 13, 14, 15, 16, 17, 18), (3, 3, 3, 3), (200, 100), (40, 41, 42, 43, 44)]


def make(family):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32)
    return lively(model, 0.2 if family in tiny_configs() else 0.8)


def answers(model, requests, *, rows, ends=frozenset()):
    found = dict(answer_in_batches(model, requests, rows=rows, eos_token_ids=ends))
    return [found[number] for number in range(len(requests))]


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_answers_are_those_of_generate(family):
    model = make(family)
    lengths = [6, 9, 3, 12, 5, 7]
    requests = [Request(prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=True)]

    found = answers(model, requests, rows=3)

    for prompt, length, answer in zip(PROMPTS, lengths, found, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, eos_token_id=None
        )
        assert answer == expected[0, len(prompt) :].tolist()


def test_an_answer_ends_with_the_closing_token_and_makes_room():
    model = make("llama")
    endless = answers(model, [Request(prompt, 20) for prompt in PROMPTS], rows=2)
    end = endless[0][4]

    found = answers(model, [Request(prompt, 20) for prompt in PROMPTS], rows=2, ends=frozenset([end]))

    for short, long in zip(found, endless, strict=True):
        assert short == (long[: long.index(end) + 1] if end in long else long)


def test_a_sampled_answer_depends_on_its_own_seed_alone():
    model = make("llama")
    requests = [Request(prompt, 12, 1.0, seed) for seed, prompt in enumerate(PROMPTS)]

    together, apart = answers(model, requests, rows=4), answers(model, requests, rows=1)
    others = answers(model, [Request(each.prompt_ids, 12, 1.0, each.seed + 100) for each in requests], rows=4)

    assert together == apart
    assert together != others
    assert len(set(map(tuple, together))) == len(together)
