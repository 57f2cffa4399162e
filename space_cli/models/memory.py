"""The memory that a process may still allocate, container limits included."""

from __future__ import annotations

from pathlib import Path

import psutil

# of control groups of version 2 and 1: the limit, what is used, and the entry of memory.stat for what is given back
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(root: Path = Path("/")) -> int:
    """Return how many bytes are free for this process; `root` is where the file system lies."""
    free: int = psutil.virtual_memory().available
    for group in _groups(root):
        for limit, used, reclaimable in _FILES:
            try:
                left = int((group / limit).read_text()) - int((group / used).read_text())
                cached = _entry((group / "memory.stat").read_text(), reclaimable)
            except (OSError, ValueError):  # there is none, or it is "max"
                continue
            free = min(free, max(0, left + cached))
    return free


def _entry(stat: str, name: str) -> int:
    return next((int(line.split()[1]) for line in stat.splitlines() if line.startswith(f"{name} ")), 0)


def _groups(root: Path) -> list[Path]:
    """Return the folders of the process's control group and its ancestors."""
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = mount / controllers
            own = top / path.strip("/")
            groups += [own, *(parent for parent in own.parents if parent.is_relative_to(top))]
    return groups
