"""Keys and values of several conversations, kept for the requests that go on with them, within a bound of memory."""

from __future__ import annotations

from collections.abc import Sequence

from space_cli.core.cache import KVCache
from space_cli.core.stream import common_prefix_length

MAX_BYTES, MAX_CACHES = 2**30, 16
# tokens that are copied rather than computed again
_WORTH_COPYING = 32


class CachePool:
    """Caches at rest, the one used last at the end.

    Args:
        most_bytes: of all at rest; those used longest ago are dropped.
        most: how many.
    """

    def __init__(self, *, most_bytes: int = MAX_BYTES, most: int = MAX_CACHES) -> None:
        self._most_bytes, self._most = most_bytes, most
        self._idle: list[KVCache] = []

    @property
    def nbytes(self) -> int:
        """Of all caches at rest."""
        return sum(cache.nbytes for cache in self._idle)

    def take(self, token_ids: Sequence[int]) -> KVCache:
        """Return a cache that has as much of a prompt as any; what only others could use of it stays at rest."""
        if not self._idle:
            return KVCache()
        # of those that have the same of it, the one that loses least
        shared, _, best = max(
            ((common_prefix_length(cache.token_ids, token_ids), -len(cache.token_ids), cache) for cache in self._idle),
            key=lambda each: each[:2],
        )
        if 2 * shared >= len(best.token_ids):
            self._idle.remove(best)
            return best
        return best.fork(shared) if shared >= _WORTH_COPYING else KVCache()

    def give(self, cache: KVCache) -> None:
        """Take a cache back once its generation has ended."""
        self._idle.append(cache)
        while self._idle and (len(self._idle) > self._most or self.nbytes > self._most_bytes):
            del self._idle[0]
