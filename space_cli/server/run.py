"""The server process: socket, application, and orderly shutdown."""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from space_cli.errors import Interrupted
from space_cli.server.app import Server
from space_cli.server.guard import Access

# seconds that running answers get after a request to stop
_GRACE_SECONDS = 30


def run(server: Server, access: Access, listening: socket.socket, *, tell: Callable[[str], None]) -> int:
    """Serve until SIGTERM or Ctrl-C; running answers are finished, waiting ones refused.

    Raises:
        Interrupted: it was Ctrl-C.
    """
    handler = _LogLines(tell)
    for name in ("space.serve", "uvicorn.error"):
        log = logging.getLogger(name)
        log.setLevel(logging.INFO if name == "space.serve" else logging.ERROR)
        log.handlers, log.propagate = [handler], False
    config = uvicorn.Config(
        server.app(access),
        http="h11",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    address, port = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    tell(f"listening on http://{shown}:{port}/v1")
    process = _Process(config, on_end=server.worker.drain)
    process.run(sockets=[listening])
    if process.ended_by == signal.SIGINT:
        raise Interrupted("interrupted")
    return 0


class _Process(uvicorn.Server):
    """A uvicorn server that reports the signal that ended it instead of raising it again.

    Attributes:
        ended_by: that signal, or None.
    """

    def __init__(self, config: uvicorn.Config, *, on_end: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_end = on_end
        self.ended_by: int | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin shutdown; a second signal ends at once."""
        if self.ended_by is None:
            self.ended_by, self.should_exit = sig, True
            self._on_end()
        else:
            self.force_exit = True


class _LogLines(logging.Handler):
    """Log lines with the time of day; tracebacks only under --debug."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """Write one."""
        line = f"{time.strftime('%H:%M:%S')} {record.getMessage()}"
        if record.exc_info and record.exc_info[1] is not None:
            line += f": {record.exc_info[1]}"
        self._tell(line)
