"""Benchmarks that never ran, for what is made of them."""

import samples

from space_cli.bench.record import BenchRecord
from space_cli.bench.results import results

ENVIRONMENT = {
    "space": "0.1.0",
    "dtype": "bfloat16",
    "device": "cpu",
    "engine": "eager",
    "threads": 1,
    # as a record read from JSON has it
    "step_costs": {"seconds": {"1": 0.001, "8": 0.0012, "32": 0.002}, "overhead": 0.0},
}


def sample(method, seconds, **fields):
    """An answer of four tokens, in four steps by ar and hf, in two by others."""
    steps = {"token_ids": [1, 2, 3, 4], "text": "a b c d", "identical": True, "first_step_seconds": seconds / 4}
    if method in ("ar", "hf"):
        steps |= {"text_by_step": ["a", " b", " c", " d"], "rejected_by_step": [[], [], [], []]}
    else:
        steps |= {"steps": 2, "tokens_by_step": [3, 1], "depth_by_step": [3, 3]}
        steps |= {"text_by_step": ["a b c", " d"], "rejected_by_step": [["x"], []]}
    return samples.sample(method=method, seconds=seconds, **{"suite": "humaneval"} | steps | fields)


def report(answers, *, metrics=None, **settings):
    own = {"model": "nano", "sampling": {"temperature": 0.0, "seed": 0}, "max_new_tokens": 4, "candidates": None}
    methods = list(dict.fromkeys(each.method for each in answers))
    return BenchRecord(
        complete=True,
        environment=ENVIRONMENT,
        settings=own | settings,
        samples=answers,
        results=results(answers, methods, metrics),
    )


def compared(speedups, *, suite="humaneval", prompts=6, repetitive=0, **fields):
    """Answers of ar and of methods that are that many times as fast, the same on every prompt."""
    return [
        sample(method, 1 / speed, suite=suite, task_id=f"{suite}/{n}", repetitive=n < repetitive, **fields)
        for n in range(prompts)
        for method, speed in {"ar": 1.0, **speedups}.items()
    ]
