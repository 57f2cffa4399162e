import os
import stat
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from space_cli.errors import UsageProblem
from space_cli.models import corpora, texts
from space_cli.models.corpora import read_corpus
from space_cli.models.loading import load_model


@pytest.fixture(scope="module")
def tokenizer():
    return load_model("nano").tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("home") / "cache"
    monkeypatch.setattr(texts, "user_cache_path", lambda _: folder)
    return folder / "text"


def write(folder, contents):
    for name, content in contents.items():
        (folder / name).write_text(content)


def text_of(corpus, tokenizer):
    """Return the texts of a corpus, decoded."""
    ends = np.flatnonzero(corpus.tokens == -1)
    return [tokenizer.decode(row[row >= 0].tolist()) for row in np.split(corpus.tokens, ends + 1)[:-1]]


def test_a_corpus_has_the_text_of_its_files_and_no_other(tokenizer, tmp_path):
    folder = tmp_path / "code"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "a.py").write_text("def area(width, height):\n    return width * height\n")
    (folder / "deep" / "b.py").write_text("def perimeter(width, height):\n    return 2 * (width + height)\n")
    (folder / "binary").write_bytes(b"def hidden(\0")
    (folder / "latin").write_bytes(b"def hidden(\xff")
    (folder / "long").write_bytes(b"def hidden(" * 1000 + b"\0")
    (folder / ".git" / "c.py").write_text("def hidden(width):")
    (folder / "link.py").symlink_to(folder / ".git" / "c.py")

    def continuation(text):
        found = read_corpus(tokenizer, [folder]).lookup(tokenizer(text, add_special_tokens=False)["input_ids"])
        return tokenizer.decode(found[0].tokens) if found else ""

    assert continuation("def area(width,").startswith(" height):\n    return width * height")
    assert continuation("    return 2 *").startswith(" (width + height)")
    assert "hidden" not in tokenizer.decode(read_corpus(tokenizer, [folder]).tokens[:-1].clip(0).tolist())


def test_a_corpus_is_read_once(tokenizer, tmp_path):
    file, seen = tmp_path / "a.txt", []
    file.write_text("one two three four")
    first = read_corpus(tokenizer, [file], lambda *progress: seen.append(progress))
    assert seen[-1] == ("sorting", 1.0)
    assert ("reading", 1.0) in seen

    seen.clear()
    again = read_corpus(tokenizer, [file], lambda *progress: seen.append(progress))

    assert seen == []
    assert np.array_equal(first.tokens, again.tokens)
    assert np.array_equal(first.places, again.places)


def test_only_files_that_have_changed_are_read_again(tokenizer, tmp_path, monkeypatch):
    contents = {"a": "one two", "b": "three four " * 9, "c": "", "d": "five six"}
    write(tmp_path, contents)
    read_corpus(tokenizer, [tmp_path])
    contents |= {"a": "seven eight nine", "e": "ten"}
    del contents["d"]
    (tmp_path / "d").unlink()
    write(tmp_path, {name: contents[name] for name in "ae"})
    read = []
    monkeypatch.setattr(corpora, "_text", lambda name, text=corpora._text: (read.append(name[-1]), text(name))[1])

    found = read_corpus(tokenizer, [tmp_path])

    assert read == ["a", "e"]
    assert text_of(found, tokenizer) == [contents[name] for name in "abe"]


def test_a_file_longer_than_a_piece_stays_one_text(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_PIECE", 10)
    monkeypatch.setattr(corpora, "_BATCH", 3)
    contents = {"a": "some words and some more " * 5, "b": "short"}
    write(tmp_path, contents)

    assert text_of(read_corpus(tokenizer, [tmp_path]), tokenizer) == list(contents.values())


def test_a_tokenizer_without_a_fast_backend_gives_the_same_tokens(tokenizer, tmp_path):
    class Slow:
        def __call__(self, texts, **options):
            return tokenizer(texts, **options)

        def get_vocab(self):
            return tokenizer.get_vocab()

    write(tmp_path, {"a": "def area(width, height):\n    return width * height\n"})

    assert np.array_equal(read_corpus(Slow(), [tmp_path]).tokens, read_corpus(tokenizer, [tmp_path]).tokens)


def test_a_corpus_can_be_read_by_its_owner_alone(tokenizer, tmp_path, cache):
    write(tmp_path, {"a": "one two three"})
    read_corpus(tokenizer, [tmp_path / "a"])

    (folder,) = cache.iterdir()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (cache, folder, *folder.iterdir())] == [0o700] * 2 + [
        0o600
    ] * 3


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_corpus_is_kept_whole_or_not_at_all(tokenizer, tmp_path, cache, monkeypatch, error):
    write(tmp_path, {"a": "one two three", "b": "four"})
    read_corpus(tokenizer, [tmp_path / "a"])
    before = sorted(cache.rglob("*"))
    problems = []

    def full(*_, **__):
        raise error

    with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
        patched.setattr(Path, "rename", full)
        found = read_corpus(tokenizer, [tmp_path / "b"], on_problem=problems.append)
        assert text_of(found, tokenizer) == ["four"]
        assert problems == [f"the sorted --corpus could not be kept in {cache}: No space left on device"]

    assert sorted(cache.rglob("*")) == before


def test_a_kept_corpus_that_was_cut_off_is_made_anew(tokenizer, tmp_path, cache):
    write(tmp_path, {"a": "one two three"})
    first = np.array(read_corpus(tokenizer, [tmp_path / "a"]).tokens)
    for file in list(next(cache.iterdir()).iterdir()):
        os.truncate(file, file.stat().st_size - 4)

        assert np.array_equal(read_corpus(tokenizer, [tmp_path / "a"]).tokens, first)


def test_a_cache_folder_that_cannot_be_made_keeps_nothing_and_stops_nothing(tokenizer, tmp_path, cache):
    cache.parent.write_text("a file in its place")
    write(tmp_path, {"a": "one two three"})
    problems = []

    assert text_of(read_corpus(tokenizer, [tmp_path / "a"], on_problem=problems.append), tokenizer) == ["one two three"]
    assert len(problems) == 1
    assert problems[0].endswith("/cache/text: Not a directory")


def test_files_that_cannot_be_read_are_left_out_and_told(tokenizer, tmp_path, monkeypatch):
    write(tmp_path, {"a": "one", "b": "two", "c": "three"})
    problems = []

    def text(name, known=corpora._text):
        if name[-1] in "bc":
            raise PermissionError(13, "Permission denied", name)
        return known(name)

    with monkeypatch.context() as patched:
        patched.setattr(corpora, "_text", text)
        found = read_corpus(tokenizer, [tmp_path], on_problem=problems.append)
        with pytest.raises(UsageProblem, match=f"--corpus {tmp_path}/b: Permission denied$"):
            read_corpus(tokenizer, [tmp_path / "b"])

    assert text_of(found, tokenizer) == ["one"]
    assert problems == [f"--corpus {tmp_path}/b: Permission denied; left out, with 1 more"]
    assert text_of(read_corpus(tokenizer, [tmp_path]), tokenizer) == ["one", "two", "three"]


def test_links_that_run_in_circles_are_not_followed(tokenizer, tmp_path):
    folder = tmp_path / "code"
    folder.mkdir()
    write(folder, {"a": "one two"})
    (folder / "loop").symlink_to(folder)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "link").symlink_to(folder)

    assert text_of(read_corpus(tokenizer, [tmp_path / "link", folder]), tokenizer) == ["one two"]
    with pytest.raises(UsageProblem, match="self: no such file or folder"):
        read_corpus(tokenizer, [tmp_path / "self"])


def test_corpora_used_long_ago_make_room(tokenizer, tmp_path, cache):
    for number in range(12):
        write(tmp_path, {f"{number}.txt": f"text number {number}"})
        read_corpus(tokenizer, [tmp_path / f"{number}.txt"])

    assert len(list(cache.glob("corpus-*"))) == 8


@pytest.mark.parametrize(
    ("name", "why"), [("absent", "no such file or folder"), ("empty.txt", "no text in it"), ("empty", "no text in it")]
)
def test_what_has_no_text_is_refused(tokenizer, tmp_path, name, why):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty").mkdir()

    with pytest.raises(UsageProblem, match=f"--corpus .*{name}: {why}"):
        read_corpus(tokenizer, [tmp_path / name])
