"""A terminal for tests: a program on a pty, its screen as a person would see it."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time

import pyte

_CURSOR_ASKED = b"\x1b[6n"


class Terminal:
    """Run a program; `screen` is what stands there now, `raw` every byte it has written."""

    def __init__(self, command, *, env, cwd, columns=80, rows=24):
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""
        self._fd, program_side = pty.openpty()
        self.resize(columns, rows)
        self._process = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=program_side,
            stdout=program_side,
            stderr=program_side,
            start_new_session=True,
            preexec_fn=_heed_ctrl_c,
        )
        os.close(program_side)

    def resize(self, columns, rows):
        self._screen.resize(rows, columns)
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    @property
    def screen(self):
        return "\n".join(line.rstrip() for line in self._screen.display)

    def type(self, text):
        os.write(self._fd, text.encode())

    def interrupt(self):
        os.write(self._fd, b"\x03")

    def until(self, text, *, seconds=60):
        """Wait until a text, or a regular expression's match, stands on the screen; return the screen."""
        end = time.monotonic() + seconds
        while not (re.search(text, self.screen) if isinstance(text, str) else text(self.screen)):
            if time.monotonic() > end or not self._read(0.2):
                raise AssertionError(f"{text!r} never came; the screen is\n{self.screen}")
        return self.screen

    def finish(self, *, seconds=30):
        """Wait for the program's end; return its exit code."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._read(0.2):
            pass
        return self._process.wait(timeout=seconds)

    def kill(self):
        self._process.kill()
        self._process.wait()
        os.close(self._fd)

    def _read(self, seconds):
        """Take what comes; False once the program has gone."""
        ready, _, _ = select.select([self._fd], [], [], seconds)
        if not ready:
            return True
        try:
            chunk = os.read(self._fd, 65536)
        except OSError:
            return False
        if not chunk:
            return False
        self.raw += chunk
        for part in re.split(b"(" + re.escape(_CURSOR_ASKED) + b")", chunk):
            if part == _CURSOR_ASKED:
                os.write(self._fd, f"\x1b[{self._screen.cursor.y + 1};{self._screen.cursor.x + 1}R".encode())
            else:
                self._stream.feed(part)
        return True


def _heed_ctrl_c():
    # Ctrl-C reaches the program whose controlling terminal it is; what runs in the background of a script ignores it
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
