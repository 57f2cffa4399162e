import os
import stat

import pytest

from space_cli.models import texts
from space_cli.models.loading import load_model
from space_cli.models.texts import PastAnswers, answers_file


@pytest.fixture(scope="module")
def tokenizer():
    return load_model("nano").tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "user_cache_path", lambda _: tmp_path / "cache")
    return tmp_path / "cache" / "text"


def test_answers_are_found_again_by_this_process_and_by_the_next(tokenizer):
    file = answers_file(tokenizer, "{}")
    answers = PastAnswers(file)
    assert answers.lookup([1, 2, 3]) == []
    answers.add([1, 2, 3, 4, 5])
    answers.add([7, 8, 9])

    for known in (answers, PastAnswers(file)):
        assert known.lookup([0, 2, 3])[0].tokens == [4, 5]
        assert known.lookup([3, 7])[0].tokens == [8, 9]
        assert not known.lookup([0, 2, 3])[0].is_context


def test_answers_can_be_read_by_their_owner_alone(tokenizer, cache):
    file = answers_file(tokenizer, "{}")
    PastAnswers(file).add([1, 2, 3])

    assert (stat.S_IMODE(cache.stat().st_mode), stat.S_IMODE(file.stat().st_mode)) == (0o700, 0o600)


def test_a_cache_folder_that_cannot_be_made_keeps_nothing_and_stops_nothing(tokenizer, tmp_path):
    (tmp_path / "cache").write_text("a file in its place")

    answers = PastAnswers(answers_file(tokenizer, "{}"))
    answers.add([1, 2, 3, 4])

    assert answers.lookup([1, 2])[0].tokens == [3, 4]


def test_a_file_that_others_could_have_written_or_that_is_not_ours_is_left_alone(tokenizer, tmp_path):
    file = answers_file(tokenizer, "{}")
    PastAnswers(file).add([1, 2, 3])
    file.chmod(0o666)
    assert PastAnswers(file).lookup([1, 2]) == []

    file.chmod(0o600)
    assert PastAnswers(file, vocabulary=4).lookup([1, 2]) != []
    assert PastAnswers(file, vocabulary=3).lookup([1, 2]) == []

    link = tmp_path / "link.i32"
    link.symlink_to(file)
    linked = PastAnswers(link)
    linked.add([4, 5, 6])
    assert linked.lookup([1, 2]) == []
    assert PastAnswers(file).lookup([4, 5]) == []


def test_another_model_has_other_answers(tokenizer):
    assert answers_file(tokenizer, "a") != answers_file(tokenizer, "b")


def test_the_newest_answers_stay_where_there_are_too_many(tokenizer, monkeypatch):
    monkeypatch.setattr(texts, "MAX_TOKENS", 100)
    monkeypatch.setattr(texts, "_UNSORTED", 30)
    file = answers_file(tokenizer, "{}")
    answers = PastAnswers(file)
    for number in range(0, 1000, 10):
        answers.add([number, number + 1, number + 2])

    for known in (answers, PastAnswers(file)):
        assert known.lookup([990, 991])[0].tokens == [992]
        assert known.lookup([0, 1]) == []
    assert os.path.getsize(file) <= 4 * 2 * 100 + 16


def test_a_full_disk_costs_nothing_but_the_memory(tokenizer, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(texts, "_append_own", full)
    answers = PastAnswers(answers_file(tokenizer, "{}"))
    answers.add([1, 2, 3])

    assert answers.lookup([1, 2])[0].tokens == [3]
