"""A server in a process of its own, as its users have it."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


@dataclass
class Running:
    """A server.

    Attributes:
        url: in front of /v1.
        log: its standard error.
    """

    process: subprocess.Popen
    url: str
    log: object

    def logged(self):
        self.log.seek(0)
        return self.log.read()

    def key_and_base(self, key="none"):
        return {"api_key": key, "base_url": f"{self.url}/v1"}


@pytest.fixture(scope="session")
def start_server(clean_env, tmp_path_factory):
    """Start `space serve` on a free port; a context manager."""

    @contextmanager
    def start(*arguments, engine="eager", **env):
        log = (tmp_path_factory.mktemp("serve") / "log").open("w+")
        with subprocess.Popen(
            [sys.executable, "-m", "space_cli", "serve", "--port", "0", "--engine", engine, "--dtype", "float32"]
            + [str(each) for each in arguments],
            env=clean_env | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                url = None
                for line in process.stderr:
                    if found := re.search(r"listening on (http://\S+)/v1", line):
                        url = found[1]
                        break
                assert url, "the server did not start"
                os.set_blocking(process.stderr.fileno(), False)
                yield Running(process, url, process.stderr)
            finally:
                process.kill()
        log.close()

    return start


@pytest.fixture(scope="session")
def server(start_server):
    """One server of nano for all tests that leave it as it was."""
    with start_server() as running:
        yield running
