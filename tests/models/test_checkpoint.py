import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space_cli.errors import UsageProblem
from space_cli.models.checkpoint import SpaceConfig

FIELDS = {"format": 1, "method": "full", "mask_token_ids": [9], "candidates": 3, "masks_per_group": 3}


@given(st.integers(1, 9), st.booleans(), st.dictionaries(st.text(max_size=5), st.floats(0, 1), max_size=3))
def test_what_is_saved_is_loaded(tmp_path_factory, masks, distinct, acceptance):
    folder = tmp_path_factory.mktemp("checkpoint")
    config = SpaceConfig(
        method="adapter",
        mask_token_ids=list(range(masks)) if distinct else [5],
        candidates=masks,
        masks_per_group=masks,
        base_model="org/base",
        acceptance=acceptance,
    )

    config.save(folder)

    assert SpaceConfig.load(folder) == config
    assert [file.name for file in folder.iterdir()] == ["space_config.json"]


@pytest.mark.parametrize(
    ("acceptance", "known"),
    [
        ({}, []),
        ({"suite": 3.0, "after": {"tokens": 7}}, []),
        ({"before": {"accepted_by_depth": []}, "after": {"accepted_by_depth": [0.5, 0.25]}}, [0.5, 0.25]),
        ({"after": {"accepted_by_depth": "many"}}, []),
        ({"after": {"accepted_by_depth": [0.5, "few", 7, -1]}}, [0.5]),
    ],
)
def test_what_was_accepted_before_is_read_where_it_is_known(acceptance, known):
    assert SpaceConfig(**FIELDS, acceptance=acceptance).accepted_by_depth == known


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": 2}, "format: Input should be 1"),
        ({"method": "half"}, "method: Input should be"),
        ({"mask_token_ids": []}, "mask_token_ids: List should have at least 1"),
        ({"mask_token_ids": [1, 2]}, "needs 1 or 3 ids, not 2"),
        ({"candidates": 0}, "candidates: Input should be greater"),
        ({"surprise": 1}, "surprise: Extra inputs"),
    ],
)
def test_a_malformed_config_is_reported_with_its_key(tmp_path, changed, message):
    (tmp_path / "space_config.json").write_text(json.dumps(FIELDS | changed))

    with pytest.raises(UsageProblem, match=message):
        SpaceConfig.load(tmp_path)


def test_a_config_that_is_no_json_is_reported(tmp_path):
    (tmp_path / "space_config.json").write_text("{")

    with pytest.raises(UsageProblem, match=r"space_config\.json: the file: Invalid JSON"):
        SpaceConfig.load(tmp_path)
