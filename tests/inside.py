"""The command run inside the test's own process, which spares importing torch once more for each call."""

import io
import os
import sys
from types import SimpleNamespace

import pytest


@pytest.fixture
def space(clean_env, tmp_path, monkeypatch, capfdbinary):
    """Run `space` with arguments that may be any bytes and something piped in, in an empty folder."""
    from space_cli.cli import app

    def run(*arguments, text=b"", **env):
        told = [os.fsdecode(part if isinstance(part, bytes) else str(part)) for part in arguments]
        with monkeypatch.context() as patch:
            for name, value in (clean_env | env).items():
                patch.setenv(name, value)
            patch.chdir(tmp_path)
            patch.setattr(sys, "argv", ["space", *told])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
            code = app.run(told)
        out, err = capfdbinary.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run


def told(done):
    """Return the one line of a command that refused what it was given."""
    lines = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (2, b"", 1), done
    return lines[0]
