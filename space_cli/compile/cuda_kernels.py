"""The Triton kernels of `cuda_attention`: attention within tiles of keys, computed alike in any call, then combined.

One kernel computes all tiles. Tiles that the committed text fills are computed for many rows at once; a tile that
reaches into the block is computed for one row (and its heads) at a time, since rows of a tree have different keys at
the same position. Both go through the same instructions with the same shapes, only addresses differ: a row's result
within a tile has the same bits either way, and so it does not matter how much of its text was committed when it ran.

Source: split attention as in Flash-Decoding, with splits of fixed size as Thinking Machines' "Defeating Nondeterminism
in LLM Inference" has them.
"""

from __future__ import annotations

# mypy: disable-error-code="untyped-decorator"
import torch
import triton
import triton.language as tl

from space_cli.compile.cuda_attention import BlockTensors

TILE = 64
"""Keys of a tile: few enough for a float32 model's tile to fit the shared memory of any GPU."""
# rows of a matrix instruction
_LANES = 16
_LOG2_E = 1.4426950408889634


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    states: torch.Tensor,
    block: BlockTensors,
    scaling: float,
) -> torch.Tensor:
    """Compute `cuda_attention.attend`; nothing is read off the device."""
    heads, rows, width = query.shape[1:]
    key_heads, capacity = states.shape[1:3]
    per_group, tiles = heads // key_heads, -(-capacity // TILE)
    query, key, value = (each if each.stride(3) == 1 else each.contiguous() for each in (query, key, value))
    padded = max(16, triton.next_power_of_2(width))
    _append[(rows, key_heads)](
        *(key, value, states, block.length, key.stride(1), key.stride(2), value.stride(1), value.stride(2)),
        *(states.stride(0), states.stride(1), width),
        padded=padded,
        num_warps=1,
    )
    sums = query.new_empty(tiles, heads, rows, width, dtype=torch.float32)
    tops, weights = query.new_empty(2, tiles, heads, rows, dtype=torch.float32)
    stacks, row_stacks = -(-rows * per_group // _LANES), -(-per_group // _LANES)
    # a block is no deeper than it has rows, so it reaches into so many tiles
    block_tiles = 1 + -(-rows // TILE)
    _attend_tiles[(stacks * tiles + rows * row_stacks * block_tiles, key_heads)](
        *(query, states, block.length, block.depths, block.ancestors, sums, tops, weights),
        *(scaling * _LOG2_E, query.stride(1), query.stride(2), states.stride(0), states.stride(1), tiles),
        rows=rows,
        per_group=per_group,
        width=width,
        padded=padded,
        stacks=stacks,
        row_stacks=row_stacks,
        block_tiles=block_tiles,
        tile_size=TILE,
        lanes=_LANES,
        num_warps=4,
        num_stages=1,
    )
    output = query.new_empty(1, rows, heads, width)
    _combine_tiles[(rows, heads)](
        *(sums, tops, weights, block.length, block.depths, output),
        rows=rows,
        width=width,
        padded=padded,
        tile_size=TILE,
        num_warps=1,
    )
    return output


@triton.jit
def _append(
    key: tl.tensor,
    value: tl.tensor,
    states: tl.tensor,
    length: tl.tensor,
    key_head: tl.tensor,
    key_row: tl.tensor,
    value_head: tl.tensor,
    value_row: tl.tensor,
    states_kind: tl.tensor,
    states_head: tl.tensor,
    width: tl.tensor,
    padded: tl.constexpr,
) -> None:
    """Write one row of one head behind what is committed."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(length).to(tl.int64) + row
    at = tl.arange(0, padded)
    inside = at < width
    place = states + head * states_head + slot * width + at
    tl.store(place, tl.load(key + head * key_head + row * key_row + at, mask=inside), mask=inside)
    tl.store(
        place + states_kind.to(tl.int64),
        tl.load(value + head * value_head + row * value_row + at, mask=inside),
        mask=inside,
    )


@triton.jit
def _lanes_of(
    program: tl.tensor,
    committed: tl.tensor,
    tiles: tl.tensor,
    per_group: tl.constexpr,
    stacks: tl.constexpr,
    row_stacks: tl.constexpr,
    block_tiles: tl.constexpr,
    tile_size: tl.constexpr,
    lanes: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Return what a program computes: whether for one row alone, which, and by lane the row, its head and the tile.

    The first programs take the tiles that are committed throughout, the others those that are not, row by row.
    """
    lane = tl.arange(0, lanes)
    is_alone = program >= stacks * tiles
    own = tl.maximum(program - stacks * tiles, 0)
    stacked = (program % stacks) * lanes + lane
    own_row = own // (block_tiles * row_stacks)
    row = tl.where(is_alone, own_row, stacked // per_group)
    member = tl.where(is_alone, (own % row_stacks) * lanes + lane, stacked % per_group)
    tile = tl.where(is_alone, committed // tile_size + (own // row_stacks) % block_tiles, program // stacks)
    first_row = tl.where(is_alone, own_row, (program % stacks) * lanes // per_group)
    return is_alone, own_row, first_row, row, member, tile


@triton.jit
def _visible_slots(
    ancestors: tl.tensor, row: tl.tensor, position: tl.tensor, committed: tl.tensor, rows: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the cache slots in which a row finds the keys of positions, and which of them it sees."""
    depth = position - committed
    in_block = depth >= 0
    ancestor = tl.load(ancestors + row * rows + depth, mask=in_block & (depth < rows), other=-1)
    return tl.where(in_block, committed + ancestor, position).to(tl.int64), (depth < 0) | (ancestor >= 0)


@triton.jit
def _attend_tiles(
    query: tl.tensor,
    states: tl.tensor,
    length: tl.tensor,
    depths: tl.tensor,
    ancestors: tl.tensor,
    sums: tl.tensor,
    tops: tl.tensor,
    weights: tl.tensor,
    scaling: tl.tensor,
    query_head: tl.tensor,
    query_row: tl.tensor,
    states_kind: tl.tensor,
    states_head: tl.tensor,
    tiles: tl.tensor,
    rows: tl.constexpr,
    per_group: tl.constexpr,
    width: tl.constexpr,
    padded: tl.constexpr,
    stacks: tl.constexpr,
    row_stacks: tl.constexpr,
    block_tiles: tl.constexpr,
    tile_size: tl.constexpr,
    lanes: tl.constexpr,
) -> None:
    """Attend within one tile of keys for 16 rows of one key head: weighted sum, highest score and sum of weights."""
    key_head, committed = tl.program_id(1).to(tl.int64), tl.load(length)
    is_alone, own_row, first_row, row, member, tile = _lanes_of(
        tl.program_id(0), committed, tiles, per_group, stacks, row_stacks, block_tiles, tile_size, lanes
    )
    own_depth = tl.load(depths + tl.minimum(first_row, rows - 1))
    last = tl.where(is_alone, committed + own_depth, committed - tile_size)
    if (tile * tile_size <= last) & (own_depth >= 0):
        position = tile * tile_size + tl.arange(0, tile_size)
        slot, visible = _visible_slots(ancestors, own_row, position, committed, rows)
        at = tl.arange(0, padded)
        head = key_head * per_group + member
        is_query = ((row < rows) & (member < per_group))[:, None] & (at < width)[None, :]
        is_key = visible[:, None] & (at < width)[None, :]
        place = query + head[:, None] * query_head + row[:, None] * query_row + at[None, :]
        queries = tl.load(place, mask=is_query, other=0.0)
        place = states + key_head * states_head + slot[:, None] * width + at[None, :]
        keys = tl.load(place, mask=is_key, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scaling
        scores = tl.where(visible[None, :], scores, float("-inf"))
        top = tl.max(scores, axis=1)
        probs = tl.math.exp2(scores - top[:, None])
        values = tl.load(place + states_kind.to(tl.int64), mask=is_key, other=0.0)
        total = tl.dot(probs.to(values.dtype), values, input_precision="ieee")
        line = (tile.to(tl.int64) * tl.num_programs(1) * per_group + head) * rows + row
        tl.store(sums + line[:, None] * width + at[None, :], total, mask=is_query)
        tl.store(tops + line, top, mask=(row < rows) & (member < per_group))
        tl.store(weights + line, tl.sum(probs, axis=1), mask=(row < rows) & (member < per_group))


@triton.jit
def _combine_tiles(
    sums: tl.tensor,
    tops: tl.tensor,
    weights: tl.tensor,
    length: tl.tensor,
    depths: tl.tensor,
    output: tl.tensor,
    rows: tl.constexpr,
    width: tl.constexpr,
    padded: tl.constexpr,
    tile_size: tl.constexpr,
) -> None:
    """Combine the tiles of one row of one head, in the order of the text."""
    row, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    at = tl.arange(0, padded)
    inside = at < width
    place = output + (row * heads + head) * width + at
    depth = tl.load(depths + row)
    if depth < 0:
        tl.store(place, tl.zeros([padded], dtype=output.dtype.element_ty), mask=inside)
        return
    last = (tl.load(length) + depth) // tile_size
    line = (head * rows + row).to(tl.int64)
    top = tl.load(tops + line)
    weight = tl.load(weights + line)
    total = tl.load(sums + line * width + at, mask=inside, other=0.0)
    for _ in range(last):
        line += heads * rows
        other = tl.load(tops + line)
        higher = tl.maximum(top, other)
        kept, added = tl.math.exp2(top - higher), tl.math.exp2(other - higher)
        weight = weight * kept + tl.load(weights + line) * added
        total = total * kept + tl.load(sums + line * width + at, mask=inside, other=0.0) * added
        top = higher
    tl.store(place, (total / weight).to(output.dtype.element_ty), mask=inside)
