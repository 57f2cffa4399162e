"""A server in a process of its own, as its users have it."""

import re
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Running:
    """A server.

    Attributes:
        url: in front of /v1.
        log: what it wrote.
    """

    process: subprocess.Popen
    url: str
    log: Path

    def key_and_base(self, key="none"):
        return {"api_key": key, "base_url": f"{self.url}/v1"}


@pytest.fixture(scope="session")
def start_server(clean_env, tmp_path_factory):
    """Start `space serve` on a free port; a context manager."""

    @contextmanager
    def start(*arguments, model="nano", engine="eager", **env):
        file = tmp_path_factory.mktemp("serve") / "log"
        command = [sys.executable, "-m", "space_cli", "serve", "--port", "0", "--model", str(model)]
        command += ["--engine", engine, "--dtype", "float32"]
        with (
            file.open("w") as log,
            subprocess.Popen(
                [*command, *map(str, arguments)],
                env=clean_env | env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            ) as process,
        ):
            try:
                yield Running(process, _address(process, file), file)
            finally:
                process.kill()

    return start


def _address(process, log):
    """Wait until the server says where it listens."""
    while process.poll() is None:
        if found := re.search(r"listening on (http://\S+)/v1", log.read_text()):
            return found[1]
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="session")
def server(start_server):
    """One server of nano for all tests that leave it as it was."""
    with start_server() as running:
        yield running
