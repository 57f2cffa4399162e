import subprocess
import sys

import pytest

SCRIPT = """
import os
import threading

import torch

from space_cli.core.threads import release_threads

torch.set_num_threads(4)


def count():
    return len(os.listdir("/proc/self/task"))


def work():
    torch.ones(4_000_000).exp_()
    there.append(count())
    release_threads()
    there.append(count())


alone, there = count(), []
work()
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(*[each - alone for each in there])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux lists them")
def test_idle_threads_end_in_each_thread_that_computed():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)

    # three helpers of the main thread, then the other thread and its own three
    assert done.stdout.split() == ["3", "0", "4", "1"]
