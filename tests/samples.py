"""Samples of a benchmark, made up."""

from space_cli.bench.record import Sample


def sample(task="1", method="ar", **changes):
    """One answer of four tokens in a second, but for what is given."""
    fields = {
        "suite": "s", "task_id": task, "method": method, "prompt_tokens": 1, "tokens": 4, "steps": 4, "seconds": 1.0,
        "first_step_seconds": 0.1, "token_ids": [], "text": "", "tokens_by_step": [1, 1, 1, 1], "finish_reason": "eos",
        "repetitive": False,
    }  # fmt: skip
    return Sample(**fields | changes)
