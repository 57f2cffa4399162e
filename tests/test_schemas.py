import json

import pytest
from jsonschema import Draft202012Validator
from reports import compared, report
from schemas import FOLDER, RECORDS, schema


@pytest.mark.parametrize("name", RECORDS)
def test_the_documented_schema_is_that_of_the_record(name):
    assert (FOLDER / f"{name}.json").read_text() == schema(name), "run: python tests/schemas.py"


def test_every_documented_schema_has_a_record():
    assert {file.stem for file in FOLDER.iterdir()} == set(RECORDS)


def test_what_a_run_writes_follows_its_schema_and_a_missing_field_does_not():
    check = Draft202012Validator(json.loads((FOLDER / "bench.json").read_text()))
    written = json.loads(report(compared({"space": 2.0})).to_json())

    assert list(check.iter_errors(written)) == []
    del written["samples"][0]["tokens"]
    assert [error.message for error in check.iter_errors(written)] == ["'tokens' is a required property"]
