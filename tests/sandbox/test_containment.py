import json

import pytest

from space_cli.errors import RunFailed
from space_cli.sandbox import contained as sandbox
from space_cli.sandbox.contained import run_submission, unsupported_reason

PROBLEM = unsupported_reason()
contained = pytest.mark.skipif(PROBLEM is not None, reason=f"programs are refused here: {PROBLEM}")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Return a function that puts a script in the place of the one that contains programs."""

    def put(script):
        child = tmp_path / "child.py"
        child.write_text(script)
        monkeypatch.setattr(sandbox, "_CHILD", child)
        sandbox.containment.cache_clear()

    yield put
    sandbox.containment.cache_clear()


@contained
def test_all_probes_are_refused_where_programs_are_run():
    found = sandbox.containment()

    assert found.problem is None
    assert found.refused == ("reading", "writing", "file rights", "network", "processes", "signals")


def test_programs_are_refused_where_they_cannot_be_contained(stand_in):
    stand_in("import os\nos.write(1, b'-Function not implemented')\n")

    with pytest.raises(RunFailed, match="cannot be contained here: Function not implemented"):
        run_submission("pass")
    assert unsupported_reason() == "generated code cannot be contained here: Function not implemented"
    assert sandbox.containment().refused == ()


def test_programs_are_refused_where_something_gets_through(stand_in):
    stand_in("import os\nos.write(1, b'+AssertionError')\n")

    assert unsupported_reason().startswith("generated code is not contained here: reading, writing")


def test_programs_are_refused_where_python_does_not_start(stand_in):
    stand_in("raise SystemExit(1)")

    with pytest.raises(RunFailed, match="cannot be contained here: Python did not start"):
        run_submission("pass")


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_programs_are_refused_outside_linux(monkeypatch, system):
    monkeypatch.setattr(sandbox.sys, "platform", system)

    with pytest.raises(RunFailed, match="on Linux alone"):
        run_submission("pass")


@contained
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        ("import platform; platform.machine = lambda: 'riscv64'", "riscv64"),
        ("child._LANDLOCK_CREATE = 100_000", "Function not implemented"),
        ("child._PR_SET_SECCOMP = 100_000", "Invalid argument"),
        ("import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()", "started a thread"),
    ],
)
def test_a_missing_part_of_the_containment_ends_the_process_before_the_program(stand_in, break_it, message):
    folder = json.dumps(str(sandbox._CHILD.parent))
    stand_in(f"import sys\nsys.path.insert(0, {folder})\nimport child\n{break_it}\nchild.main()\n")

    with pytest.raises(RunFailed, match=message):
        run_submission("pass")
