import os
import subprocess
import sys
import time

import pytest

from space_cli.compile import workplace as workplaces
from space_cli.compile.workplace import tidy, used, workplace
from space_cli.errors import RunFailed

HOUR, MONTH = 3600, 30 * 24 * 3600
COMPILE_FOREVER = """
import sys, time
from pathlib import Path
from space_cli.compile.workplace import workplace
with workplace(Path(sys.argv[1]), 0) as place:
    (place / "half.cpp").touch()
    print(place.name, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def compiling(tmp_path):
    """Start a process that is compiling; return it and its place, an hour old."""
    started = []

    def start():
        command = [sys.executable, "-c", COMPILE_FOREVER, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        place = tmp_path / process.stdout.readline().strip()
        return process, aged(place, HOUR)

    yield start
    for process in started:
        process.kill()
        process.communicate()


def aged(entry, seconds):
    then = time.time() - seconds
    os.utime(entry, (then, then))
    return entry


def made(file, *, age=0, size=1):
    file.write_bytes(bytes(size))
    return aged(file, age)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_what_a_killed_compilation_left_goes_with_the_next_one_and_what_another_works_in_stays(compiling, tmp_path):
    (killed, left), (_, working) = compiling(), compiling()
    killed.kill()
    killed.wait()

    with workplace(tmp_path, 0) as place:
        assert names(tmp_path) == sorted([place.name, working.name])

    assert not left.exists()
    assert names(tmp_path) == [working.name]
    assert names(working) == ["half.cpp"]


def test_places_that_are_not_locked_stay_while_somebody_may_be_compiling_in_them(tmp_path):
    ages = {"compiling-young": 0, "compiling-old": HOUR, "tmp-of-an-earlier-version": HOUR, "tmp-left": 25 * HOUR}
    for name, age in ages.items():
        (tmp_path / name).mkdir()
        aged(tmp_path / name, age)

    tidy(tmp_path)

    assert names(tmp_path) == ["compiling-young", "tmp-of-an-earlier-version"]


def test_without_locks_only_what_is_a_day_old_goes(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError("no locks available")

    monkeypatch.setattr(workplaces, "_lock", refuse)
    with workplace(tmp_path, 0) as place:
        assert place.is_dir()
    for name, age in {"compiling-1": HOUR, "compiling-2": 25 * HOUR}.items():
        (tmp_path / name).mkdir()
        aged(tmp_path / name, age)

    tidy(tmp_path)

    assert names(tmp_path) == ["compiling-1"]


def test_files_that_nobody_used_for_a_month_go_and_what_is_not_ours_stays(tmp_path):
    for name in ("kernels-1.so", "kernels-1.sha256", "program-1.pt2", "speeds-1.json", ".costs-1.json.half", "a.txt"):
        made(tmp_path / name, age=MONTH + HOUR)
    (tmp_path / "mine").mkdir()
    aged(tmp_path / "mine", MONTH + HOUR)
    made(tmp_path / "kernels-2.so", age=MONTH - HOUR)
    used(tmp_path / "program-1.pt2")

    tidy(tmp_path)

    assert names(tmp_path) == ["a.txt", "kernels-2.so", "mine", "program-1.pt2"]


def test_the_folder_is_bounded_and_what_was_used_last_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(workplaces, "MOST_BYTES", 100)
    for age in range(5):
        made(tmp_path / f"program-{age}.pt2", age=age * HOUR, size=40)

    tidy(tmp_path)

    assert names(tmp_path) == ["program-0.pt2", "program-1.pt2"]


def test_without_room_nothing_is_begun(tmp_path):
    wrong = r"MiB are free, compiling needs \d+; make room, or let XDG_CACHE_HOME name"
    with pytest.raises(RunFailed, match=wrong), workplace(tmp_path, 2**60):
        pytest.fail("it was begun")

    assert names(tmp_path) == []


def interrupted_in(place):
    (place / "half.cpp").touch()
    raise KeyboardInterrupt


def test_an_interrupted_compilation_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), workplace(tmp_path, 0) as place:
        interrupted_in(place)

    assert names(tmp_path) == []
