"""A pool of KV caches of several conversations, reused by requests that continue them, within a memory bound."""

from __future__ import annotations

from collections.abc import Sequence

from space_cli.core.cache import KVCache
from space_cli.core.stream import common_prefix_length

MAX_BYTES, MAX_CACHES = 2**30, 16
# tokens that are copied rather than computed again
_WORTH_COPYING = 32


class CachePool:
    """Idle caches, most recently used last.

    Args:
        most_bytes: of all at rest; those used longest ago are dropped.
        most: how many.
    """

    def __init__(self, *, most_bytes: int = MAX_BYTES, most: int = MAX_CACHES) -> None:
        self._most_bytes, self._most = most_bytes, most
        self._idle: list[KVCache] = []

    @property
    def nbytes(self) -> int:
        """Size of all idle caches."""
        return sum(cache.nbytes for cache in self._idle)

    def take(self, token_ids: Sequence[int]) -> KVCache:
        """Return the cache with the longest prefix of a prompt; the part only others could use stays in the pool."""
        if not self._idle:
            return KVCache()
        # among equal prefixes, the cache that loses least
        shared, _, best = max(
            ((common_prefix_length(cache.token_ids, token_ids), -len(cache.token_ids), cache) for cache in self._idle),
            key=lambda each: each[:2],
        )
        if 2 * shared >= len(best.token_ids):
            self._idle.remove(best)
            return best
        return best.fork(shared) if shared >= _WORTH_COPYING else KVCache()

    def give(self, cache: KVCache) -> None:
        """Return a cache to the pool after its generation."""
        self._idle.append(cache)
        while self._idle and (len(self._idle) > self._most or self.nbytes > self._most_bytes):
            del self._idle[0]
