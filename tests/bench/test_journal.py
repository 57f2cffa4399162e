import json

import pytest
from samples import sample

from space_cli.bench.journal import Journal, journal_of
from space_cli.errors import RunFailed, UsageProblem

RUN = {"model": "nano", "sampling": {"temperature": 0.0}, "threads": 2}


def written(file, *groups):
    with Journal(file, RUN) as journal:
        for group in groups:
            journal.add(group)
    return journal


def test_what_a_run_left_is_taken_up_and_added_to(tmp_path):
    file = tmp_path / "run.json"
    written(file, [sample("1"), sample("1", "space")])

    again = Journal(file, RUN)
    again.resume()
    with again:
        again.add([sample("2")])
    last = Journal(file, RUN)
    last.resume()

    assert [(each.task_id, each.method) for each in last.samples] == [("1", "ar"), ("1", "space"), ("2", "ar")]
    last.finish()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_line_that_a_crash_cut_off_is_dropped_and_the_rest_kept(tmp_path, cut):
    file = tmp_path / "run.json"
    left = written(file, [sample("1")], [sample("2")]).file
    left.write_bytes(left.read_bytes()[:-cut])

    again = Journal(file, RUN)
    again.resume()
    with again:
        again.add([sample("3")])
    last = Journal(file, RUN)
    last.resume()

    assert [each.task_id for each in last.samples] == ["1", "3"]


def test_a_run_cut_off_before_its_first_line_ended_begins_anew(tmp_path):
    file = tmp_path / "run.json"
    journal_of(file).write_text('{"model": "na')

    journal = Journal(file, RUN)
    journal.resume()
    with journal:
        journal.add([sample("1")])

    assert json.loads(journal.file.read_text().splitlines()[0]) == RUN


def test_another_run_is_not_taken_for_this_one(tmp_path):
    file = tmp_path / "run.json"
    written(file, [sample("1")])

    with pytest.raises(UsageProblem, match=r"run\.json\.partial is of a run with other sampling, threads"):
        Journal(file, RUN | {"threads": 4, "sampling": {"temperature": 1.0}}).resume()


@pytest.mark.parametrize("content", ["[]\n", "7\n", "oops\n", json.dumps(RUN) + '\n[{"suite": 1}]\n', "\xff\n"])
def test_a_file_that_is_no_journal_is_reported(tmp_path, content):
    journal_of(tmp_path / "run.json").write_text(content, "latin-1")

    with pytest.raises(UsageProblem, match="not what an interrupted run left; delete it"):
        Journal(tmp_path / "run.json", RUN).resume()


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "run.json", RUN)

    def full(_):
        raise OSError(28, "No space left on device")

    with journal:
        monkeypatch.setattr("space_cli.bench.journal.os.fsync", full)

        with pytest.raises(RunFailed, match=r"run\.json\.partial: could not be written: No space left"):
            journal.add([sample("1")])
