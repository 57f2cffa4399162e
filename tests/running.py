"""The command `space`, in this process or in one of its own."""

import contextlib
import gc
import logging
import os
import subprocess
import sys
import tempfile
from unittest import mock

_LIBRARIES = ("accelerate", "datasets", "huggingface_hub", "peft", "transformers")


def apart(arguments, *, env, cwd, stdin=b""):
    """Run it in an interpreter of its own; return the process with its text."""
    command = [sys.executable, "-m", "space_cli", *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, env=env, cwd=cwd, timeout=300, check=False)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def here(arguments, *, env, cwd, stdin=b""):
    """Run it in this process as if it had one of its own, but for what libraries read when they are imported."""
    from space_cli.cli.app import run

    words = [os.fsdecode(part if isinstance(part, bytes) else str(part)) for part in arguments]
    with contextlib.ExitStack() as stack:
        inputs, out, err = (stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(3))
        inputs.buffer.write(stdin)
        inputs.seek(0)
        for name, value in {"stdin": inputs, "stdout": out, "stderr": err, "argv": ["space", *words]}.items():
            stack.enter_context(mock.patch.object(sys, name, value))
        stack.enter_context(mock.patch.dict(os.environ, env, clear=True))
        stack.enter_context(contextlib.chdir(cwd))
        stack.enter_context(_loggers_as_they_start(err))
        stack.callback(gc.unfreeze)
        code = run(words)
        return subprocess.CompletedProcess(words, code, _written(out), _written(err))


def refusal(done):
    """Return the one line of a command that refused what it was given."""
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 1), done
    return lines[0]


def _written(stream):
    stream.flush()
    stream.seek(0)
    return stream.read()


@contextlib.contextmanager
def _loggers_as_they_start(err):
    """Let the libraries' notes go to the command's standard error, at the level they have in a new process."""
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    levels = [logger.level for logger in loggers]
    last_resort = logging.lastResort.level
    for handler in _writing(loggers):
        handler.stream = err
    # what pytest hangs on the root logger would keep the handler of last resort from writing
    with mock.patch.object(logging.root, "handlers", []):
        try:
            yield
        finally:
            logging.lastResort.setLevel(last_resort)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            for handler in _writing(loggers):  # those too of a library that was imported meanwhile
                handler.stream = sys.__stderr__


def _writing(loggers):
    return [handler for logger in loggers for handler in logger.handlers if type(handler) is logging.StreamHandler]
