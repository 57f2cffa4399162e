import os
import sys
from threading import Thread

import pytest

from space_cli.files import atomic_write


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    file = tmp_path / "run.json"
    file.write_text("old")

    atomic_write(file, "new")

    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")
def test_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)

    atomic_write(link, "new")

    assert link.is_symlink()
    assert target.read_text() == "new"


@pytest.mark.skipif(sys.platform == "win32", reason="needs named pipes")
def test_a_pipe_or_device_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()

    atomic_write(pipe, "text")

    reader.join(timeout=10)
    assert read == ["text"]
    assert pipe.is_fifo()
