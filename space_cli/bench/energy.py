"""Energy used by the machine, where the platform reports it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")


@cache
def _counters() -> tuple[Path, ...]:
    """Return the counters of the processor packages (Linux powercap, RAPL); most systems let only root read them."""
    counters = []
    for zone in sorted(_POWERCAP.glob("intel-rapl:?")):
        counter = zone / "energy_uj"
        try:
            counter.read_text("ascii")
        except OSError:
            continue
        counters.append(counter)
    return tuple(counters)


def joules() -> float | None:
    """Return the joules used by all processor packages so far; the counter wraps around. None if not reported."""
    try:
        return sum(int(counter.read_text("ascii")) for counter in _counters()) / 1e6 if _counters() else None
    except (OSError, ValueError):
        return None
