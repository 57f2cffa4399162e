from tiny import tiny_model

from space_cli.core.stopping import StopRule
from space_cli.training.acceptance import measure_acceptance


def test_time_ends_a_measurement_but_not_before_a_prompt_was_answered():
    seen = []

    found = measure_acceptance(
        tiny_model(),
        [[3, 5, 7], [11, 13], [17]],
        mask_token_ids=[],
        candidates=0,
        stop=StopRule(4, frozenset()),
        seconds=0,
        on_progress=lambda done, total: seen.append((done, total)),
    )

    assert found.prompts == 1
    assert found.tokens == found.steps == 4
    assert seen == [(1, 3), (3, 3)]
