"""Which conversation's keys and values a prompt goes on from."""

import pytest
import torch

from space_cli.api.caches import CachePool
from space_cli.core.cache import KVCache


def held(count, first=0):
    """Return a cache of a layer that holds tokens first, first + 1, ..."""
    cache = KVCache()
    cache.reserve(count)
    states = torch.arange(float(count)).reshape(1, 1, count, 1)
    cache.layer(0).update(states, states + 1)
    cache.token_ids = list(range(first, first + count))
    return cache


def test_a_conversation_is_gone_on_with():
    pool, mine, other = CachePool(), held(40), held(60, first=500)
    pool.give(mine)
    pool.give(other)

    assert pool.take(list(range(50))) is mine
    assert pool.take(list(range(50))) is not mine


def test_of_equal_beginnings_the_shortest_is_taken():
    pool, short = CachePool(), held(40)
    pool.give(held(45))
    pool.give(short)
    pool.give(held(44))

    assert pool.take(list(range(40))) is short


def test_a_long_common_beginning_is_copied_out_of_another_conversation():
    pool, other = CachePool(), held(200)
    pool.give(other)

    cache = pool.take([*range(64), 999])

    assert cache is not other
    assert cache.token_ids == list(range(64))
    assert cache.length == 64
    assert torch.equal(cache.layer(0).values, other.layer(0).values[:, :, :64])
    cache.layer(0).keys.zero_()
    assert other.layer(0).keys.sum() > 0


def test_a_short_common_beginning_is_computed_anew():
    pool = CachePool()
    pool.give(held(200))

    assert pool.take([*range(5), 999]).length == 0


@pytest.mark.parametrize("bound", [{"most_bytes": 2 * 40 * 4 * 3}, {"most": 3}])
def test_those_used_longest_ago_are_dropped(bound):
    pool = CachePool(**bound)
    caches = [held(40, first=1000 * number) for number in range(5)]

    for cache in caches:
        pool.give(cache)

    assert pool.nbytes == 3 * 2 * 40 * 4
    assert pool.take(caches[0].token_ids) is not caches[0]
    assert pool.take(caches[4].token_ids) is caches[4]


def test_a_cache_too_large_for_the_bound_is_not_kept():
    pool = CachePool(most_bytes=100)
    pool.give(held(40))

    assert pool.nbytes == 0
