import os
import stat

import numpy as np
import pytest

from space_cli.errors import UsageProblem
from space_cli.models import texts
from space_cli.models.loading import load_model
from space_cli.models.texts import PastAnswers, answers_file, read_corpus


@pytest.fixture(scope="module")
def tokenizer():
    return load_model("nano").tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "user_cache_path", lambda _: tmp_path / "cache")
    return tmp_path / "cache" / "text"


def modes(folder):
    return {stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")] if path.is_dir()}, {
        stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()
    }


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


def test_what_is_kept_can_be_read_by_its_owner_alone(tokenizer, cache, tmp_path):
    (tmp_path / "notes.txt").write_text("one two three")
    PastAnswers(answers_file(tokenizer, "{}")).add([1, 2, 3])
    read_corpus(tokenizer, [tmp_path / "notes.txt"])

    assert modes(cache) == ({0o700}, {0o600})


def test_a_cache_folder_that_cannot_be_made_keeps_nothing_and_stops_nothing(tokenizer, tmp_path):
    (tmp_path / "cache").write_text("a file in its place")
    (tmp_path / "notes.txt").write_text("one two three")

    answers = PastAnswers(answers_file(tokenizer, "{}"))
    answers.add([1, 2, 3, 4])
    corpus = read_corpus(tokenizer, [tmp_path / "notes.txt"])

    assert answers.lookup([1, 2])[0].tokens == [3, 4]
    assert len(corpus.tokens)


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


def test_a_corpus_has_the_text_of_its_files_and_no_other(tokenizer, tmp_path):
    folder = tmp_path / "code"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "a.py").write_text("def area(width, height):\n    return width * height\n")
    (folder / "deep" / "b.py").write_text("def perimeter(width, height):\n    return 2 * (width + height)\n")
    (folder / "binary").write_bytes(b"def hidden(\0")
    (folder / "latin").write_bytes(b"def hidden(\xff")
    (folder / ".git" / "c.py").write_text("def hidden(width):")
    (folder / "link.py").symlink_to(folder / ".git" / "c.py")

    def continuation(text):
        found = read_corpus(tokenizer, [folder]).lookup(tokenizer(text, add_special_tokens=False)["input_ids"])
        return tokenizer.decode(found[0].tokens) if found else ""

    assert continuation("def area(width,").startswith(" height):\n    return width * height")
    assert continuation("    return 2 *").startswith(" (width + height)")
    assert "hidden" not in tokenizer.decode(read_corpus(tokenizer, [folder]).tokens[:-1].clip(0).tolist())


def test_a_corpus_is_read_once_and_again_when_a_file_has_changed(tokenizer, tmp_path):
    file, seen = tmp_path / "a.txt", []
    file.write_text("one two three four")
    first = read_corpus(tokenizer, [file], lambda *progress: seen.append(progress))
    assert seen[-1] == ("sorting", 1.0)
    assert ("reading", 1.0) in seen

    seen.clear()
    again = read_corpus(tokenizer, [file], lambda *progress: seen.append(progress))
    assert seen == []
    assert np.array_equal(first.tokens, again.tokens)

    file.write_text("five six seven eight nine")
    assert len(read_corpus(tokenizer, [file]).tokens) != len(first.tokens)


def test_corpora_used_long_ago_make_room(tokenizer, tmp_path, cache):
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(f"text number {number}")
        read_corpus(tokenizer, [tmp_path / f"{number}.txt"])

    assert len(list(cache.glob("corpus-*"))) == 8


@pytest.mark.parametrize(("name", "why"), [("absent", "no such file or folder"), ("empty.txt", "no text in it")])
def test_what_has_no_text_is_refused(tokenizer, tmp_path, name, why):
    (tmp_path / "empty.txt").write_text("")

    with pytest.raises(UsageProblem, match=f"--corpus .*{name}: {why}"):
        read_corpus(tokenizer, [tmp_path / name])
