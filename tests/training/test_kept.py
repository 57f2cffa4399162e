from space_cli.training.kept import keep, kept_rows


def test_a_row_after_an_incomplete_line_is_not_lost(tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    keep(file, {"key": "a", "token_ids": [1]})
    with file.open("a") as stream:
        stream.write('{"key": "b", "tok')

    keep(file, {"key": "c", "token_ids": [2]})

    assert list(kept_rows(file)) == [{"key": "a", "token_ids": [1]}, {"key": "c", "token_ids": [2]}]


def test_without_a_file_there_are_no_rows(tmp_path):
    assert list(kept_rows(tmp_path / "rows.jsonl")) == []
