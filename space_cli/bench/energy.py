"""Energy a machine has used, where its platform tells."""

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
    """Return a count of the joules that all processor packages have used; it starts anew at times. None if untold."""
    try:
        return sum(int(counter.read_text("ascii")) for counter in _counters()) / 1e6 if _counters() else None
    except (OSError, ValueError):
        return None
